"""Conversions: images that are read in another way than their files have them, and the sentences that say so."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from corinfomax.images.files import some
from corinfomax.images.levels import Raster
from corinfomax.images.readers import Opened
from corinfomax.recipes.fields import PixelFormat
from corinfomax.runtime import extras

# By Pillow's mode, without a loss.
MODES = {"RGB": "", "RGBA": "", "L": "grey", "1": "black-and-white", "P": "palette-based"}
EFFECTS = {
    "16-bit": "levels are divided by 257",
    "32-bit": "levels are divided by 257",
    "64-bit": "levels are divided by 257",
    "animated": "only the first frame is used",
    "transparent": "the background turns white; --channels 4 reads transparency as a fourth channel",
    "floating-point": "levels are read as 0 to 1, or as 0 to 255 if any exceeds 1",
    "in colour": "only brightness is read",
}
BEYOND, DEEP_PNG, DEEP = "of more than 3 channels", "16-bit in colour", "in colour of more than 8 bits"
CODESTREAM, DEPTH = b"\xff\x4f\xff\x51", 42  # start of JPEG 2000, and the place of its bits, less one, after it


def conversion(image: Opened, pixels: PixelFormat) -> str:
    """The form of an opened image, not yet loaded, that reading it in a format changes; empty if it is as usual.

    If there are several, the form that loses most. `grey` and other modes lose nothing.
    """
    if isinstance(image, Raster):
        return _of_numbers(image, pixels)
    deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    if deep and not image.mode.startswith("I"):
        return DEEP_PNG
    if image.mode in ("RGB", "RGBA") and _is_deep_colour(image):
        return DEEP
    if getattr(image, "is_animated", False):
        return "animated"
    if pixels.channels in (1, 3) and _is_see_through(image):
        return "transparent"
    if pixels.channels == 1 and image.mode not in ("1", "L", "LA") and not image.mode.startswith(("I", "F")):
        return "in colour" if pixels.is_bytes else "8-bit in colour"
    if not pixels.is_bytes:
        return "" if image.mode.startswith(("I", "F")) else "8-bit"
    if image.mode.startswith(("I", "F")):
        return "16-bit" if image.mode.startswith("I") else "floating-point"
    return MODES.get(image.mode, image.mode) if pixels.channels == 3 else ""


def _is_deep_colour(image: Any) -> bool:
    """True for colours of more than 8 bits in PPM, JPEG 2000 or HEIC, of which Pillow keeps 8 without a word."""
    if image.format == "PPM":
        return any(isinstance(tile[3], tuple) and tile[3][1] > 255 for tile in image.tile)
    if image.format == "JPEG2000" and image.fp is not None:
        image.fp.seek(0)
        header = image.fp.read(4096)
        place = header.find(CODESTREAM)
        return place >= 0 and len(header) > place + DEPTH and (header[place + DEPTH] & 127) + 1 > 8
    return int(image.info.get("bit_depth", 8)) > 8


def _of_numbers(raster: Raster, pixels: PixelFormat) -> str:
    if raster.alpha and pixels.channels == raster.channels - 1 and raster.is_see_through:
        return "transparent"
    if raster.colours and raster.channels > 3 + raster.alpha and pixels.is_rgb:
        return BEYOND
    kind, is_bytes = raster.values.dtype, raster.values.dtype == "uint8"
    if raster.colours and pixels.channels == 1:
        return "8-bit in colour" if is_bytes and not pixels.is_bytes else "in colour"
    if pixels.is_bytes and not is_bytes:
        return "floating-point" if kind.kind == "f" else f"{8 * kind.itemsize}-bit"
    return "8-bit" if is_bytes and not pixels.is_bytes else ""


def _is_see_through(image: Image.Image) -> bool:
    """True if some pixel of an image is transparent; many files have a fourth channel that is white all over."""
    if not image.has_transparency_data:
        return False
    image.load()
    alpha = (image if image.mode in ("RGBA", "LA") else image.convert("RGBA")).getchannel("A")
    return int(alpha.getextrema()[0]) < 255  # type: ignore[arg-type]


def effect(kind: str, pixels: PixelFormat) -> str | None:
    """The loss in reading images of a form; None for a form that loses nothing."""
    if kind == DEEP_PNG:
        return f"8 bits of each level are read; {extras.missing('the rest', 'imagecodecs', extra='formats')}"
    if kind == DEEP:
        return "8 bits of each level are read; as TIFF or PNG all are"
    if kind == BEYOND:
        return "only red, green and blue are read"
    if kind.startswith("8-bit"):
        brightness = "only brightness is read, and " if "colour" in kind else ""
        return f"{brightness}255 is read as {max(pixels.high):,.7g}, the highest level"
    return EFFECTS.get(kind)


def sentences(counts: Mapping[str, int], pixels: PixelFormat) -> list[str]:
    """A sentence about each form whose images are not read as they are."""
    said = [(kind, count, effect(kind, pixels)) for kind, count in sorted(counts.items())]
    return [f"{some(n, 'image')} {'is' if n == 1 else 'are'} {kind}: {text}" for kind, n, text in said if text]
