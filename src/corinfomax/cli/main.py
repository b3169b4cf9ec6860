"""The command line: run the typed command and turn its end into an exit code."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from corinfomax import __version__
from corinfomax.cli import messages, output, process
from corinfomax.cli.parse import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 doctor found a fault, 2 a mistake with its message, 130 stopped.

    141 when the reader of the output has gone, as after `head`: the work is done all the same.
    """
    if argv is None:  # this process runs nothing else
        process.keep_freed_memory()
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
        with process.borrowed():
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
