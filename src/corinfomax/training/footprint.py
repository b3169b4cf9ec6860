"""Memory of a training step before it is run, and the micro-batch with which it fits."""

from typing import NamedTuple

import torch
from torch import Tensor

from corinfomax.network import Network, autocast, freeze, match_dtype, network_for
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import memory, processes
from corinfomax.runtime.memory import Tally
from corinfomax.training.prefetch import AHEAD

HEAP = 1.2  # memory of the process for each byte of tensors, for the gaps between them
COMPILED = 2**27  # bytes of a CPU's compiled views, and of the threads that read ahead
TRIALS = (2, 4)  # images: BatchNorm needs two


class Footprint(NamedTuple):
    """Bytes of tensors in a step, for the images of one process."""

    fixed: float  # weights, their gradients, the optimiser's state, and the copy that is known to be good
    waiting: float  # of an image in the batch, all views: its pixels, read ahead, its views and projections
    saved: float  # of an image in one view: what backward needs
    passing: float  # of an image in one view: temporary tensors of backward

    def needs(self, images: int, views: int, micro_batch: int | None = None) -> float:
        """Bytes of the process for a step on so many images, in parts of `micro_batch`."""
        if micro_batch is None or micro_batch >= images:
            activations = images * (views * self.saved + self.passing)
        else:
            activations = micro_batch * (self.saved + self.passing)
        return HEAP * (self.fixed + images * self.waiting + activations)


def measure_footprint(recipe: Recipe, device: torch.device) -> Footprint:
    """The footprint of a step, from a forward and a backward pass of one view of two images, and of four."""
    # Not the learner: its BatchNorm may wait for other processes.
    dtype = torch.float64 if recipe.precision == "float64" else None
    network = network_for(recipe).to(device, dtype)
    network = network.to(memory_format=torch.channels_last)
    freeze(network.backbone, recipe.tuning)
    saved, peaks = list[int](), list[int]()
    for images in TRIALS:
        with Tally() as tally:
            z = _project(network, recipe, device, images)
            saved.append(tally.live)
            z.sum().backward()
        peaks.append(tally.peak)
        network.zero_grad(set_to_none=True)
    saved_each, peak_each = ((b - a) / (TRIALS[1] - TRIALS[0]) for a, b in (saved, peaks))

    # Muon and SGD keep one number for each weight, AdamW two.
    state = sum(tensor.nbytes for tensor in network.state_dict().values())
    trained = sum(parameter.nbytes for parameter in network.parameters() if parameter.requires_grad)
    kept = state + trained * (2 if recipe.optim.name == "adamw" else 1)
    if recipe.tuning.pull:
        kept += sum(weight.nbytes for weight in network.backbone.parameters() if weight.requires_grad)
    view = 4 * (recipe.pixels.channels * recipe.size**2 + 4 * recipe.projector.widths[-1])
    pixels = recipe.pixels.bytes * recipe.cache_side**2 * (1 + AHEAD if device.type == "cpu" else 1)
    fixed = trained + 2 * kept + (COMPILED / HEAP if device.type == "cpu" else 0)
    return Footprint(fixed, pixels + recipe.n_views * view, saved_each, max(0.0, peak_each - saved_each))


def _project(network: Network, recipe: Recipe, device: torch.device, images: int) -> Tensor:
    x = torch.randn(images, recipe.pixels.channels, recipe.size, recipe.size, device=device).to(
        memory_format=torch.channels_last
    )
    with autocast(recipe, device):
        return network(match_dtype(x, network))


def warning(recipe: Recipe, device: torch.device) -> str | None:
    """One sentence when a step of the recipe does not fit into memory, with the micro-batch that does; else None."""
    footprint = measure_footprint(recipe, device)
    memory.give_back()
    share = processes.share(recipe.batch)
    n, available = share.stop - share.start, memory.room(device)
    need = footprint.needs(n, recipe.n_views, recipe.micro_batch)
    if need <= available:
        return None

    # the largest power of two that fits and leaves no single image
    sizes = [2**e for e in range(n.bit_length() - 1, 0, -1) if 2**e < n and n % 2**e != 1]
    fitting = [size for size in sizes if footprint.needs(n, recipe.n_views, size) <= available]
    step = f"a step of {n:,} images" + (f" in parts of {recipe.micro_batch}" if recipe.micro_batch else "")
    problem = f"{step} needs about {need / 1e9:.1f} GB, but {available / 1e9:.1f} GB are free"
    if not fitting:
        return f"{problem}, too little for any --micro-batch: try a smaller --batch, --size or network"
    least = footprint.needs(n, recipe.n_views, fitting[0])
    exact = "the gradient stays exact, but BatchNorm sees a part at a time"
    return f"{problem}: --micro-batch {fitting[0]} needs {least / 1e9:.1f} GB ({exact})"
