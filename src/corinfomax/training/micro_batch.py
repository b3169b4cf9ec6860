"""The exact gradient of the whole batch in the memory of a small one.

The loss is no sum over images, so gradients of parts of the batch do not add up to its gradient. But it sees the images
through their projections alone: so first all projections without a graph, then the loss's gradient to them, then each
part again with its graph, from which the chain rule goes on. One more forward is the price.

BatchNorm takes its statistics over each part (and over that part of every process), in both passes the same: the
gradient is exactly that of a batch whose BatchNorm sees it in parts, which is another network than one that sees it
whole. Without BatchNorm it is that of the whole batch. Running statistics move once for each part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corinfomax.objective.covariance import Terms


def backward(
    project: Callable[[Float[Tensor, "m 3 s s"], int], Float[Tensor, "m d"]],
    network: nn.Module,
    criterion: Callable[..., Terms],
    crops: Sequence[Float[Tensor, "n 3 s s"]],
    part: int,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Terms:
    """Accumulate the gradient of the loss of all views into the network, `part` images of a view at a time.

    `project(images, i)` runs the network on the i-th part, counted over the views: the same for the same i, dropout
    included. The gradient is that of `scale(loss)`.
    """
    parts = [images for view in crops for images in view.split(part)]
    leaves = [z.requires_grad_() for z in projections(project, crops, part)]
    terms = criterion(*leaves)
    scale(terms.loss).backward()
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    gradients = [gradient for leaf in leaves if leaf.grad is not None for gradient in leaf.grad.split(part)]
    for i, (images, gradient) in enumerate(zip(parts, gradients, strict=True)):
        project(images, i).backward(gradient)
    for buffer, before in buffers:
        buffer.copy_(before)  # the second pass saw the same images again
    return terms


@torch.no_grad()
def projections(
    project: Callable[[Float[Tensor, "m 3 s s"], int], Float[Tensor, "m d"]],
    crops: Sequence[Float[Tensor, "n 3 s s"]],
    part: int,
) -> list[Float[Tensor, "n d"]]:
    """Of all views, `part` images at a time and without a graph; `project` as in `backward`."""
    each = math.ceil(len(crops[0]) / part)
    return [
        torch.cat([project(images, v * each + i) for i, images in enumerate(view.split(part))])
        for v, view in enumerate(crops)
    ]
