"""Batches that are ready when a step needs them: images on the GPU from the start, or read ahead by a thread."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from corinfomax.images.cache import Images
from corinfomax.recipes.fields import Recipe
from corinfomax.training.batches import Batch, draw_batch, reader

AHEAD = 3  # batches
ROOM = 0.2  # share of a GPU's free memory for all images, before anything else is on it


class Prefetch:
    """The batches of a run, by step and in any order; fast when steps follow one another."""

    def __init__(
        self, load: Callable[[int], Batch], steps: int, device: torch.device, pool: ThreadPoolExecutor | None
    ) -> None:
        self._load, self._steps, self._device, self._pool = load, steps, device, pool
        self._pending: dict[int, Future[Batch]] = {}
        self.waited = 0.0
        """Seconds that steps waited for their batch."""

    def take(self, step: int) -> Batch:
        """The batch of a step, its pixels on the device. Errors of the reading thread are raised here."""
        if self._pool is None:
            return self._load(step)

        # This step's batch, loaded now when nobody asked for it before.
        started = time.monotonic()
        future = self._pending.pop(step, None)
        batch = self._load(step) if future is None else future.result()
        self.waited += time.monotonic() - started

        # The next ones.
        for later in range(step + 1, min(step + 1 + AHEAD, self._steps)):
            if later not in self._pending:
                self._pending[later] = self._pool.submit(self._load, later)
        return batch.to(self._device)


@contextlib.contextmanager
def prefetch(
    recipe: Recipe, images: Images, steps: int, device: torch.device, share: slice = slice(None)
) -> Iterator[Prefetch]:
    """The batches of `steps` steps; `share` is this process's slice of each global batch.

    Images of equal size that fit into ROOM of a GPU's free memory are copied there once. All others are read by a
    thread, at most AHEAD batches before their step.
    """
    if device.type == "cuda" and images.equal:
        available, _ = torch.cuda.mem_get_info(device)
        if images.pixels.numel() <= ROOM * available:
            images = images.on(device)
            with contextlib.ExitStack() as stack:
                read = reader(recipe, images, device, stack)
                yield Prefetch(lambda step: read(draw_batch(recipe, images, step, share)), steps, device, None)
            return

    with contextlib.ExitStack() as stack:
        read = reader(recipe, images, device, stack)

        def load(step: int) -> Batch:
            batch = read(draw_batch(recipe, images, step, share))
            if device.type != "cuda":
                return batch
            # A copy from pinned memory runs beside the step before; torch keeps the memory until it is done.
            pinned = (pixels._replace(images=pixels.images.pin_memory()) for pixels in batch.pixels)
            return batch._replace(pixels=tuple(pinned))

        pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="prefetch"))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        yield Prefetch(load, steps, device, pool)
