"""The operations of `views` on a CPU: each image goes through all of them while it lies in the processor's cache.

Compiled by Numba when first called, kept on disk, free of Python's lock. Between the operations a picture is float32
(3, columns × rows), transposed: so both passes of resampling and of blur run along contiguous memory. `views` has the
equations; the results are the same up to rounding, whatever else is in the batch and on however many threads.
"""

from __future__ import annotations

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
from jaxtyping import Bool, Float, Int, Num, UInt8
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """The function as machine code, made when it is first called and kept beside this file or in the user's cache."""
    function = inspect.unwrap(function)  # without a type checker, where tests put one
    options: dict[str, Any] = {"nogil": True, "fastmath": True, "error_model": "numpy"}
    try:
        return numba.njit(**options, cache=True)(function)
    except RuntimeError:  # no folder to write to
        return numba.njit(**options)(function)


Vector = Float[np.ndarray, " p"]
Planes = Float[np.ndarray, "3 p"]
"""A picture's red, green and blue, each column by column."""
Integers = Int[np.ndarray, "..."]

# Python's numbers are float64 there, and so would be all that they meet.
_0, _1, _2, _3, _4, _6, _HALF = (np.float32(x) for x in (0, 1, 2, 3, 4, 6, 0.5))
_BYTE, _TINY, _THRESHOLD = (np.float32(x) for x in (1 / 255, 1e-30, 128 / 255))
_RED, _GREEN, _BLUE = (np.float32(x) for x in (0.2989, 0.587, 0.114))


class Window(NamedTuple):
    """What of each of n images is resampled, (n, 2) float64 and int64: vertical, horizontal; in pixels."""

    start: Float[Tensor, "n 2"]
    extent: Float[Tensor, "n 2"]
    low: Int[Tensor, "n 2"]
    """Nothing before it is read, and nothing from `high` on."""
    high: Int[Tensor, "n 2"]
    flip: Bool[Tensor, " n"]


class Changes(NamedTuple):
    """What becomes of each picture before and after it is resampled."""

    angle: Float[Tensor, " n"]
    """Radians."""
    part: Int[Tensor, "n 4"]
    """The jitter's parts in their order; −1 is none."""
    factor: Float[Tensor, "n 4"]
    """In the same order."""
    grey: Bool[Tensor, " n"]
    blur: Bool[Tensor, " n"]
    kernel: Float[Tensor, "n k"]
    """The blur's taps."""
    solarize: Bool[Tensor, " n"]


def unchanged(n: int) -> Changes:
    """No change to any of n pictures."""
    no, zero = torch.zeros(n, dtype=torch.bool), torch.zeros(n)
    return Changes(zero, torch.full((n, 4), -1), torch.ones(n, 4), no, no, torch.ones(n, 1), no)


def run(
    images: UInt8[Tensor, "n 3 h w"],
    sizes: Int[Tensor, "n 2"],
    window: Window,
    changes: Changes,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Tensor, "n 3 {size} {size}"]:
    """The windows as squares of `size`, changed, normalised, channels_last; on as many threads as torch uses."""
    n = len(images)
    _check(images, sizes, window, changes)
    out = torch.empty(n, 3, size, size, memory_format=torch.channels_last)
    statistics = np.array(mean, np.float32), (1 / np.array(std)).astype(np.float32)
    given: Any = [x.contiguous().numpy() for x in (images, sizes, *window, *changes)]
    given += [*statistics, out.permute(0, 2, 3, 1).numpy()]

    def some(begin: int, end: int) -> None:
        _pictures(begin, end, *given)

    parts = max(1, min(torch.get_num_threads(), n))
    bounds = [n * i // parts for i in range(parts + 1)]
    others = [_pool().submit(some, *part) for part in itertools.pairwise(bounds[1:])]
    some(*bounds[:2])
    for other in others:
        other.result()
    return out


def _check(images: Tensor, sizes: Tensor, window: Window, changes: Changes) -> None:
    """Machine code looks at no bounds: what lies beyond an image would be read, and written."""
    if any(len(field) != len(images) for field in (sizes, *window, *changes)):
        raise ValueError(f"{len(images)} images need as many rows of every parameter")
    whole = torch.tensor(images.shape[2:])
    inside = (window.low >= 0) & (window.low < window.high) & (window.high <= sizes) & (sizes <= whole)
    if not bool(inside.all()):
        row = int((~inside).any(1).nonzero()[0])
        raise ValueError(
            f"the window {window.low[row].tolist()} to {window.high[row].tolist()} of image {row}, of height and width "
            f"{sizes[row].tolist()} in a batch of {whole.tolist()}, is empty or not inside it"
        )


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="views")


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads that its copy of the pool counts on
    os.register_at_fork(after_in_child=_pool.cache_clear)


@compiled
def _pictures(
    begin: int,
    end: int,
    images: UInt8[np.ndarray, "n 3 h w"],
    sizes: Integers,
    start: Float[np.ndarray, "n 2"],
    extent: Float[np.ndarray, "n 2"],
    low: Integers,
    high: Integers,
    flip: Bool[np.ndarray, " n"],
    angle: Float[np.ndarray, " n"],
    part: Integers,
    factor: Float[np.ndarray, "n 4"],
    grey: Bool[np.ndarray, " n"],
    blur: Bool[np.ndarray, " n"],
    kernel: Float[np.ndarray, "n k"],
    solarize: Bool[np.ndarray, " n"],
    shift: Vector,
    scale: Vector,
    out: Float[np.ndarray, "n s s 3"],
) -> None:
    size = out.shape[1]
    most_rows, most_columns = images.shape[2:]
    taps = 8
    for n in range(begin, end):
        for axis in range(2):
            taps = max(taps, math.ceil(4 * extent[n, axis] / size) + 4)
    weights = np.empty((2, size, taps), np.float32)
    first = np.empty((2, size), np.int64)
    count = np.empty((2, size), np.int64)
    line = np.empty(most_columns, np.float32)
    tall = np.empty((most_columns, 3, size), np.float32)
    x = np.empty((3, size * size), np.float32)
    longer = size + kernel.shape[1] - 1
    wide, y = np.empty(size * longer, np.float32), np.empty(size * longer, np.float32)
    last = np.empty(2, np.int64)
    turned = np.empty((3, most_rows, most_columns), np.float32)
    for n in range(begin, end):
        for axis in range(2):
            _cubic(
                start[n, axis], extent[n, axis], low[n, axis], high[n, axis], first[axis], count[axis], weights[axis]
            )
            last[axis] = min(high[n, axis], (first[axis] + 4 * count[axis]).max())
        if angle[n] != 0:
            _rotate(images[n], sizes[n], angle[n], turned)
            _resample(turned, first, count, weights, last, flip[n], _1, line, tall, x)
        else:
            _resample(images[n], first, count, weights, last, flip[n], _BYTE, line, tall, x)
        for place in range(4):
            if part[n, place] == 3:
                _hue(x, factor[n, place])
            elif part[n, place] >= 0:
                _blend(x, part[n, place], factor[n, place])
        if grey[n]:
            _grey(x)
        if blur[n]:
            _blur(x, kernel[n], size, wide, y)
        if solarize[n]:
            _solarize(x)
        _store(x, shift, scale, out[n])


@compiled
def _cubic(
    start: float,
    extent: float,
    low: int,
    high: int,
    first: Integers,
    count: Integers,
    weights: Float[np.ndarray, "s k"],
) -> None:
    """Keys' cubic for each pixel of a line: its first tap, how many fours of taps, their weights, 0 beyond the last."""
    size = len(first)
    step = extent / size
    widened = max(step, 1.0)
    narrow = 1 / widened
    for i in range(size):
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
    image: Num[np.ndarray, "3 h w"],
    first: Integers,
    count: Integers,
    weights: Float[np.ndarray, "2 s k"],
    last: Integers,
    flip: bool,
    unit: np.float32,
    line: Vector,
    tall: Float[np.ndarray, "w 3 s"],
    x: Planes,
) -> None:
    """Lines first, along the image's rows, into transposed memory; then columns, along that. Four taps at a time."""
    size = first.shape[1]
    left, right = first[1].min(), last[1]
    bottom = last[0] - 1
    width = right - left
    for c in range(3):
        for i in range(size):
            for four in range(count[0, i]):
                k, row = 4 * four, first[0, i] + 4 * four
                w0, w1 = weights[0, i, k] * unit, weights[0, i, k + 1] * unit
                w2, w3 = weights[0, i, k + 2] * unit, weights[0, i, k + 3] * unit
                r0, r1 = image[c, row, left:right], image[c, min(row + 1, bottom), left:right]
                r2, r3 = image[c, min(row + 2, bottom), left:right], image[c, min(row + 3, bottom), left:right]
                if four == 0:
                    for u in range(width):
                        line[u] = (
                            w0 * np.float32(r0[u])
                            + w1 * np.float32(r1[u])
                            + w2 * np.float32(r2[u])
                            + w3 * np.float32(r3[u])
                        )
                else:
                    for u in range(width):
                        line[u] += (
                            w0 * np.float32(r0[u])
                            + w1 * np.float32(r1[u])
                            + w2 * np.float32(r2[u])
                            + w3 * np.float32(r3[u])
                        )
            for u in range(width):
                tall[u, c, i] = line[u]
    for j in range(size):
        to = size - 1 - j if flip else j
        for c in range(3):
            column = x[c, to * size : (to + 1) * size]
            for four in range(count[1, j]):
                k, place = 4 * four, first[1, j] + 4 * four - left
                w0, w1, w2, w3 = weights[1, j, k], weights[1, j, k + 1], weights[1, j, k + 2], weights[1, j, k + 3]
                c0, c1 = tall[place, c], tall[min(place + 1, width - 1), c]
                c2, c3 = tall[min(place + 2, width - 1), c], tall[min(place + 3, width - 1), c]
                if four == 0:
                    for i in range(size):
                        column[i] = w0 * c0[i] + w1 * c1[i] + w2 * c2[i] + w3 * c3[i]
                else:
                    for i in range(size):
                        column[i] += w0 * c0[i] + w1 * c1[i] + w2 * c2[i] + w3 * c3[i]
    for c in range(3):
        plane = x[c]
        for p in range(len(plane)):
            plane[p] = min(max(plane[p], _0), _1)


@compiled
def _rotate(image: UInt8[np.ndarray, "3 h w"], sizes: Integers, angle: float, out: Float[np.ndarray, "3 h w"]) -> None:
    height, width = image.shape[1:]
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    cy, cx = np.float32((sizes[0] - 1) / 2), np.float32((sizes[1] - 1) / 2)
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            dx, dy = np.float32(j) - cx, np.float32(i) - cy
            u, v = cos * dx - sin * dy + cx, sin * dx + cos * dy + cy
            a, b = int(np.floor(u)), int(np.floor(v))
            right, below = u - np.float32(a), v - np.float32(b)
            if 0 <= a < width - 1 and 0 <= b < height - 1:
                w00, w01 = (_1 - below) * (_1 - right) * _BYTE, (_1 - below) * right * _BYTE
                w10, w11 = below * (_1 - right) * _BYTE, below * right * _BYTE
                y, x = np.uint64(b), np.uint64(a)
                for c in range(3):
                    out[c, i, j] = (
                        w00 * np.float32(image[c, y, x])
                        + w01 * np.float32(image[c, y, x + np.uint64(1)])
                        + w10 * np.float32(image[c, y + np.uint64(1), x])
                        + w11 * np.float32(image[c, y + np.uint64(1), x + np.uint64(1)])
                    )
            else:  # black outside
                for c in range(3):
                    out[c, i, j] = _0
                for row, of_row in ((b, _1 - below), (b + 1, below)):
                    for column, of_column in ((a, _1 - right), (a + 1, right)):
                        if 0 <= row < height and 0 <= column < width:
                            for c in range(3):
                                out[c, i, j] += of_row * of_column * _BYTE * np.float32(image[c, row, column])


@compiled
def _blend(x: Planes, part: int, factor: np.float32) -> None:
    red, green, blue = x[0], x[1], x[2]
    other = _1 - factor
    if part == 0:
        for c in range(3):
            plane = x[c]
            for p in range(len(plane)):
                plane[p] = min(max(factor * plane[p], _0), _1)
    elif part == 1:
        total = _0
        for p in range(len(red)):
            total += _RED * red[p] + _GREEN * green[p] + _BLUE * blue[p]
        rest = other * total / np.float32(len(red))
        for c in range(3):
            plane = x[c]
            for p in range(len(plane)):
                plane[p] = min(max(factor * plane[p] + rest, _0), _1)
    else:
        for p in range(len(red)):
            rest = other * (_RED * red[p] + _GREEN * green[p] + _BLUE * blue[p])
            red[p] = min(max(factor * red[p] + rest, _0), _1)
            green[p] = min(max(factor * green[p] + rest, _0), _1)
            blue[p] = min(max(factor * blue[p] + rest, _0), _1)


@compiled
def _hue(x: Planes, shift: np.float32) -> None:
    red, green, blue = x[0], x[1], x[2]
    turn = _6 * shift
    for p in range(len(red)):
        r, g, b = red[p], green[p], blue[p]
        value = max(r, g, b)
        least = min(r, g, b)
        chroma = value - least
        rise = r - g
        sector = _4
        if value == g:
            rise = b - r
            sector = _2
        if value == r:
            rise = g - b
            sector = _0
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
        red[p] = luma
        green[p] = luma
        blue[p] = luma


@compiled
def _blur(x: Planes, kernel: Vector, size: int, wide: Vector, y: Vector) -> None:
    """Columns first: a padded copy of a plane, of rows that lie beside each other; then lines, each padded."""
    radius = len(kernel) // 2
    longer = size + 2 * radius
    for c in range(3):
        for j in range(longer):
            wide[j * size : (j + 1) * size] = x[c, _mirror(j - radius, size) * size :][:size]
        _convolve(wide, kernel, size, size * size, y)
        for j in range(size):
            row = wide[j * longer : (j + 1) * longer]
            row[radius : radius + size] = y[j * size : (j + 1) * size]
            for k in range(1, radius + 1):
                row[radius - k] = row[radius + _mirror(-k, size)]
                row[radius + size - 1 + k] = row[radius + _mirror(size - 1 + k, size)]
        _convolve(wide, kernel, 1, size * longer - 2 * radius, y)
        for j in range(size):
            x[c, j * size : (j + 1) * size] = y[j * longer : j * longer + size]


@compiled
def _mirror(i: int, size: int) -> int:
    """Reflected at the border, which is not repeated; held inside where a tap without weight lies further out."""
    i = abs(i)
    return max(2 * (size - 1) - i, 0) if i >= size else i


@compiled
def _convolve(source: Vector, kernel: Vector, stride: int, length: int, out: Vector) -> None:
    """out[p] is the sum of the symmetric kernel's weights times source[p], source[p + stride], …"""
    radius = len(kernel) // 2
    for begin in range(0, length, 2048):  # what a processor keeps nearest
        n = min(2048, length - begin)
        here = out[begin : begin + n]
        w, middle = kernel[radius], source[begin + radius * stride :][:n]
        for p in range(n):
            here[p] = w * middle[p]
        for k in range(1, radius + 1):
            w = kernel[radius + k]
            before, after = source[begin + (radius - k) * stride :][:n], source[begin + (radius + k) * stride :][:n]
            for p in range(n):
                here[p] += w * (before[p] + after[p])


@compiled
def _solarize(x: Planes) -> None:
    for c in range(3):
        plane = x[c]
        for p in range(len(plane)):
            plane[p] = _1 - plane[p] if plane[p] >= _THRESHOLD else plane[p]


@compiled
def _store(x: Planes, shift: Vector, scale: Vector, out: Float[np.ndarray, "s s 3"]) -> None:
    size = len(out)
    for c in range(3):
        a, b = scale[c], -shift[c] * scale[c]
        for i in range(size):
            for j in range(size):
                out[i, j, c] = x[c, j * size + i] * a + b
