"""Charts of a run's metrics: a list of curves per chart, thinned for the screen."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from corinfomax.recipes.fields import ALPHA_PER_DIM, Recipe
from corinfomax.runtime.records import Row

POINTS = 1_000  # per curve, about the pixels across a screen


class Plot(NamedTuple):
    """A chart before it has data; a folded one shows only under “More measures”."""

    title: str
    caption: str
    columns: dict[str, str]  # the numbers to draw, by the names of their curves
    folded: bool = False


PLOTS = (
    # the course of the run
    Plot("Loss", "alpha · attraction + big bang", {"loss": "loss"}),
    Plot("Loss terms", "attraction pulls views together, the big bang spreads images",
         {"alpha · attraction": "weighted_attraction", "big bang": "big_bang"}),
    Plot("Gap to 2·ln D", "nats per dimension; 0 is a perfectly even spread",
         {"training batches": "gap", "measured images": "spread_gap"}),
    Plot("Learning rate", "linear warm-up, then cosine", {"learning rate": "lr"}),
    Plot("kNN score", "top-1 on a sample of the labelled images, %", {"kNN": "knn"}),
    Plot("Effective rank", "dimensions in use (RankMe)", {"backbone features": "rank_features", "projections": "rank"}),
    Plot("Likeness to the start", "linear CKA of the features with those before the first step; 1 is no change",
         {"CKA": "cka"}),
    # label-free measures, folded
    Plot("LiDAR", "effective rank of the directions that separate images",
         {"backbone features": "lidar_features", "projections": "lidar"}, folded=True),
    Plot("LDMI", "information that two views share, nats per dimension", {"LDMI": "ldmi"}, folded=True),
    Plot("Agreement and spread", "variance between images ÷ all variance; spread 0 is one point",
         {"agreement": "agreement", "spread": "spread"}, folded=True),
    Plot("Alignment", "mean squared distance between two views", {"alignment": "alignment"}, folded=True),
    Plot("Uniformity", "lower is more evenly spread", {"uniformity": "uniformity"}, folded=True),
    Plot("Idle dimensions", "share that hardly varies, or nearly repeats another",
         {"dead features": "dead_features", "dead projections": "dead",
          "duplicate features": "duplicate_features", "duplicate projections": "duplicate"}, folded=True),
    Plot("α-ReQ", "decay exponent of the features' spectrum", {"α": "req"}, folded=True),
    # the optimiser, folded
    Plot("Gradient norm", "before clipping", {"gradient norm": "gradient_norm"}, folded=True),
    Plot("Gradient scale", "against underflow in float16", {"scale": "scale"}, folded=True),
)  # fmt: skip


class Curve(NamedTuple):
    """One curve: a value per point of the chart, None for a gap, and the last value of all."""

    name: str
    values: list[float | None]
    last: float


class Chart(NamedTuple):
    """A plot with its data; x holds the steps done at each point."""

    plot: Plot
    x: list[int]
    curves: list[Curve]


Point = tuple[int, dict[str, float]]  # numbers by name after a step


def charts(rows: Sequence[Row], recipe: Recipe) -> list[Chart]:
    """A chart for every plot with data."""
    alpha = recipe.loss.alpha if recipe.loss.alpha is not None else ALPHA_PER_DIM * recipe.projector.widths[-1]
    points: list[Point] = []
    for row in rows:
        numbers = row.numbers()
        if row.big_bang is not None:  # else a foreign criterion, without an alpha
            numbers["weighted_attraction"] = alpha * row.attraction
        if row.gap is None:  # another objective does not spread directions, so no bound applies to them
            numbers.pop("spread_gap", None)
        points.append((row.step, numbers))
    return list(filter(None, (_chart(plot, points) for plot in PLOTS)))


def _chart(plot: Plot, points: Sequence[Point]) -> Chart | None:
    """The chart of a plot; None without data."""
    points = [(step, numbers) for step, numbers in points if not numbers.keys().isdisjoint(plot.columns.values())]
    if not points:
        return None

    # Rows are means over equally many steps, so the mean of neighbouring rows is such a mean too.
    width = math.ceil(len(points) / POINTS)
    buckets = [points[start : start + width] for start in range(0, len(points), width)]
    chart = Chart(plot, [bucket[-1][0] for bucket in buckets], [])

    # a curve for each column with data
    for name, column in plot.columns.items():
        values = [numbers[column] for _, numbers in points if column in numbers]
        if values:
            chart.curves.append(Curve(name, [_mean(bucket, column) for bucket in buckets], values[-1]))
    return chart


def _mean(bucket: Sequence[Point], column: str) -> float | None:
    """Mean of the finite values of a column; None without one."""
    values = [numbers.get(column, math.nan) for _, numbers in bucket]
    values = [value for value in values if math.isfinite(value)]
    return sum(values) / len(values) if values else None
