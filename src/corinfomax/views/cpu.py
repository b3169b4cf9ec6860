"""Views of images on a CPU, compiled: an image goes through all operations while it lies in the cache.

`operations` has the equations (`hue` explains `_hue` here); the results agree up to rounding. The bits of a view depend
neither on the rest of its batch nor on the number of threads.

Numba compiles a function on its first call, keeps the machine code on disk and runs it without Python's lock. Between
the operations an image is float32 (channels, size · size), stored column by column: in this transposed order both
passes of resampling, and both of blur, run along contiguous memory.
"""

import functools
import inspect
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num, UInt8, UInt16
from numpy import float32
from torch import Tensor

from corinfomax.recipes.fields import Scaling

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.2989, 0.587, 0.114)  # shares of red, green and blue in grey, ITU-R BT.601

# As float32: Python's numbers are float64 to Numba, and would widen everything they meet.
_0, _1, _2, _3, _4, _6 = (float32(x) for x in (0, 1, 2, 3, 4, 6))
_TINY, _THRESHOLD = (float32(x) for x in (1e-30, 128 / 255))
_RED, _GREEN, _BLUE = (float32(x) for x in LUMA)

Sizes = Int[Tensor, "n 2"]  # height and width of each image
Levels = UInt8[Tensor, "n c h w"] | UInt16[Tensor, "n c h w"]  # images as the cache holds them
Vector = Float[np.ndarray, " p"]
Integers = Int[np.ndarray, "..."]
Floats = Float[np.ndarray, "..."]
Planes = Float[np.ndarray, "c p"]  # the channels of an image, each column by column; colours come first
Function = TypeVar("Function", bound=Callable[..., Any])


class ViewPlan(NamedTuple):
    """Everything about one view of n images, as the compiled code reads it; pixels are (vertical, horizontal)."""

    start: Float[Tensor, "n 2"]  # corner of the window that the view shows, float64
    extent: Float[Tensor, "n 2"]  # size of the window, float64
    low: Int[Tensor, "n 2"]  # first pixel that may be read
    high: Int[Tensor, "n 2"]  # end of the pixels that may be read, exclusive
    flip: Bool[Tensor, " n"]
    angle: Float[Tensor, " n"]  # rotation before the window is resampled, radians
    adjustments: Int[Tensor, "n 4"]  # BRIGHTNESS, CONTRAST, SATURATION and HUE in order of application; −1 is none
    factors: Float[Tensor, "n 4"]  # factor of each adjustment, in the same order
    own: Float[Tensor, "n o 2"]  # brightness and contrast factors of each channel that is no colour
    grey: Bool[Tensor, " n"]
    blur: Bool[Tensor, " n"]
    kernel: Float[Tensor, "n k"]  # weights of the blur
    solarize: Bool[Tensor, " n"]


def apply_plan(
    images: Levels, sizes: Sizes, plan: ViewPlan, *, size: int, scaling: Scaling
) -> Float[Tensor, "n c {size} {size}"]:
    """Make the views: `size`×`size` pixels, normalised, channels_last; on as many threads as torch uses.

    Raises ValueError for a window that leaves its image, and for a plan of another number of images or channels.
    """
    # refuse parameters that lead outside the arrays: machine code would read and write there unchecked
    n = len(images)
    if any(len(field) != n for field in (sizes, *plan)):
        raise ValueError(f"{n} images need as many rows of every parameter")
    channels, known = images.shape[1], len(scaling.steps)
    if channels != known or plan.own.shape[1:] != (channels - scaling.colours, 2):
        factors = f"{plan.own.shape[1]} of them have factors of their own"
        raise ValueError(f"images have {channels} channels, the scaling {known}, and {factors}: they must agree")
    low, high, frame = plan.low, plan.high, torch.tensor(images.shape[2:])
    outside = ((low < 0) | (low >= high) | (high > sizes) | (sizes > frame)).any(1)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"the window {low[row].tolist()} to {high[row].tolist()} of image {row} is empty or leaves the image, "
            f"whose height and width are {sizes[row].tolist()} in a batch of {frame.tolist()}"
        )

    # Numba reads NumPy arrays only
    out = torch.empty(n, channels, size, size, memory_format=torch.channels_last)
    fields: list[Any] = [tensor.contiguous().numpy() for tensor in (images, sizes, *plan)]
    unit, inverse_std = (1 / np.array((scaling.steps, scaling.std), np.float64)).astype(np.float32)
    numbers = (scaling.colours, unit, np.array(scaling.mean, np.float32), inverse_std)
    arrays = (*fields[:2], ViewPlan(*fields[2:]), *numbers, out.permute(0, 2, 3, 1).numpy())

    # equal shares of the images: the first for this thread, the others for the pool
    threads = max(1, min(torch.get_num_threads(), n))
    shares = list(itertools.pairwise(n * i // threads for i in range(threads + 1)))
    pending = [_pool().submit(_make_views, begin, end, *arrays) for begin, end in shares[1:]]
    _make_views(*shares[0], *arrays)
    for future in pending:
        future.result()
    return out


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="views")


if hasattr(os, "register_at_fork"):  # a forked process inherits the pool but none of its threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def compiled(function: Function) -> Function:
    """Machine code for `function`, made on its first call and kept beside this file or in the user's cache."""
    function = inspect.unwrap(function)  # tests wrap functions in a type checker, which Numba cannot read
    # A function that is not inlined has a copy of its own, which may round otherwise: only a process that compiles
    # calls it.
    options: dict[str, Any] = {"nogil": True, "fastmath": True, "error_model": "numpy", "forceinline": True}
    try:
        return numba.njit(**options, cache=True)(function)
    except RuntimeError:  # no folder is writable: each process compiles for itself
        return numba.njit(**options)(function)


@compiled
def _make_views(
    begin: int,
    end: int,
    images: Num[np.ndarray, "n c h w"],
    sizes: Integers,
    plan: Any,
    colours: int,
    unit: Vector,
    mean: Vector,
    inverse_std: Vector,
    out: Floats,
) -> None:
    """Write the views of images begin … end − 1 to `out` (n, s, s, c); `plan` is a ViewPlan of arrays."""
    # the most taps of any cubic: four pixels wide, wider if the image shrinks, padded to groups of four
    size, taps = out.shape[1], 8
    for n in range(begin, end):
        for axis in range(2):
            taps = max(taps, math.ceil(4 * plan.extent[n, axis] / size) + 4)

    # scratch memory, used again for every image
    channels, most_rows, most_columns = images.shape[1:]
    weights = np.empty((2, size, taps), np.float32)
    first, count, stops = np.empty((2, size), np.int64), np.empty((2, size), np.int64), np.empty(2, np.int64)
    line = np.empty(most_columns, np.float32)
    tall = np.empty((most_columns, channels, size), np.float32)
    rotated = np.empty((channels, most_rows, most_columns), np.float32)
    x = np.empty((channels, size * size), np.float32)
    padded_size = size + plan.kernel.shape[1] - 1
    padded, blurred = np.empty(size * padded_size, np.float32), np.empty(size * padded_size, np.float32)

    for n in range(begin, end):
        # the pixels that each row and column of the view is made from, and their weights
        for axis in range(2):
            start, extent, low, high = plan.start[n, axis], plan.extent[n, axis], plan.low[n, axis], plan.high[n, axis]
            _cubic_weights(start, extent, low, high, first[axis], count[axis], weights[axis])
            stops[axis] = min(high, (first[axis] + 4 * count[axis]).max())

        # rotate, crop, flip
        if plan.angle[n] != 0:
            _rotate(images[n], sizes[n], plan.angle[n], rotated)
            _resample(rotated, first, count, weights, stops, plan.flip[n], unit, line, tall, x)
        else:
            _resample(images[n], first, count, weights, stops, plan.flip[n], unit, line, tall, x)

        # jitter
        rgb, others = x[:colours], x[colours:]
        for place in range(4):
            adjustment = plan.adjustments[n, place]
            if adjustment == HUE and colours:
                _hue(rgb, plan.factors[n, place])
            elif adjustment >= 0 and colours:
                _blend(rgb, adjustment, plan.factors[n, place])
            if 0 <= adjustment <= CONTRAST:
                _blend_apart(others, adjustment, plan.own[n])

        # grey, blur, solarize, normalise
        if plan.grey[n] and colours:
            _grey(rgb)
        if plan.blur[n]:
            _blur(x, plan.kernel[n], size, padded, blurred)
        if plan.solarize[n]:
            _solarize(rgb)
        _normalize(x, mean, inverse_std, out[n])


@compiled
def _cubic_weights(
    start: float, extent: float, low: int, high: int, first: Integers, count: Integers, weights: Floats
) -> None:
    """Keys' cubic for each pixel of a line: its first tap, its groups of four taps, their weights padded with 0."""
    size = len(first)
    step = extent / size
    widened = max(step, 1.0)
    narrow = 1 / widened
    for i in range(size):
        # the pixels under the cubic, within [low, high)
        centre = start + step * (i + 0.5)
        a = max(low, math.floor(centre - 2 * widened + 0.5))
        b = min(high, math.ceil(centre + 2 * widened - 0.5))
        total = 0.0
        for k in range(b - a):
            t = abs((a + k + 0.5 - centre) * narrow)
            outer, inner = max(2 - t, 0.0), max(1 - t, 0.0)
            weight = outer * outer * (1 - t) * 0.5 + inner * inner * (2 * t - 1)
            weights[i, k] = weight
            total += weight
        total = 1 / total
        fours = (b - a + 3) // 4
        for k in range(b - a):
            weights[i, k] *= total
        for k in range(b - a, 4 * fours):
            weights[i, k] = 0
        first[i], count[i] = a, fours


@compiled
def _resample(
    image: Num[np.ndarray, "c h w"],
    first: Integers,
    count: Integers,
    weights: Floats,
    stops: Integers,
    flip: bool,
    unit: Vector,
    line: Vector,
    tall: Floats,
    x: Planes,
) -> None:
    """Resample vertically along the image's rows into `tall`, which is transposed, then horizontally along that.

    Each pass over the memory adds four taps. Padded taps weigh 0; they read the last pixel of the window again.
    """
    size = first.shape[1]
    left, right, bottom = first[1].min(), stops[1], stops[0] - 1
    width = right - left

    # vertically: each row of the view is a weighted sum of rows of the image
    for c in range(len(image)):
        for i in range(size):
            for four in range(count[0, i]):
                k, row = 4 * four, first[0, i] + 4 * four
                w0, w1 = weights[0, i, k] * unit[c], weights[0, i, k + 1] * unit[c]
                w2, w3 = weights[0, i, k + 2] * unit[c], weights[0, i, k + 3] * unit[c]
                r0, r1 = image[c, row, left:right], image[c, min(row + 1, bottom), left:right]
                r2, r3 = image[c, min(row + 2, bottom), left:right], image[c, min(row + 3, bottom), left:right]
                if four == 0:
                    for u in range(width):
                        line[u] = w0 * float32(r0[u]) + w1 * float32(r1[u]) + w2 * float32(r2[u]) + w3 * float32(r3[u])
                else:
                    for u in range(width):
                        line[u] += w0 * float32(r0[u]) + w1 * float32(r1[u]) + w2 * float32(r2[u]) + w3 * float32(r3[u])
            for u in range(width):
                tall[u, c, i] = line[u]

    # horizontally: each column of the view is a weighted sum of columns
    for j in range(size):
        to = size - 1 - j if flip else j
        for c in range(len(image)):
            column = x[c, to * size : (to + 1) * size]
            for four in range(count[1, j]):
                k, u = 4 * four, first[1, j] + 4 * four - left
                w0, w1, w2, w3 = weights[1, j, k], weights[1, j, k + 1], weights[1, j, k + 2], weights[1, j, k + 3]
                c0, c1 = tall[u, c], tall[min(u + 1, width - 1), c]
                c2, c3 = tall[min(u + 2, width - 1), c], tall[min(u + 3, width - 1), c]
                if four == 0:
                    for i in range(size):
                        column[i] = w0 * c0[i] + w1 * c1[i] + w2 * c2[i] + w3 * c3[i]
                else:
                    for i in range(size):
                        column[i] += w0 * c0[i] + w1 * c1[i] + w2 * c2[i] + w3 * c3[i]

    flat = x.reshape(-1)
    for p in range(len(flat)):
        flat[p] = min(max(flat[p], _0), _1)


@compiled
def _rotate(image: Num[np.ndarray, "c h w"], sizes: Integers, angle: float, out: Float[np.ndarray, "c h w"]) -> None:
    height, width = image.shape[1:]
    cos, sin = float32(math.cos(angle)), float32(math.sin(angle))
    cy, cx = float32((sizes[0] - 1) / 2), float32((sizes[1] - 1) / 2)
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            # the point of the image that lands on pixel (i, j): column u, row v
            dx, dy = float32(j) - cx, float32(i) - cy
            u, v = cos * dx - sin * dy + cx, sin * dx + cos * dy + cy
            a, b = int(np.floor(u)), int(np.floor(v))
            right, below = u - float32(a), v - float32(b)
            if 0 <= a < width - 1 and 0 <= b < height - 1:  # all four neighbours are inside
                w00, w01 = (_1 - below) * (_1 - right), (_1 - below) * right
                w10, w11 = below * (_1 - right), below * right
                y, x = np.uint64(b), np.uint64(a)  # unsigned: Numba need not test for an index below 0
                for c in range(len(image)):
                    out[c, i, j] = (
                        w00 * float32(image[c, y, x])
                        + w01 * float32(image[c, y, x + np.uint64(1)])
                        + w10 * float32(image[c, y + np.uint64(1), x])
                        + w11 * float32(image[c, y + np.uint64(1), x + np.uint64(1)])
                    )
            else:  # black outside
                for c in range(len(image)):
                    out[c, i, j] = _0
                for row, row_weight in ((b, _1 - below), (b + 1, below)):
                    for column, column_weight in ((a, _1 - right), (a + 1, right)):
                        if 0 <= row < height and 0 <= column < width:
                            for c in range(len(image)):
                                out[c, i, j] += row_weight * column_weight * float32(image[c, row, column])


@compiled
def _blend(x: Planes, adjustment: int, factor: np.float32) -> None:
    red, green, blue = x[0], x[1], x[2]
    remainder = _1 - factor

    if adjustment == BRIGHTNESS:  # with black
        flat = x.reshape(-1)
        for p in range(len(flat)):
            flat[p] = min(max(factor * flat[p], _0), _1)
    elif adjustment == CONTRAST:  # with the mean grey
        total = _0
        for p in range(len(red)):
            total += _RED * red[p] + _GREEN * green[p] + _BLUE * blue[p]
        rest = remainder * total / float32(len(red))
        for c in range(3):
            plane = x[c]
            for p in range(len(plane)):
                plane[p] = min(max(factor * plane[p] + rest, _0), _1)
    else:  # SATURATION: with the grey of each pixel
        for p in range(len(red)):
            rest = remainder * (_RED * red[p] + _GREEN * green[p] + _BLUE * blue[p])
            red[p] = min(max(factor * red[p] + rest, _0), _1)
            green[p] = min(max(factor * green[p] + rest, _0), _1)
            blue[p] = min(max(factor * blue[p] + rest, _0), _1)


@compiled
def _blend_apart(x: Planes, adjustment: int, own: Float[np.ndarray, "c 2"]) -> None:
    """Brightness or contrast of channels that are no colours, each by its own factor and about its own mean."""
    for c in range(len(x)):
        factor, plane, rest = own[c, adjustment], x[c], _0
        if adjustment == CONTRAST:
            total = _0
            for p in range(len(plane)):
                total += plane[p]
            rest = (_1 - factor) * total / float32(len(plane))
        for p in range(len(plane)):
            plane[p] = min(max(factor * plane[p] + rest, _0), _1)


@compiled
def _hue(x: Planes, shift: np.float32) -> None:
    red, green, blue = x[0], x[1], x[2]
    turn = _6 * shift
    for p in range(len(red)):
        r, g, b = red[p], green[p], blue[p]
        value, least = max(r, g, b), min(r, g, b)
        chroma = value - least
        # hue in sixths of a turn, shifted
        rise, sector = r - g, _4
        if value == g:
            rise, sector = b - r, _2
        if value == r:
            rise, sector = g - b, _0
        h = sector + rise / max(chroma, _TINY) + turn
        h -= _6 * np.floor(h / _6)
        red[p] = least + chroma * min(max(abs(h - _3) - _1, _0), _1)
        green[p] = least + chroma * min(max(_2 - abs(h - _2), _0), _1)
        blue[p] = least + chroma * min(max(_2 - abs(h - _4), _0), _1)


@compiled
def _grey(x: Planes) -> None:
    red, green, blue = x[0], x[1], x[2]
    for p in range(len(red)):
        luma = _RED * red[p] + _GREEN * green[p] + _BLUE * blue[p]
        red[p] = green[p] = blue[p] = luma


@compiled
def _blur(x: Planes, kernel: Vector, size: int, padded: Vector, blurred: Vector) -> None:
    radius = len(kernel) // 2
    padded_size = size + 2 * radius
    for c in range(len(x)):
        # horizontally: columns mirrored beyond both borders; one tap further is one column further
        for j in range(padded_size):
            padded[j * size : (j + 1) * size] = x[c, _mirror(j - radius, size) * size :][:size]
        _convolve(padded, kernel, size, size * size, blurred)

        # vertically: each column mirrored beyond both ends
        for j in range(size):
            row = padded[j * padded_size : (j + 1) * padded_size]
            row[radius : radius + size] = blurred[j * size : (j + 1) * size]
            for k in range(1, radius + 1):
                row[radius - k] = row[radius + _mirror(-k, size)]
                row[radius + size - 1 + k] = row[radius + _mirror(size - 1 + k, size)]
        _convolve(padded, kernel, 1, size * padded_size - 2 * radius, blurred)
        for j in range(size):
            x[c, j * size : (j + 1) * size] = blurred[j * padded_size : j * padded_size + size]


@compiled
def _mirror(i: int, size: int) -> int:
    """Reflect an index at the border, which is not repeated; clamp taps of a tiny image that reflect outside it."""
    i = abs(i)
    return max(2 * (size - 1) - i, 0) if i >= size else i


@compiled
def _convolve(source: Vector, kernel: Vector, stride: int, length: int, out: Vector) -> None:
    """out[p] = Σₖ kernel[k] · source[p + k · stride], for a symmetric kernel."""
    radius = len(kernel) // 2
    for begin in range(0, length, 2048):  # blocks that stay in the first-level cache
        n = min(2048, length - begin)
        block = out[begin : begin + n]
        w, middle = kernel[radius], source[begin + radius * stride :][:n]
        for p in range(n):
            block[p] = w * middle[p]
        for k in range(1, radius + 1):
            w = kernel[radius + k]
            before, after = source[begin + (radius - k) * stride :][:n], source[begin + (radius + k) * stride :][:n]
            for p in range(n):
                block[p] += w * (before[p] + after[p])


@compiled
def _solarize(x: Planes) -> None:
    flat = x.reshape(-1)
    for p in range(len(flat)):
        flat[p] = _1 - flat[p] if flat[p] >= _THRESHOLD else flat[p]


@compiled
def _normalize(x: Planes, mean: Vector, inverse_std: Vector, out: Float[np.ndarray, "s s c"]) -> None:
    size = len(out)
    for c in range(len(x)):
        a, b = inverse_std[c], -mean[c] * inverse_std[c]
        for i in range(size):
            for j in range(size):
                out[i, j, c] = x[c, j * size + i] * a + b
