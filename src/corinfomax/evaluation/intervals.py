"""How sure a score is: per-image outcomes, their bootstrap intervals, retrieval, and whether pretraining helped."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from corinfomax.runtime.seeds import generator

RESAMPLES = 2000
LEVEL = 0.95  # of every interval
BLOCK = 2**24  # numbers held at once: 64 MiB of float32
FEWEST = 6  # images decided differently: of fewer even all on one side are chance, 2 · 0.5⁶ is the first under 5 %


class Score(NamedTuple):
    """A mean over test images in percent; what else is known of it."""

    mean: float
    sd: float | None = None
    """Over draws of the labels, where there were several."""
    low: float | None = None
    high: float | None = None
    """The interval over test images that 95 % of bootstrap resamples fall in; the fitted probe stays as it is."""


class Comparison(NamedTuple):
    """One kind of features beside another, on the same test images."""

    verdict: Literal["better", "unclear", "worse"]
    score: float
    """Percent, as is the other's."""
    other: str
    """The name of what it is compared with."""
    other_score: float
    difference: float
    """Points, and its 95 % interval, paired by image."""
    low: float
    high: float
    decided: int
    """Images that one of the two classifies rightly and the other does not."""
    images: int


@torch.no_grad()
def average_precision(
    features: Float[Tensor, "m d"], labels: Int[Tensor, " m"], *, chunk: int = BLOCK
) -> Float[Tensor, " m"]:
    """Average precision of each image as a query to all the others, by cosine; nan where no other is of its class.

    Their mean is leave-one-out mAP, as in metric learning: with relevance r_k of the k-th nearest of the m − 1 others,
    AP = Σ_k r_k · (r_1 + … + r_k) / k / Σ_k r_k. Equally near images keep their order. Holds `chunk` cosines at once.
    """
    rows, m = normalize(features.float()), len(features)
    places = torch.arange(1, m, device=features.device)
    found = []
    for queries in torch.arange(m, device=features.device).split(max(1, chunk // m)):
        cosine = rows[queries] @ rows.T
        cosine[torch.arange(len(queries)), queries] = torch.inf  # the query itself comes first, and is cut off
        order = cosine.sort(dim=1, descending=True, stable=True).indices[:, 1:]
        relevant = labels[order] == labels[queries, None]
        hits = relevant.cumsum(1)
        found.append((hits / places * relevant).sum(1) / relevant.sum(1))
    return torch.cat(found)


def resample_means(
    values: Float[Tensor, "m c"], *, seed: int, resamples: int = RESAMPLES
) -> Float[Tensor, "{resamples} c"]:
    """The mean of each column over `resamples` draws of m rows with replacement; nan entries are left out.

    Every column sees the same draws, so that the difference of two columns' means is that of paired rows.
    """
    m, rng = len(values), generator(seed, "bootstrap")
    known = ~values.isnan()
    both = torch.cat([values.nan_to_num(), known.to(values)], 1).double().cpu()
    means = []
    size = max(1, BLOCK // m)
    for first in range(0, resamples, size):
        count = min(size, resamples - first)
        rows = torch.randint(m, (count, m), generator=rng)
        times = torch.zeros(count, m, dtype=torch.float64).scatter_add_(
            1, rows, torch.ones(()).double().expand(count, m)
        )
        total, seen = (times @ both).chunk(2, 1)
        means.append(total / seen)
    return torch.cat(means).to(values)


def intervals(means: Float[Tensor, "b c"]) -> list[tuple[float, float]]:
    """Of each column the bounds of its central 95 %; draws that had nothing to average are left out."""
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=means.dtype)
    low, high = means.nanquantile(ends, 0).tolist()
    return list(zip(low, high, strict=True))


def wilson(percent: float, count: int) -> tuple[float, float]:
    """Wilson's interval at LEVEL of an accuracy in percent on `count` images, in percent."""
    z, share = NormalDist().inv_cdf((1 + LEVEL) / 2), percent / 100
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0)


def compare(ours: Float[Tensor, " m"], others: dict[str, Float[Tensor, " m"]], *, seed: int) -> Comparison:
    """How `ours` does beside the best of `others`; each is 1 for an image classified rightly and 0 for another.

    Better or worse is said where the 95 % interval of the paired difference leaves out 0 and at least FEWEST images are
    decided differently; everything else is unclear.
    """
    score = {name: 100 * float(values.mean()) for name, values in others.items()}
    other = max(score, key=score.__getitem__)
    paired = ours - others[other]
    low, high = intervals(100 * resample_means(paired[:, None], seed=seed))[0]
    decided = int((paired != 0).sum())
    verdict: Literal["better", "unclear", "worse"] = "unclear"
    if decided >= FEWEST and not low <= 0 <= high:
        verdict = "better" if low > 0 else "worse"
    mean = 100 * float(ours.mean())
    return Comparison(verdict, mean, other, score[other], mean - score[other], low, high, decided, len(ours))


def in_words(c: Comparison, *, probe: str, dissent: Comparison | None = None, dissenter: str = "") -> str:
    """One sentence on whether pretraining helped, for people: the verdict, the numbers, how sure they are.

    Where another probe, `dissenter`, is clear and of another mind, the sentence says so too.
    """
    got = f"the {probe} probe gets {c.score:.1f} % right on these features and {c.other_score:.1f} % on {c.other}"
    if c.verdict == "unclear" and c.decided < FEWEST:
        few = f"only {c.decided} of {c.images:,} test images are decided differently"
        return f"Too little to say whether pretraining helped: {got}, and {few}."
    verdict = {
        "better": "Pretraining helped",
        "unclear": "Pretraining made no clear difference",
        "worse": "Pretraining did harm",
    }[c.verdict]
    said = f"{verdict}: {got}, {_points(c)}"
    if dissent is not None and dissent.verdict not in (c.verdict, "unclear"):
        how = "better" if dissent.verdict == "better" else "worse"
        said += f"; but {dissenter} does {how} on them, {dissent.score:.1f} and {dissent.other_score:.1f} % on "
        said += f"{dissent.other}, {_points(dissent)}"
    return f"{said}."


def beside(name: str, c: Comparison, *, probe: str) -> str:
    """One sentence on features compared with those of other weights, `c.other`."""
    how = {"better": "is better than", "unclear": "is not clearly different from", "worse": "is worse than"}[c.verdict]
    return f"On the {probe} probe {name} {how} {c.other}: {c.score:.1f} and {c.other_score:.1f} %, {_points(c)}."


def _points(c: Comparison) -> str:
    more = f"{abs(c.difference):.1f} points {'fewer' if c.difference < 0 else 'more'}"
    return f"{more} (95 % interval of the difference {c.low:+.1f} to {c.high:+.1f}, {c.images:,} test images)".replace(
        "-", "−"
    )
