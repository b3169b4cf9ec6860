"""Certainty of a score: bootstrap intervals over test images, retrieval, and whether pretraining helped."""

import math
from statistics import NormalDist
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from corinfomax.runtime.records import Comparison
from corinfomax.runtime.seeds import generator

RESAMPLES = 2000
LEVEL = 0.95  # of every interval
COSINES = 2**20  # numbers held at once: about 40 MB with their ranks
# Images decided differently; fewer are chance even when all favour one side: 2 · 0.5⁶ is the first below 5 %.
FEWEST = 6
HELPED = {"better": "helped", "unclear": "made no clear difference", "worse": "did harm"}
BESIDE = {"better": "is better than", "unclear": "is not clearly different from", "worse": "is worse than"}


@torch.no_grad()
def average_precision(features: Float[Tensor, "m d"], labels: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Average precision of each image as a query to all others, by cosine; nan when no other has its class.

    The mean is leave-one-out mAP. With relevance r_k of the k-th nearest of the m − 1 others, AP is
    Σ_k r_k · (r_1 + … + r_k) / k / Σ_k r_k. Equally near images keep their order.
    """
    rows, m, precisions = normalize(features.float()), len(features), []
    places = torch.arange(1, m, device=features.device)
    for queries in torch.arange(m, device=features.device).split(max(1, COSINES // m)):
        # Rank all others; the query itself comes first and is cut off.
        cosine = rows[queries] @ rows.T
        cosine[torch.arange(len(queries)), queries] = torch.inf
        order = cosine.sort(dim=1, descending=True, stable=True).indices[:, 1:]

        relevant = labels[order] == labels[queries, None]
        hits = relevant.cumsum(1)
        precisions.append((hits / places * relevant).sum(1) / relevant.sum(1))
    return torch.cat(precisions)


def resample_means(values: Float[Tensor, "m c"], *, seed: int) -> Float[Tensor, "b c"]:
    """The mean of each column over RESAMPLES draws of m rows with replacement, without nan entries.

    All columns share the draws, so the difference of two columns' means is that of paired rows.
    """
    m, rng = len(values), generator(seed, "bootstrap")
    values_and_counts = torch.cat([values.nan_to_num(), (~values.isnan()).to(values)], 1).double().cpu()
    unit = torch.ones((), dtype=torch.float64)

    means, size = [], max(1, COSINES // m)
    for first in range(0, RESAMPLES, size):
        # Count the draws of each row: a mean is then a matrix product.
        count = min(size, RESAMPLES - first)
        rows = torch.randint(m, (count, m), generator=rng)
        times = torch.zeros(count, m, dtype=torch.float64).scatter_add_(1, rows, unit.expand(count, m))
        total, number = (times @ values_and_counts).chunk(2, 1)
        means.append(total / number)
    return torch.cat(means).to(values)


def central_intervals(means: Float[Tensor, "b c"]) -> list[tuple[float, float]]:
    """Bounds of the central 95 % of each column, without nan entries."""
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=means.dtype)
    return list(map(tuple, means.nanquantile(ends, 0).T.tolist()))


def wilson(percent: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy on `count` images; both in percent."""
    z, share = NormalDist().inv_cdf((1 + LEVEL) / 2), percent / 100
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0)


def compare(ours: Float[Tensor, " m"], alternatives: dict[str, Float[Tensor, " m"]], *, seed: int) -> Comparison:
    """`ours` against the best of `alternatives`; each row is 1 for an image classified correctly, else 0.

    The verdict is unclear when the 95 % interval of the paired difference holds 0, or the exact sign test of the images
    decided differently exceeds 5 %: on few images a bootstrap interval is too narrow.
    """
    # The best alternative, and the paired difference from it.
    score = {name: 100 * float(values.mean()) for name, values in alternatives.items()}
    best = max(score, key=score.__getitem__)
    paired = ours - alternatives[best]
    low, high = central_intervals(100 * resample_means(paired[:, None], seed=seed))[0]
    wins, losses = int((paired > 0).sum()), int((paired < 0).sum())

    verdict: Literal["better", "unclear", "worse"] = "unclear"
    if not low <= 0 <= high and sign_test(wins, losses) <= 1 - LEVEL:
        verdict = "better" if low > 0 else "worse"
    mean = 100 * float(ours.mean())
    return Comparison(verdict, mean, best, score[best], mean - score[best], low, high, wins + losses, len(ours))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of the exact sign test: chance of a split as uneven when both sides are equally likely."""
    n, k = wins + losses, torch.arange(min(wins, losses) + 1, dtype=torch.float64)
    choices = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)  # log of n choose k
    return min(1.0, 2 * float((choices - n * math.log(2)).exp().sum()))


def pretraining_sentence(c: Comparison, nearest: Comparison) -> str:
    """One sentence on whether pretraining helped: the linear probe's verdict, its numbers and their certainty.

    kNN joins the sentence when its verdict is clear and contradicts the first.
    """
    scores = f"the linear probe reaches {c.score:.1f} % on these features and {c.other_score:.1f} % on {c.other}"
    if c.verdict == "unclear" and c.decided < FEWEST:
        reason = f"the two differ on only {c.decided} of {c.images:,} test images"
        return f"Too little to say whether pretraining helped: {scores}, and {reason}."

    sentence = f"Pretraining {HELPED[c.verdict]}: {scores}, {_points(c)}"
    if nearest.verdict not in (c.verdict, "unclear"):
        pair = f"{nearest.score:.1f} and {nearest.other_score:.1f} % on {nearest.other}"
        sentence += f"; but kNN does {nearest.verdict} on them, {pair}, {_points(nearest)}"
    return f"{sentence}."


def continuing_sentence(c: Comparison, nearest: Comparison) -> str:
    """One sentence on whether continuing improved on the weights before: by the linear probe, beside kNN."""
    change = f"{c.difference:+.1f}, 95 % interval {c.low:+.1f} to {c.high:+.1f}".replace("-", "−")
    scores = f"linear {c.other_score:.1f} → {c.score:.1f} ({change})"
    if nearest.verdict not in (c.verdict, "unclear"):
        scores += f", though kNN {nearest.other_score:.1f} → {nearest.score:.1f}"
    if c.verdict == "better":
        return f"Continuing helped: {scores}."
    harm = "did harm" if c.verdict == "worse" else "did not clearly help"
    return f"Continuing {harm}: {scores}. Keep the weights you started from."


def rival_sentence(c: Comparison) -> str:
    """One sentence on pretrained features against those of other weights, by the linear probe."""
    pair = f"{c.score:.1f} and {c.other_score:.1f} %"
    return f"On the linear probe pretrained {BESIDE[c.verdict]} {c.other}: {pair}, {_points(c)}."


def _points(c: Comparison) -> str:
    points = f"{abs(c.difference):.1f} points {'fewer' if c.difference < 0 else 'more'}"
    interval = f"{c.low:+.1f} to {c.high:+.1f}".replace("-", "−")
    return f"{points} (95 % interval {interval}, {c.images:,} test images)"
