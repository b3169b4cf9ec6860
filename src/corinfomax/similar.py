"""Which images are alike: exact nearest rows by cosine, what is likely the same image twice, what resembles nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 1 << 24  # cosines held at once: 64 MiB


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
