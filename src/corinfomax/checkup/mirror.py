"""Whether mirrored images can be told from the others, as with letters and digits; views must then not mirror."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from corinfomax.evaluation import probes
from corinfomax.images.cache import Images
from corinfomax.recipes.fields import IMAGENET_STATS, RGB, Recipe, View
from corinfomax.runtime.seeds import generator
from corinfomax.views import operations

SAMPLE = 1500  # images
LEAST = 200  # images, for an accuracy within four points
SIDE, CELLS = 28, 7  # px of a crop, and its cells in each direction
FOLDS = 4
TOLD = 65.0  # %: digits have 76, photographs 50 to 54, and 50 is chance
CROP = View(crop_area=(0.6, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0)


def told_apart(images: Images, recipe: Recipe) -> float | None:
    """Accuracy in % with which a ridge probe on coarse pixels tells mirrored images from the others.

    Both are cropped at random, so that only what holds anywhere in the image counts. None for too few images.
    """
    if len(images) < LEAST:
        return None
    order = torch.randperm(len(images), generator=generator(0, "mirror"))[:SAMPLE]
    sample = images.select(order)
    plain, mirrored = (_coarse(sample, replace(CROP, flip=flip), recipe) for flip in (0.0, 1.0))

    # an image and its mirror image are in the same fold
    labels = torch.arange(2).repeat_interleave(len(sample))
    fold = (torch.arange(len(sample)) % FOLDS).repeat(2)
    return probes.accuracy(probes.out_of_fold(torch.cat((plain, mirrored)), labels, fold), labels)


def of_thumbnails(thumbnails: UInt8[Tensor, "n 3 s s"], recipe: Recipe) -> float | None:
    """The same for small RGB images."""
    n, _, side, _ = thumbnails.shape
    offsets, sizes = torch.arange(n) * 3 * side * side, torch.full((n, 2), side)
    images = Images(thumbnails.flatten(), offsets, sizes, ("",) * n, None, (), (), fingerprint="thumbnails")
    return told_apart(images, replace(recipe, pixels=RGB, mean=IMAGENET_STATS[0], std=IMAGENET_STATS[1]))


def _coarse(images: Images, view: View, recipe: Recipe) -> Float[Tensor, "n p"]:
    """Mean levels of the cells of a random crop of each image."""
    rows = []
    for number, indices in enumerate(torch.arange(len(images)).split(256)):
        pixels, sizes = images.batch(indices)
        rng = generator(0, f"mirror {view.flip:g}", number)
        parameters = operations.draw(view, sizes, rng, recipe.pixels)
        x = operations.apply(pixels.cpu(), sizes, parameters, size=SIDE, scaling=recipe.scaling)
        rows.append(F.avg_pool2d(x, SIDE // CELLS).flatten(1))
    return torch.cat(rows)
