"""The parts of a training step on this machine, and what bounds it.

python -m benchmarks.speed.parts cpu-small --seconds 30
python -m benchmarks.speed.parts cifar10 --device cuda --data data/cifar10 --out parts.json
"""

import argparse
import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from corinfomax import network
from corinfomax.cli import inputs
from corinfomax.images import cache
from corinfomax.images.cache import Images
from corinfomax.images.decode import cores, decode, map_images
from corinfomax.images.files import Source
from corinfomax.images.sources import Data
from corinfomax.recipes import fields, published
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import run_folder
from corinfomax.training import batches
from corinfomax.training.step import Learner, build, update
from corinfomax.training.timing import made_up, time_loop, without_learning

PARTS = ("read", "views", "forward", "loss", "backward", "optimizer")
BOUND = 0.95  # least share of a step in the update at which the network is the bound
ROUNDS = 5
DECODED = 256  # files that decoding is timed on


class Setting(NamedTuple):
    """Batch and machine of the timings; the recipe has the rest."""

    batch: int
    device: str
    threads: int  # of torch, on the CPU
    cores: int
    load: float = 0.0  # load average before the measurement: programs that wanted a core
    decode: float | None = None  # seconds to decode one image file on all cores


class Timings(NamedTuple):
    """Seconds a step, one number a round; a round times everything, so that a busy moment slows everything alike."""

    parts: dict[str, list[float]]
    """Each of PARTS, waited for; `backward` includes the loss's, and the whole forward pass with micro-batches."""
    ready: list[float]
    """The update on ready views, with no wait between its parts."""
    loop: list[float]
    """The loop of `corinfomax pretrain`."""


def describe(recipe: Recipe, device: torch.device, *, decode: float | None = None) -> Setting:
    """The setting of a measurement that starts now."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return Setting(recipe.batch, device.type, torch.get_num_threads(), cores(), load, decode)


def measure(recipe: Recipe, images: Images, device: torch.device, *, seconds: float = 30.0) -> Timings:
    """Time steps of `recipe` on `images` for about `seconds`, at least five of each kind; the learning rate is 0.

    Raises KeyboardInterrupt after Ctrl-C, and the errors of training such as MemoryError.
    """
    recipe = without_learning(recipe)
    learner, counter = build(recipe, device), itertools.count()

    # one step to allocate and compile, one to see how many fit into the time
    _time_parts(recipe, learner, images, next(counter), device)
    once = sum(_time_parts(recipe, learner, images, next(counter), device).values())
    steps = max(1, min(200, round(seconds / (4 * ROUNDS * once))))  # parts, update, loop and its warm-up

    # the rounds
    views = batches.apply_views(recipe, batches.read_batch(recipe, images, 0, device), device)
    timings = Timings({part: [] for part in PARTS}, [], [])
    for _ in range(ROUNDS):
        laps = [_time_parts(recipe, learner, images, next(counter), device) for _ in range(steps)]
        for part, samples in timings.parts.items():
            samples.append(statistics.median(lap[part] for lap in laps))
        began = _now(device)
        for _ in range(steps):
            update(recipe, learner, views, next(counter), device)
        timings.ready.append((_now(device) - began) / steps)
        timings.loop.append(time_loop(recipe, images, device, steps))
    return timings


def _time_parts(recipe: Recipe, learner: Learner, images: Images, step: int, device: torch.device) -> dict[str, float]:
    """Seconds of each part of one step."""
    # An epoch's order is drawn before the clock starts: the loop pays for it, as often as training does.
    batches.indices(recipe, step, len(images))
    laps, last = dict.fromkeys(PARTS, 0.0), _now(device)

    def lap(part: str) -> None:
        nonlocal last
        now = _now(device)
        laps[part], last = laps[part] + now - last, now

    with contextlib.ExitStack() as stack:
        read = batches.reader(recipe, images, device, stack)
        batch = batches.draw_batch(recipe, images, step)
        lap("views")
        batch = read(batch)
        lap("read")
        views = batches.apply_views(recipe, batch, device)
        lap("views")
        update(recipe, learner, views, step, device, lap)
    return laps


def _now(device: torch.device) -> float:
    """Seconds on the clock once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def decoding(source: Source, side: int) -> float | None:
    """Seconds to decode one image on all cores, measured on some of the files; None for a set in one array."""
    if source.array is not None:
        return None
    files = source.take(range(0, len(source.paths), max(1, len(source.paths) // DECODED)))
    began = time.perf_counter()
    for _ in map_images(files, lambda image: decode(image, side), progress=False):
        pass
    return (time.perf_counter() - began) / len(files.paths)


def efficiency(timings: Timings) -> float:
    """Share of a step that the update on ready views takes; at 1 the network never waits."""
    # A round times the two one after the other, so their ratio is steadier than that of the medians.
    return min(1.0, statistics.median(a / b for a, b in zip(timings.ready, timings.loop, strict=True)))


def advice(timings: Timings, setting: Setting) -> str:
    """One sentence: the bound of a step, its number, and the change that makes it faster."""
    share, step, on_cpu = efficiency(timings), statistics.median(timings.loop), setting.device == "cpu"
    bound = "the network" if share >= BOUND else "what feeds the network"

    # idle cores: those that other programs leave
    if on_cpu and setting.threads < setting.cores and setting.threads + 0.5 < setting.cores - setting.load:
        threads = f"torch computes on {setting.threads} of {setting.cores} cores"
        return f"Bound by {bound}, and {threads}: set OMP_NUM_THREADS={setting.cores}."

    # the network itself
    if share >= BOUND:
        faster = f"smaller network, smaller views (--size) or {'a GPU' if on_cpu else 'a faster device'}"
        return f"Bound by {bound}, {100 * share:.0f} % of a step: only a {faster} would help."

    # the slowest part before the network
    read, views = (statistics.median(timings.parts[part]) / step for part in ("read", "views"))
    most, slowest, cure = max(
        (read, "reading", "put the cache on a faster disk (--cache) or smaller images into it (--cache-side)"),
        (views, "making views", "make smaller views (--size) from smaller images (--cache-side)"),
        (1 - share - read - views, "bookkeeping", "write metrics less often (--log-steps)"),
    )
    waits = f"it waits {100 - 100 * share:.0f} % of the time, and {slowest} takes {100 * most:.0f} %"
    return f"Bound by {bound}: {waits}; {cure}."


def as_text(timings: Timings, setting: Setting) -> str:
    """A table of the parts, images a second, the efficiency, the advice, and a warning on a busy machine."""
    step, ready = statistics.median(timings.loop), statistics.median(timings.ready)

    # the table, the whole loop last
    lines = [f"{'':<24}{'ms a step':>11}{'quartiles':>20}{'µs an image':>14}{'share':>8}"]
    totals = {"update on ready views": timings.ready, "whole training loop": timings.loop}
    for name, samples in {**timings.parts, **totals}.items():
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        spread, image = f"{1e3 * low:,.1f} – {1e3 * high:,.1f}", 1e6 * middle / setting.batch
        lines.append(f"{name:<24}{1e3 * middle:>11,.1f}{spread:>20}{image:>14,.1f}{100 * middle / step:>6.0f} %")
    lines.insert(1 + len(PARTS), "─" * len(lines[0]))
    unsteady = high - low > 0.2 * step

    # the sentences
    if setting.decode is not None:
        lines.append(f"decoding: {1e6 * setting.decode:,.0f} µs an image on all cores, once; then the cache is read")
    rates = f"{setting.batch / step:,.0f} images/s; the network alone would do {setting.batch / ready:,.0f}"
    lines.append(f"{rates}: the pipeline's efficiency is {efficiency(timings):.2f}")
    lines.append(f"→ {advice(timings, setting)}")
    if setting.device == "cpu" and setting.threads + setting.load > setting.cores + 1:
        busy = f"other programs use about {setting.load:.1f} of the {setting.cores} cores and slow this down"
        lines.append(busy + "; one thread may be faster (OMP_NUM_THREADS=1)" * (setting.threads > 1))
    elif unsteady:
        lines.append("the rounds differ by more than a fifth because the machine is busy: trust only the shares")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="cpu-small")
    parser.add_argument("--data", default=None, help="images; made-up ones by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=None, help="a JSON file of the timings")
    options = parser.parse_args(argv)

    # the images, and what decoding them costs
    device, recipe = inputs.choose_device(options.device), published.find_recipe(options.recipe)
    images, seconds = made_up(recipe), None
    if options.data is not None:
        data = Data(options.data)
        images, seconds = (
            cache.load(data, side=recipe.cache_side).train,
            decoding(data.splits()["train"], recipe.cache_side),
        )
        recipe = replace(recipe, batch=min(recipe.batch, len(images)))

    # the timings
    recipe = replace(recipe, precision=network.choose_precision(recipe, device, training=True))
    setting = describe(recipe, device, decode=seconds)
    about = f"{recipe.backbone.name} at {recipe.size} px, batch {recipe.batch}, {recipe.precision}"
    print(
        f"{about}, on {setting.device}, {setting.threads} threads on {setting.cores} cores, torch {torch.__version__}\n"
    )
    timings = measure(recipe, images, device, seconds=options.seconds)
    print(as_text(timings, setting))
    if options.out is not None:
        content = {"setting": setting._asdict(), "timings": timings._asdict(), "recipe": fields.to_json(recipe)}
        run_folder.write_json(options.out, {**content, "advice": advice(timings, setting)})


if __name__ == "__main__":
    main()
