"""Inspection of each image in a split: readable or not, size, format, colours, and a thumbnail to compare."""

import functools
import hashlib
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64, UInt8
from torch import Tensor

from corinfomax.evaluation.similar import THUMBNAIL
from corinfomax.images.conversions import conversion
from corinfomax.images.decode import decode, map_images
from corinfomax.images.files import Source
from corinfomax.images.levels import Raster, as_rgb, is_deep
from corinfomax.images.readers import Opened
from corinfomax.recipes.fields import RGB, PixelFormat


class Inspection(NamedTuple):
    """Facts about the n readable images of one split; about 2 kB of memory per image."""

    split: str
    pixels: PixelFormat
    paths: tuple[str, ...]
    labels: tuple[str, ...] | None
    unreadable: tuple[tuple[str, str], ...]  # path and reason of each
    sizes: Int64[np.ndarray, "n 2"]  # width and height in the file, in pixels
    formats: tuple[str, ...]  # empty for plain RGB, `grey` for 8-bit grey, else unusual, such as `16-bit` or `CMYK`
    digests: tuple[bytes, ...]  # hash of each image's decoded pixels and shape
    thumbnails: UInt8[Tensor, "n 3 s s"]  # whole images, squeezed into a small square
    blank: Bool[np.ndarray, " n"]  # all pixels have one colour
    grey: Bool[np.ndarray, " n"]  # red, green and blue are equal in every pixel
    moments: Float64[np.ndarray, "n 2 c"]  # mean and mean square of each channel in [0, 1]
    decoded_bytes: int  # of all images in the cache


class _ImageFacts(NamedTuple):
    size: tuple[int, int]
    format: str
    digest: bytes
    blank: bool
    grey: bool
    decoded_bytes: int


def inspect_split(
    name: str, source: Source, side: int, pixels: PixelFormat = RGB, *, progress: bool = True
) -> Inspection:
    """Decode each image of a split to a short side of at most `side` pixels and record facts about it.

    A few images per core are in memory at a time. Decompression bombs, as Pillow calls them, count as unreadable.
    """
    count = len(source.paths)
    thumbnails = np.zeros((count, 3, THUMBNAIL, THUMBNAIL), np.uint8)
    moments = np.zeros((count, 2, pixels.channels))
    facts, unreadable = list[_ImageFacts](), dict[int, str]()

    # decode on all cores
    results = map_images(
        source, lambda image: _inspect_image(image, side, pixels), progress, label=f"inspecting {name}"
    )
    with closing(results):
        for row, result in enumerate(results):
            if isinstance(result, str):
                unreadable[row] = result
            else:
                image_facts, thumbnails[len(facts)], moments[len(facts)] = result
                facts.append(image_facts)

    # gather the facts in columns
    readable = source.take([row for row in range(count) if row not in unreadable])
    return Inspection(
        split=name,
        pixels=pixels,
        paths=readable.paths,
        labels=readable.labels,
        unreadable=tuple((source.paths[row], cause) for row, cause in unreadable.items()),
        sizes=np.array([image.size for image in facts], np.int64).reshape(-1, 2),
        formats=tuple(image.format for image in facts),
        digests=tuple(image.digest for image in facts),
        thumbnails=torch.from_numpy(thumbnails[: len(facts)]),
        blank=np.array([image.blank for image in facts], bool),
        grey=np.array([image.grey for image in facts], bool),
        moments=moments[: len(facts)],
        decoded_bytes=sum(image.decoded_bytes for image in facts),
    )


def _inspect_image(
    image: Opened, side: int, pixels: PixelFormat
) -> tuple[_ImageFacts, UInt8[np.ndarray, "3 s s"], Float32[np.ndarray, "2 c"]]:
    """Facts, thumbnail and moments of an opened image."""
    size = image.values.shape[1::-1] if isinstance(image, Raster) else image.size  # decoding changes it
    file_format = conversion(image, pixels)
    levels = decode(image, side, pixels)

    # Two matrix products: for small images Pillow's resize would spend its time on three copies.
    shown = as_rgb(levels, pixels).astype(np.float32)
    thumbnail = _area_weights(shown.shape[1]) @ shown @ _area_weights(shown.shape[2]).T
    flat = levels.reshape(pixels.channels, -1)
    x = flat.astype(np.float32) / np.array(pixels.each(pixels.steps), np.float32)[:, None]
    moments = np.stack((x.mean(1), (x * x).mean(1)))

    # The shape goes into the hash: the same bytes in another shape are another image.
    digest = hashlib.blake2b(levels.data, digest_size=16, salt=b"%d %d" % levels.shape[1:]).digest()
    span = int((flat.max(1) - flat.min(1)).max())
    blank = span <= (3 if pixels.is_bytes and not is_deep(image) else 0)  # levels of 255: JPEG rounding
    grey = pixels.colours and np.array_equal(levels[0], levels[1]) and np.array_equal(levels[1], levels[2])
    facts = _ImageFacts(size, file_format, digest, blank, grey, levels.nbytes)
    return facts, np.rint(thumbnail).astype(np.uint8), moments


@functools.lru_cache(maxsize=4096)
def _area_weights(length: int) -> Float32[np.ndarray, "s length"]:
    """Averaging of `length` pixels into THUMBNAIL equal intervals: the overlaps as weights, rows sum to 1."""
    edges = np.arange(THUMBNAIL + 1) * length / THUMBNAIL
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (overlap.clip(0) * THUMBNAIL / length).astype(np.float32)
