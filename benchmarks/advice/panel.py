"""Runs of one recipe under other views, on every set: what they score, and their networks, for the measures to judge.

    python -m benchmarks.advice.panel --root data --out runs/panel --seeds 0 1

About a minute a run on one thread; runs that are in --out already are kept.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.advice import sets
from benchmarks.verdict.cases import changed
from corinfomax.evaluation import features, probes
from corinfomax.images.cache import Splits
from corinfomax.recipes.fields import Recipe, View
from corinfomax.recipes.published import RECIPES
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Options
from corinfomax.training import loop

CPU = torch.device("cpu")
BASE = changed(RECIPES["cpu-small"].recipe, batch=128, epochs=16, test_scale=4 / 3, projector={"widths": (1024, 64)})
MILD = BASE.views[0]
PLAIN = {"jitter": 0.0, "grey": 0.0}
VIEWS: dict[str, View] = {
    "recipe": MILD,
    "crops from 0.08": replace(MILD, crop_area=(0.08, 1.0)),
    "crops from 0.5": replace(MILD, crop_area=(0.5, 1.0)),
    "crops from 0.75": replace(MILD, crop_area=(0.75, 1.0)),
    "turned": replace(MILD, rotate=180.0),
    "not mirrored": replace(MILD, flip=0.0),
    "no colour changes": replace(MILD, **PLAIN),
    "blurred": replace(MILD, blur=0.5),
    "turned, crops from 0.5": replace(MILD, rotate=180.0, crop_area=(0.5, 1.0)),
    "crops from 0.5, no colour changes": replace(MILD, crop_area=(0.5, 1.0), **PLAIN),
}


def recipe_of(view: View, seed: int, epochs: float = BASE.epochs) -> Recipe:
    """The recipe with this view, of that length."""
    return replace(BASE, views=(view, view), seed=seed, epochs=epochs)


def run(recipe: Recipe, splits: Splits, folder: Path) -> dict[str, float]:
    """Train into the folder and score: kNN, ridge and logistic regression on the test images, in percent."""
    if not (folder / "done.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        options = Options(checkpoint_minutes=600.0, keep=1, scores=0)
        network = loop.pretrain(recipe, splits, folder, device=CPU, options=options)
        run_folder.write_json(folder / "done.json", score(network.backbone, splits, recipe))
    scores: dict[str, float] = run_folder.read_json(folder / "done.json")
    return scores


def score(backbone: torch.nn.Module, splits: Splits, recipe: Recipe) -> dict[str, float]:
    """Probes of frozen features."""
    train, test = splits
    assert test is not None and train.labels is not None and test.labels is not None
    x, y = (features.extract_features(backbone, part, recipe) for part in (train, test))
    fits = {
        "kNN": probes.knn(x, train.labels, y),
        "ridge": probes.ridge(x, train.labels, y).predicted,
        "linear": probes.logistic(x, train.labels, y).predicted,
    }
    return {name: probes.accuracy(predicted, test.labels) for name, predicted in fits.items()}


def folder_of(out: Path, data: str, views: str, seed: int) -> Path:
    """The folder of a run."""
    return out / data.replace(" ", "-") / f"{views.replace(' ', '-').replace(',', '')}-{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--sets", nargs="+", default=list(sets.SETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as commands do
    loaded = {name: sets.load(name, options.root) for name in options.sets}
    # by turns, so that what is there is balanced if it is stopped early
    for seed, (views, view), data in itertools.product(options.seeds, VIEWS.items(), options.sets):
        scores = run(recipe_of(view, seed), loaded[data], folder_of(options.out, data, views, seed))
        print(seed, data, views, scores, flush=True)


if __name__ == "__main__":
    main()
