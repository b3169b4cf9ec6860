"""Readers: an image file as Pillow opens it, or as the numbers in it where Pillow would lose some."""

import contextlib
import functools
import importlib
import importlib.util
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from corinfomax.images.files import DICOM, DICOM_START, DataError
from corinfomax.images.levels import Raster
from corinfomax.runtime import extras

# Never EPS: Pillow would hand it to Ghostscript.
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF"]
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes of a file; + is BigTIFF
PNG_OF_16_BITS = (b"\x10\x02", b"\x10\x06", b"\x10\x04")  # bits and kind in its header: RGB, RGBA, grey with alpha
NUMPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"
HEIF, JXL = (b"ftyphei", b"ftypmif1", b"ftyphev"), b"JXL "  # from the fifth byte on
JXL_STREAM = b"\xff\x0a"  # a JPEG XL without a container
PACKAGES = {"pillow_heif": "pillow-heif", "pillow_jxl": "pillow-jxl-plugin"}  # of modules with other names

WHITE_IS_ZERO, RGB_PHOTOMETRIC = 0, 2  # photometric interpretations of a TIFF
BITS, PHOTOMETRIC, ORIENTATION, SAMPLES, EXTRA_SAMPLES = 258, 262, 274, 277, 338  # tags of a TIFF
ALPHA = (1, 2)  # extra samples that are transparency; 0 is any other data


class UnclearError(DataError):
    """A file with several planes that does not say what they are."""


Content = Path | io.BytesIO | np.ndarray
Opened = Image.Image | Raster
StackAxis = Literal["channels", "images"]  # what several planes of one size in a file are


@contextlib.contextmanager
def opened(content: Content, plane: int | None = None, stack: StackAxis | None = None) -> Iterator[Opened]:
    """The image in a file or an array, or number `plane` of several; a malformed file may raise any Exception."""
    if isinstance(content, np.ndarray):
        yield from_array(content)
        return
    start = _start(content)
    read = _reader(content, start)
    if read is not None:
        yield read(content, plane, stack)
        return
    if start[4:].startswith(HEIF):
        _use_plugin("pillow_heif")
    elif start[4:].startswith(JXL) or start.startswith(JXL_STREAM):
        _use_plugin("pillow_jxl")
    try:
        image = Image.open(content, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise DataError("not an image" if start else "empty file") from error
    with image:
        yield image


def may_be_stack(content: Content) -> bool:
    """True for content that begins as a file of several images may."""
    start = b"" if isinstance(content, np.ndarray) else _start(content)
    return start.startswith((*TIFF, NUMPY, ZIP)) or start[DICOM_START:] == DICOM


def planes(content: Content, stack: StackAxis | None = None) -> int:
    """Number of images in a file; DataError if it holds several planes that could be images or channels."""
    start = b"" if isinstance(content, np.ndarray) else _start(content)
    if start.startswith(TIFF) and not _is_plain_tiff(content):
        with _library("tifffile", "this TIFF").TiffFile(content) as file:
            return len(_tiff_pages(file.series[0], stack))
    if start.startswith((NUMPY, ZIP)):
        return sum(len(_images_of(array, stack)) for array in _arrays(content))
    if start[DICOM_START:] == DICOM:
        header = _library("pydicom", "DICOM").dcmread(content, stop_before_pixels=True)
        return int(header.get("NumberOfFrames", 1) or 1)
    return 1


def _only(count: int, plane: int | None) -> int:
    """The plane to read of so many; DataError for several of which none is named."""
    if plane is None and count > 1:
        raise DataError(f"it holds {count} images, of which none is named: save each as a file")
    return plane or 0


def _unclear(count: int) -> UnclearError:
    choices = f"--stack channels for one image of {count} channels, --stack images for {count} images"
    return UnclearError(f"it holds {count} planes, and does not say what they are: {choices}")


def from_array(values: np.ndarray) -> Opened:
    """An array of height×width or height×width×channels: bytes of 1, 3 or 4 channels as Pillow's, others as numbers."""
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    if values.dtype == np.uint8 and (values.ndim == 2 or values.shape[2] in (3, 4)):
        return Image.fromarray(values)
    if values.dtype.kind not in "uif":
        raise DataError(f"numbers of type {values.dtype} are no levels of an image")
    return Raster(values[:, :, None] if values.ndim == 2 else values, values.ndim == 3 and values.shape[2] == 3)


def _start(content: Path | io.BytesIO) -> bytes:
    """The first bytes of a file, enough to tell its kind."""
    if isinstance(content, io.BytesIO):
        return content.getbuffer()[: DICOM_START + 4].tobytes()
    with content.open("rb") as file:
        return file.read(DICOM_START + 4)


def _reader(content: Path | io.BytesIO, start: bytes) -> Any:
    """Function that reads a file of numbers; None where Pillow reads it without loss."""
    if start.startswith(TIFF):
        return None if _is_plain_tiff(content) else _read_tiff
    if start.startswith((NUMPY, ZIP)):
        return _read_array
    if start[DICOM_START:] == DICOM:
        return _read_dicom
    deep_png = start[1:4] == b"PNG" and start[24:26] in PNG_OF_16_BITS
    return _read_png if deep_png and importlib.util.find_spec("imagecodecs") else None


def _library(name: str, what: str) -> Any:
    """A module of the extra `formats`; DataError with what to install if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(extras.missing(what, PACKAGES.get(name, name), extra="formats")) from None


@functools.cache
def _use_plugin(name: str) -> None:
    """Let Pillow open files of a plug-in."""
    module = _library(name, "this format")
    if name == "pillow_heif":
        module.register_heif_opener()
    FORMATS.extend(["HEIF"] if name == "pillow_heif" else ["JXL"])


def upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """An array of height×width×channels turned as an EXIF orientation says."""
    if orientation in (5, 6, 7, 8):
        values = values.transpose(1, 0, 2)
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return values[:: -1 if rows else 1, :: -1 if columns else 1]


# TIFF and PNG


def _is_plain_tiff(content: Any) -> bool:
    """True for a TIFF of one image that Pillow reads without loss: of one channel, or of 8 bits in grey or colour."""
    try:
        stream = io.BytesIO(content.getbuffer()) if isinstance(content, io.BytesIO) else content
        with Image.open(stream, formats=["TIFF"]) as image:
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            samples, bits, extra = tags.get(SAMPLES, 1), tags.get(BITS, (1,)), tags.get(EXTRA_SAMPLES, ())
            lossy = samples > 1 and (max(bits) > 8 or any(kind not in ALPHA for kind in extra))
            lossy |= max(bits) > 8 and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO  # which Pillow does not turn round
            return not lossy and getattr(image, "n_frames", 1) == 1
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return False


def _tiff_pages(series: Any, stack: StackAxis | None) -> np.ndarray:
    """The pages of each image of a series, one row an image; DataError if their meaning is not recorded."""
    inner = series.pages[0].axes
    axes = series.axes.removesuffix(inner)
    shape = series.shape[: len(axes)]
    if series.axes != axes + inner or len(series.pages) != math.prod(shape):
        raise DataError(f"its axes {series.axes} are not read: save each image as a file")
    unknown = [place for place, axis in enumerate(axes) if axis not in "TZRPC"]
    if unknown and stack is None and math.prod(shape) > 1:
        raise _unclear(math.prod(shape))

    # pages that are channels last
    channels = [place for place, axis in enumerate(axes) if axis == "C" or (place in unknown and stack == "channels")]
    images = [place for place in range(len(axes)) if place not in channels]
    order = np.arange(math.prod(shape)).reshape(shape).transpose(*images, *channels)
    return order.reshape(math.prod(shape[place] for place in images), -1)


def _read_tiff(content: Path | io.BytesIO, plane: int | None, stack: StackAxis | None) -> Opened:
    """An image of a TIFF; the samples of its pages come last. Bytes of grey or RGB are a photograph as any other."""
    with _library("tifffile", "this TIFF").TiffFile(content) as file:
        series = file.series[0]
        first, images = series.pages[0], _tiff_pages(series, stack)
        pages = images[_only(len(images), plane)].tolist()
        parts = [series.pages[page].asarray() for page in pages]
        if first.axes == "SYX":
            parts = [part.transpose(1, 2, 0) for part in parts]
        values = np.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], 2)
        if int(first.photometric) == WHITE_IS_ZERO and values.dtype.kind == "u":
            values = np.iinfo(values.dtype).max - values
        tag = first.tags.get(ORIENTATION)
        values = upright(values, 1 if tag is None else int(tag.value))
        colours = int(first.photometric) == RGB_PHOTOMETRIC and len(pages) == 1
        if values.shape[2] == 1 or (values.shape[2] == 3 and colours):
            return from_array(np.ascontiguousarray(values[:, :, 0] if values.shape[2] == 1 else values))
        return Raster(values, colours)


def _read_png(content: Path | io.BytesIO, plane: int | None, stack: StackAxis | None) -> Raster:
    """A PNG of 16 bits in colour or with transparency, of which Pillow keeps 8."""
    packed = content.read_bytes() if isinstance(content, Path) else content.getvalue()
    values = _library("imagecodecs", "this PNG").png_decode(packed)
    return Raster(values, values.shape[2] >= 3, alpha=values.shape[2] in (2, 4))


# NumPy


def _arrays(content: Any) -> list[np.ndarray]:
    """The arrays of an .npy or .npz file; those of a .npy on the disk are mapped, not read."""
    if isinstance(content, Path) and content.suffix.lower() != ".npz":
        return [np.load(content, mmap_mode="r", allow_pickle=False)]
    if isinstance(content, Path):
        return _unpacked(content, content.stat().st_mtime_ns)
    loaded = np.load(content, allow_pickle=False)
    return [loaded] if isinstance(loaded, np.ndarray) else [loaded[name] for name in loaded.files]


@functools.lru_cache(maxsize=1)  # its images are read one after the other
def _unpacked(path: Path, _: int) -> list[np.ndarray]:
    with np.load(path, allow_pickle=False) as loaded:
        return [loaded[name] for name in loaded.files]


def _images_of(array: np.ndarray, stack: StackAxis | None) -> np.ndarray:
    """View of an array with images on its first axis and, of four axes, channels on its last.

    With three axes, a last one of 1, 3 or 4 is channels; any other array of three axes needs `stack`.
    """
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4) and stack is None):
        return array[None]
    if array.ndim == 3 and stack is None:
        raise _unclear(min(array.shape))
    if array.ndim == 3:
        return np.moveaxis(array, int(np.argmin(array.shape)), 2)[None] if stack == "channels" else array
    if array.ndim == 4:
        return array if array.shape[3] <= array.shape[1] else np.moveaxis(array, 1, 3)
    raise DataError(f"an array of {array.ndim} axes: want height×width, with channels, images or both")


def _read_array(content: Any, plane: int | None, stack: StackAxis | None) -> Opened:
    """An image of an .npy or .npz file."""
    stacks = [_images_of(array, stack) for array in _arrays(content)]
    number = _only(sum(map(len, stacks)), plane)
    for images in stacks:
        if number < len(images):
            return from_array(np.ascontiguousarray(images[number]))
        number -= len(images)
    raise DataError(f"it has no image {plane} any more")


# DICOM


def _read_dicom(content: Any, plane: int | None, stack: StackAxis | None) -> Opened:
    """An image of a DICOM file in the units of its rescale slope and intercept, without a window; black is low."""
    # the frame, with its colours
    library = _library("pydicom", "DICOM")
    pixels = importlib.import_module("pydicom.pixels")
    dataset = library.dcmread(content)
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    frame = _only(frames, plane)
    values = dataset.pixel_array[frame] if frames > 1 else dataset.pixel_array
    photometric = str(dataset.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        values = pixels.apply_color_lut(values, dataset)

    # black is low, and levels are in the units of the device
    if photometric == "MONOCHROME1":
        bits = int(dataset.BitsStored)
        low = -(2 ** (bits - 1)) if dataset.PixelRepresentation else 0
        values = (2 * low + 2**bits - 1) - values.astype(np.int32)
    values = pixels.apply_rescale(values, dataset)
    if values.dtype.kind == "f" and (values == np.rint(values)).all():
        values = values.astype(np.int32)
    if values.ndim == 2 and values.dtype.kind == "i" and values.min() >= 0 and values.max() <= 65535:
        values = values.astype(np.uint8 if dataset.BitsAllocated == 8 and values.max() <= 255 else np.uint16)
    return from_array(values)
