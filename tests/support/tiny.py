"""Small made-up images and recipes that train in a second."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from corinfomax.images import cache
from corinfomax.images.cache import Splits
from corinfomax.network import Network
from corinfomax.recipes.fields import Backbone, Loss, Optim, Projector, Recipe
from corinfomax.recipes.published import RECIPES
from corinfomax.runtime.records import Options
from corinfomax.training import loop
from corinfomax.weights.checkpoint import Checkpoint

RECIPE: Recipe = replace(
    RECIPES["cpu-small"].recipe,
    size=16,
    test_scale=1.0,
    cache_side=16,
    backbone=Backbone(small_stem=True, stem_stride=2, layers=(1, 1, 1, 1), channels=(8, 8, 8, 16)),
    projector=Projector(widths=(32, 8)),
    loss=Loss(),
    optim=Optim(lr=0.05, warmup_epochs=0.5, schedule="step"),
    epochs=2,
    batch=8,
    precision="float32",
)

NETWORK = [
    "--backbone.layers",
    "1",
    "1",
    "1",
    "1",
    "--backbone.channels",
    "8",
    "8",
    "8",
    "16",
    "--projector.widths",
    "32",
    "8",
]
KNOBS = ["--size", "16", "--cache-side", "16", "--batch", "8", "--epochs", "2", *NETWORK]
"""A run of the command that takes a second."""


def pictures(count: int, side: int = 16, seed: int = 0) -> np.ndarray:
    """Coloured shapes whose hue is their class of two, (count, side, side, 3), uint8."""
    rng = np.random.default_rng(seed)
    cache = rng.integers(0, 60, (count, side, side, 3), dtype=np.uint8)
    for i, image in enumerate(cache):
        y, x = rng.integers(0, side // 2, 2)
        image[y : y + side // 2, x : x + side // 2, i % 2] = 220
    return cache


def folder(root: Path, splits: dict[str, int], *, labelled: bool = True, side: int = 16) -> Path:
    """An image folder: <split>/<class>/<n>.png, or <n>.png alone for the split ""."""
    for seed, (split, count) in enumerate(splits.items()):
        for i, image in enumerate(pictures(count, side, seed)):
            place = root / split / (("red", "green")[i % 2] if labelled else "")
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{i:03}.png")
    return root


def splits(root: Path) -> Splits:
    """Forty such images to train on, five steps an epoch, and twelve to test on."""
    return cache.load(folder(root, {"train": 40, "test": 12}), side=16, progress=False)


def run(
    splits: Splits,
    folder: Path,
    recipe: Recipe = RECIPE,
    *,
    resume: Checkpoint | None = None,
    criterion: nn.Module | None = None,
    start: dict[str, torch.Tensor] | None = None,
    **options: float,
) -> Network:
    """Train into `folder` with a row of metrics per step; no scores and no looks by default."""
    folder.mkdir(exist_ok=True)
    chosen = Options(**{"log_steps": 1, "scores": 0, "diagnoses": 0, **options})  # type: ignore[arg-type]
    device = torch.device("cpu")
    return loop.pretrain(
        recipe, splits, folder, device=device, options=chosen, resume=resume, criterion=criterion, start=start
    )


def equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are bitwise the same."""
    return a.keys() == b.keys() and all(torch.as_tensor(a[name]).equal(torch.as_tensor(b[name])) for name in a)
