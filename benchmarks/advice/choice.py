"""What each way to choose views costs: always the recipe's, the rules of `pretrain`, `tune` with and without labels.

    python -m benchmarks.advice.choice run --root data --out runs/panel
    python -m benchmarks.advice.choice table

Searches are those of `tune`, with runs of the panel's length; each run is scored by labels and without them, so that
both searches share it. The views chosen, the recipe's and all those of the panel are compared by the linear probe on
test images, seed 0. Runs that are in --out already are kept: about 15 minutes a set on one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.advice import sets
from benchmarks.advice.panel import BASE, CPU, VIEWS, folder_of, run
from corinfomax.cli.fit import fit_symmetry
from corinfomax.images.cache import Splits
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Trial
from corinfomax.search import scores, search
from corinfomax.search.options import options_for, with_options
from corinfomax.weights import checkpoint

RECORDS = Path(__file__).with_suffix(".jsonl")
WAYS = ("recipe", "rules", "tune", "tune without labels")
Record = dict[str, Any]


class Runs:
    """The runs of one set, each trained once."""

    def __init__(self, data: str, splits: Splits, out: Path) -> None:
        self.data, self.splits, self.out = data, splits, out

    def folder(self, recipe: Recipe) -> Path:
        """The folder of a recipe's run: the panel's, where it has these views."""
        for name, view in VIEWS.items():
            if recipe.views == (view, view):
                return folder_of(self.out, self.data, name, recipe.seed)
        view = recipe.views[0]
        words = [f"{view.crop_area[0]:g}", f"{view.rotate:g}", f"{view.flip:g}", f"{view.jitter:g}", f"{view.blur:g}"]
        return folder_of(self.out, self.data, "-".join(words), recipe.seed)

    def linear(self, recipe: Recipe) -> float:
        """Linear probe on the test images, in percent."""
        return run(recipe, self.splits, self.folder(recipe))["linear"]

    def score(self, recipe: Recipe, *, labelled: bool) -> tuple[float, float]:
        """The score of `tune` and its standard error."""
        self.linear(recipe)
        path = self.folder(recipe) / f"{'labels' if labelled else 'no-labels'}.json"
        if not path.exists():
            network, _ = checkpoint.load_network(run_folder.checkpoints(self.folder(recipe))[-1])
            by = scores.by_labels if labelled else scores.without_labels
            run_folder.write_json(path, list(by(network.backbone, self.splits.train, recipe, device=CPU)))
        score, error = json.loads(path.read_text())
        return score, error

    def tune(self, base: Recipe, *, labelled: bool) -> tuple[search.Choice, Recipe]:
        """The search of `tune` from a recipe that the rules have fitted; its choice and the recipe with it."""
        options = options_for(base, labelled=labelled)

        def trial(number: int, names: search.Names, epochs: float) -> Trial:
            chosen = [option for option in options if option.name in names]
            recipe = replace(with_options(base, chosen), seed=number)
            score, error = self.score(recipe, labelled=labelled)
            print(self.data, number, names, f"{score:.2f} ± {error:.2f}", flush=True)
            return Trial(number, names, epochs, score, error, 1.0, 1.0)

        found = search.choose(search.search(options, trial, epochs=base.epochs, seconds=0.0))
        return found, with_options(base, [option for option in options if option.name in found.options])


def measure(options: argparse.Namespace) -> None:
    """Search, train and record the sets that are not yet recorded."""
    for data in options.sets:
        if any(record["set"] == data for record in read()):
            continue
        runs = Runs(data, sets.load(data, options.root), options.out)
        fitted = fit_symmetry(BASE, runs.splits.train, ("flip", "rotate"))
        chosen = {"recipe": BASE, "rules": fitted}
        leads = {}
        for labelled, way in ((True, WAYS[2]), (False, WAYS[3])):
            choice, chosen[way] = runs.tune(fitted, labelled=labelled)
            leads[way] = [*choice.options, f"{choice.lead:+.2f} ± {choice.error:.2f}"]
        record = {"set": data, "chosen": leads, "rules": [fitted.views[0].flip, fitted.views[0].rotate]}
        record["linear"] = {way: round(runs.linear(recipe), 2) for way, recipe in chosen.items()}
        record["panel"] = {name: round(runs.linear(replace(BASE, views=(v, v))), 2) for name, v in VIEWS.items()}
        with RECORDS.open("a") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read() -> list[Record]:
    """The records."""
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def regrets(record: Record) -> dict[str, float]:
    """Points that each way loses against the best views of the set."""
    best = max((*record["linear"].values(), *record["panel"].values()))
    return {way: best - record["linear"][way] for way in WAYS}


def table(records: Sequence[Record]) -> Iterable[str]:
    """A row of points lost for each set, and their means."""
    yield f"| set | best | {' | '.join(WAYS)} |"
    yield "|---|---:|" + "---:|" * len(WAYS)
    for record in records:
        best = max((*record["linear"].values(), *record["panel"].values()))
        lost = regrets(record)
        yield f"| {record['set']} | {best:.1f} | {' | '.join(f'{lost[way]:.1f}' for way in WAYS)} |"
    yield f"| mean | | {' | '.join(f'{fmean(regrets(record)[way] for record in records):.1f}' for way in WAYS)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measured, _ = commands.add_parser("run"), commands.add_parser("table")
    measured.add_argument("--root", type=Path, default=Path("data"))
    measured.add_argument("--out", type=Path, required=True, help="folder of the panel")
    measured.add_argument("--sets", nargs="+", default=list(sets.SETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as commands do
    if options.command == "run":
        measure(options)
    print("\n".join(table(read())))


if __name__ == "__main__":
    main()
