"""Which images are alike: exact nearest rows by cosine, what is likely the same image twice, what resembles nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

BLOCK = 1 << 24  # cosines held at once: 64 MiB
FINE = 24  # side in pixels at which copies are told from likenesses
SURE = 0.99  # correlation there: copies reach 0.999, different photographs of one kind of thing 0.98
TILE = 2048  # rows and columns of the distances that `close` holds at once: 16 MiB
SKETCH = 32  # leading directions in which copies are looked for


class Near(NamedTuple):
    """The k rows nearest to each of n, most similar first."""

    rows: Int[Tensor, "n k"]
    cosine: Float[Tensor, "n k"]


def centred(x: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
    """Unit rows of what each row has beyond the mean of all; zeros stay zeros.

    Most of the length of a network's features is common to every image: cosines about the origin are all near 1.
    """
    return F.normalize(x - x.mean(0), dim=1)


def nearest(x: Float[Tensor, "n f"], *, k: int, queries: Int[Tensor, " q"] | None = None) -> Near:
    """The k other rows most similar to each of the `queries`, or to every row; exact, in bounded memory.

    `x` has unit rows. k is cut to the number of other rows.
    """
    asked = torch.arange(len(x), device=x.device) if queries is None else queries.to(x.device)
    k = min(k, len(x) - 1)
    rows, cosine = [], []
    for some in asked.split(max(1, BLOCK // len(x))):
        block = x[some] @ x.T
        block[torch.arange(len(some), device=x.device), some] = -torch.inf  # not itself
        top = block.topk(k, dim=1)
        rows.append(top.indices.cpu())
        cosine.append(top.values.cpu())
    return Near(torch.cat(rows), torch.cat(cosine))


def best_of(queries: Float[Tensor, "q f"], blocks: Iterable[Float[Tensor, "_ f"]], *, k: int) -> Near:
    """The k rows of all blocks, counted through, that are most similar to each query; exact, one block at a time.

    Queries and blocks have unit rows. k is cut to the number of rows; of equal cosines the earlier row comes first.
    """
    rows, cosine, start = torch.zeros(len(queries), 0, dtype=torch.long), torch.zeros(len(queries), 0), 0
    for block in blocks:
        for some in block.split(max(1, BLOCK // max(len(queries), 1))):
            here = torch.arange(start, start + len(some)).expand(len(queries), -1)
            rows, cosine = torch.cat((rows, here), 1), torch.cat((cosine, queries @ some.T), 1)
            order = cosine.argsort(dim=1, descending=True, stable=True)[:, :k]
            rows, cosine = rows.gather(1, order), cosine.gather(1, order)
            start += len(some)
    return Near(rows, cosine)


def correlation(a: Float[Tensor, "m 3 s s"], b: Float[Tensor, "m 3 s s"]) -> Float[Tensor, " m"]:
    """Of the pixels of each pair of pictures, or with the second one mirrored, whichever is more; 1 for equal ones."""
    return torch.maximum(_correlation(a, b), _correlation(a, b.flip(3)))


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    x, y = (F.normalize(each.flatten(1) - each.flatten(1).mean(1, keepdim=True), dim=1) for each in (a, b))
    # Two blank pictures have no correlation, and are one picture all the same.
    equal = (a - b).abs().amax((1, 2, 3)) < 1 / 255
    return torch.where(equal, 1.0, (x * y).sum(1))


class Copies(NamedTuple):
    """Pairs of pictures that are likely one."""

    pairs: Int[Tensor, "m 2"]
    """Rows, the lower one first, in no order of the pairs."""
    alike: Float[Tensor, " m"]
    """Their correlation."""
    whole: bool
    """Whether all pairs were looked at; not so where more pictures than could be looked at resemble each other."""


def copies(
    squares: UInt8[Tensor, "n 3 s s"], *, least: float = SURE, most: int = 5_000_000, sample: int = 8192
) -> Copies:
    """Every two pictures with a correlation of at least `least`, mirrored or not; none of them may be of one colour.

    Exact, without looking at all pairs in full: for unit rows a correlation of c is a distance of √(2 − 2c), and a
    projection brings nothing further apart. So whatever is further apart in a sketch of SKETCH numbers, the leading
    directions of the mirror-symmetric half of each picture (which has all that a picture and its mirror image share),
    is no copy; the others are correlated in full, at most `most` pairs.
    """
    if len(squares) < 2:
        return Copies(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0), True)
    blocks = squares.split(TILE)
    some = _even(squares[:: max(1, len(squares) // sample)])
    mean = some.mean(0)
    _, directions = torch.linalg.eigh((some - mean).T @ (some - mean))
    axes = directions.flip(1)[:, :SKETCH]
    sketch = torch.cat([(_even(block) - mean) @ axes for block in blocks])
    found, alike, looked = [], [], 0
    for pairs in close(sketch, (2 - 2 * least) ** 0.5):
        for few in pairs.split(TILE):
            a, b = (squares[rows].float() / 255 for rows in few.unbind(1))
            same = correlation(a, b)
            found.append(few[same >= least])
            alike.append(same[same >= least])
        looked += len(pairs)
        if looked > most:
            break
    empty = torch.zeros(0, 2, dtype=torch.long), torch.zeros(0)
    return Copies(torch.cat([empty[0], *found]).sort(1).values, torch.cat([empty[1], *alike]), looked <= most)


def _even(squares: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n f"]:
    """The mirror-symmetric half of each picture's unit pixels, as an orthogonal projection of them."""
    x = squares.float()
    unit = F.normalize(x.flatten(1) - x.flatten(1).mean(1, keepdim=True), dim=1).view_as(x)
    left, right = unit[..., : (x.shape[3] + 1) // 2], unit.flip(3)[..., : (x.shape[3] + 1) // 2]
    half = (left + right) / 2**0.5  # two equal halves in one: √2 keeps the length
    if x.shape[3] % 2:
        half[..., -1] /= 2**0.5  # the middle column is there once
    return half.flatten(1)


def close(x: Float[Tensor, "n f"], distance: float) -> Iterator[Int[Tensor, "m 2"]]:
    """Every two rows of `x` at most that `distance` apart, by and by, each pair once.

    Rows are compared in the order of their first column, as far as it alone allows: the more they differ in it, the
    fewer pairs are computed. Memory is bounded but for the pairs of one tile.
    """
    order = x[:, 0].argsort()
    x = x[order]
    first, squared, one = x[:, 0].contiguous(), x.square().sum(1, keepdim=True) / 2, torch.ones(len(x), 1)
    rows, columns = torch.cat((x, -squared, one), 1), torch.cat((x, one, -squared), 1).T.contiguous()
    least = -(distance**2) / 2 - 1e-5  # of −|a − b|²/2, and what rounding takes from it
    # One place for every tile: freed and asked for anew, they left gigabytes of holes in the heap.
    half, is_close = x.new_empty(TILE * TILE), torch.empty(TILE * TILE, dtype=torch.bool)
    for start in range(0, len(x), TILE):
        stop = min(start + TILE, len(x))
        reach = int(torch.searchsorted(first, first[stop - 1] + distance + 1e-5, right=True))
        for left in range(start, reach, TILE):
            wide = min(TILE, reach - left)
            tile, near = (place[: (stop - start) * wide].view(-1, wide) for place in (half, is_close))
            torch.mm(rows[start:stop], columns[:, left : left + wide], out=tile)
            a, b = torch.ge(tile, least, out=near).nonzero().unbind(1)
            pairs = torch.stack((a + start, b + left), 1)
            yield order[pairs[pairs[:, 0] < pairs[:, 1]]]


class Twins(NamedTuple):
    """Groups of pictures that are likely one, most alike first."""

    groups: list[list[int]]
    """Rows of each group, ascending."""
    alike: list[float]
    """The least correlation along which each group hangs together."""


def grouped(pairs: Int[Tensor, "m 2"], alike: Float[Tensor, " m"]) -> Twins:
    """The groups that pairs make when whatever is joined to one of a group joins the group."""
    above: dict[int, int] = {}

    def head(row: int) -> int:
        while (up := above.setdefault(row, row)) != row:
            above[row] = row = above[up]
        return row

    least: dict[int, float] = {}
    for (a, b), value in zip(pairs.tolist(), alike.tolist(), strict=True):
        a, b = sorted((head(a), head(b)))
        above[b] = a
        least[a] = min(value, least.get(a, 1.0), least.pop(b, 1.0) if a != b else 1.0)
    members: dict[int, list[int]] = {}
    for row in sorted(above):
        members.setdefault(head(row), []).append(row)
    order = sorted(members, key=lambda row: -least[row])
    return Twins([members[row] for row in order], [least[row] for row in order])


def strangers(features: Near, *, most: int) -> Int[Tensor, " m"]:
    """The rows least like their nearest ones, by mean cosine, strangest first."""
    return features.cosine.mean(1).argsort()[:most]
