"""The command line: run the typed command and turn its end into an exit code."""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence

from corinfomax import __version__
from corinfomax.cli import messages, output
from corinfomax.cli.parse import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 doctor found a fault, 2 a mistake with its message, 130 stopped.

    141 when the reader of the output has gone, as after `head`: the work is done all the same.
    """
    if argv is None:  # this process runs nothing else
        _keep_freed_memory()
        # Pillow's lines do not name the file; ours do.
        logging.getLogger("PIL").setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", module=r"PIL\.")
        # numpy below 2.4 tells everyone who reads its limits that denormal numbers are flushed to 0, as we chose.
        warnings.filterwarnings("ignore", message="The value of the smallest subnormal", module="numpy")
    words = sys.argv[1:] if argv is None else list(argv)
    with output.forgiving() as printed:
        code = _run(words)
    if printed.error is None:
        return code
    output.silence(sys.stdout)
    if isinstance(printed.error, BrokenPipeError):
        return 141
    print(f"corinfomax: the output could not be written: {messages.message(printed.error)}", file=sys.stderr)
    return code or 2


def _run(words: list[str]) -> int:
    try:
        with _borrowed_process():
            if words == ["--version"]:
                print(f"corinfomax {__version__}")
                return 0

            command, typed = parse(words)
            return command.run(typed)
    except KeyboardInterrupt:
        print("corinfomax: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        message = messages.message(error)
        if message is None or os.environ.get("CORINFOMAX_TRACEBACK"):
            raise
        print(f"corinfomax: {message}", file=sys.stderr)
        return 2


def _keep_freed_memory() -> None:
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
def _borrowed_process() -> Iterator[None]:
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
    try:
        yield
    finally:
        if torch := sys.modules.get("torch"):
            torch.set_flush_denormal(flushed)
        if memory := sys.modules.get("corinfomax.runtime.memory"):
            memory.set_limit(None)
        for number, handler in before.items():
            signal.signal(number, handler)
