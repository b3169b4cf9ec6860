"""A benchmark's figure, a baseline of such figures, and what is worse than it, in words."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SLACK = 0.1  # a tenth less than the baseline is noise even where the spreads do not touch


class Metric(NamedTuple):
    """One figure: a ratio of two costs that were measured by turns. More is better; 1 is as good as the other."""

    suite: str
    name: str
    against: str
    ratio: float
    """Median over the rounds of the other's cost over ours."""
    low: float
    """Lower quartile of the rounds."""
    high: float
    """Upper quartile."""
    n: int
    """Rounds."""
    ours: float
    """Median cost of ours, in `unit`."""
    theirs: float
    unit: str
    at_least: float | None = None
    """Smallest ratio wanted, if there is a target."""
    aim: float | None = None
    commit: str = ""
    """Of what was measured; suites are measured apart."""


def metric(
    suite: str,
    name: str,
    against: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    unit: str,
    at_least: float | None = None,
    aim: float | None = None,
) -> Metric:
    """The figure of two costs, one number a round each; round i of both stood next to each other in time."""
    ratios = [other / own for own, other in zip(ours, theirs, strict=True)]
    low, _, high = quartiles(ratios)
    return Metric(
        suite,
        name,
        against,
        statistics.median(ratios),
        low,
        high,
        len(ratios),
        statistics.median(ours),
        statistics.median(theirs),
        unit,
        at_least,
        aim,
    )


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of one number that number."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def regressions(now: Sequence[Metric], baseline: Sequence[Metric]) -> list[str]:
    """A sentence for each figure that is worse than in the baseline: by a tenth, and outside of both spreads."""
    before = {(m.suite, m.name, m.against): m for m in baseline}
    said = []
    for m in now:
        old = before.get((m.suite, m.name, m.against))
        if old is not None and m.ratio < (1 - SLACK) * old.ratio and m.high < old.low:
            worse = f"{100 * (1 - m.ratio / old.ratio):.0f} % worse"
            said.append(f"{m.name}, against {m.against}: {_spread(m)}, before {_spread(old)}: {worse}")
    return said


def _spread(m: Metric) -> str:
    return f"{m.ratio:.2f} ({m.low:.2f} – {m.high:.2f}, n = {m.n})"


def missing(now: Sequence[Metric], baseline: Sequence[Metric]) -> list[str]:
    """What the baseline has of the suites that ran and they did not give this time."""
    ran, have = {m.suite for m in now}, {(m.suite, m.name, m.against) for m in now}
    gone = [m for m in baseline if m.suite in ran and (m.suite, m.name, m.against) not in have]
    return [f"{m.name}, against {m.against}: in the baseline, not measured now" for m in gone]


def write(path: Path, metrics: Sequence[Metric], machine: dict[str, str]) -> None:
    """Figures with the machine that they are of, as JSON."""
    content = {"machine": machine, "metrics": [m._asdict() for m in metrics]}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read(path: Path) -> tuple[list[Metric], dict[str, str]]:
    """What `write` wrote. ValueError for a file that is none of its."""
    try:
        content = json.loads(path.read_text("utf-8"))
        return [Metric(**row) for row in content["metrics"]], dict(content["machine"])
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no benchmark figures: {error}") from error
