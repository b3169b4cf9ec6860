"""Levels: the numbers in image files, their range over a set, and the whole numbers that the cache stores."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Num, UInt8
from PIL import Image

from corinfomax.images.files import DataError, listed, some
from corinfomax.recipes.fields import RGB, PixelFormat
from corinfomax.runtime.records import Json

SAMPLED = (64, 1024)  # pixels of an image that count for mean and standard deviation: of many images, of few
COUNTED = 2**18  # such pixels of a set
NUMBERS = 2**22  # of all their channels, as float64: 32 MB, and a few copies
SPREAD = np.array((0.7548776662466927, 0.5698402909980532))  # of the plastic number: multiples, modulo 1, fill a square
BULK = (0.05, 99.95)  # percentiles of all pixels between which floats keep most of their precision
MOST_STEPS = 65535  # that 16 bits can store above 0
TAILS = 16  # times that range: floats farther out are cut off, which leaves 4,096 of the 65,535 steps to the bulk
SHOWN = (1, 99)  # percentiles of an image that become black and white in a picture
WINSORISED = (0.5, 99.5)  # percentiles at which mean and standard deviation cut the tails off
CONSTANT = 1e-8  # standard deviation in [0, 1] that is rounding alone
LUMA = np.array((0.2989, 0.587, 0.114))  # shares of red, green and blue in grey, ITU-R BT.601


class Raster(NamedTuple):
    """An image as its file has it: upright, with numbers of any type."""

    values: Num[np.ndarray, "h w c"]
    colours: bool  # the first three channels are red, green and blue
    alpha: bool = False  # the last channel is transparency, in 16 bits

    @property
    def channels(self) -> int:
        return int(self.values.shape[2])

    @property
    def is_see_through(self) -> bool:
        """True if some pixel is transparent."""
        return self.alpha and bool(self.values[:, :, -1].min() < MOST_STEPS)


def is_deep(image: Image.Image | Raster) -> bool:
    """True for an opened image that is no 8-bit photograph: 8-bit RGB would not hold it."""
    return isinstance(image, Raster) or image.mode.startswith(("I", "F"))


def as_raster(image: Image.Image | Raster, channels: int | None = None) -> Raster:
    """The numbers of a loaded image; transparency lies over white, unless `channels` asks for it as a fourth one."""
    if isinstance(image, Raster):
        return _over_white(image) if image.alpha and channels != image.channels else image
    if image.mode in ("1", "L") or image.mode.startswith(("I", "F")):
        return Raster(np.asarray(image.convert("L") if image.mode == "1" else image)[:, :, None], colours=False)
    if channels == 4 and image.has_transparency_data:
        return Raster(np.asarray(image.convert("RGBA")), colours=True)
    return Raster(np.asarray(to_rgb(image)), colours=True)


def _over_white(raster: Raster) -> Raster:
    opacity = raster.values[:, :, -1:] / np.float64(MOST_STEPS)
    values = np.rint(raster.values[:, :, :-1] * opacity + MOST_STEPS * (1 - opacity)).astype(np.uint16)
    return Raster(values, raster.colours)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of 8 bits to RGB; transparency lies over white."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def scaled(raster: Raster, pixels: PixelFormat) -> Float32[np.ndarray, "h w c"]:
    """The steps of a format that an image has, not yet rounded or cut off; NaN becomes the lowest.

    A grey image serves as RGB and an RGB image as grey; where RGB is read, the channels after it are left out. Raises
    DataError for any other number of channels.
    """
    values, channels = raster.values, raster.channels
    if not fits(channels, raster.colours, pixels):
        raise DataError(f"{some(channels, 'channel')}, where {pixels.channels} are read")
    if channels == 3 and raster.colours and pixels.channels == 1:
        values = (values @ LUMA)[:, :, None]
    elif channels > 3 and raster.colours and pixels.is_rgb:
        values = values[:, :, :3]
    values = _of_type(values, pixels)
    result = np.empty((*values.shape[:2], pixels.channels), np.float32)
    ranges = zip(pixels.each(pixels.low), pixels.each(pixels.high), pixels.each(pixels.steps), strict=True)
    for channel, (low, high, steps) in enumerate(ranges):  # one at a time: float64 takes four times 16 bits
        plane = values[:, :, min(channel, values.shape[2] - 1)].astype(np.float64)
        plane = np.nan_to_num((plane - low) * (steps / (high - low)), nan=0.0)
        result[:, :, channel] = plane.clip(-steps, 2 * steps)
    return result


def fits(channels: int, colours: bool, pixels: PixelFormat) -> bool:
    """True if an image of these channels can be read in a format."""
    if channels == pixels.channels or (channels == 1 and pixels.is_rgb):
        return True
    return colours and ((channels == 3 and pixels.channels == 1) or (channels > 3 and pixels.is_rgb))


def _of_type(values: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """Values of an image of another type than its set: 8 bits among more, or more among 8, scaled to the same white.

    16-bit levels are divided by 257; floats are 0 to 1, or 0 to 255 if any is above 1.
    """
    if pixels.is_bytes and values.dtype != np.uint8:
        if values.dtype.kind == "f":
            values = np.nan_to_num(values)
            return values * 255 if values.max() <= 1 else values
        return values.clip(0, MOST_STEPS) / 257
    if not pixels.is_bytes and values.dtype == np.uint8:
        low, high = (np.array(pixels.each(edge)) for edge in (pixels.low, pixels.high))
        return low + values * ((high - low) / 255)
    return values


def stored(levels: Float32[np.ndarray, "h w c"], pixels: PixelFormat) -> Num[np.ndarray, "c h w"]:
    """`scaled` levels as the cache has them: whole numbers from 0 to the steps of each channel."""
    whole = np.rint(levels).clip(0, pixels.each(pixels.steps)).astype(pixels.dtype)
    return np.ascontiguousarray(whole.transpose(2, 0, 1))


class ImageLevels(NamedTuple):
    """Range and sample of the levels of one image."""

    channels: int
    colours: bool
    kind: str  # of NumPy's dtype: u and i for integers, f for floats
    bits: int
    low: Float64[np.ndarray, " c"]  # of each channel, without NaN and infinities; inf if there is nothing else
    high: Float64[np.ndarray, " c"]  # −inf then
    sample: Float32[np.ndarray, "k c"]  # some of its pixels
    nan: bool  # some are no numbers, or infinite


def sampling(images: int) -> tuple[int, int]:
    """Pixels to sample of an image, and one image in so many to sample, in a set of so many."""
    each = min(max(COUNTED // images, SAMPLED[0]), SAMPLED[1])
    return each, max(1, images * each // COUNTED)


def image_levels(raster: Raster, channels: int | None = None, sampled: int = SAMPLED[1]) -> ImageLevels:
    """The levels of one image and a sample of its pixels; with `channels` 3, of its colours alone."""
    if channels == 3 and raster.colours:
        raster = Raster(raster.values[:, :, :3], colours=True)
    values = raster.values.reshape(-1, raster.channels)
    finite = np.isfinite(values).all(1) if values.dtype.kind == "f" else np.ones(len(values), bool)
    nan = not finite.all()
    values = values[finite] if nan else values
    sample = values
    if len(values) > sampled:  # not every so many: they would lie in a few columns
        height, width = raster.values.shape[:2]
        rows, columns = (((0.5 + np.arange(sampled)[:, None] * SPREAD) % 1) * (height, width)).astype(int).T
        sample = raster.values[rows, columns]
        sample = sample[finite[rows * width + columns]] if nan else sample
        sample = sample if len(sample) else values[:sampled]

    kind, bits = values.dtype.kind, 8 * values.dtype.itemsize
    if len(values):
        low, high = values.min(0).astype(np.float64), values.max(0).astype(np.float64)
    else:
        low, high = np.full(raster.channels, np.inf), np.full(raster.channels, -np.inf)
    return ImageLevels(raster.channels, raster.colours, kind, bits, low, high, sample.astype(np.float32), nan)


class SetLevels(NamedTuple):
    """The format of a set of images, and the statistics of its channels in [0, 1]."""

    pixels: PixelFormat = RGB
    mean: tuple[float, ...] | None = None  # None for 8-bit RGB, whose recipes know them
    std: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()  # sentences about levels that are read, cut off or left out

    def to_json(self) -> Json:
        return self._asdict() | {"pixels": dataclasses.asdict(self.pixels)}

    @classmethod
    def from_json(cls, content: Json) -> "SetLevels":
        """The inverse of `to_json`."""
        pixels = PixelFormat(**_with_tuples(content["pixels"]))
        return cls(**_with_tuples(content) | {"pixels": pixels})


def _with_tuples(content: Json) -> Json:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}


def set_levels(images: Sequence[ImageLevels]) -> SetLevels:
    """A format that keeps the levels of these images, and statistics that ignore a few extreme values.

    Integers keep every level if they span at most 65,535; without a sign they go up to a power of two, which is the
    same in another part of the images. Floats are stored in 65,535 steps.
    """
    # the channels of most images; grey ones among RGB are read as RGB
    channels, colours = Counter((image.channels, image.colours) for image in images).most_common(1)[0][0]
    chosen = [image for image in images if image.channels == channels]
    if {image.channels for image in images} == {1, 3} and all(image.colours for image in images if image.channels == 3):
        channels, colours = 3, True
        bits = Counter(image.bits for image in images).most_common(1)[0][0]
        chosen = [image for image in images if image.bits == bits]
    low = np.min([np.broadcast_to(image.low, channels) for image in chosen], 0)
    high = np.max([np.broadcast_to(image.high, channels) for image in chosen], 0)
    samples = np.concatenate([np.broadcast_to(image.sample, (len(image.sample), channels)) for image in chosen])
    values = samples[:: 1 + samples.size // NUMBERS].astype(np.float64)
    if not len(values):
        raise DataError("no image has a number in it: all values are NaN or infinite")

    # integers: one range for all channels, from 0 unless some are below
    notes: list[str] = []
    bottom = min(float(low.min()), 0.0)
    span = max(float(high.max()) - bottom, 1.0)
    if all(image.kind != "f" for image in chosen) and span <= MOST_STEPS:
        span = 2.0 ** max(8, int(span).bit_length()) - 1 if bottom == 0 else span
        # never 255 steps here: they mark 8-bit files, beside which deeper images are divided by 257
        steps = MOST_STEPS if span == 255 and max(image.bits for image in chosen) > 8 else round(span)
        pixels = PixelFormat(channels=channels, colours=colours, low=(bottom,), high=(bottom + span,), steps=(steps,))
    else:
        lows, highs, notes = _float_range(values, low, high)
        pixels = PixelFormat(
            channels=channels, colours=colours, low=tuple(lows), high=tuple(highs), steps=(MOST_STEPS,)
        )

    # statistics in [0, 1], of values whose tails are cut off
    bottoms, tops = (np.array(pixels.each(edge)) for edge in (pixels.low, pixels.high))
    unit = np.clip((values - bottoms) / (tops - bottoms), 0, 1)
    usual = np.clip(unit, *np.percentile(unit, WINSORISED, axis=0))
    deviation = np.where(usual.std(0) > CONSTANT, usual.std(0), unit.std(0))
    deviation = np.where(deviation > CONSTANT, deviation, 1.0)
    mean, std = (tuple(float(f"{value:.4g}") for value in each) for each in (usual.mean(0), deviation))

    # in words
    kinds = sorted({f"{image.bits}-bit {'floats' if image.kind == 'f' else 'integers'}" for image in chosen})
    first = ", the first three of them red, green and blue" if colours and channels > 3 else ""
    notes.insert(0, f"levels: {listed(kinds)} from {_ranges(low, high)} in {some(channels, 'channel')}{first}")
    others = Counter(image.channels for image in images if image.channels != channels)
    for number, count in sorted(others.items()):
        if not (number == 1 and colours and channels == 3):
            notes.append(f"not read: {some(count, 'image')} of {some(number, 'channel')}, beside {channels}")
    if missing := sum(image.nan for image in chosen):
        verb = "has" if missing == 1 else "have"
        notes.append(f"{some(missing, 'image')} {verb} values that are not finite: NaN is read as the lowest level")
    return SetLevels(pixels, mean, std, tuple(notes))


def outside(images: Sequence[ImageLevels], pixels: PixelFormat) -> list[str]:
    """A sentence about levels of some images that another set's format cuts off, if there are any."""
    same = [i for i in images if i.channels == pixels.channels and (i.bits > 8 or pixels.is_bytes)]
    notes = []
    low, high = min(pixels.low), max(pixels.high)
    lowest = min((image.low.min() for image in same), default=low)
    highest = max((image.high.max() for image in same), default=high)
    if lowest < low or highest > high:
        seen = f"levels from {lowest:,.7g} to {highest:,.7g}"
        notes.append(f"{seen}, of which the run reads {low:,.7g} to {high:,.7g}: the rest is cut off")
    return notes


def _float_range(
    values: Float64[np.ndarray, "k c"], low: Float64[np.ndarray, " c"], high: Float64[np.ndarray, " c"]
) -> tuple[list[float], list[float], list[str]]:
    """The range of each channel to store, and a sentence about values beyond it."""
    bulk_low, bulk_high = np.percentile(values, BULK, axis=0)
    middle, reach = (bulk_low + bulk_high) / 2, TAILS / 2 * (bulk_high - bulk_low)
    bulk = bulk_high > bulk_low
    lows = np.where(bulk, np.maximum(low, middle - reach), low)
    highs = np.where(bulk, np.minimum(high, middle + reach), high)
    highs = np.where(highs > lows, highs, lows + 1)  # constant channels
    if (lows <= low).all() and (highs >= high).all():
        return lows.tolist(), highs.tolist(), []
    share = float(((values < lows) | (values > highs)).any(1).mean())
    rest = "they lie far from the rest, to which they would leave few steps"
    return lows.tolist(), highs.tolist(), [f"cut off at {_ranges(lows, highs)}: {share:.2%} of the pixels ({rest})"]


def _ranges(low: Num[np.ndarray, " c"], high: Num[np.ndarray, " c"]) -> str:
    return f"{float(np.min(low)):,.7g} to {float(np.max(high)):,.7g}"


def as_rgb(
    levels: Num[np.ndarray, "c h w"], pixels: PixelFormat, whole: Num[np.ndarray, "c _ _"] | None = None
) -> UInt8[np.ndarray, "3 h w"]:
    """A picture of stored levels: as they are where they are 8-bit colours, else in false colours.

    These are the colours, or the first three channels, or two as red and cyan, or one as grey; each is stretched from
    its 1st to its 99th percentile in the image, or in the whole image that the levels are a view of.
    """
    if pixels.is_bytes and pixels.is_rgb:
        return np.rint(levels).astype(np.uint8)
    low, high = np.percentile(levels if whole is None else whole, SHOWN, axis=(1, 2))
    shown = (levels - low[:, None, None]) / np.maximum(high - low, 1e-6)[:, None, None]
    return np.rint(255 * shown.clip(0, 1)).astype(np.uint8)[shown_channels(pixels)]


def shown_channels(pixels: PixelFormat) -> list[int]:
    """Channels to show as red, green and blue."""
    return {1: [0, 0, 0], 2: [0, 1, 1]}.get(pixels.channels, [0, 1, 2])


def colours_shown(pixels: PixelFormat) -> str | None:
    """A sentence about the false colours of `as_rgb`; None for true ones."""
    if pixels.is_bytes and pixels.is_rgb:
        return None
    if pixels.channels == 1:
        return "Pictures show grey levels, stretched from the 1st to the 99th percentile in the image"
    shown = {2: "channels 1 and 2 in red and cyan", 3: "channels 1, 2 and 3 as red, green and blue"}.get(
        pixels.channels, f"channels 1, 2 and 3 of {pixels.channels} as red, green and blue"
    )
    if pixels.colours:
        shown = "red, green and blue" + (f" of {pixels.channels} channels" if pixels.channels > 3 else "")
    return f"Pictures show {shown}, each stretched from its 1st to its 99th percentile in the image"
