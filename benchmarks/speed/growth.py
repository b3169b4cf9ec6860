"""What an image costs as the set, the projections or the batch grow, and how long a second run takes to start."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.objectives.methods import START
from benchmarks.speed.augmentation import pictures
from benchmarks.speed.clock import Effort, alternate
from benchmarks.speed.loss import ours_of, pull
from benchmarks.speed.metrics import Metric, metric
from benchmarks.speed.sparse import million, tree
from benchmarks.speed.steps import as_images, body, whole
from corinfomax import CorInfoMaxLoss
from corinfomax.images import cache as images
from corinfomax.images.sources import Data
from corinfomax.training import batches

SETS = (1_000, 10_000, 100_000, 1_000_000)
DIMENSIONS = (64, 128, 256, 512, 1024, 2048)
BATCHES = (128, 512, 2048, 4096)
FILES = 100_000
LIMIT = 2.0  # seconds


def run(effort: Effort) -> Iterator[Metric]:
    """Each against the smallest of its row: 1 is no growth."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _sets(effort, Path(folder))
        yield from _start(effort, Path(folder))
    yield from _dimensions(effort)
    yield from _batches(effort)


def _against_first(
    name: str, row: dict[int, Callable[[], object]], each: Callable[[int], int], effort: Effort, label: str
) -> Iterator[Metric]:
    seconds = alternate({str(size): call for size, call in row.items()}, effort)
    first, *others = row
    cost = {size: [1e6 * s / each(size) for s in seconds[str(size)]] for size in row}
    for size in others:
        against = f"{label} = {first:,}"
        yield metric("growth", f"{name}, {label} = {size:,}", against, cost[size], cost[first], unit="µs/image")


def _sets(effort: Effort, folder: Path) -> Iterator[Metric]:
    """Choosing and reading a batch of 256 images of 32 px from N of them."""
    recipe = whole(effort)

    def reading(count: int) -> Callable[[], object]:
        held, steps = million(folder, count, 32), iter(range(10**9))
        return lambda: held.batch(batches.indices(recipe, next(steps), count))

    row = {count: reading(count) for count in (SETS[:2] if effort.quick else SETS)}
    yield from _against_first("reading a batch", row, lambda _: recipe.batch, effort, "N")


def _start(effort: Effort, folder: Path) -> Iterator[Metric]:
    """From DATA to the first batch with the cache built, against looking at each file's entry once."""
    count = 200 if effort.quick else FILES
    root, cache = tree(folder, count), folder / "cache"

    def load() -> None:
        train_split, _ = images.load(Data(root, cache=cache), side=8, progress=False)
        train_split.batch(torch.arange(16))

    load()
    seconds = alternate({"ours": load, "walk": lambda: _walk(root)}, effort)
    name = f"start of a second run on {count:,} images"
    yield metric("growth", name, "one stat of each file", seconds["ours"], seconds["walk"], unit="s")
    limit = [LIMIT] * len(seconds["ours"])
    yield metric("growth", name, "the target of 2 s", seconds["ours"], limit, unit="s", at_least=1.0, aim=4.0)


def _walk(root: Path) -> int:
    total = 0
    for place, _, names in os.walk(root):
        for name in names:
            total += os.stat(f"{place}/{name}").st_size  # noqa: PTH116 (a Path for each would be the larger part)
    return total


def _dimensions(effort: Effort) -> Iterator[Metric]:
    """The loss, forward and backward, of 512 rows."""
    n = 32 if effort.quick else 512

    def pulling(d: int) -> Callable[[], object]:
        return pull(ours_of(CorInfoMaxLoss(d)), torch.randn(2, n, d))

    row = {d: pulling(d) for d in ((8, 16) if effort.quick else DIMENSIONS)}
    yield from _against_first(f"loss of {n} rows", row, lambda _: n, effort, "D")


def _batches(effort: Effort) -> Iterator[Metric]:
    """A whole step of the compact network."""
    small = replace(START, precision="auto", optim=replace(START.optim, lr=0.0, start_lr=0.0))
    recipe = whole(effort) if effort.quick else small
    row_sizes = (4, 8) if effort.quick else BATCHES
    held = as_images(pictures(max(row_sizes), recipe.cache_side))
    row = {batch: body(replace(recipe, batch=batch), held) for batch in row_sizes}
    yield from _against_first("step of the compact network", row, lambda batch: batch, effort, "batch")
