"""A run that goes on in its folder: what it has recorded, whether it is complete, and what may change."""

import dataclasses
from dataclasses import replace
from pathlib import Path

from corinfomax.cli.pretrain import Pretrain
from corinfomax.recipes import fields
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Facts, Options

CHANGEABLE = frozenset(field.name.replace("_", "-") for field in dataclasses.fields(Options))


def recorded(run: Path) -> tuple[Recipe, Facts]:
    """Recipe and facts of a run; ValueError if its recipe.json was not written by one."""
    content = run_folder.read_json(run / "recipe.json")
    if not isinstance(content, dict) or not {"recipe", "facts"} <= content.keys():
        raise ValueError(f"{run / 'recipe.json'} has no recipe or no facts: a run did not write it")
    return fields.from_json(content["recipe"]), Facts.from_json(content["facts"])


def is_complete(run: Path, command: Pretrain, typed: frozenset[str]) -> bool:
    """True if every step of a run is done, and verdict, scores and page are written.

    ValueError if `command` has a setting that is not the run's own, which it would keep.
    """
    recipe, facts = recorded(run)
    _check_same(run, command, typed)
    saved = run_folder.checkpoints(run)
    if not saved or run_folder.step_of(saved[-1]) < recipe.steps(facts.images):
        return False
    if facts.options.report:  # the last of all that is written
        return (run / "report.html").exists()
    return bool(run_folder.read_results(run).table) or not facts.options.evaluate


def _check_same(run: Path, command: Pretrain, typed: frozenset[str]) -> None:
    recipe, facts = recorded(run)
    before = fields.flags(recipe) | {"recipe": facts.recipe_name, "init": facts.start and facts.start.name}
    before |= {"holdout": facts.holdout, "test-split": facts.test_split}
    asked = fields.flags(command.settings) | {"recipe": command.recipe, "init": command.init}
    asked |= {"holdout": command.images.holdout, "test-split": command.images.test_split}
    if command.init is not None and Path(command.init).exists():  # a path is recorded as an absolute one
        asked["init"] = str(Path(command.init).absolute())

    for flag in sorted(typed & asked.keys()):
        fitted = flag == "precision" or (flag == "batch" and before[flag] == facts.images)
        if asked[flag] != before[flag] and not fitted:
            problem = f"the run in {run} has {flag} {before[flag]!r}, not {asked[flag]!r}"
            raise ValueError(f"{problem}: leave it out to continue that run, or choose another folder")


def as_resumed(command: Pretrain, typed: frozenset[str]) -> tuple[Pretrain, frozenset[str]]:
    """The command that goes on with the run in its folder `out`, and those of its flags that may change."""
    resumed = replace(command, resume=command.out, out=None, recipe=None, init=None, prefix=None)
    return resumed, typed & CHANGEABLE
