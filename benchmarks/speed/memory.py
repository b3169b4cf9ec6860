"""Peak memory of a process of its own, above what it has when everything is imported.

`python -m benchmarks.speed.memory` prints the megabytes of each contestant as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.speed.augmentation import kornia_pair, ours, pictures, pil_pair
from benchmarks.speed.clock import Effort
from benchmarks.speed.machine import installed
from benchmarks.speed.metrics import Metric, metric
from benchmarks.speed.sparse import million
from benchmarks.speed.steps import as_images, body, plain, whole
from corinfomax.training import batches

MILLION = 10**6
FEW = 10**4  # in their stead when it must be quick
CONTESTANTS = ("step", "micro", "plain", "views", "kornia", "pil", "million")


def run(effort: Effort) -> Iterator[Metric]:
    """A training step, whole and in parts, the views of a batch of large images, and batches of a million images."""
    batch, rounds = whole(effort).batch, 1 if effort.quick else min(effort.rounds, 3)
    found = [peaks(quick=effort.quick) for _ in range(rounds)]
    costs = {name: [peak[name] for peak in found] for name in found[0]}
    step = f"peak memory of a training step, ResNet-18, batch {batch}"
    views = "peak memory of the pair of views, 64 images of 256 px to 224 px"
    yield metric("memory", step, "the plain baseline, its workers left out", costs["step"], costs["plain"], unit="MB")
    micro = f"peak memory of that step in parts of {part_of(batch)} (--micro-batch), the same gradient"
    yield metric("memory", micro, "the whole batch at once", costs["micro"], costs["step"], unit="MB")
    if "kornia" in costs:
        yield metric("memory", views, "kornia", costs["views"], costs["kornia"], unit="MB")
    yield metric("memory", views, "torchvision on PIL images", costs["views"], costs["pil"], unit="MB")
    count = FEW if effort.quick else MILLION
    total = [count * 3 * 64 * 64 / 1e6] * rounds
    name = f"memory beside the map, {count:,} images of 64 px, 50 random batches"
    yield metric("memory", name, "all of their pixels", costs["million"], total, unit="MB", at_least=10.0)


def part_of(batch: int) -> int:
    """The micro-batch that is compared with the batch."""
    return max(batch // 8, 2)


def peaks(*, quick: bool) -> dict[str, float]:
    """Megabytes of each contestant, from a process that has imported everything and done nothing yet."""
    words = [sys.executable, "-m", "benchmarks.speed.memory", *["quick"] * quick]
    # Memory that malloc keeps for threads of its own would count as ours.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(words, capture_output=True, text=True, cwd=root, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"memory could not be measured: {done.stderr.strip()[-500:]}")
    return dict(json.loads(done.stdout))


def main(contestant: str, quick: bool) -> float:
    """Do it once in a process of its own; megabytes above what it began with."""
    effort = Effort(1, "cpu", quick)
    recipe = whole(effort)
    small, count = (16, 4) if quick else (224, 64)
    large = pictures(count, 20 if quick else 256)
    pixels = pictures(2 * recipe.batch, recipe.cache_side)
    if contestant == "million":
        return _million(FEW if quick else MILLION, recipe.batch)
    before = _megabytes("VmRSS")
    if contestant in ("step", "micro"):
        part = part_of(recipe.batch) if contestant == "micro" else None
        body(replace(recipe, micro_batch=part), as_images(pixels))()
    elif contestant == "plain":
        _, update = plain(recipe)
        update(*torch.randn(2, recipe.batch, 3, recipe.size, recipe.size))
    elif contestant == "views":
        ours(large, small)()
    elif contestant == "kornia":
        kornia_pair(large, small)()
    else:
        pil_pair(large, small, pillow_blur=False)()
    return max(_megabytes("VmHWM") - before, 0.1)


def _million(count: int, batch: int) -> float:
    """Anonymous memory alone: pages of the map are the system's to take back."""
    with tempfile.TemporaryDirectory() as folder:
        before = _megabytes("RssAnon")
        images = million(Path(folder), count, 64)
        most = 0.0
        for step in range(50):
            images.batch(batches.indices(replace(whole(Effort(1, "cpu", True)), batch=batch), step, count))
            most = max(most, _megabytes("RssAnon"))
        return max(most - before, 0.1)


def _megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


if __name__ == "__main__":
    asked = "quick" in sys.argv[1:]
    found = {}
    for name in CONTESTANTS:
        if name == "kornia" and not installed(name):
            continue
        # A fork begins with the parent's memory as its peak, and the parent has computed nothing.
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found[name] = pool.apply(main, (name, asked))
    print(json.dumps(found))
