"""One look at each image of a split: what can be read, what it is, and what is needed to compare it with the others."""

from __future__ import annotations

import functools
import hashlib
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64, UInt8
from PIL import Image
from torch import Tensor

from corinfomax.evaluation.similar import FINE
from corinfomax.images.decode import decode, each
from corinfomax.images.files import Source

ONE_COLOUR = 3  # levels of 255 by which the pixels of a picture of one colour differ at most: JPEG's rounding
KINDS = {
    "RGB": "",
    "L": "grey",
    "1": "black and white",
    "CMYK": "CMYK",
    "F": "floating point",
    "P": "palette",
}


@dataclass(frozen=True, eq=False)
class Seen:
    """What was seen of the n images of one split that can be read; about 2 kB of memory each."""

    split: str
    root: str
    """The folder that paths start from; of an array set, its name."""
    paths: tuple[str, ...]
    labels: tuple[str, ...] | None
    unreadable: tuple[tuple[str, str], ...]
    """Path and reason of each image that cannot be read."""
    sizes: Int64[np.ndarray, "n 2"]
    """Width and height in the file, in pixels."""
    kinds: tuple[str, ...]
    """How an image is kept in its file: empty for plain RGB, `grey` for 8 bits of grey, else what is unusual."""
    digests: tuple[bytes, ...]
    """Of each image's pixels and shape as training would see them: equal for the same pixels alone."""
    squares: UInt8[Tensor, "n 3 s s"]
    """Each image squeezed whole into a small square."""
    blank: Bool[np.ndarray, " n"]
    """Whether an image has one colour only."""
    grey: Bool[np.ndarray, " n"]
    """Whether no pixel of an image has a hue."""
    moments: Float64[np.ndarray, "n 2 3"]
    """Mean and mean square of red, green and blue in [0, 1]."""
    cached: int
    """Bytes of the decoded images in the cache."""

    def __len__(self) -> int:
        return len(self.paths)


class _Look(NamedTuple):
    size: tuple[int, int]
    kind: str
    digest: bytes
    square: UInt8[np.ndarray, "3 s s"]
    blank: bool
    grey: bool
    moments: Float32[np.ndarray, "2 3"]
    cached: int


def examine(name: str, source: Source, side: int, *, progress: bool = True) -> Seen:
    """Decode every image of the split called `name`, reduced to a short side of `side` pixels, and keep what was seen.

    A few images a core are in memory at any time. Nothing is written: the cache is for one selection of images, which
    is only known after this. An image that Pillow takes for a decompression bomb counts as unreadable.
    """
    count = len(source.paths)
    sizes, moments = np.zeros((count, 2), np.int64), np.zeros((count, 2, 3))
    blank, grey = np.zeros(count, bool), np.zeros(count, bool)
    squares = np.zeros((count, 3, FINE, FINE), np.uint8)
    kept: list[int] = []
    kinds: list[str] = []
    digests: list[bytes] = []
    unreadable: list[tuple[str, str]] = []
    cached = 0
    with closing(each(source, lambda image: _look(image, side), progress, said=f"looking at {name}")) as looks:
        for row, look in enumerate(looks):
            if isinstance(look, str):
                unreadable.append((source.paths[row], look))
                continue
            at = len(kept)
            sizes[at], squares[at], blank[at], grey[at], moments[at] = (
                look.size,
                look.square,
                look.blank,
                look.grey,
                look.moments,
            )
            kept.append(row)
            kinds.append(look.kind)
            digests.append(look.digest)
            cached += look.cached
    n = len(kept)
    return Seen(
        split=name,
        root=source.root,
        paths=tuple(source.paths[row] for row in kept),
        labels=None if source.labels is None else tuple(source.labels[row] for row in kept),
        unreadable=tuple(unreadable),
        sizes=sizes[:n],
        kinds=tuple(kinds),
        digests=tuple(digests),
        squares=torch.from_numpy(squares[:n]),
        blank=blank[:n],
        grey=grey[:n],
        moments=moments[:n],
        cached=cached,
    )


def _look(image: Image.Image, side: int) -> _Look:
    size, kind = image.size, _kind(image)
    pixels = decode(image, side)
    _, height, width = pixels.shape
    # For small images calls are the time: two matrix products, as Pillow's resize costs three copies.
    levels = pixels.astype(np.float32)
    square = _shares(height) @ levels @ _shares(width).T
    flat, x = pixels.reshape(3, -1), levels.reshape(3, -1) / 255
    return _Look(
        size,
        kind,
        hashlib.blake2b(pixels.data, digest_size=16, salt=b"%d %d" % (height, width)).digest(),
        np.rint(square).astype(np.uint8),
        bool((flat.max(1) - flat.min(1)).max() <= ONE_COLOUR),
        np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[1], pixels[2]),
        np.stack((x.mean(1), (x * x).mean(1))),
        pixels.nbytes,
    )


@functools.lru_cache(maxsize=4096)
def _shares(length: int) -> Float32[np.ndarray, "s length"]:
    """What each of `length` pixels in a line gives to each of FINE equal parts of that line; rows sum to 1."""
    edges = np.arange(FINE + 1) * length / FINE
    pixels = np.arange(length)
    inside = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (inside.clip(0) * FINE / length).astype(np.float32)


def _kind(image: Image.Image) -> str:
    if getattr(image, "is_animated", False):
        return "animated"
    if image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        return "16-bit"
    if image.has_transparency_data:
        return "with transparency"
    return KINDS.get(image.mode, f"{image.mode} colours")
