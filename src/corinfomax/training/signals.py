"""Ctrl-C and SIGTERM as a question asked between steps, to which all processes give one answer."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from corinfomax.runtime import processes

DELAY = 1.0  # seconds between two questions of one process to the others, since each makes the host wait


class Stop:
    """Whether the run was asked to stop."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._step, self._time, self._next = 0, time.monotonic(), 0

    def ask(self) -> None:
        """Stop after the step that is under way."""
        self._asked.set()

    def agreed(self, done: int) -> bool:
        """Whether to stop now that `done` steps are done: the same answer in every process, about DELAY late at most.

        Every process calls this after every step. How long to wait with the next question is agreed with this one.
        """
        if processes.size() == 1:
            return self._asked.is_set()
        if done < self._next:
            return False
        now = time.monotonic()
        a_step = (now - self._time) / max(1, done - self._step)
        asked, a_step = processes.largest(float(self._asked.is_set()), a_step)
        self._step, self._time, self._next = done, now, done + max(1, int(DELAY / max(a_step, 1e-6)))
        return bool(asked)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """What Ctrl-C or SIGTERM asks, so that a step is never cut in half; a second Ctrl-C stops at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.ask()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
