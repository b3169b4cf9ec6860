"""Standard output and error that never cost the work: what cannot be written is dropped."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class Output:
    """A text stream for which a full disk, a closed pipe or a missing character is no error.

    Characters that the stream's encoding lacks become question marks.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None
        """The first error of writing."""
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Write the text, if the stream takes it."""
        try:
            self._stream.write(text)
        except OSError as error:
            self.error = self.error or error
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if it works."""
        try:
            self._stream.flush()
        except OSError as error:
            self.error = self.error or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def forgiving() -> Iterator[Output]:
    """Replace standard output and error in this block; gives the output, with its error."""
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        # daemons and windowed programs have none: the file also takes the closed one's descriptor
        nowhere = [stack.enter_context(open(os.devnull, "w", encoding="utf-8")) for stream in before if stream is None]  # noqa: PTH123
        output, errors = (Output(nowhere.pop() if stream is None else stream) for stream in before)
        sys.stdout, sys.stderr = output, errors
        try:
            yield output
        finally:
            output.flush()
            sys.stdout, sys.stderr = before


def silence(stream: Any) -> None:
    """Send a broken stream to nowhere, so that Python's exit does not complain about it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
