"""Weights on labelled images, beside baselines and other weights."""

from __future__ import annotations

from pathlib import Path

from corinfomax.cli import inputs
from corinfomax.cli.options import Evaluate
from corinfomax.evaluation import table
from corinfomax.evaluation.table import Result
from corinfomax.images.cache import Splits
from corinfomax.runtime import run_folder


def run(command: Evaluate) -> int:
    """Score weights on labelled images, beside baselines and other weights."""
    table.check_crops(command.test_crops)
    device = inputs.device_of(command.where.device)
    names = (command.weights, *command.against)
    loaded = [inputs.weights_of(name, command.network, device) for name in names]
    ours, others = loaded[0], loaded[1:]
    splits = inputs.load(command.data, command.where, ours.recipe)
    table.check_labels(splits)
    sides = {ours.recipe.cache_side: splits}
    for other in others:
        if (side := other.recipe.cache_side) not in sides:
            sides[side] = inputs.splits_of(command.data, command.where, other.recipe)
    called = table.distinct_names(command.against, command.test_crops)
    rivals = [
        table.Contender(name, other.backbone, other.recipe, sides[other.recipe.cache_side])
        for name, other in zip(called, others, strict=True)
    ]
    result = table.evaluate(
        ours.backbone,
        splits,
        ours.recipe,
        device=device,
        published_probe=command.published_probe,
        fine_tune=command.fine_tune,
        crops=command.test_crops,
        rivals=rivals,
    )
    tell(result, splits, command.out)
    return 0


def tell(result: Result, splits: Splits, path: Path | None) -> None:
    """Print the scores and what they say, and keep them in the JSON file at `path`."""
    assert splits.test is not None
    print(f"\n{table.as_text(result.table)}\n{table.LEGEND}\n")
    print(f"{len(splits.train):,} images with labels to fit each probe, {len(splits.test):,} others to score it")
    print("\n".join(result.sentences))
    if path is not None:
        run_folder.add_json(path, {**table.as_json(result), "train": len(splits.train), "test": len(splits.test)})
        print(f"written to {path}")
