"""Time of a training step with part of the backbone frozen, relative to all of it trained: a markdown table.

    python -m benchmarks.continuing.steps tf_efficientnet_lite0 resnet18 vit_tiny_patch16_224 --size 96

Steps of the recipe `adapt` alternate in one process, their processor time counts, and each figure is a median of ratios
with the least and the greatest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from benchmarks.speed.clock import Effort, alternate
from corinfomax import network
from corinfomax.recipes.fields import Backbone, Tuning
from corinfomax.recipes.published import RECIPES
from corinfomax.training.step import build, update

CPU = torch.device("cpu")
KINDS = {
    "half of the blocks": (Tuning(blocks=0.5, batch_norm="keep"), False),
    "the projector alone": (Tuning(batch_norm="keep"), True),
}


def step_of(name: str, tuning: Tuning, size: int, batch: int, *, projector_alone: bool = False) -> Callable[[], Tensor]:
    """A training step of a network on the same random views."""
    recipe = replace(RECIPES["adapt"].recipe, backbone=Backbone(name=name), size=size, batch=batch, tuning=tuning)
    recipe = replace(recipe, precision=network.choose_precision(recipe, CPU, training=True))
    learner = build(recipe, CPU)
    views = torch.randn(2, batch, 3, size, size, generator=torch.Generator().manual_seed(0)).unbind()
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    return lambda: update(recipe, learner, views, 0, CPU, projector_alone=projector_alone)


def ratios(name: str, size: int, batch: int, effort: Effort) -> dict[str, list[float]]:
    """Time of each kind of step relative to training everything, one number a round."""
    steps = {"all": step_of(name, Tuning(batch_norm="keep"), size, batch)}
    for kind, (tuning, alone) in KINDS.items():
        steps[kind] = step_of(name, tuning, size, batch, projector_alone=alone)
    seconds = alternate(steps, effort)
    return {kind: [a / b for a, b in zip(seconds[kind], seconds["all"], strict=True)] for kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    print(f"| network, {options.size} px | {' | '.join(KINDS)} |\n|---|{'---:|' * len(KINDS)}")
    for name in options.networks:
        found = ratios(name, options.size, options.batch, Effort(options.rounds, "cpu", quick=False))
        cells = [f"{median(each):.2f} ({min(each):.2f}–{max(each):.2f})" for each in found.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
