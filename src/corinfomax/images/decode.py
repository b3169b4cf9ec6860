"""Decoding: image files and arrays to upright levels of a format, whole or in crops, many at a time."""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32, Int, Int64, Num, UInt8
from PIL import Image
from PIL.Image import Transpose

from corinfomax.images.files import DataError, Source
from corinfomax.images.levels import Raster, as_raster, is_deep, scaled, stored, to_rgb
from corinfomax.images.readers import Opened, opened, upright
from corinfomax.recipes.fields import RGB, PixelFormat
from corinfomax.runtime import bars

LONGEST = 4  # longest side of a cached image, in short sides: it bounds the padding of a batch
FORK_ABOVE = 256  # images; starting processes takes longer than decoding fewer
IMAGES_PER_TASK = 32  # handing over one 32×32 image costs as much as decoding it
OVERSIZE = 2  # sides of the view that a reduced crop keeps, so that resampling it is nearly exact
GRACE = 5.0  # seconds for an executor to notice that a process was killed
KILLED = "a process that was decoding images was killed, perhaps because memory ran out"

# EXIF orientations (tag 0x0112): the inverse of each
UPRIGHT: dict[object, Transpose] = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM}
UPRIGHT |= {5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}
Task = Callable[[Any], Any]
T = TypeVar("T")
Crop = tuple[Num[np.ndarray, "c _ _"], tuple[float, ...]]  # whole pixels that cover a crop, and its box among them
Crops = tuple[Num[np.ndarray, "n c h w"], Int[np.ndarray, "n 2"], Num[np.ndarray, "n 4"]]
"""One crop of each image: pixels, at the top left of zeros or, if cached, of anything; their height and width; boxes of
top, left, height and width, whose edges may lie inside a pixel."""


def reason(error: Exception) -> str:
    """Short reason why an image cannot be read, from the error of opening or decoding it."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def try_image(source: Source, row: int, work: Callable[[Opened], T]) -> T | str:
    """Result of `work` on one opened image of `source`, or the reason it is unreadable."""
    try:
        with opened(source.content(row), source.plane(row), source.stack) as image:
            return work(image)
    except Exception as error:  # parsers raise nearly anything
        return reason(error)


def read_again(source: Source, row: int, work: Callable[[Opened], T]) -> T:
    """As `try_image`, for images that were readable once: raises DataError if one no longer is."""
    if isinstance(result := try_image(source, row, work), str):
        raise DataError(f"{source.paths[row]} in {source.root} cannot be read any more: {result}")
    return result


def upright_size(image: Opened) -> tuple[int, int]:
    """Height and width of an opened image once it is upright."""
    if isinstance(image, Raster):
        height, width, _ = image.values.shape
        return height, width
    width, height = image.size
    sideways = image.getexif().get(0x0112) in (5, 6, 7, 8) and image.format != "TIFF"  # Pillow turns a TIFF itself
    return (width, height) if sideways else (height, width)


def decode(image: Opened, side: int, pixels: PixelFormat = RGB) -> Num[np.ndarray, "c h w"]:
    """Decode an opened image to upright levels of a format, its short side reduced to `side` if it is longer.

    An animation gives its first frame, an image longer than LONGEST short sides its middle. Transparency lies over
    white. Raises DataError for an image of other channels or of levels that the format does not have, and Pillow's
    errors for a file that is damaged or cut off.
    """
    if is_deep(image) or pixels != RGB:
        return _decode_levels(image, side, pixels)
    assert isinstance(image, Image.Image)

    # A JPEG decodes faster at 1/2, 1/4 or 1/8 of its size; keep twice the side to resample from.
    short = min(image.size)
    drafted = image.draft(None, (2 * side * image.width // short, 2 * side * image.height // short))
    image.load()
    orientation = UPRIGHT.get(image.getexif().get(0x0112))
    rgb = to_rgb(image)

    width, height = drafted[1][2:] if drafted else rgb.size  # a drafted image ends at a fraction of a pixel
    box, size = _reduced(width, height, side)
    rgb = rgb.resize(size, Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    if orientation is not None:
        rgb = rgb.transpose(orientation)
    return _planar(np.asarray(rgb))


def _decode_levels(image: Opened, side: int, pixels: PixelFormat) -> Num[np.ndarray, "c h w"]:
    levels = _upright_levels(image, pixels)
    box, size = _reduced(levels.shape[1], levels.shape[0], side)
    if size != levels.shape[1::-1]:
        planes = [Image.fromarray(plane) for plane in np.ascontiguousarray(levels.transpose(2, 0, 1))]
        reduced = [plane.resize(size, Image.Resampling.BICUBIC, box, reducing_gap=3.0) for plane in planes]
        levels = np.stack([np.asarray(plane) for plane in reduced], 2)
    return stored(levels, pixels)


def _upright_levels(image: Opened, pixels: PixelFormat) -> Float32[np.ndarray, "h w c"]:
    """The levels of an opened image in a format, not yet rounded."""
    if isinstance(image, Raster):
        return scaled(as_raster(image, pixels.channels), pixels)
    image.load()
    levels = scaled(as_raster(image, pixels.channels), pixels)
    return upright(levels, int(image.getexif().get(0x0112, 1)) if image.format != "TIFF" else 1)


def _reduced(width: float, height: float, side: int) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """The middle of a long image as a box, and the size to which it is reduced."""
    shorter = min(width, height)
    longest = LONGEST * max(shorter, side)
    x, y = max(0, width - longest) // 2, max(0, height - longest) // 2
    width, height = min(width, longest), min(height, longest)
    size = round(width), round(height)
    if shorter > side:
        size = max(side, round(width * side / shorter)), max(side, round(height * side / shorter))
    return (x, y, x + width, y + height), size


def read_crops(image: Opened, boxes: Int[np.ndarray, "v 4"], side: int, pixels: PixelFormat = RGB) -> list[Crop]:
    """Read regions of an opened image as levels of a format; `boxes` are in pixels of the upright image.

    Large crops are reduced while OVERSIZE times `side` remains: first all together as far as the smallest allows, by
    decoding a JPEG at 1/2, 1/4 or 1/8, then each by the means of blocks of pixels.
    """
    if is_deep(image) or pixels != RGB:
        planes = _upright_levels(image, pixels).transpose(2, 0, 1)
        whole = [Image.fromarray(plane) for plane in np.ascontiguousarray(planes)]
        return [_crop(whole, box, side, lambda levels: stored(levels, pixels)) for box in boxes.tolist()]
    assert isinstance(image, Image.Image)
    height, width = upright_size(image)
    reduction = max(1, int(boxes[:, 2:].min()) // (OVERSIZE * side))
    full = image.width
    drafted = image.draft(None, (full // reduction, image.height // reduction)) if reduction > 1 else None
    scale = drafted[1][2] / full if drafted else 1.0  # an eighth of 1,411 px is 176.4 px, in 177 pixels
    image.load()

    # turn it upright; a TIFF, turned by Pillow, has no orientation left
    orientation = image.getexif().get(0x0112)
    rgb = to_rgb(image)
    if orientation in UPRIGHT:
        rgb = rgb.transpose(UPRIGHT[orientation])

    # The file's last row and column may be fractions of a pixel, and upright they may come first.
    above = rgb.height - scale * height if orientation in (3, 4, 7, 8) else 0.0
    before = rgb.width - scale * width if orientation in (2, 3, 6, 7) else 0.0
    crops = []
    for box in boxes.tolist():
        top, left, height, width = (scale * edge for edge in box)
        crops.append(_crop([rgb], (top + above, left + before, height, width), side, _planar))
    return crops


def _crop(
    planes: Sequence[Image.Image], box: Sequence[float], side: int, store: Callable[[np.ndarray], np.ndarray]
) -> Crop:
    """The whole pixels around a box of upright planes, reduced by blocks, and the box among them."""
    top, left, height, width = box
    right, bottom = min(math.ceil(left + width), planes[0].width), min(math.ceil(top + height), planes[0].height)
    x, y = min(int(left), right - 1), min(int(top), bottom - 1)
    factor = max(1, int(min(height, width)) // (OVERSIZE * side))
    reduced = [np.asarray(plane.reduce(factor, (x, y, right, bottom))) for plane in planes]
    edges = (top - y, left - x, min(height, bottom - top), min(width, right - left))
    return store(np.dstack(reduced)), tuple(edge / factor for edge in edges)


def _planar(levels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "3 h w"]:
    return np.ascontiguousarray(levels.transpose(2, 0, 1))


def too_many(unreadable: int, count: int) -> bool:
    """True for more unreadable images than may be skipped: over 1 % and over one, or all."""
    return unreadable > max(1, 0.01 * count) or unreadable == count


def check_skipped(source: Source, skipped: Sequence[tuple[int, str]]) -> None:
    """Raise DataError for `too_many` unreadable images, given the row and reason of each."""
    count = len(source.paths)
    if too_many(len(skipped), count):
        named = ", ".join(f"{source.paths[row]} ({cause})" for row, cause in skipped[:5])
        named += ", …" if len(skipped) > 5 else ""
        problem = f"{len(skipped):,} of {count:,} images in {source.root} cannot be read"
        remedy = "remove or replace them, or leave them out with --skip and the list that corinfomax doctor writes"
        raise DataError(f"{problem}, and no more than 1 % is skipped: {named}; {remedy}")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_images(
    source: Source, work: Callable[[Opened], T], progress: bool, *, label: str = "decoding"
) -> Generator[T | str, None, None]:
    """Result of `work` on each opened image of `source`, or the reason it is unreadable.

    In order, on all cores, with a few tasks a core in memory. Raises DataError if a worker process is killed.
    """
    count = len(source.paths)
    tasks = [range(start, min(start + IMAGES_PER_TASK, count)) for start in range(0, count, IMAGES_PER_TASK)]
    workers = min(cores(), max(1, len(tasks)))
    if source.array is not None:
        source.array()  # read before the fork, so that processes share it

    def work_on(rows: range) -> list[T | str]:
        return [try_image(source, row, work) for row in rows]

    pending: deque[Future[list[T | str]]] = deque()
    with (
        warnings.catch_warnings(),
        worker_pool(work_on, workers, fork=count > FORK_ABOVE) as submit,
        bars.tqdm(total=count, desc=label, unit=" images", disable=not (progress and bars.shown())) as bar,
    ):
        warnings.filterwarnings("ignore", module=r"PIL\.")  # broken EXIF and many pixels do no harm
        for rows in tasks:
            pending.append(submit(rows))
            # wait for the oldest task if the queue is full, and for all after the last
            while len(pending) > 2 * workers or (pending and rows.stop == count):
                results = pending.popleft().result()
                yield from results
                bar.update(len(results))


def padded(
    images: Sequence[Num[np.ndarray, "c _ _"]], new: Callable[..., np.ndarray] = np.zeros
) -> tuple[Num[np.ndarray, "n c h w"], Int64[np.ndarray, "n 2"]]:
    """One batch of unequal images, each at the top left of the largest height and width."""
    sizes = np.array([image.shape[1:] for image in images], np.int64).reshape(-1, 2)
    channels, kind = (len(images[0]), images[0].dtype) if images else (3, np.uint8)
    batch = new((len(images), channels, *sizes.max(0, initial=0)), kind)
    for slot, image, (height, width) in zip(batch, images, sizes.tolist(), strict=True):
        slot[:, :height, :width] = image
    return batch, sizes


@contextlib.contextmanager
def crop_reader(
    source: Source, workers: int, pixels: PixelFormat
) -> Iterator[Callable[[Sequence[int], Int[np.ndarray, "n v 4"], int], list[Crops]]]:
    """Start processes that read crops from the files of `source` until the end of the block.

    The reader takes rows of `source`, boxes in their upright pixels and the side of the views, and gives one batch per
    view. It raises DataError for a file that cannot be read, or if a process is killed.
    """

    def work(task: tuple[Sequence[int], Int[np.ndarray, "n v 4"], int]) -> list[list[Crop]]:
        rows, boxes, side = task
        regions = zip(rows, boxes, strict=True)
        return [
            read_again(source, row, partial(read_crops, boxes=box, side=side, pixels=pixels)) for row, box in regions
        ]

    def read(rows: Sequence[int], boxes: Int[np.ndarray, "n v 4"], side: int) -> list[Crops]:
        # a few files a task, over all workers
        tasks = [slice(start, start + 8) for start in range(0, len(rows), 8)]
        try:
            futures = [submit((rows[task], boxes[task], side)) for task in tasks]
            images = [crops for future in futures for crops in future.result()]
        except BrokenExecutor as error:  # raised here, where the run can still be saved
            raise DataError(KILLED) from error
        return [_batch([crops[view] for crops in images]) for view in range(boxes.shape[1])]

    with worker_pool(work, workers, fork=True) as submit:
        yield read


def crop_cached(images: Sequence[Num[np.ndarray, "c _ _"]], boxes: Int[np.ndarray, "n v 4"]) -> list[Crops]:
    """Crop decoded images, one batch per view; `boxes` are in their pixels."""
    batches = []
    for view in boxes.transpose(1, 0, 2).tolist():
        crops: list[Crop] = []
        for image, (top, left, height, width) in zip(images, view, strict=True):
            crops.append((image[:, top : top + height, left : left + width], (0, 0, height, width)))
        batches.append(_batch(crops, np.empty))  # zeros would take twice the time of all the rest
    return batches


def _batch(crops: Sequence[Crop], new: Callable[..., np.ndarray] = np.zeros) -> Crops:
    pixels, sizes = padded([pixels for pixels, _ in crops], new)
    return pixels, sizes, np.array([box for _, box in crops])


@contextlib.contextmanager
def worker_pool(task: Task, workers: int, *, fork: bool) -> Generator[Callable[[Any], Future[Any]], None, None]:
    """Start workers for `task` and yield a function that submits an argument for it."""
    # Forked processes where the system allows it: small images are mostly Python, and threads execute that in turn.
    processes = _fork(task, workers) if fork and workers > 1 and sys.platform == "linux" else None
    ended = threading.Event()
    if processes is not None:
        threading.Thread(target=_watch, args=(processes, ended), daemon=True).start()
    try:
        with processes or ThreadPoolExecutor(workers) as pool:
            try:
                yield lambda argument: pool.submit(_run_task if processes else task, argument)
            finally:
                ended.set()
    except BrokenExecutor as error:
        raise DataError(KILLED) from error


def _watch(pool: ProcessPoolExecutor, ended: threading.Event) -> None:
    """Break a pool of which a process was killed while it wrote a result: the executor would wait for the rest."""
    workers, writer = list(pool._processes.values()), pool._result_queue._writer  # type: ignore[attr-defined]
    while not ended.wait(1.0):
        if all(worker.is_alive() for worker in workers):
            continue
        # Killed at any other moment, the executor notices by itself. With the last writer gone, reading fails.
        if not ended.wait(GRACE) and not writer.closed:
            handle, writer._handle = writer.fileno(), None  # closed for the executor, which closes it too
            os.close(handle)
            for worker in workers:
                worker.kill()
        return


def _fork(task: Task, workers: int) -> ProcessPoolExecutor | None:
    """Forked processes for `task`; None if the system does not allow that many."""
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (task, os.getpid()))
    # Python warns of threads when it forks; torch's are idle, and the workers never call torch.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        try:
            pool.submit(os.getpid).result()  # forks them all
        except OSError:
            # an incomplete pool never tells its processes to end
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
                child.join()
            return None
    return pool


_tasks: list[Task] = []  # of a forked process: its one task


def _start_worker(task: Task, parent: int) -> None:
    """Prepare a forked process: it leaves signals to its parent, and ends when that is gone."""
    _tasks.append(task)
    if sys.platform != "win32":  # out of the parent's group, to which a terminal or batch system sends signals
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.filterwarnings("ignore", module=r"PIL\.")

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run_task(argument: Any) -> Any:
    return _tasks[-1](argument)
