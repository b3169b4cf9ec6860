"""Accuracy against compute: CorInfoMax, other objectives and labels, on one network in equal processor time.

    python -m benchmarks.objectives.frontier measure --root data
    python -m benchmarks.objectives.frontier tune --root data
    python -m benchmarks.objectives.frontier ablate --root data --seeds 1
    python -m benchmarks.objectives.frontier train --root data --minutes 10 --seeds 0 1 2
    python -m benchmarks.objectives.frontier train --root data --minutes 20 --seeds 0 --data cifar10-resnet18
    python -m benchmarks.objectives.frontier write

`measure`, on a quiet machine, takes the processor seconds of every kind of step that is tried or run and not known yet,
so that the number of steps that fit into a trial or run is a matter of one quiet measurement and not of what ran beside
it. `tune` chooses each method's settings on a slice of CIFAR-10's training images, by the same search for all but the
kernel, which begins with what that search found for the covariance; what it found stands in `methods.CHOSEN`.
`ablate` then changes one thing each of what was found for CorInfoMax before Muon, with seeds that the search has not
seen. `train` trains and scores. What is in the file of results already is left out, so several can work side by side
with other `--seeds` or `--methods`; `--data cifar10-resnet18` is the second network. `write` draws the tables and the
plot of docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.objectives import compared
from benchmarks.objectives.methods import (
    ABLATIONS,
    CHOSEN,
    DATA,
    METHODS,
    SUPERVISED,
    Changes,
    Method,
    Setting,
    ablated,
    changed,
    merged,
)
from benchmarks.objectives.speeds import CPU, TRIAL_DATA, measure, seconds_a_step, settings, supervised
from benchmarks.speed import machine
from corinfomax.evaluation import features, probes
from corinfomax.images import cache as images
from corinfomax.images.cache import Splits
from corinfomax.images.sources import Data
from corinfomax.network import Network
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime.records import Options
from corinfomax.runtime.seeds import generator
from corinfomax.training import loop

ROWS = Path(__file__).with_name("frontier.jsonl")
DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- python -m benchmarks.objectives.frontier write -->", "<!-- end -->"
TRIAL_MINUTES = 2.0
MARGIN = 0.5  # points by which the search's later parts want to be better: about the sd of a trial
HELD_OUT = 5000
SEEDS = 3  # of every method in a table


def load(data: str, root: Path, cache: Path | None) -> Splits:
    """The images of a set, decoded at the side its runs want."""
    loaded = images.load(Data(root / DATA[data].folder, cache=cache), side=DATA[data].cache_side)
    assert loaded.test is not None
    return loaded


def held_out(splits: Splits) -> Splits:
    """Training images alone, the last of them in a random order to score on: test images are for the end."""
    order = torch.randperm(len(splits.train), generator=generator(0, "slice"))
    return Splits(splits.train.select(order[:-HELD_OUT]), splits.train.select(order[-HELD_OUT:]))


def fit(name: str, setting: Setting, splits: Splits) -> tuple[Network, float]:
    """The network after all of the recipe's steps, and the processor seconds it took."""
    recipe, criterion = setting.recipe, METHODS[name].criterion(setting)
    began = time.process_time()
    if name == SUPERVISED:
        steps = supervised(recipe, splits)
        for _ in range(recipe.steps(len(splits.train))):
            network = next(steps)
        return network.eval(), time.process_time() - began
    options = Options(log_steps=50, checkpoint_minutes=math.inf, scores=0, diagnoses=0)
    with tempfile.TemporaryDirectory() as folder:
        train = Splits(splits.train, None)
        network = loop.pretrain(recipe, train, Path(folder), device=CPU, options=options, criterion=criterion)
    return network.eval(), time.process_time() - began


def score(network: Network, splits: Splits, recipe: Recipe, *, most: int | None = None) -> dict[str, float]:
    """Top-1 in percent on the second split of probes on the first, at most so many of it."""
    assert splits.test is not None
    first = splits.train if most is None else splits.train.select(torch.arange(most))
    x, y = (features.extract_features(network.backbone, split, recipe) for split in (first, splits.test))
    labels, truth = first.labels, splits.test.labels
    assert labels is not None and truth is not None
    few = probes.few_label(x, labels, y, per_class=10, seed=0)
    found = {
        "kNN": probes.knn(x, labels, y),
        "linear": probes.logistic(x, labels, y, seed=0).predicted,
    }
    return {
        **{name: probes.accuracy(predicted, truth) for name, predicted in found.items()},
        "10 a class": statistics.fmean(probes.accuracy(predicted, truth) for predicted in few),
    }


def sized(setting: Setting, steps: int, count: int) -> Setting:
    """The setting for so many steps on so many images."""
    recipe = setting.recipe
    per_epoch = count // recipe.batch
    epochs = steps / per_epoch
    warmup = min(recipe.optim.warmup_epochs, epochs / 10)
    sized = changed(setting, {"": {"epochs": epochs}, "optim": {"warmup_epochs": warmup}})
    assert sized.recipe.steps(count) == steps
    return sized


def flops(recipe: Recipe, name: str, classes: int) -> float:
    """Of one view, forward and backward: three times the forward's."""
    widths = (classes,) if name == SUPERVISED else recipe.projector.widths
    network = Network(recipe.backbone, replace(recipe.projector, widths=widths), size=recipe.size).eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, recipe.size, recipe.size))
    return 3 * float(counter.get_total_flops())


def rows() -> list[dict[str, Any]]:
    """Everything measured so far."""
    return [compared.from_json(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def add(row: dict[str, Any]) -> None:
    """One more line, in one write, for others append to the same file."""
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def trial(method: Method, changes: Changes, splits: Splits, seed: int, kind: str = "trial") -> float:
    """The linear probe of one setting of a method on the slice; read where it was tried before, in as many steps."""
    setting = changed(method.start, merged(changes, {"": {"seed": seed}}))
    steps = round(60 * TRIAL_MINUTES / seconds_a_step(method.name, TRIAL_DATA, setting.recipe))
    mark = {"kind": kind, "method": method.name, "changes": changes, "seed": seed}
    for row in rows():
        if all(row.get(name) == value for name, value in mark.items()) and same(row["steps"], steps):
            return float(row["linear"])
    setting = sized(setting, steps, len(splits.train))
    found: dict[str, Any]
    taken: float | None
    try:
        network, taken = fit(method.name, setting, splits)
        found = score(network, splits, setting.recipe, most=15_000)
    except FloatingPointError as error:
        found, taken = {"linear": 0.0, "error": str(error).partition(" (")[0]}, None
    add({**mark, "steps": steps, "cpu_seconds": taken and round(taken, 1), **_rounded(found)})
    return float(found["linear"])


def same(steps: int, wanted: int) -> bool:
    """Whether a trial of so many steps counts as one of as many as wanted: a tenth is worth 0.4 points."""
    return abs(steps / wanted - 1) <= 0.1


def tune(method: Method, splits: Splits, seed: int = 0) -> Changes:
    """The best setting found by changing one thing after the other and keeping what helped."""
    best: Changes = {}
    most = trial(method, best, splits, seed)

    def improves(options: Callable[[Setting], list[Changes]], by: float = 0.0) -> bool:
        nonlocal best, most
        every = [merged(best, change) for change in options(changed(method.start, best))]
        values = [trial(method, changes, splits, seed) for changes in every]
        if max(values, default=0.0) <= most + by:
            return False
        most = max(values)
        best = every[values.index(most)]
        return True

    for options in method.options:
        improves(options)
    for options in method.late:
        improves(options, by=MARGIN)
    helped = [True]
    while any(helped):  # not for as long as chance does
        helped = [improves(options, by=MARGIN) for options in method.again]
    print(f"{method.name}: {best} {most:.1f}", flush=True)
    return best


def run(name: str, data: str, splits: Splits, minutes: float, seed: int) -> None:
    """One row of the table, unless it is there."""
    mark = {"kind": "run", "method": name, "changes": CHOSEN[name]}
    mark |= {"data": data, "minutes": minutes, "seed": seed}
    setting = changed(settings(name, data), {"": {"seed": seed}})
    if any(all(row.get(key) == value for key, value in mark.items()) for row in rows()):
        return
    steps = round(60 * minutes / seconds_a_step(name, data, setting.recipe))
    setting = sized(setting, steps, len(splits.train))
    network, seconds = fit(name, setting, splits)
    recipe = setting.recipe
    views = steps * recipe.batch * (1 if name == SUPERVISED else recipe.n_views)
    each = flops(recipe, name, len(splits.train.classes))
    work = {"steps": steps, "views": views, "tflops": round(views * each / 1e12, 1)}
    add(
        {
            **mark,
            **work,
            "cpu_seconds": round(seconds, 1),
            **_rounded(score(network, splits, recipe)),
            "commit": machine.commit(),
        }
    )


def _rounded(found: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in found.items()}


def write(page: Path, picture: Path) -> None:
    """The tables and the plot into the page, between its marks."""
    found = rows()
    parts = []
    for data in dict.fromkeys(row["data"] for row in compared.runs_of(found)):
        budgets = {row["minutes"] for row in compared.runs_of(found, data=data)}
        minutes = max(budgets, key=lambda m: (_repeated(found, data, m), m))
        title = f"### {compared.TITLES[data]}, {minutes:g} processor minutes"
        parts += [title, "", *compared.table(found, data, minutes, seeds=SEEDS), ""]
    if parts:
        compared.plot(found, picture)
        parts += [f"![Accuracy over compute]({picture.name})"]
    text = page.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text("\n".join([f"{before}{BEGIN}", "", *parts, "", f"{END}{after}"]), "utf-8")


def _repeated(found: list[dict[str, Any]], data: str, minutes: float) -> int:
    """How many methods have as many seeds there as a table wants."""
    seeds = Counter(row["method"] for row in compared.runs_of(found, data=data, minutes=minutes))
    return sum(count >= SEEDS for count in seeds.values())


def main() -> None:
    one_network = [name for name, data in DATA.items() if not data.also]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "ablate", "measure", "train", "write"))
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--cache", type=Path, default=None, help="folder of decoded images")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--data", nargs="*", default=one_network, choices=list(DATA))
    parser.add_argument("--minutes", type=float, nargs="*", default=[10.0], help="processor minutes of training")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(SEEDS)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as commands do
    doing: dict[str, Callable[[], None]] = {
        "tune": lambda: _tune(options),
        "ablate": lambda: _ablate(options),
        "measure": lambda: measure(_every(options), options.methods),
        "train": lambda: _train(options),
        "write": lambda: write(DOCS / "results.md", DOCS / "frontier.svg"),
    }
    doing[options.what]()


def _tune(options: argparse.Namespace) -> None:
    splits = held_out(load(TRIAL_DATA, options.root, options.cache))
    for name in options.methods:
        tune(METHODS[name], splits)


def _ablate(options: argparse.Namespace) -> None:
    splits = held_out(load(TRIAL_DATA, options.root, options.cache))
    for seed in options.seeds:
        for change in ({}, *ABLATIONS):
            trial(METHODS["corinfomax"], ablated(change), splits, seed, kind="ablation")


def _every(options: argparse.Namespace) -> dict[str, Splits]:
    return {data: load(data, options.root, options.cache) for data in options.data}


def _train(options: argparse.Namespace) -> None:
    every = _every(options)
    for minutes in options.minutes:
        for seed in options.seeds:
            for data, splits in every.items():
                for name in options.methods:
                    run(name, data, splits, minutes, seed)


if __name__ == "__main__":
    main()
