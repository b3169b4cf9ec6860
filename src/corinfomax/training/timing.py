"""Time of a training step on this machine, and the forecast for a whole run."""

import contextlib
import io
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from corinfomax.images.cache import Images, Splits
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime.records import Options, Row
from corinfomax.runtime.seeds import generator
from corinfomax.training import loop

MADE_UP_BYTES = 2**27  # made-up pixels: far more than a processor's cache, little beside a machine's memory


class Speed(NamedTuple):
    """Median seconds a step, the number of timed steps, and peak bytes (None where the system reports none)."""

    step: float
    steps: int
    memory: int | None


def made_up(recipe: Recipe) -> Images:
    """Images of random pixels at the recipe's cached size and channels, at least one batch of them."""
    side, form = recipe.cache_side, recipe.pixels
    length = form.bytes * side * side
    count = max(recipe.batch, min(50_000, MADE_UP_BYTES // length))
    random = torch.randint(256, (count * length,), dtype=torch.uint8, generator=generator(0, "made up"))
    pixels = random.view(getattr(torch, form.dtype))
    offsets = torch.arange(count) * form.channels * side * side
    sizes, paths = torch.full((count, 2), side), tuple(f"made up/{i}" for i in range(count))
    return Images(pixels, offsets, sizes, paths, None, (), (), fingerprint="made up", format=form)


def speed(recipe: Recipe, device: torch.device, *, seconds: float) -> Speed:
    """Train on made-up images for about `seconds`, two steps at a time after two of warm-up.

    Raises KeyboardInterrupt after Ctrl-C, and the errors of training such as MemoryError.
    """
    recipe, images = without_learning(recipe), made_up(recipe)
    rounds: list[float] = []
    began = time.perf_counter()
    while not rounds or time.perf_counter() - began < seconds:
        rounds.append(time_loop(recipe, images, device, 2))
    return Speed(statistics.median(rounds), 2 * len(rounds), _peak_memory(device))


def forecast(measured: Speed, recipe: Recipe, images: int, device: torch.device) -> str:
    """One sentence: time and memory of a run on so many images, and the measurement behind them."""
    steps = recipe.steps(images)
    minutes = steps * measured.step / 60
    needs = f"{minutes:,.1f} min" if minutes < 90 else f"{minutes / 60:,.1f} hours"
    if measured.memory is not None:
        needs += f" and {measured.memory / 1e9:,.1f} GB of memory"
    return (
        f"training takes about {needs} on this {device.type}: {recipe.epochs:g} epochs of {images:,} images are "
        f"{steps:,} steps of {recipe.batch}, each {1e3 * measured.step:,.0f} ms ({measured.steps} steps on made-up "
        "images, timed just now); scores and report come on top"
    )


def time_loop(recipe: Recipe, images: Images, device: torch.device, steps: int) -> float:
    """Seconds a step of the training loop, in a temporary run folder, after as many steps of warm-up."""
    epoch = images.select(torch.arange(2 * steps * recipe.batch) % len(images))
    recipe, splits = replace(recipe, epochs=1), Splits(epoch, None)
    options = Options(log_steps=steps, checkpoint_minutes=1e6, scores=0, diagnoses=0)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as run, contextlib.redirect_stderr(io.StringIO()):
        try:
            loop.pretrain(recipe, splits, Path(run), device=device, options=options, on_row=rows.append)
        except loop.Interrupted:
            raise KeyboardInterrupt from None
    return (rows[1].seconds - rows[0].seconds) / steps


def without_learning(recipe: Recipe) -> Recipe:
    """The recipe with a learning rate of 0: as much work, and random pixels cannot make it diverge."""
    return replace(recipe, optim=replace(recipe.optim, lr=0.0, start_lr=0.0, min_lr=0.0))


def _peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, kilobytes elsewhere
