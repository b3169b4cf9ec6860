"""The views of a step, for tests and measurements that have whole images in memory."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from corinfomax.recipes.fields import Recipe
from corinfomax.training.batches import Batch, Pixels, apply_views, draw_views


def make_views(
    recipe: Recipe, pixels: UInt8[Tensor, "n 3 h w"], sizes: Int[Tensor, "n 2"], step: int, device: torch.device
) -> list[Float[Tensor, "n 3 s s"]]:
    """Views of whole images, with the random parameters of a step."""
    batch = Batch(torch.arange(len(sizes)), sizes, tuple(draw_views(recipe, sizes, step)), (Pixels(pixels, sizes),))
    return apply_views(recipe, batch, device)
