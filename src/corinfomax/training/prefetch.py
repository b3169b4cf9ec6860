"""Images that are there when a step wants them: on the device from the start, or read ahead by a thread."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from corinfomax.images.cache import Images
from corinfomax.images.crops import cut_copies, cutter
from corinfomax.images.decode import cores

AHEAD = 3  # batches read before they are wanted
ROOM = 0.2  # share of a device's free memory that images may take, before anything else is on it


class Batch(NamedTuple):
    """Images of one step, whole, or what one of their crops covers."""

    pixels: UInt8[Tensor, "n 3 h w"]
    sizes: Int[Tensor, "n 2"]
    """Height and width of each, on the CPU."""
    boxes: Float[Tensor, "n 4"] | Int[Tensor, "n 4"] | None = None
    """Of crops, where in these pixels each one is, on the CPU."""


Boxes = Callable[[int], tuple[Int[Tensor, "n v 4"], int] | None]
"""The boxes of the crops of a step's images, and the side of the views made of them; None where images go whole."""


class Feed:
    """The images of a run's steps, each by its step, in any order; cheap where they are taken one after another."""

    def __init__(
        self,
        read: Callable[[int], list[Batch]],
        steps: int,
        device: torch.device,
        pool: ThreadPoolExecutor | None,
    ) -> None:
        self._read, self._steps, self._device, self._pool = read, steps, device, pool
        self._pending: dict[int, Future[list[Batch]]] = {}
        self.waited = 0.0
        """Seconds that steps waited for their images."""

    def take(self, step: int) -> list[Batch]:
        """The images of that step on the device, whole, or apart for each crop. What reading raises is raised here."""
        if self._pool is None:
            return self._read(step)
        began = time.monotonic()
        ahead = self._pending.pop(step, None)
        found = self._read(step) if ahead is None else ahead.result()
        self.waited += time.monotonic() - began
        for later in range(step + 1, min(step + 1 + AHEAD, self._steps)):
            if later not in self._pending:
                self._pending[later] = self._pool.submit(self._read, later)
        return [batch._replace(pixels=batch.pixels.to(self._device, non_blocking=True)) for batch in found]


@contextlib.contextmanager
def feed(
    images: Images, indices: Callable[[int], Int[Tensor, " n"]], boxes: Boxes, steps: int, device: torch.device
) -> Iterator[Feed]:
    """Batches of `images` at `indices(step)`, for steps below `steps`, as `reader` reads them.

    Equal images that fit into ROOM of a GPU's free memory are copied there once; all else is read by a thread, at most
    AHEAD batches before its step, crops of files by processes.
    """
    if device.type == "cuda" and images.equal:
        free, _ = torch.cuda.mem_get_info(device)
        if images.pixels.numel() <= ROOM * free:
            images = replace(images, pixels=images.pixels.to(device))
            yield Feed(lambda step: [Batch(*images.batch(indices(step)))], steps, device, None)
            return
    with contextlib.ExitStack() as stack:
        read = reader(images, indices, boxes, device, stack)

        def ready(step: int) -> list[Batch]:
            found = read(step)
            if device.type != "cuda":
                return found
            # From pinned memory a copy to the GPU goes on beside the step before; torch keeps it until it is done.
            return [batch._replace(pixels=batch.pixels.pin_memory()) for batch in found]

        pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="feed"))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        yield Feed(ready, steps, device, pool)


def reader(
    images: Images,
    indices: Callable[[int], Int[Tensor, " n"]],
    boxes: Boxes,
    device: torch.device,
    stack: contextlib.ExitStack,
) -> Callable[[int], list[Batch]]:
    """What reads the images of a step: as their crops in `boxes` or whole.

    Images without copies come as crops, and so do unequal ones for CUDA unless `boxes` is None: all of a batch's
    pixels would go there, padded to its largest height and width. A CPU reads only what the crops cover.
    """
    if images.files is not None:
        cut = of_files(images, stack)
    elif device.type == "cuda" and not images.equal:
        cut = of_copies(images)
    else:
        return lambda step: [Batch(*images.batch(indices(step)))]

    def read(step: int) -> list[Batch]:
        asked = boxes(step)
        return [Batch(*images.batch(indices(step)))] if asked is None else cut(indices(step), *asked)

    return read


def of_copies(images: Images) -> Callable[[Int[Tensor, " n"], Int[Tensor, "n v 4"], int], list[Batch]]:
    """What cuts the crops of the images at some indices from their copies; boxes as of `of_files`."""

    def read(indices: Int[Tensor, " n"], boxes: Int[Tensor, "n v 4"], side: int) -> list[Batch]:
        copies = cast("list[np.ndarray]", images.copies(indices))  # they are on the CPU
        return [Batch(*map(torch.from_numpy, cut)) for cut in cut_copies(copies, boxes.numpy())]

    return read


def of_files(
    images: Images, stack: contextlib.ExitStack
) -> Callable[[Int[Tensor, " n"], Int[Tensor, "n v 4"], int], list[Batch]]:
    """What cuts the crops of the images at some indices from their files, until the stack is closed.

    Boxes are in pixels of the whole images; the crops are for views of that side. DataError for a lost file.
    """
    assert images.files is not None
    source, rows, _ = images.files
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine, each with its own
    cut = stack.enter_context(cutter(source, max(1, cores() // together)))

    def read(indices: Int[Tensor, " n"], boxes: Int[Tensor, "n v 4"], side: int) -> list[Batch]:
        found = cut(rows[indices].tolist(), boxes.numpy(), side)
        return [Batch(*map(torch.from_numpy, each)) for each in found]

    return read
