"""Ctrl-C, SIGTERM and SIGHUP as a question between steps, with one answer in all processes."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from corinfomax.runtime import processes

DELAY = 1.0  # seconds between two exchanges among processes, each of which makes the host wait


class Stop:
    """A request to stop the run."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._step, self._time, self._next = 0, time.monotonic(), 0

    def request(self) -> None:
        """Stop after the current step."""
        self._requested.set()

    def agreed(self, done: int) -> bool:
        """True if the run should stop after `done` steps: the same answer in every process, up to about DELAY late.

        Every process calls this after every step. Each exchange also agrees on the step of the next one.
        """
        if processes.size() == 1:
            return self._requested.is_set()
        if done < self._next:
            return False
        now = time.monotonic()
        step_seconds = (now - self._time) / max(1, done - self._step)
        requested, step_seconds = processes.largest(float(self._requested.is_set()), step_seconds)
        self._step, self._time, self._next = done, now, done + max(1, int(DELAY / max(step_seconds, 1e-6)))
        return bool(requested)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into a request, so that no step is cut in half; a second Ctrl-C stops at once.

    SIGHUP is the end of a terminal; under nohup it stays ignored.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    before = {number: signal.getsignal(number) for number in numbers}

    def request(number: int, frame: FrameType | None) -> None:
        stop.request()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
