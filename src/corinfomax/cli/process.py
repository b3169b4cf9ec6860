"""Settings of the process that a command changes: its signals, torch, and malloc."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator


def keep_freed_memory() -> None:
    """Keep freed memory in the process: glibc would return it and fetch it again, page by page, every step.

    A float32 step of `cpu-small` on two cores takes 0.18 s instead of 0.21 s, with a tenth more memory at most
    (dev/LOG.md). Settings of malloc in the environment win.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # glibc only
    if chosen or mallopt is None:
        return
    mmap_threshold, trim_threshold = -3, -1
    # Older versions accept at most 32 MB. Setting the trim threshold alone would freeze the other one at 128 kB.
    if mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25):
        mallopt(trim_threshold, (1 << 31) - 1)


@contextlib.contextmanager
def borrowed() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP as Ctrl-C in this block; after it undo `inputs.choose_device`'s settings."""
    numbers: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():  # only it may handle signals
        numbers.append(signal.SIGTERM)
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none, and nohup ignores it on purpose
        if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
            numbers.append(hangup)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    torch = sys.modules.get("torch")
    # torch cannot be asked, so look whether such a number survives.
    flushed = torch is not None and float(torch.tensor(1e-39, dtype=torch.float32, device="cpu") * 1) == 0
    tf32 = True if torch is None else torch.backends.cudnn.allow_tf32  # torch's own choice
    try:
        yield
    finally:
        if torch := sys.modules.get("torch"):
            torch.set_flush_denormal(flushed)
            torch.backends.cudnn.allow_tf32 = tf32
        if memory := sys.modules.get("corinfomax.runtime.memory"):
            memory.set_limit(None)
        for number, handler in before.items():
            signal.signal(number, handler)
