"""A file of bytes that is read through the system's cache of files, and whose pages are given back."""

from __future__ import annotations

import mmap
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

READ_AT_ONCE = 2**28  # bytes after which pages are given back: they count as memory of the process
AROUND = 2**16  # Linux maps the 64 KiB around a byte together


class MappedFile:
    """The bytes of a file, read-only; `read` must be called for what is read, from any thread."""

    def __init__(self, path: Path) -> None:
        # Read-only: Linux counts a copy-on-write map as memory, and refuses one larger than the machine has.
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # torch would warn against writing to the map; nothing does.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            self.bytes: UInt8[Tensor, " bytes"] = torch.from_numpy(np.frombuffer(self._map, np.uint8))
        self._read = 0

    def read(self, places: int, size: int) -> None:
        """Count `size` bytes read at so many places; after enough of them give the pages back."""
        self._read += size + places * AROUND
        if self._read > READ_AT_ONCE:
            self.give_back()

    def give_back(self) -> None:
        """Take the pages from this process; they stay in the system's cache, and reading them again is cheap."""
        self._read = 0
        if sys.platform == "linux":  # elsewhere the advice may mean something else
            self._map.madvise(mmap.MADV_DONTNEED)
