"""Time by turns: wall time on a quiet machine, processor time where others compute too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

Clock = Literal["cpu", "wall"]


class Effort(NamedTuple):
    """How much to measure."""

    rounds: int
    clock: Clock
    quick: bool
    """Small shapes, for the tests: the figures say nothing."""


def now(clock: Clock) -> float:
    """Seconds: of the processor for this process and its threads, or of the wall."""
    return time.process_time() if clock == "cpu" else time.perf_counter()


def alternate(
    contestants: dict[str, Callable[[], object]], effort: Effort, *, least: float = 0.2
) -> dict[str, list[float]]:
    """Seconds a call of each, one number a round; in a round each runs for about `least` seconds, one after another."""
    calls = {}
    for name, call in contestants.items():
        once = _once(call, effort.clock)  # allocates and pages in
        if once < 10 * least:
            once = _once(call, effort.clock)
        calls[name] = 1 if effort.quick else max(1, round(least / once))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(effort.rounds):
        for name, call in contestants.items():
            began = now(effort.clock)
            for _ in range(calls[name]):
                call()
            seconds[name].append((now(effort.clock) - began) / calls[name])
    return seconds


def _once(call: Callable[[], object], clock: Clock) -> float:
    began = now(clock)
    call()
    return max(now(clock) - began, 1e-6)


def of_workers(pids: Iterable[int]) -> float:
    """Seconds of the processor that other processes have had since they began."""
    nanoseconds = (Path(f"/proc/{pid}/schedstat").read_text().split()[0] for pid in pids)
    return 1e-9 * sum(map(int, nanoseconds))
