"""Similar images: exact nearest neighbours by cosine, and near-duplicates by pixels."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

COSINES_AT_ONCE = 1 << 24  # 64 MiB
THUMBNAIL = 24  # side in pixels: enough to separate duplicates from images that merely look alike
MIN_CORRELATION = 0.99  # least correlation of duplicates: they reach 0.999, different photographs of like objects 0.98
TILE = 2048  # rows and columns of a block of distances: 16 MiB
MAX_PAIRS = 5_000_000  # compared in full: minutes


class Neighbours(NamedTuple):
    """The k nearest neighbours of n rows, most similar first."""

    rows: Int[Tensor, "n k"]
    cosine: Float[Tensor, "n k"]


def centred(x: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
    """Rows minus their mean, scaled to unit length; zeros stay zeros.

    Most of the length of a network's features is common to all images: cosines about the origin are all near 1.
    """
    return F.normalize(x - x.mean(0), dim=1)


def nearest_neighbours(x: Float[Tensor, "n f"], *, k: int, queries: Int[Tensor, " q"] | None = None) -> Neighbours:
    """The k other rows most similar to each query; exact, in bounded memory.

    `x` has unit rows. `queries` are row numbers, by default all. k is limited to the number of other rows.
    """
    queries = torch.arange(len(x)) if queries is None else queries
    k, size = min(k, len(x) - 1), max(1, COSINES_AT_ONCE // len(x))
    neighbours = Neighbours(queries.new_empty(len(queries), k), x.new_empty(len(queries), k))

    # One buffer for all cosines: allocating each block anew fragments the heap by gigabytes.
    cosines = x.new_empty(min(size, len(queries)), len(x))
    for chunk, rows, cosine in zip(*(tensor.split(size) for tensor in (queries, *neighbours)), strict=True):
        block = torch.mm(x[chunk], x.T, out=cosines[: len(chunk)])
        block[torch.arange(len(chunk)), chunk] = -torch.inf  # exclude the query itself
        torch.topk(block, k, dim=1, out=(cosine, rows))
    return neighbours


def nearest_in_blocks(queries: Float[Tensor, "q f"], blocks: Iterable[Float[Tensor, "_ f"]], *, k: int) -> Neighbours:
    """The k rows most similar to each query; exact, one block of rows in memory at a time.

    Rows have unit length and are numbered across blocks. k is limited to their number; of equals the first row wins.
    """
    rows, cosine, start = torch.zeros(len(queries), 0, dtype=torch.long), torch.zeros(len(queries), 0), 0
    for block in blocks:
        # merge the block with the best so far
        block_rows = torch.arange(start, start + len(block)).expand(len(queries), -1)
        rows, cosine = torch.cat((rows, block_rows), 1), torch.cat((cosine, queries @ block.T), 1)
        order = cosine.argsort(dim=1, descending=True, stable=True)[:, :k]
        rows, cosine = rows.gather(1, order), cosine.gather(1, order)
        start += len(block)
    return Neighbours(rows, cosine)


def pixel_correlation(a: Float[Tensor, "m 3 s s"], b: Float[Tensor, "m 3 s s"]) -> Float[Tensor, " m"]:
    """Pixel correlation of each pair of images, or of one and the mirrored other if higher; 1 if equal."""
    unit, correlations = _unit_pixels(a), []
    for other in (b, b.flip(3)):
        # Blank images have no correlation; equal ones are duplicates all the same.
        equal = (a - other).abs().amax((1, 2, 3)) < 1 / 255
        correlations.append(torch.where(equal, 1.0, (unit * _unit_pixels(other)).sum(1)))
    return torch.maximum(*correlations)


def _unit_pixels(x: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n f"]:
    """Pixels minus their mean, one unit row per image: dot products are correlations."""
    return F.normalize(x.flatten(1) - x.flatten(1).mean(1, keepdim=True), dim=1)


class NearDuplicates(NamedTuple):
    """Pairs of rows that probably show the same image, lower row first, in no order."""

    pairs: Int[Tensor, "m 2"]
    complete: bool  # false if the search stopped early because too many images look alike


def near_duplicates(thumbnails: UInt8[Tensor, "n 3 s s"]) -> NearDuplicates:
    """All pairs with a pixel correlation of MIN_CORRELATION or more, mirrored or not; no thumbnail may be blank.

    Exact without correlating every pair: unit rows with correlation c lie √(2 − 2c) apart, and a projection brings no
    two rows further apart. Pairs further apart in a sketch are ruled out, the others are correlated in full.
    """
    pairs, n_compared = [torch.zeros(0, 2, dtype=torch.long)], 0
    if len(thumbnails) < 2:
        return NearDuplicates(pairs[0], True)

    # sketch: the 32 leading directions of the mirror-symmetric halves, estimated from at most 16,383 of them
    sampled = thumbnails[:: max(1, len(thumbnails) // 8192)]
    sample = torch.cat([_symmetric_half(block) for block in sampled.split(TILE)])
    mean = sample.mean(0)
    axes = torch.linalg.eigh((sample - mean).T @ (sample - mean)).eigenvectors.flip(1)[:, :32]
    sketch = torch.empty(len(thumbnails), axes.shape[1])  # filled in place: parts of it would fragment the heap
    for block, rows in zip(thumbnails.split(TILE), sketch.split(TILE), strict=True):
        rows.copy_((_symmetric_half(block) - mean) @ axes)

    # correlate near pairs; many images that look alike would take quadratic time
    for candidates in pairs_within(sketch, (2 - 2 * MIN_CORRELATION) ** 0.5):
        for chunk in candidates.split(TILE):
            a, b = (thumbnails[rows].float() / 255 for rows in chunk.unbind(1))
            pairs.append(chunk[pixel_correlation(a, b) >= MIN_CORRELATION])
        n_compared += len(candidates)
        if n_compared > MAX_PAIRS:
            break
    return NearDuplicates(torch.cat(pairs).sort(1).values, n_compared <= MAX_PAIRS)


def _symmetric_half(thumbnails: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n f"]:
    """Orthogonal projection of unit pixels onto the mirror-symmetric images: equal for an image and its mirror."""
    unit = _unit_pixels(thumbnails.float()).view(thumbnails.shape)
    half = (unit + unit.flip(3))[..., : THUMBNAIL // 2] / 2**0.5  # √2: half the columns carry all the length
    return half.flatten(1)


def pairs_within(x: Float[Tensor, "n f"], distance: float) -> Iterator[Int[Tensor, "m 2"]]:
    """All pairs of rows at most `distance` apart, each once, in batches.

    Rows are sorted by their first column, and only rows within `distance` in that column are compared.
    """
    order = x[:, 0].argsort()
    x = x[order]
    first = x[:, 0].contiguous()

    # −|a − b|²/2 = a·b − |a|²/2 − |b|²/2 as one matrix product
    half_square, ones = x.square().sum(1, keepdim=True) / 2, torch.ones(len(x), 1)
    rows, columns = torch.cat((x, -half_square, ones), 1), torch.cat((x, ones, -half_square), 1).T.contiguous()
    least = -(distance**2) / 2 - 1e-5  # minus rounding

    # One buffer for all tiles: allocating each anew fragments the heap by gigabytes.
    products, is_near = x.new_empty(TILE * TILE), torch.empty(TILE * TILE, dtype=torch.bool)
    for start in range(0, len(x), TILE):
        stop = min(start + TILE, len(x))
        reach = int(torch.searchsorted(first, first[stop - 1] + distance + 1e-5, right=True))
        for column in range(start, reach, TILE):
            width = min(TILE, reach - column)
            tile, near = (buffer[: (stop - start) * width].view(-1, width) for buffer in (products, is_near))
            torch.mm(rows[start:stop], columns[:, column : column + width], out=tile)
            a, b = torch.ge(tile, least, out=near).nonzero().unbind(1)
            pairs = torch.stack((a + start, b + column), 1)
            yield order[pairs[pairs[:, 0] < pairs[:, 1]]]
