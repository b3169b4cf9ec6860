"""A memory-mapped file whose pages are given back while it is read."""

import mmap
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

PAGES_AT_ONCE = 2**25  # bytes of pages after which they are given back: they count as memory of the process


class MappedFile:
    """The bytes of a file, read-only; `trim` must be called after reading some, from any thread."""

    def __init__(self, path: Path) -> None:
        # Read-only: Linux counts a copy-on-write map as memory, and refuses one larger than the machine has.
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # torch would warn against writing to the map; nothing does.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            self.bytes: UInt8[Tensor, " bytes"] = torch.from_numpy(np.frombuffer(self._map, np.uint8))
        self._before = _pages_of_files()

    def trim(self) -> None:
        """Give the pages back once they are many."""
        # The system is asked, as reading a byte maps anything from 4 KiB to 2 MiB around it.
        if _pages_of_files() - self._before > PAGES_AT_ONCE:
            self.give_back()

    def give_back(self) -> None:
        """Take the pages from this process; they stay in the system's cache, and reading them again is cheap."""
        if sys.platform == "linux":  # elsewhere the advice may mean something else
            self._map.madvise(mmap.MADV_DONTNEED)
            self._before = _pages_of_files()


def _pages_of_files() -> int:
    """Bytes of files in this process: a call takes microseconds."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm", "rb") as stream:  # noqa: PTH123 (a Path takes longer than the rest)
        return int(stream.read().split()[2]) * mmap.PAGESIZE
