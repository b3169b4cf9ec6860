"""What one step learns from: which images, at which size, which views. All of it follows from recipe and step."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from corinfomax.images.cache import Images
from corinfomax.recipes.fields import Recipe, View
from corinfomax.runtime.seeds import generator
from corinfomax.training.prefetch import Batch, reader
from corinfomax.views import operations


def indices(recipe: Recipe, step: int, count: int) -> Int[Tensor, " b"]:
    """Which images make the global batch of a step: a slice of the epoch's permutation, the short last one dropped."""
    epoch, place = divmod(step, count // recipe.batch)
    return _order(recipe.seed, epoch, count)[place * recipe.batch : (place + 1) * recipe.batch]


@functools.lru_cache(maxsize=2)  # a million images take 20 ms to shuffle; batches are read ahead into the next epoch
def _order(seed: int, epoch: int, count: int) -> Int[Tensor, " n"]:
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def of_step(recipe: Recipe, step: int, steps: int) -> Recipe:
    """The recipe with the size of the views in that one of a run's steps."""
    for size, end in _early(recipe, steps):
        if step < end:
            return replace(recipe, size=size)
    return recipe


def _early(recipe: Recipe, steps: int) -> list[tuple[int, int]]:
    """Side of the views of each early part, and the step at which it ends."""
    ends = itertools.accumulate(recipe.early_shares)
    return [(size, min(steps, round(end * steps))) for size, end in zip(recipe.early_sizes, ends, strict=True)]


def work(recipe: Recipe, step: int, steps: int) -> int:
    """Of a view, summed over the first `step` of a run's steps: roughly what these cost."""
    done, total = 0, 0
    for size, end in (*_early(recipe, steps), (recipe.size, steps)):
        part = max(0, min(step, end) - done)
        done, total = done + part, total + part * size**2
    return total


def make_views(
    recipe: Recipe,
    pixels: UInt8[Tensor, "n 3 h w"],
    sizes: Int[Tensor, "b 2"],
    step: int,
    device: torch.device,
    here: slice = slice(None),
) -> list[Float[Tensor, "n 3 s s"]]:
    """The views of the images `here` of one step's batch, drawn for all of it from generators keyed on the step."""
    pixels = pixels.to(device)
    drawn = draw_views(recipe, sizes, step)
    return [
        operations.apply(pixels, sizes[here], p.take(here), size=recipe.size, mean=recipe.mean, std=recipe.std)
        for p in drawn
    ]


def cut_views(
    recipe: Recipe,
    cuts: Sequence[Batch],
    sizes: Int[Tensor, "b 2"],
    step: int,
    device: torch.device,
    here: slice = slice(None),
) -> list[Float[Tensor, "n 3 s s"]]:
    """The same of crops that were cut out already; `sizes` are those of the whole images."""
    made = []
    for cut, drawn in zip(cuts, draw_views(recipe, sizes, step), strict=True):
        assert cut.boxes is not None
        p, pixels = drawn.take(here)._replace(box=cut.boxes), cut.pixels.to(device)
        made.append(operations.apply(pixels, cut.sizes, p, size=recipe.size, mean=recipe.mean, std=recipe.std))
    return made


def views_of(
    recipe: Recipe,
    given: Sequence[Batch],
    sizes: Int[Tensor, "b 2"],
    step: int,
    device: torch.device,
    here: slice = slice(None),
) -> list[Float[Tensor, "n 3 s s"]]:
    """The views of what was read of the images `here`, whole or cut; `sizes` are those of all the batch's images."""
    if given[0].boxes is None:
        return make_views(recipe, given[0].pixels, sizes, step, device, here)
    return cut_views(recipe, given, sizes, step, device, here)


def boxes(recipe: Recipe, images: Images, step: int, here: slice) -> tuple[Int[Tensor, "n v 4"], int] | None:
    """The boxes that one step's crops of the images `here` of its batch are cut out by, and the side of the views.

    None where images that there are copies of go whole: those that are turned first, and those that padded to the
    largest height and width of the batch take no more room than their crops do.
    """
    copied = images.files is None
    if copied and any(view.rotate for view in recipe.views):
        return None
    sizes = images.sizes[indices(recipe, step, len(images))]
    drawn = torch.stack([drawn.box for drawn in draw_views(recipe, sizes, step)], 1)
    if copied and sizes.amax(0).prod() <= drawn[:, :, 2:].amax(0).prod(1).sum():
        return None
    return drawn[here], recipe.size


def step_views(
    recipe: Recipe, images: Images, step: int, device: torch.device, here: slice = slice(None)
) -> list[Float[Tensor, "n 3 s s"]]:
    """The views of the images `here` of one step's batch, read for this once."""
    sizes = images.sizes[indices(recipe, step, len(images))]
    return views_of(recipe, read(recipe, images, step, device, here), sizes, step, device, here)


def read(recipe: Recipe, images: Images, step: int, device: torch.device, here: slice = slice(None)) -> list[Batch]:
    """What one step's crops are made of, read for this once."""
    with contextlib.ExitStack() as stack:

        def chosen(step: int) -> Int[Tensor, " n"]:
            return indices(recipe, step, len(images))[here]

        return reader(images, chosen, lambda step: boxes(recipe, images, step, here), device, stack)(step)


def draw_views(recipe: Recipe, sizes: Int[Tensor, "b 2"], step: int) -> list[operations.Parameters]:
    """What is done to each image of a step's batch, for each of its crops."""
    return [
        operations.draw(of_crop(recipe, crop), sizes, generator(recipe.seed, f"view {crop}", step))
        for crop in range(recipe.crops)
    ]


def of_crop(recipe: Recipe, crop: int) -> View:
    """How the crop of that number is made."""
    return recipe.views[crop % len(recipe.views)]
