"""Progress bars: on a terminal, as a widget in a notebook, elsewhere none."""

import sys
import warnings
from typing import Any

from tqdm import TqdmWarning

with warnings.catch_warnings():  # without ipywidgets tqdm asks for them; lines now and then do as well
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

__all__ = ["lines", "shown", "tqdm"]
AS_WIDGET = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)


def shown() -> bool:
    """True if a bar can be seen: standard error is a terminal, or that of a notebook with widgets."""
    return (AS_WIDGET and _in_notebook()) or sys.stderr.isatty()


def lines() -> Any:
    """The stream for lines of progress: standard error, but standard output in a notebook, which paints errors red."""
    return sys.stdout if _in_notebook() else sys.stderr


def _in_notebook() -> bool:
    return type(sys.stderr).__module__ == "ipykernel.iostream"
