"""Where the time of a training step goes on this machine: the parts, the update on ready views, the loop itself."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from corinfomax import network
from corinfomax import network as hardware
from corinfomax.images.cache import Images, Splits
from corinfomax.images.decode import decode_all
from corinfomax.images.files import Source
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import run_folder
from corinfomax.runtime.seeds import generator
from corinfomax.training import batches
from corinfomax.training import loop as train
from corinfomax.training.bottleneck import PARTS, Setting, Timings
from corinfomax.training.step import Learner, build, update

ROUNDS = 5
MADE_UP_BYTES = 2**27  # of made-up images: far more than a processor's cache, little beside a machine's memory
LOOKS = 256  # images decoded to see what decoding costs


def made_up(recipe: Recipe) -> Images:
    """Images of random pixels of the recipe's cached size, at least one batch of them."""
    side = recipe.cache_side
    count = max(recipe.batch, min(50_000, MADE_UP_BYTES // (3 * side * side)))
    pixels = torch.randint(256, (count * 3 * side * side,), dtype=torch.uint8, generator=generator(0, "made up"))
    return Images(
        pixels=pixels,
        offsets=torch.arange(count) * (3 * side * side),
        sizes=torch.full((count, 2), side),
        paths=tuple(f"made up/{i}" for i in range(count)),
        labels=None,
        classes=(),
        skipped=(),
        fingerprint="made up",
    )


def describe(recipe: Recipe, images: Images, device: torch.device, *, decode: float | None = None) -> Setting:
    """The setting in which `measure` runs."""
    return Setting(
        batch=recipe.batch,
        size=recipe.size,
        image_bytes=int(3 * images.sizes.prod(1).double().mean()),
        device=device.type,
        precision=network.precision(recipe, device),
        threads=torch.get_num_threads(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        native_bfloat16=hardware.multiplies_bfloat16(device),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        decode=decode,
    )


class Pace(NamedTuple):
    """How fast training steps are here, and what they need."""

    step: float
    """Seconds a step; the median of the rounds."""
    steps: int
    """Steps that were timed."""
    memory: int | None
    """Peak bytes: of the device, or on a CPU of this whole process so far; None where the system does not say."""


def pace(recipe: Recipe, device: torch.device, *, seconds: float) -> Pace:
    """Run the training loop of `recipe` on made-up images for about `seconds`, at least two steps after two others.

    Raises KeyboardInterrupt after Ctrl-C, MemoryError and the like as training would.
    """
    recipe, images = _still(recipe), made_up(recipe)
    rounds: list[float] = []
    began = time.perf_counter()
    while not rounds or time.perf_counter() - began < seconds:
        rounds.append(_loop(recipe, images, device, 2))
    return Pace(statistics.median(rounds), 2 * len(rounds), _peak_memory(device))


def foreseen(pace: Pace, recipe: Recipe, images: int, device: torch.device) -> str:
    """A sentence: what a run of `recipe` on so many images takes here, and how that is known."""
    steps = recipe.steps(images)
    minutes = batches.work(recipe, steps, steps) / recipe.size**2 * pace.step / 60
    time = f"{minutes:,.1f} min" if minutes < 90 else f"{minutes / 60:,.1f} hours"
    memory = "" if pace.memory is None else f" and {pace.memory / 1e9:,.1f} GB of memory"
    return (
        f"training takes about {time}{memory} on this {device.type}: {recipe.epochs:g} epochs of {images:,} images are "
        f"{steps:,} steps of {recipe.batch}, each {1e3 * pace.step:,.0f} ms by {pace.steps} steps timed now on made-up "
        "images; scores and report come on top"
    )


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _still(recipe: Recipe) -> Recipe:
    """The recipe with a learning rate of 0: the work is the same, and nothing runs away on made-up images.

    All views are of the full size.
    """
    return replace(
        recipe, early_sizes=(), early_shares=(), optim=replace(recipe.optim, lr=0.0, start_lr=0.0, min_lr=0.0)
    )


def measure(recipe: Recipe, images: Images, device: torch.device, *, seconds: float = 30.0) -> Timings:
    """Time the steps of this recipe on these images for about `seconds`, at least three rounds of three steps.

    The learning rate is 0 all along.
    Raises KeyboardInterrupt after Ctrl-C, MemoryError and the like as training would.
    """
    recipe = _still(recipe)
    learner = build(recipe, device)
    counter = itertools.count()

    def apart() -> dict[str, float]:
        return _step_apart(recipe, learner, images, next(counter), device)

    apart()  # the first step allocates, compiles and pages in
    began = time.perf_counter()
    apart()
    once = time.perf_counter() - began
    rounds = ROUNDS if 4 * ROUNDS * once < seconds else 3
    steps = max(1, min(200, round(seconds / (5 * rounds * once))))
    parts: dict[str, list[float]] = {part: [] for part in PARTS}
    operations: dict[str, list[float]] = {name: [] for name in _operations(recipe)}
    ready, loop = [], []
    crops = batches.step_views(recipe, images, 0, device)
    for _ in range(rounds):
        laps = [apart() for _ in range(steps)]
        for part in PARTS:
            parts[part].append(statistics.median(lap[part] for lap in laps))
        with _stopwatch(device) as watch:
            for _ in range(steps):
                update(recipe, learner, crops, next(counter), device)
        ready.append(watch() / steps)
        loop.append(_loop(recipe, images, device, steps))
        for name, less in _operations(recipe).items():
            operations[name].append(_difference(recipe, less, images, device, min(steps, 5)))
    return Timings(parts, ready, loop, operations)


def _step_apart(recipe: Recipe, learner: Learner, images: Images, step: int, device: torch.device) -> dict[str, float]:
    """Seconds of each part of one step, the device waited for after each."""
    laps = dict.fromkeys(PARTS, 0.0)
    _wait(device)
    last = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal last
        _wait(device)
        now = time.perf_counter()
        laps[part] += now - last
        last = now

    # What an epoch's order costs stays in the loop's own time, where it is paid as often as it is there.
    sizes = images.sizes[batches.indices(recipe, step, len(images))]
    last = time.perf_counter()
    given = batches.read(recipe, images, step, device)
    lap("read")
    crops = batches.views_of(recipe, given, sizes, step, device)
    lap("views")
    update(recipe, learner, crops, step, device, lap)
    # The backward pass of the loss is inside "backward": time it alone, on rows of the same shape, and move it over.
    rows = torch.randn(recipe.crops, recipe.batch, recipe.projector.widths[-1], device=device).unbind()
    learner.criterion.eval()  # the moments stay as they are
    terms = learner.criterion(*(row.requires_grad_() for row in rows))
    _wait(device)
    last = time.perf_counter()
    terms.loss.backward()
    _wait(device)
    moved = min(time.perf_counter() - last, laps["backward"])
    learner.criterion.train()
    laps["loss"] += moved
    laps["backward"] -= moved
    return laps


def _loop(recipe: Recipe, images: Images, device: torch.device, steps: int) -> float:
    """Seconds a step of training itself, in a run folder that is thrown away; as many steps before as warm-up."""
    recipe = replace(recipe, epochs=1)
    some = images.select(torch.arange(2 * steps * recipe.batch) % len(images))
    pace = train.Pace(log_steps=steps, checkpoint_minutes=math.inf, scores=0, diagnoses=0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        try:
            train.pretrain(recipe, Splits(some, None), Path(folder), device=device, pace=pace, facts={})
        except train.Interrupted:
            raise KeyboardInterrupt from None
        before, after = (row["seconds"] for row in run_folder.read_metrics(Path(folder)))
    return (after - before) / steps


def _operations(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe without each operation of the views that it has and that can be left out."""
    found = {}
    for name in ("rotate", "jitter", "blur"):
        if any(getattr(view, name) for view in recipe.views):
            without: dict[str, Any] = {name: 0.0}
            first, second = (replace(view, **without) for view in recipe.views)
            found[name] = replace(recipe, views=(first, second))
    return found


def _difference(recipe: Recipe, less: Recipe, images: Images, device: torch.device, steps: int) -> float:
    """Seconds a step that the views of `less` take less than those of `recipe`, by turns."""
    given, sizes = batches.read(recipe, images, 0, device), images.sizes[batches.indices(recipe, 0, len(images))]
    saved = []
    for step in range(steps):
        took = []
        for which in (recipe, less):
            with _stopwatch(device) as watch:
                batches.views_of(which, given, sizes, step, device)
            took.append(watch())
        saved.append(took[0] - took[1])
    return statistics.median(saved)


def decoding(source: Source, side: int, *, looks: int = LOOKS) -> float | None:
    """Seconds to decode one image on all cores, from some of the files; None for a set that is one array."""
    if source.array is not None:
        return None
    some = source.take(range(0, len(source.paths), max(1, len(source.paths) // looks)))
    began = time.perf_counter()
    for _ in decode_all(some, side, progress=False):
        pass
    return (time.perf_counter() - began) / len(some.paths)


@contextlib.contextmanager
def _stopwatch(device: torch.device) -> Iterator[Callable[[], float]]:
    """What the block inside took, with all that it left to the device to do."""
    _wait(device)
    began = time.perf_counter()
    ended = math.nan
    yield lambda: ended - began
    _wait(device)
    ended = time.perf_counter()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
