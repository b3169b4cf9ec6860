"""Batches that are there when a step wants them: on the device from the start, or read ahead by a thread."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from corinfomax.images import Images

AHEAD = 3  # batches read before they are wanted
ROOM = 0.2  # share of a device's free memory that images may take, before anything else is on it

Pixels = UInt8[Tensor, "n 3 h w"]


class Feed:
    """The batches of a run's steps, each by its step, in any order; cheap where they are taken one after another."""

    def __init__(
        self,
        images: Images,
        indices: Callable[[int], Int[Tensor, " n"]],
        steps: int,
        device: torch.device,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._images, self._indices, self._steps, self._device, self._pool = images, indices, steps, device, pool
        self._resident = images.pixels.device == device and device.type == "cuda"
        self._pending: dict[int, Future[Pixels]] = {}
        self.waited = 0.0
        """Seconds that steps waited for their images."""

    def take(self, step: int) -> Pixels:
        """The images of that step on the device. Whatever reading raises is raised here."""
        if self._resident:
            return self._read(step)
        began = time.monotonic()
        ahead = self._pending.pop(step, None)
        pixels = self._read(step) if ahead is None else ahead.result()
        self.waited += time.monotonic() - began
        for later in range(step + 1, min(step + 1 + AHEAD, self._steps)):
            if later not in self._pending:
                self._pending[later] = self._pool.submit(self._read, later)
        return pixels.to(self._device, non_blocking=True)

    def _read(self, step: int) -> Pixels:
        pixels, _ = self._images.batch(self._indices(step))
        # From pinned memory a copy to the GPU goes on beside the step before; torch keeps it until it is done.
        return pixels.pin_memory() if self._device.type == "cuda" and not self._resident else pixels


@contextlib.contextmanager
def feed(
    images: Images, indices: Callable[[int], Int[Tensor, " n"]], steps: int, device: torch.device
) -> Iterator[Feed]:
    """Batches of `images` at `indices(step)`, for steps below `steps`.

    Equal images that fit into ROOM of a GPU's free memory are copied there once; all else is read by a thread, at most
    AHEAD batches before its step.
    """
    if device.type == "cuda" and images.equal:
        free, _ = torch.cuda.mem_get_info(device)
        if images.pixels.numel() <= ROOM * free:
            images = replace(images, pixels=images.pixels.to(device))
    pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
    try:
        yield Feed(images, indices, steps, device, pool)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
