"""The exact gradient of a whole batch in the memory of a small one.

The loss is not a sum over images, so gradients of chunks of the batch do not add up to its gradient. But it sees images
through their projections only. So: all projections without a graph, the gradient of the loss to them, then each chunk
again with its graph, from which the chain rule continues. The price is one more forward pass.

BatchNorm takes its statistics over each chunk (and over that chunk of every process), the same in both passes: the
gradient is exact for a network whose BatchNorm sees the batch in chunks. Without BatchNorm it is exact for the whole
batch. Running statistics move once per chunk.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corinfomax.objective.covariance import Terms


def backward(
    project: Callable[[Float[Tensor, "m 3 s s"], int], Float[Tensor, "m d"]],
    network: nn.Module,
    criterion: Callable[..., Terms],
    views: Sequence[Float[Tensor, "n c s s"]],
    chunk_size: int,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Terms:
    """Accumulate the gradient of `scale(loss)` into the network, `chunk_size` images of a view at a time.

    `project(images, i)` runs the network on chunk i, counted over all views; the same i gives the same result, dropout
    included.
    """
    # First pass, without a graph: projections, and the gradient of the loss to them.
    chunks = [images for view in views for images in view.split(chunk_size)]
    with torch.no_grad():
        z = [project(images, i) for i, images in enumerate(chunks)]
    per_view = len(chunks) // len(views)
    leaves = [torch.cat(z[first : first + per_view]).requires_grad_() for first in range(0, len(chunks), per_view)]
    terms = criterion(*leaves)
    scale(terms.loss).backward()

    # Second pass: each chunk with its graph.
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    gradients = [gradient for leaf in leaves if leaf.grad is not None for gradient in leaf.grad.split(chunk_size)]
    for i, (images, gradient) in enumerate(zip(chunks, gradients, strict=True)):
        project(images, i).backward(gradient)

    # The second pass ran on the same images, so running statistics must not move again.
    for buffer, before in buffers:
        buffer.copy_(before)
    return terms
