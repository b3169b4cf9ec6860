"""Decoding: the bytes of image files and arrays as upright RGB uint8, many at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from corinfomax.images.files import DataError, Source

# Never EPS: Pillow would hand it to Ghostscript. AVIF last: before Pillow 11.3 asking for it raises.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
LONGEST = 4
"""Longest side of a cached image, in short sides: it bounds the padding of a batch."""
FEW = 256  # images for which no further process is worth starting
CHUNK = 32  # images a task: handing over one 32×32 image costs as much as decoding it
UPRIGHT: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each value of EXIF's Orientation (tag 0x0112)."""

KILLED = "a process that was decoding images was killed, perhaps for want of memory"
Decoded = UInt8[np.ndarray, "3 _ _"] | str
"""An image, or why it cannot be read."""
Look = Callable[[Any], list[Any]]
"""What looks at some images, and what it is told of them."""
T = TypeVar("T")


def decode_all(source: Source, side: int, progress: bool) -> Generator[Decoded, None, None]:
    """Each image of `source` in order, or why it cannot be read; a few chunks a core are in memory at any time."""
    return each(source, lambda image: decode(image, side), progress)


def each(
    source: Source, look: Callable[[Image.Image], T], progress: bool, *, said: str = "decoding"
) -> Generator[T | str, None, None]:
    """What `look` makes of each opened image of `source`, in order, or why it cannot be read.

    All cores look; a few chunks a core are in memory at any time. Whatever `look` raises makes the image unreadable.
    `said` is what the progress bar calls it. DataError where a process that looks was killed.
    """
    count = len(source.paths)
    workers = min(cores(), max(1, -(-count // CHUNK)))
    array = source.array() if source.array else None

    def open_image(row: int) -> Image.Image:
        if array is not None:
            return Image.fromarray(array[row])
        return Image.open(source.file(row), formats=FORMATS)

    def look_at(rows: range) -> list[T | str]:
        results: list[T | str] = []
        for row in rows:
            try:
                with open_image(row) as image:
                    results.append(look(image))
            except UnidentifiedImageError:
                results.append("not an image" if source.stamps[row, 0] else "empty file")
            except Exception as error:  # a malformed file makes Pillow's parsers raise nearly anything
                results.append(getattr(error, "strerror", None) or str(error) or type(error).__name__)
        return results

    chunks = (range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))
    pending: deque[Future[list[T | str]]] = deque()
    with (
        warnings.catch_warnings(),
        pool_of(look_at, workers, fork=count > FEW) as (pool, task),
        tqdm(total=count, desc=said, unit=" images", disable=None if progress else True) as bar,
    ):
        # What Pillow warns of (broken EXIF, many pixels) does not keep the pixels from being read.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        for rows in chunks:
            pending.append(pool.submit(task, rows))
            while len(pending) > 2 * workers or (pending and rows.stop == count):
                results = pending.popleft().result()
                yield from results
                bar.update(len(results))


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def pool_of(look_at: Look, workers: int, *, fork: bool) -> Generator[tuple[Executor, Look], None, None]:
    """Something that runs a task, and the task that is `look_at`.

    Processes where they are wanted and can be forked, since small images are mostly Python, which threads do one at a
    time; else threads.
    """
    processes = _processes(look_at, workers) if fork and workers > 1 and sys.platform == "linux" else None
    if processes is None:
        with ThreadPoolExecutor(workers) as threads:
            yield threads, look_at
        return
    try:
        with processes:
            yield processes, _look_at
    except BrokenProcessPool as error:
        raise DataError(KILLED) from error


def _processes(look_at: Look, workers: int) -> ProcessPoolExecutor | None:
    """Forked processes that are there for `look_at`; None where the system does not give as many."""
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin, (look_at, os.getpid()))
    with warnings.catch_warnings():
        # Python warns of threads when it forks; torch's are idle, and what is forked here never calls torch.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        try:
            pool.submit(os.getpid).result()  # forks them all
        except OSError:
            for child in (
                set(multiprocessing.active_children()) - before
            ):  # without them all, none of them is told to end
                child.kill()
                child.join()
            return None
    return pool


_tasks: list[Look] = []  # what a forked process is there for


def _begin(look_at: Look, parent: int) -> None:
    """In a process just forked: what asks to stop is for the parent, and this one ends when the parent is gone."""
    _tasks.append(look_at)
    os.setpgid(0, 0)  # nor does it get what is sent to the parent's group
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # What Pillow warns of (broken EXIF, many pixels) does not keep the pixels from being read.
    warnings.filterwarnings("ignore", module=r"PIL\.")

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _look_at(told: Any) -> list[Any]:
    return _tasks[-1](told)


def too_many(unreadable: int, count: int) -> bool:
    """Whether so many of `count` images are unreadable that the rest is not the data: over 1 % and over one, or all."""
    return unreadable > max(1, 0.01 * count) or unreadable == count


def check_skipped(source: Source, skipped: list[tuple[int, str]]) -> None:
    """Raise where `too_many` of the images were unreadable."""
    count = len(source.paths)
    if not too_many(len(skipped), count):
        return
    named = ", ".join(f"{source.paths[row]} ({reason})" for row, reason in skipped[:5])
    raise DataError(
        f"{len(skipped):,} of {count:,} images in {source.root} cannot be read, and no more than 1 % is skipped: "
        f"{named}{', …' if len(skipped) > 5 else ''}; remove or replace "
        "them, or leave them out: corinfomax doctor writes the list that --skip takes"
    )


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image once it is upright."""
    width, height = image.size
    on_its_side = image.getexif().get(0x0112) in (5, 6, 7, 8)
    return (width, height) if on_its_side and image.format != "TIFF" else (height, width)


def decode(image: Image.Image, side: int) -> UInt8[np.ndarray, "3 h w"]:
    """An opened image as RGB bytes, upright, its short side reduced to `side` where it is longer.

    The first frame of an animation; transparency over white; 16-bit levels divided by 257 (mode I is taken as 16-bit),
    floats taken as 0 to 1, or as 0 to 255 if any is above 1. Of a side longer than LONGEST short ones only the middle
    is kept. Raises what Pillow raises on a file that it cannot read whole.
    """
    short = min(image.size)
    # A JPEG then decodes at 1/2, 1/4 or 1/8 of its size, in less time; twice the side is left to resample from.
    drafted = image.draft(None, (2 * side * image.width // short, 2 * side * image.height // short))
    image.load()
    upright = UPRIGHT.get(image.getexif().get(0x0112))
    rgb = to_rgb(image)
    width, height = drafted[1][2:] if drafted else rgb.size  # of the drafted image in fractions of a pixel
    shorter = min(width, height)
    longest = LONGEST * max(shorter, side)
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    width, height = min(width, longest), min(height, longest)
    if shorter > side:
        size = max(side, round(width * side / shorter)), max(side, round(height * side / shorter))
    else:
        size = round(width), round(height)
    box = (left, top, left + width, top + height)
    rgb = rgb.resize(size, Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    if upright is not None:
        rgb = rgb.transpose(upright)
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image as RGB: transparency over white, 16-bit levels divided by 257."""
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    elif image.mode == "F":
        levels = np.nan_to_num(np.asarray(image))
        levels = levels * 255 if levels.max() <= 1 else levels
        image = Image.fromarray(np.rint(levels.clip(0, 255)).astype(np.uint8))
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")
