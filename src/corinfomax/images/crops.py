"""Crops cut out before they are made views: from the image files themselves, at full resolution, by processes that
decode beside the training, or from copies."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from corinfomax.images.decode import FORMATS, KILLED, UPRIGHT, pool_of, to_rgb, upright_size
from corinfomax.images.files import DataError, Source

FINE = 2  # sides of the view that a reduced crop still has, so that resampling it is all but that of the whole
SHARE = 8  # images a task
_T = Image.Transpose
UPSIDE_DOWN = (_T.FLIP_TOP_BOTTOM, _T.ROTATE_180, _T.ROTATE_90, _T.TRANSVERSE)
"""What makes the file's last column or row the first row."""
BACKWARDS = (_T.FLIP_LEFT_RIGHT, _T.ROTATE_180, _T.ROTATE_270, _T.TRANSVERSE)
"""What makes it the first column."""

Boxes = Int[np.ndarray, "n v 4"]
"""Top, left, height and width of each crop, in pixels of the upright image."""


class Cut(NamedTuple):
    """One crop of each image of a batch, at the top left of the largest height and width of them; elsewhere there are
    zeros, or anything where they are cut from copies."""

    pixels: UInt8[np.ndarray, "n 3 h w"]
    sizes: Int[np.ndarray, "n 2"]
    boxes: Float[np.ndarray, "n 4"] | Int[np.ndarray, "n 4"]
    """Where in these pixels the crop is: its edges may lie within some."""


Part = tuple[UInt8[np.ndarray, "3 _ _"], tuple[float, ...]]
"""The pixels that a crop covers, and its box among them."""
Cutter = Callable[[Sequence[int], Boxes, int], list[Cut]]
"""Rows of the source, a box for each of their crops, side of the view: each of the crops."""


def cut(image: Image.Image, boxes: Int[np.ndarray, "v 4"], side: int) -> list[Part]:
    """These parts of an opened image, as RGB.

    Larger ones than FINE times `side` are reduced while they stay at least that: all together as far as the smallest
    one goes, where JPEG decodes at 1/2, 1/4 or 1/8, and then each by the means of squares.
    """
    height, width = upright_size(image)
    spare = max(1, int(boxes[:, 2:].min()) // (FINE * side))
    given = image.width
    drafted = image.draft(None, (given // spare, image.height // spare)) if spare > 1 else None
    scale = drafted[1][2] / given if drafted else 1.0  # an eighth of 1,411 px are 176.4, though there are 177
    image.load()
    turn = UPRIGHT.get(image.getexif().get(0x0112))  # Pillow turns a TIFF itself, and says so here
    rgb = to_rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
    # The pixel that is there in part is the last one of the file, and the first one where that is turned round.
    above, before = (
        actual - scale * whole if turn in turned else 0.0
        for actual, whole, turned in ((rgb.height, height, UPSIDE_DOWN), (rgb.width, width, BACKWARDS))
    )
    found: list[Part] = []
    for box in boxes.tolist():
        top, left, tall, wide = (scale * edge for edge in box)
        top, left = top + above, left + before
        right, bottom = min(math.ceil(left + wide), rgb.width), min(math.ceil(top + tall), rgb.height)
        x, y = min(int(left), right - 1), min(int(top), bottom - 1)
        pixels = rgb.crop((x, y, right, bottom))
        if (by := int(min(tall, wide)) // (FINE * side)) > 1:
            pixels = pixels.reduce(by)
        by = max(1, by)
        part = (top - y, left - x, min(tall, bottom - top), min(wide, right - left))
        found.append((np.ascontiguousarray(np.asarray(pixels).transpose(2, 0, 1)), tuple(edge / by for edge in part)))
    return found


@contextlib.contextmanager
def cutter(source: Source, workers: int) -> Iterator[Cutter]:
    """What cuts crops from the files of `source` in so many processes, until the end of the block.

    Its call raises DataError for a file that cannot be read.
    """

    def work(task: tuple[Sequence[int], Boxes, int]) -> list[list[Part] | str]:
        rows, boxes, side = task
        found: list[list[Part] | str] = []
        for row, of_image in zip(rows, boxes, strict=True):
            try:
                with Image.open(source.file(row), formats=FORMATS) as image:
                    found.append(cut(image, of_image, side))
            except Exception as error:  # a malformed file makes Pillow's parsers raise nearly anything
                found.append(getattr(error, "strerror", None) or str(error) or type(error).__name__)
        return found

    with pool_of(work, workers, fork=True) as (pool, task):

        def crops(rows: Sequence[int], boxes: Boxes, side: int) -> list[Cut]:
            try:
                asked: list[Future[list[list[Part] | str]]] = [
                    pool.submit(task, (rows[start : start + SHARE], boxes[start : start + SHARE], side))
                    for start in range(0, len(rows), SHARE)
                ]
                found = [image for each in asked for image in each.result()]
            except BrokenProcessPool as error:  # said here, where the run can still be kept
                raise DataError(KILLED) from error
            images = []
            for row, image in zip(rows, found, strict=True):
                if isinstance(image, str):
                    raise DataError(f"{source.paths[row]} in {source.root} cannot be read any more: {image}")
                images.append(image)
            return [_padded([image[crop] for image in images]) for crop in range(boxes.shape[1])]

        yield crops


def cut_copies(images: Sequence[UInt8[np.ndarray, "3 _ _"]], boxes: Boxes) -> list[Cut]:
    """These parts of decoded images."""
    crops: list[Cut] = []
    for of_crop in boxes.transpose(1, 0, 2).tolist():
        parts: list[Part] = []
        for image, (top, left, height, width) in zip(images, of_crop, strict=True):
            parts.append((image[:, top : top + height, left : left + width], (0, 0, height, width)))
        crops.append(_padded(parts, np.empty))  # zeros would take twice the time of all the rest
    return crops


def _padded(parts: Sequence[Part], new: Callable[..., np.ndarray] = np.zeros) -> Cut:
    sizes = np.array([image.shape[1:] for image, _ in parts])
    pixels = new((len(parts), 3, *sizes.max(0)), np.uint8)
    for slot, (image, _), (height, width) in zip(pixels, parts, sizes.tolist(), strict=True):
        slot[:, :height, :width] = image
    return Cut(pixels, sizes, np.array([box for _, box in parts]))
