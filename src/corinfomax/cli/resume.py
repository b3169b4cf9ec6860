"""A run that goes on in its folder: whether it is complete, and what may change."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from corinfomax.images.sources import Data
from corinfomax.recipes import fields
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Options
from corinfomax.weights import checkpoint

CHANGEABLE = frozenset(field.name.replace("_", "-") for field in dataclasses.fields(Options))


def is_complete(run: Path) -> bool:
    """True if every step of a run is done, and verdict, scores and page are written."""
    recipe, facts = checkpoint.recorded(run)
    saved = run_folder.checkpoints(run)
    if not saved or run_folder.step_of(saved[-1]) < recipe.steps(facts.images):
        return False
    if facts.options.report:  # the last of all that is written
        return (run / "report.html").exists()
    return bool(run_folder.read_results(run).table) or not facts.options.evaluate


def has_images(run: Path, data: Data) -> bool:
    """True if these images have the place that the run recorded."""
    _, facts = checkpoint.recorded(run)
    root = None if data.absolute_root is None else str(data.absolute_root)
    return (data.absolute_name, root) == (facts.data, facts.root)


def check_same(run: Path, asked: Mapping[str, object]) -> None:
    """ValueError if one of these settings, by their flags, is not the run's own, which it would keep."""
    recipe, facts = checkpoint.recorded(run)
    before = fields.flags(recipe) | {"recipe": facts.recipe_name, "init": facts.start and facts.start.name}
    before |= {"holdout": facts.holdout, "test-split": facts.test_split}
    before |= {"stack": facts.stack, "channels": facts.channels}
    for flag, value in sorted(asked.items()):
        fitted = flag == "precision" or (flag == "batch" and before[flag] == facts.images)
        if flag in before and value != before[flag] and not fitted:
            problem = f"the run in {run} has {flag} {before[flag]!r}, not {value!r}"
            raise ValueError(f"{problem}: leave it out to continue that run, or choose another folder")
