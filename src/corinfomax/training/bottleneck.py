"""What bounds a training step and what to change about it: from timings to words."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

PARTS = ("read", "views", "forward", "loss", "backward", "optimizer")
LEAST = 0.95  # of the loop's time in the update, from where on the network decides and not what feeds it

Samples = Sequence[float]
"""Seconds a step, one number a round."""


class Timings(NamedTuple):
    """What was measured, in seconds a step: rounds of all of it by turns, so that a busy moment hits all alike."""

    parts: Mapping[str, Samples]
    """Of each of PARTS, the device waited for after each; `loss` is its forward and backward, `backward` the rest."""
    ready: Samples
    """Forward, loss, backward and optimiser on ready views, nothing waited for between them."""
    loop: Samples
    """The loop of `corinfomax pretrain` as it runs."""
    operations: Mapping[str, Samples]
    """What the views take less when an operation is left out."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the timings are of."""

    batch: int
    size: int
    image_bytes: int
    """Pixels of one image as they are read; the mean."""
    device: str
    precision: str
    threads: int
    """Threads torch computes with on the CPU."""
    cores: int
    native_bfloat16: bool
    """Whether the device multiplies bfloat16 faster than float32."""
    load: float = 0.0
    """Programs that wanted a core before measuring began: the load average."""
    decode: float | None = None
    """Seconds to decode one image file on all cores; once for each image, then the cache is read."""


class Look(NamedTuple):
    """The numbers an answer is made from, medians, in seconds a step."""

    parts: dict[str, float]
    ready: float
    loop: float
    efficiency: float
    """Share of the loop that the update would take if its views were always ready; 1 is all."""
    rest: float
    """What the loop surely takes beside its parts: logging, checkpoints, order of the images."""


def look(timings: Timings) -> Look:
    """The medians, and what follows from them."""
    parts = {part: statistics.median(samples) for part, samples in timings.parts.items()}
    ready, loop = statistics.median(timings.ready), statistics.median(timings.loop)
    # A round's two blocks stood next to each other in time: their ratio is steadier than that of the medians.
    efficiency = statistics.median(r / whole for r, whole in zip(timings.ready, timings.loop, strict=True))
    # A difference of four noisy numbers: only what is left at the better quartile of one and the worse of the others.
    known = sum(quartiles(samples)[2] for samples in (timings.ready, timings.parts["read"], timings.parts["views"]))
    rest = max(0.0, quartiles(timings.loop)[0] - known)
    return Look(parts, ready, loop, min(1.0, efficiency), rest)


def advise(timings: Timings, setting: Setting) -> str:
    """One sentence: what to change for more images a second, and the number it follows from."""
    now = look(timings)
    share = {part: seconds / now.loop for part, seconds in now.parts.items()}
    network = share["forward"] + share["backward"]
    most = f"at most {_percent(1 / now.efficiency - 1)} more images a second"
    on_cpu = setting.device == "cpu"
    free = setting.cores - setting.load  # what other programs compute on is not there to take
    if on_cpu and setting.threads < setting.cores and setting.threads + 0.5 < free:
        return (
            f"Let torch use every core (OMP_NUM_THREADS={setting.cores}): it computes on {setting.threads} of "
            f"{setting.cores}, and {_percent(share['views'] + network)} of the time is computing."
        )
    if now.efficiency < LEAST:
        feeding = {"read": now.parts["read"], "views": now.parts["views"], "rest": now.rest}
        slowest = max(feeding, key=lambda part: feeding[part])
        lost = now.loop - now.ready
        waits = f"{_ms(lost)} of a step's {_ms(now.loop)} ms the network waits, and {_ms(feeding[slowest])} ms go to"
        if slowest == "read":
            rate = setting.batch * setting.image_bytes / max(now.parts["read"], 1e-9) / 1e6
            return (
                f"Read faster, by a cache on a faster disk (--cache) or of smaller images (--cache-side): {waits} "
                f"reading the images, at {rate:,.0f} MB/s; {most}."
            )
        if slowest == "views":
            saved = {name: statistics.median(samples) for name, samples in timings.operations.items()}
            dearest = max(saved, key=lambda name: saved[name], default=None)
            if dearest is None or saved[dearest] < 0.2 * now.parts["views"]:
                what, why = "Make smaller views (--size) or read smaller images (--cache-side)", ""
            else:
                what = f"Try the views without {dearest} (--views.0.{dearest} 0 --views.1.{dearest} 0)"
                why = f", {_percent(saved[dearest] / now.parts['views'])} of that to {dearest}"
            return f"{what}, or take a larger network for the same time: {waits} views{why}; {most}."
        return f"Log and save less often (--log-steps, --checkpoint-minutes): {waits} neither data nor network; {most}."
    if share["optimizer"] > 0.2:
        gain = _percent(1 / (1 - share["optimizer"] / 2) - 1)
        return (
            f"Take a larger batch: the optimiser's {_ms(now.parts['optimizer'])} ms a step do not depend on it, so "
            f"--batch {2 * setting.batch} is about {gain} more images a second."
        )
    if share["loss"] > 0.2:
        return (
            f"Take a smaller last width of the projector or a larger batch: the loss is {_percent(share['loss'])} of a "
            "step, and most of it does not depend on the batch but on that width."
        )
    if setting.native_bfloat16 and setting.precision == "float32":
        return (
            f"Try --precision bfloat16: {_percent(network)} of a step is the network in float32, and this "
            f"{setting.device} multiplies bfloat16 faster."
        )
    device = "a GPU" if on_cpu else "a faster device"
    return (
        f"Only a smaller network, smaller views (--size) or {device} would be faster: the network is "
        f"{_percent(network)} of a step, and data for nothing would give {most}."
    )


def as_text(timings: Timings, setting: Setting) -> str:
    """The table, images a second, the bound and the advice."""
    now, batch = look(timings), setting.batch
    rows = [(part, timings.parts[part]) for part in PARTS]
    rows += [("update on ready views", timings.ready), ("whole loop of training", timings.loop)]
    lines = [f"{'':<24}{'ms a step':>11}{'quartiles':>18}{'µs an image':>14}{'share':>8}"]
    for name, samples in rows:
        low, middle, high = quartiles(samples)
        lines.append(
            f"{name:<24}{_ms(middle):>11}{f'{_ms(low)} – {_ms(high)}':>18}{1e6 * middle / batch:>14.1f}"
            f"{_percent(middle / now.loop):>8}"
        )
        if name == PARTS[-1]:
            lines.append("─" * len(lines[0]))
    if setting.decode is not None:
        lines.append(
            f"decoding: {1e6 * setting.decode:,.0f} µs an image on all cores, once; then it is read from the cache"
        )
    low, _, high = quartiles(timings.loop)
    bound = "the network" if now.efficiency >= LEAST else "what feeds the network"
    lines += [
        f"{batch / now.loop:,.0f} images/s; the network alone would do {batch / now.ready:,.0f}: the pipeline's "
        f"efficiency is {now.efficiency:.2f}, so {bound} is the bound",
        f"→ {advise(timings, setting)}",
    ]
    if setting.device == "cpu" and setting.threads + setting.load > setting.cores + 1:
        lines.append(
            f"other programs want {setting.load:.1f} of the {setting.cores} cores: figures are theirs too, and threads "
            "that wait for each other can be slower than one (OMP_NUM_THREADS=1)"
        )
    elif high - low > 0.2 * now.loop:
        lines.append("the rounds differ by more than a fifth: the machine does other things too, so trust shares only")
    return "\n".join(lines)


def as_json(timings: Timings, setting: Setting) -> dict[str, Any]:
    """All that was measured, in seconds a step."""
    return {"setting": vars(setting), "timings": timings._asdict(), "advice": advise(timings, setting)}


def quartiles(samples: Samples) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of one number that number."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def _ms(seconds: float) -> str:
    """Milliseconds with three digits that count."""
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
