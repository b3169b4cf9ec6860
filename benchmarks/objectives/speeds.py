"""What a step of each method costs, measured once and quietly: equal minutes whatever runs beside them."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

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
from benchmarks.speed import machine
from benchmarks.speed.views import make_views
from corinfomax.images.cache import Splits
from corinfomax.network import Network, autocast, choose_precision
from corinfomax.recipes.fields import Projector, Recipe
from corinfomax.runtime.seeds import generator, key
from corinfomax.training import batches
from corinfomax.training import optimizer as optim
from corinfomax.training.step import build, update
from corinfomax.views import operations

CPU = torch.device("cpu")
SPEEDS = Path(__file__).with_name("frontier.json")
TRIAL_DATA = "cifar10"


class Stepper:
    """Steps of a method one at a time, with what the training loop does for each: images, views, update."""

    def __init__(self, name: str, setting: Setting, splits: Splits) -> None:
        recipe, self.step = setting.recipe, 0
        if name == SUPERVISED:
            self.advance = supervised(recipe, splits).__next__
        else:
            learner = build(recipe, CPU, criterion=METHODS[name].criterion(setting))

            def advance() -> object:
                indices = batches.indices(recipe, self.step, len(splits.train))
                pixels, sizes = splits.train.batch(indices)
                views = make_views(recipe, pixels, sizes, self.step, CPU)
                return update(recipe, learner, views, self.step, CPU)

            self.advance = advance

    def seconds(self, steps: int) -> float:
        """Processor seconds a step of so many more."""
        began = time.process_time()
        for _ in range(steps):
            self.advance()
            self.step += 1
        return (time.process_time() - began) / steps


def supervised(recipe: Recipe, splits: Splits) -> Iterator[Network]:
    """The recipe's network trained by cross-entropy on the labels, one view of an image a step; after each step."""
    labels = splits.train.labels
    assert labels is not None
    per_epoch = len(splits.train) // recipe.batch
    torch.manual_seed(key(recipe.seed, "weights"))
    network = Network(recipe.backbone, Projector(widths=(len(splits.train.classes),)), size=recipe.size)
    network = network.to(memory_format=torch.channels_last)
    lower = torch.bfloat16 if choose_precision(recipe, CPU) == "bfloat16" else None
    optimizer = optim.build(network, recipe.optim, lower)
    step = 0
    while True:
        indices = batches.indices(recipe, step, len(splits.train))
        pixels, sizes = splits.train.batch(indices)
        drawn = operations.draw(recipe.views[0], sizes, generator(recipe.seed, "view 0", step))
        x = operations.apply(pixels, sizes, drawn, size=recipe.size, scaling=recipe.scaling)
        lr = optim.learning_rate(recipe.optim, step, steps_per_epoch=per_epoch, epochs=recipe.epochs)
        optim.set_learning_rate(optimizer, lr)
        optimizer.zero_grad(set_to_none=True)
        with autocast(recipe, CPU):
            logits = network(x)
        F.cross_entropy(logits.float(), labels[indices]).backward()
        optimizer.step()
        step += 1
        yield network


def settings(name: str, data: str) -> Setting:
    """A method as it was chosen, for a set of images."""
    return DATA[data].fit(changed(METHODS[name].start, CHOSEN[name]))


class Kind(NamedTuple):
    """What the cost of a step depends on; the rest of the settings changes next to nothing about it."""

    method: str
    data: str
    size: int
    widths: tuple[int, ...]
    batch: int
    n_views: int
    optimizer: str


def kind_of(name: str, data: str, recipe: Recipe) -> Kind:
    """The kind of a run's steps."""
    return Kind(name, data, recipe.size, recipe.projector.widths, recipe.batch, recipe.n_views, recipe.optim.name)


def seconds_a_step(name: str, data: str, recipe: Recipe) -> float:
    """Processor seconds, as `measure` found them. SystemExit where it has not been asked."""
    known, kind = speeds(), _text(kind_of(name, data, recipe))
    if kind not in known:
        raise SystemExit(f"no speed is known of {kind}: python -m benchmarks.objectives.frontier measure")
    return float(known[kind]["seconds"])


def _text(kind: Kind) -> str:
    return json.dumps(kind)


def speeds() -> dict[str, Any]:
    """What `measure` has found so far, by kind of step."""
    return json.loads(SPEEDS.read_text())["steps"] if SPEEDS.exists() else {}


def measure(every: dict[str, Splits], names: Sequence[str], rounds: int = 5) -> None:
    """Processor seconds of a step of each kind of these methods that is not known yet, by turns."""
    wanted: dict[Kind, Setting] = {}

    def add_kind(name: str, data: str, setting: Setting) -> None:
        wanted.setdefault(kind_of(name, data, setting.recipe), setting)

    for name, method in ((name, METHODS[name]) for name in names):
        for data in every:
            add_kind(name, data, settings(name, data))
        if TRIAL_DATA not in every:
            continue
        chosen = changed(method.start, CHOSEN[name])
        late = (merged(CHOSEN[name], change) for options in method.late for change in options(chosen))
        for changes in (*searched(method), *late):
            add_kind(name, TRIAL_DATA, changed(method.start, changes))
    for change in ABLATIONS if TRIAL_DATA in every and "corinfomax" in names else ():
        add_kind("corinfomax", TRIAL_DATA, changed(METHODS["corinfomax"].start, ablated(change)))
    known = speeds()
    new = {kind: setting for kind, setting in wanted.items() if _text(kind) not in known}
    taken: dict[Kind, list[float]] = {kind: [] for kind in new}
    for turn in range(rounds):
        for kind, setting in new.items():
            stepper = Stepper(kind.method, setting, every[kind.data])
            stepper.seconds(2)
            taken[kind].append(stepper.seconds(3))
        print(f"round {turn + 1} of {rounds}: {len(new)} kinds of steps", flush=True)
    for kind, samples in taken.items():
        spread = max(samples) / min(samples) - 1
        seconds = {"seconds": round(statistics.median(samples), 5), "spread": round(spread, 3)}
        known[_text(kind)] = {**seconds, "processor": machine.machine("cpu")["processor"]}
    SPEEDS.write_text(json.dumps({"steps": known}, indent=1) + "\n")


def searched(method: Method) -> Iterator[Changes]:
    """Settings of all costs that the search may come by."""
    offered = [change for options in method.options for change in options(method.start)]

    def values(part: str, field: str, usual: Any) -> set[Any]:
        return {usual} | {change[part][field] for change in offered if field in change.get(part, {})}

    start = method.start.recipe
    every = (
        values("projector", "widths", start.projector.widths),
        values("", "batch", start.batch),
        values("", "n_views", start.n_views),
        values("optim", "name", start.optim.name),
    )
    for widths, batch, n_views, name in itertools.product(*map(sorted, every)):
        yield {"projector": {"widths": widths}, "": {"batch": batch, "n_views": n_views}, "optim": {"name": name}}
