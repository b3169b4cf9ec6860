"""Images that a program holds as arrays, tensors, Pillow images or paths."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from corinfomax.images.files import DataError, Source, from_files, stamp

NAME = "images in memory"  # and a digest of them
KINDS = "an array or tensor of images, or a list of paths, Pillow images, arrays or tensors"
Labels = Sequence[object] | np.ndarray | torch.Tensor  # the class of each image, of any type that prints
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA


def from_memory(images: Any, labels: Labels | None = None) -> Source:
    """The source of images in memory: of an array or tensor of n images, or of a list.

    An image is a path, a Pillow image, or an array or tensor of height×width, height×width×channels or
    channels×height×width: integers, colours from 0 to 1, or other channels as floats of any range. Raises DataError for
    anything else.
    """
    try:
        items = list(images)
    except TypeError:
        raise DataError(f"images are {KINDS}, not {type(images).__name__}") from None
    if not items:
        raise DataError(f"there are no images: give {KINDS}")
    if labels is not None and len(labels) != len(items):
        raise DataError(f"{len(items)} images have {len(labels)} labels: each image needs one")
    names = None if labels is None else tuple(str(_plain(label)) for label in labels)
    if all(isinstance(item, str | os.PathLike) for item in items):
        return _from_paths([Path(item) for item in items], names)

    # The digest of the pixels tells other images of the same number apart.
    pixels = [_pixels(item, row) for row, item in enumerate(items)]
    digest = hashlib.blake2b(digest_size=32)
    for image in pixels:
        digest.update(f"{image.dtype} {image.shape}".encode())
        digest.update(np.ascontiguousarray(image).data)
    stamps = np.frombuffer(digest.digest(), np.int64).reshape(1, 4)
    paths = tuple(f"memory/{row:05d}" for row in range(len(items)))
    return Source(f"{NAME} {digest.hexdigest()[:16]}", paths, stamps, names, Held(pixels))


class Held:
    """Images in memory, as the `array` of a source."""

    def __init__(self, images: list[np.ndarray]) -> None:
        self._images = images

    def __call__(self) -> "Held":
        return self

    def __getitem__(self, rows: int | Sequence[int]) -> Any:
        return self._images[rows] if isinstance(rows, int) else Held([self._images[row] for row in rows])


def _from_paths(paths: list[Path], labels: tuple[str, ...] | None) -> Source:
    """The source of image files, named from the folder around all of them."""
    absolute = [path.expanduser().absolute() for path in paths]
    root = Path(os.path.commonpath([path.parent for path in absolute]))
    stamps = {}
    for path in absolute:
        name = path.relative_to(root).as_posix()
        if name in stamps:
            raise DataError(f"{path} is listed twice: list every image once")
        if not path.is_file():
            raise DataError(f"no image at {path}")
        stamps[name] = stamp(path.stat())
    return from_files(root, stamps, labels)


def _pixels(item: Any, row: int) -> np.ndarray:
    """Height×width, or height×width×channels, as Pillow takes it; ValueError names the row of a bad image."""
    if isinstance(item, str | os.PathLike):
        raise DataError(f"image {row} is a path and others are not: give paths alone, or pixels alone")
    if isinstance(item, Image.Image):
        item = ImageOps.exif_transpose(item)
        if item.mode not in ("1", "L", "RGB", "RGBA", "I", "I;16", "F"):
            item = item.convert("RGBA" if item.has_transparency_data else "RGB")
    array = item.detach().cpu().numpy() if isinstance(item, torch.Tensor) else np.asarray(item)

    if array.ndim not in (2, 3) or not array.size:
        shape = "×".join(map(str, array.shape)) or "a number"
        raise DataError(f"image {row} has the shape {shape}: want height×width, with channels first or last if any")

    # channels last: a usual number of them, else the shorter axis; a tensor has them first by custom, an array last
    if array.ndim == 3:
        first, last = array.shape[0] in CHANNELS, array.shape[2] in CHANNELS
        if first == last:
            first = array.shape[0] < array.shape[2] or (first and isinstance(item, torch.Tensor))
        array = array.transpose(1, 2, 0) if first else array
        array = array[:, :, 0] if array.shape[2] == 1 else array

    # levels
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    colours = array.ndim == 3 and array.shape[2] in CHANNELS
    if np.issubdtype(array.dtype, np.integer):
        return array
    if np.issubdtype(array.dtype, np.floating) and not colours:
        return array.astype(np.float32)
    low, high = float(array.min()), float(array.max())
    if np.issubdtype(array.dtype, np.floating) and low >= 0 and high <= 1:
        return np.rint(array * 255).astype(np.uint8)
    levels = f"{array.dtype} levels from {low:g} to {high:g}"
    raise DataError(f"image {row} has {levels}: colours are integers, or floats from 0 to 1, before any normalisation")


def _plain(label: object) -> object:
    """A label of NumPy or torch as Python's own, which prints without its type."""
    return label.item() if isinstance(label, np.generic | torch.Tensor) else label
