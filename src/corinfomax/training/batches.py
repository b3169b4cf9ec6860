"""The batch of a step: its images, the random parameters of their views, and the views themselves.

All of it follows from the recipe and the step. Parameters are drawn for the global batch before processes share it, so
the number of processes changes nothing but rounding.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from corinfomax.images.cache import Images
from corinfomax.images.decode import cores, crop_cached, crop_reader
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime.devices import sent
from corinfomax.runtime.seeds import generator
from corinfomax.views import operations
from corinfomax.views.cpu import Levels
from corinfomax.views.operations import ViewParameters


class Pixels(NamedTuple):
    """Whole images, or the region of each image that one view's crop covers; padded to one height and width."""

    images: Levels
    sizes: Int[Tensor, "n 2"]  # height and width without padding, on the CPU
    boxes: Num[Tensor, "n 4"] | None = None  # the crop in these pixels, on the CPU; None for whole images


class Batch(NamedTuple):
    """One process's images of a step."""

    indices: Int[Tensor, " n"]
    sizes: Int[Tensor, "n 2"]  # height and width of each image
    parameters: tuple[ViewParameters, ...]  # of each view
    pixels: tuple[Pixels, ...] = ()  # whole images for all views, or regions for each view; empty until they are read

    def to(self, device: torch.device) -> "Batch":
        """The batch with its pixels on the device; on CUDA the host does not wait for the copy."""
        moved = (part._replace(images=sent(part.images, device)) for part in self.pixels)
        return self._replace(pixels=tuple(moved))


# Draw.


def draw_batch(recipe: Recipe, images: Images, step: int, share: slice = slice(None)) -> Batch:
    """The batch of a step without pixels; `share` is this process's slice of the global batch."""
    rows = indices(recipe, step, len(images))
    sizes = images.sizes[rows]
    return Batch(rows[share], sizes[share], tuple(p.take(share) for p in draw_views(recipe, sizes, step)))


def indices(recipe: Recipe, step: int, count: int) -> Int[Tensor, " b"]:
    """Images of a step's global batch: a slice of the epoch's permutation; its short last slice is dropped."""
    epoch, place = divmod(step, count // recipe.batch)
    return _order(recipe.seed, epoch, count)[place * recipe.batch : (place + 1) * recipe.batch]


@functools.lru_cache(maxsize=2)  # shuffling a million images takes 20 ms; reading ahead reaches into the next epoch
def _order(seed: int, epoch: int, count: int) -> Int[Tensor, " n"]:
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def draw_views(recipe: Recipe, sizes: Int[Tensor, "b 2"], step: int) -> list[ViewParameters]:
    """Random parameters of each view of a step's images, which have these heights and widths."""
    generators = [generator(recipe.seed, f"view {i}", step) for i in range(recipe.n_views)]
    return [operations.draw(recipe.views[i % 2], sizes, rng, recipe.pixels) for i, rng in enumerate(generators)]


# Read.


def read_batch(recipe: Recipe, images: Images, step: int, device: torch.device, share: slice = slice(None)) -> Batch:
    """The batch of one step with its pixels, read without reading ahead."""
    with contextlib.ExitStack() as stack:
        return reader(recipe, images, device, stack)(draw_batch(recipe, images, step, share))


def reader(
    recipe: Recipe, images: Images, device: torch.device, stack: contextlib.ExitStack
) -> Callable[[Batch], Batch]:
    """A function that reads the pixels of a batch; its processes live until the stack is closed.

    Images without a cache are read as regions from their files. Cached images of unequal sizes go to a GPU as regions
    when that is less than all of them padded to one size. All else is read whole: a CPU touches only what crops cover.
    DataError when a file is lost.
    """

    def read_whole(batch: Batch) -> Batch:
        return batch._replace(pixels=(Pixels(*images.batch(batch.indices)),))

    if images.files is None and (device.type != "cuda" or images.equal):
        return read_whole
    if images.files is not None:
        source, rows, _ = images.files
        workers = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # of the processes on this machine
        crop_files = stack.enter_context(crop_reader(source, workers, images.format))

    def read_regions(batch: Batch) -> Batch:
        boxes = torch.stack([p.box for p in batch.parameters], 1)
        whole, regions = batch.sizes.amax(0).prod(), boxes[:, :, 2:].amax(0).prod(1).sum()  # pixels, padded
        if images.files is not None:
            crops = crop_files(rows[batch.indices].tolist(), boxes.numpy(), recipe.size)
        elif any(view.rotate for view in recipe.views) or whole <= regions:
            return read_whole(batch)  # to be rotated before they are cropped, or no larger than the regions
        else:
            crops = crop_cached(images.cached(batch.indices), boxes.numpy())
        return batch._replace(pixels=tuple(Pixels(*map(torch.from_numpy, crop)) for crop in crops))

    return read_regions


# Apply.


def apply_views(recipe: Recipe, batch: Batch, device: torch.device) -> list[Float[Tensor, "n c s s"]]:
    """The views of a batch that has its pixels, on the device: one tensor per view."""
    batch = batch.to(device)
    whole = batch.pixels[0].boxes is None
    views = []
    for i, p in enumerate(batch.parameters):
        images, sizes, boxes = batch.pixels[0 if whole else i]
        p = p if boxes is None else p._replace(box=boxes)
        views.append(operations.apply(images, sizes, p, size=recipe.size, scaling=recipe.scaling))
    return views
