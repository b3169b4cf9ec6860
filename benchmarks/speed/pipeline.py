"""The pipeline's efficiency: the bare update on ready views over the whole step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.objectives.methods import START
from benchmarks.speed.augmentation import pictures
from benchmarks.speed.clock import Effort, alternate
from benchmarks.speed.metrics import Metric, metric
from benchmarks.speed.steps import CPU, as_images, body, whole
from benchmarks.speed.views import make_views
from corinfomax.recipes.fields import Recipe
from corinfomax.training.step import build, update


def run(effort: Effort) -> Iterator[Metric]:
    """1 is a network that never waits; at 32 px with ResNet-18, and with the compact network of two cores."""
    small = replace(START, precision="auto", optim=replace(START.optim, lr=0.0, start_lr=0.0, min_lr=0.0))
    large = whole(effort)
    large = replace(large, batch=min(large.batch, 64))  # both sides grow with the batch; a step is seconds already
    recipes: dict[str, Recipe] = {f"ResNet-18 with 3×3 stem, batch {large.batch}, {large.size} px": large}
    if not effort.quick:
        recipes[f"compact ResNet, SGD, batch {small.batch}, {small.size} px"] = small
    for name, recipe in recipes.items():
        images = as_images(pictures(8 * recipe.batch, recipe.cache_side))
        learner = build(recipe, CPU)
        pixels, sizes = images.batch(torch.arange(recipe.batch))
        pair = make_views(recipe, pixels, sizes, 0, CPU)
        contestants = {
            "ours": body(recipe, images),
            "bare": lambda recipe=recipe, learner=learner, pair=pair: update(recipe, learner, pair, 0, CPU),
        }
        seconds = alternate(contestants, effort, least=1.0)
        each = {which: [1e3 * s / recipe.batch for s in samples] for which, samples in seconds.items()}
        goal = {"at_least": 0.93, "aim": 0.97} if "ResNet-18" in name else {}
        yield metric(
            "pipeline",
            f"efficiency, {name}",
            "forward+backward+update on ready views",
            each["ours"],
            each["bare"],
            unit=f"{effort.clock}-ms/image",
            **goal,
        )
