"""Memory: what is free, the user's limit, how much tensors take at their worst moment, and giving it back."""

import ctypes
import sys
import weakref
from collections.abc import Callable
from math import inf
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS = 2**26  # bytes of a batch without gradients on a CPU: more is no faster
GPU_SHARE = 0.25  # of a GPU's free memory, for such a batch
_limit = inf  # bytes of this process on the device that computes


def set_limit(gigabytes: float | None) -> None:
    """Limit memory from here on (None: what is free); ValueError unless it is above 0."""
    global _limit  # noqa: PLW0603 (a setting of the process, as torch's number of threads is)
    if gigabytes is not None and not gigabytes > 0:
        raise ValueError(f"--memory is {gigabytes:g}; it is in GB and must be above 0")
    _limit = inf if gigabytes is None else 1e9 * gigabytes


def room(device: torch.device) -> float:
    """Bytes that this process may still take on the device, within the limit; infinite where none is reported."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        available, used = float(torch.cuda.mem_get_info(device)[0] + held), torch.cuda.memory_allocated(device)
    else:
        available, used = min(_free_on_machine(), free_in_cgroup()), resident()
    return max(0.0, min(available, _limit - used))


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    return int(_fields(Path("/proc/self/status")).get("VmRSS", 0))


def _free_on_machine() -> float:
    """Bytes that programs can have without swapping."""
    return _fields(Path("/proc/meminfo")).get("MemAvailable", inf)


def _fields(path: Path) -> dict[str, float]:
    """The lines `name: number kB` of a file of Linux, in bytes; empty elsewhere."""
    if not path.exists():
        return {}
    lines = (line.split() for line in path.read_text("utf-8").splitlines())
    return {words[0].rstrip(":"): 1024 * float(words[1]) for words in lines if words[2:] == ["kB"]}


def free_in_cgroup(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes left to this process by the control groups above it, of version 1 or 2; infinite without a limit."""
    if not own.exists():
        return inf
    available = inf
    for line in own.read_text("utf-8").splitlines():
        _, kinds, group = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        names = ("memory.max", "memory.current", "inactive_file")
        if kinds:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        # A container may see the names of the host's groups below the root of its own.
        path = PurePosixPath(group.lstrip("/"))
        for folder in {root / kinds / ancestor for ancestor in (path, *path.parents)}:
            available = min(available, _free_in_group(folder, *names))
    return available


def _free_in_group(folder: Path, limit: str, usage: str, cached: str) -> float:
    """Bytes left in one control group; inactive file pages count as free."""
    if not (folder / limit).exists() or (most := (folder / limit).read_text("ascii").strip()) == "max":
        return inf
    stat = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
    return int(most) - int((folder / usage).read_text("ascii")) + int(stat.get(cached, 0))


def give_back() -> None:
    """Return freed memory to the system, which the settings of `cli.main` otherwise keep for the next step."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc only
    if trim is not None:
        trim(0)


class Tally(TorchDispatchMode):  # torch shows its operations to subclasses only
    """Bytes of the tensors made in a block: `live` those that are still held, `peak` the most so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._held = dict[int, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in tree_leaves(result):
            if isinstance(output, torch.Tensor):
                self._add(output.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._held:
            self._held[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.live -= self._held.pop(key)


def growth(run: Callable[[int], object], *, first: int = 1) -> int:
    """Bytes of tensors that one more image costs at the worst moment of `run(images)`, by running it twice."""
    peaks = []
    for images in (first, first + 1):
        with Tally() as tally:
            run(images)
        peaks.append(tally.peak)
    return max(1, peaks[1] - peaks[0])


def images_at_once(bytes_per_image: int, device: torch.device, *, most: int) -> int:
    """Images in a batch without gradients, at `bytes_per_image` bytes per image: from 1 to `most`."""
    available = room(device)
    budget = GPU_SHARE * available if device.type == "cuda" else min(ACTIVATIONS, available / 2)
    return int(min(most, max(1, budget // bytes_per_image)))
