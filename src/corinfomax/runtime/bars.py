"""Progress bars: on a terminal, as a widget in a notebook, elsewhere none."""

import sys

from tqdm.auto import tqdm

__all__ = ["shown", "tqdm"]
IN_NOTEBOOK = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)


def shown() -> bool:
    """True if a bar can be seen: standard error is a terminal, or this is a notebook."""
    return IN_NOTEBOOK or sys.stderr.isatty()
