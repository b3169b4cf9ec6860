"""Inspection of each image in a split: readable or not, size, format, colours, and a thumbnail to compare."""

import functools
import hashlib
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64, UInt8
from PIL import Image
from torch import Tensor

from corinfomax.evaluation.similar import THUMBNAIL
from corinfomax.images.decode import DEEPEST, Levels, decode, deep_levels, map_images
from corinfomax.images.files import Source

# By Pillow's mode.
MODES = {"RGB": "", "L": "grey", "1": "black-and-white", "F": "floating-point", "P": "palette-based"}


class Inspection(NamedTuple):
    """Facts about the n readable images of one split; about 2 kB of memory per image."""

    split: str
    paths: tuple[str, ...]
    labels: tuple[str, ...] | None
    unreadable: tuple[tuple[str, str], ...]  # path and reason of each
    sizes: Int64[np.ndarray, "n 2"]  # width and height in the file, in pixels
    formats: tuple[str, ...]  # empty for plain RGB, `grey` for 8-bit grey, else unusual, such as `16-bit` or `CMYK`
    digests: tuple[bytes, ...]  # hash of each image's decoded pixels and shape
    thumbnails: UInt8[Tensor, "n 3 s s"]  # whole images, squeezed into a small square
    blank: Bool[np.ndarray, " n"]  # all pixels have one colour
    grey: Bool[np.ndarray, " n"]  # red, green and blue are equal in every pixel
    levels: tuple[Levels | None, ...]  # of images with more than 8 bits
    moments: Float64[np.ndarray, "n 2 3"]  # mean and mean square of red, green and blue in [0, 1]
    decoded_bytes: int  # of all images in the cache


class _ImageFacts(NamedTuple):
    size: tuple[int, int]
    format: str
    digest: bytes
    blank: bool
    grey: bool
    levels: Levels | None
    decoded_bytes: int


def inspect_split(name: str, source: Source, side: int, *, progress: bool = True) -> Inspection:
    """Decode each image of a split to a short side of at most `side` pixels and record facts about it.

    A few images per core are in memory at a time. Decompression bombs, as Pillow calls them, count as unreadable.
    """
    count = len(source.paths)
    thumbnails, moments = np.zeros((count, 3, THUMBNAIL, THUMBNAIL), np.uint8), np.zeros((count, 2, 3))
    facts, unreadable = list[_ImageFacts](), dict[int, str]()

    # decode on all cores
    results = map_images(source, lambda image: _inspect_image(image, side), progress, label=f"inspecting {name}")
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
        paths=readable.paths,
        labels=readable.labels,
        unreadable=tuple((source.paths[row], cause) for row, cause in unreadable.items()),
        sizes=np.array([image.size for image in facts], np.int64).reshape(-1, 2),
        formats=tuple(image.format for image in facts),
        digests=tuple(image.digest for image in facts),
        thumbnails=torch.from_numpy(thumbnails[: len(facts)]),
        blank=np.array([image.blank for image in facts], bool),
        grey=np.array([image.grey for image in facts], bool),
        levels=tuple(image.levels for image in facts),
        moments=moments[: len(facts)],
        decoded_bytes=sum(image.decoded_bytes for image in facts),
    )


def _inspect_image(
    image: Image.Image, side: int
) -> tuple[_ImageFacts, UInt8[np.ndarray, "3 s s"], Float32[np.ndarray, "2 3"]]:
    """Facts, thumbnail and moments of an opened image."""
    size, file_format = image.size, _format(image)  # decoding changes both
    pixels = decode(image, side)
    deep = deep_levels(image)
    if deep is None and file_format == "16-bit":  # Pillow keeps the upper 8 bits of three channels
        deep = Levels(0.0, min(float(pixels.max()) * 257 + 256, DEEPEST), floating=False)

    # Images are compared as they are in the file: with few levels left, different ones would look the same.
    compared = pixels if deep is None or image.mode == "RGB" else _stretched(image, deep)

    # Two matrix products: for small images Pillow's resize would spend its time on three copies.
    levels = pixels.astype(np.float32)
    thumbnail = _area_weights(compared.shape[1]) @ compared.astype(np.float32) @ _area_weights(compared.shape[2]).T
    flat, x = pixels.reshape(3, -1), levels.reshape(3, -1) / 255
    moments = np.stack((x.mean(1), (x * x).mean(1)))

    # The shape goes into the hash: the same bytes in another shape are another image.
    digest = hashlib.blake2b(compared.data, digest_size=16, salt=b"%d %d" % compared.shape[1:]).digest()
    flat_range = (flat.max(1) - flat.min(1)).max() if deep is None else deep.high - deep.low
    blank = bool(flat_range <= (3 if deep is None else 0))  # levels of 255: JPEG rounding
    grey = np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[1], pixels[2])
    facts = _ImageFacts(size, file_format, digest, blank, grey, deep, pixels.nbytes)
    return facts, np.rint(thumbnail).astype(np.uint8), moments


def _stretched(image: Image.Image, deep: Levels) -> Float32[np.ndarray, "3 h w"]:
    """Levels of a loaded image of more than 8 bits, from 0 to 255 over their own range, in three equal channels."""
    levels = np.nan_to_num(np.asarray(image), posinf=0, neginf=0).astype(np.float32)
    levels = (levels - deep.low) * (255 / max(deep.high - deep.low, 1e-9))
    return np.repeat(levels.astype(np.float32)[None], 3, axis=0)


@functools.lru_cache(maxsize=4096)
def _area_weights(length: int) -> Float32[np.ndarray, "s length"]:
    """Averaging of `length` pixels into THUMBNAIL equal intervals: the overlaps as weights, rows sum to 1."""
    edges = np.arange(THUMBNAIL + 1) * length / THUMBNAIL
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (overlap.clip(0) * THUMBNAIL / length).astype(np.float32)


def _format(image: Image.Image) -> str:
    if getattr(image, "is_animated", False):
        return "animated"
    if image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        return "16-bit"
    if image.has_transparency_data:
        return "transparent"
    return MODES.get(image.mode, image.mode)
