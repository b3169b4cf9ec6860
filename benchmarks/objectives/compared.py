"""The rows of `benchmarks.frontier` as a table and a plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.objectives.methods import CHOSEN, METHODS, Changes

Row = dict[str, Any]
SCORES = ("kNN", "10 a class")
NAMES = {
    "paper": "CorInfoMax, the paper's settings",
    "kernel": "CorInfoMax with a kernel",
    "corinfomax": "**CorInfoMax, our settings**",
    "vicreg": "VICReg",
    "barlow-twins": "Barlow Twins",
    "simclr": "SimCLR",
    "sigreg": "SIGReg (LeJEPA)",
    "supervised": "supervised",
}
TITLES = {
    "cifar10": "CIFAR-10 (JPEG copy)",
    "tiny-imagenet-64-100c": "Tiny ImageNet, 100 classes at 64 px",
    "cifar10-resnet18": "CIFAR-10 (JPEG copy), ResNet-18 with a stem of stride 2",
}


RENAMED = {("", "crops"): ("", "n_views"), ("loss", "weights"): ("rival", "weights")}
"""Settings of the first rows, and their names now."""


def from_json(line: str) -> Row:
    """A row of the file, with lists as tuples and settings under their names now."""
    row: Row = json.loads(line)
    if "crops" in row:
        row["views"] = row.pop("crops")
    changes: Changes = {}
    for part, values in row["changes"].items():
        for name, value in values.items():
            part_now, name_now = RENAMED.get((part, name), (part, name))
            changes.setdefault(part_now, {})[name_now] = tuple(value) if isinstance(value, list) else value
    return row | {"changes": changes}


def runs_of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows of runs with these fields, and the settings that are chosen now."""
    runs = (row for row in rows if row["kind"] == "run" and row["changes"] == CHOSEN[row["method"]])
    return [row for row in runs if all(row[name] == value for name, value in wanted.items())]


def table(rows: Sequence[Row], data: str, minutes: float, *, seeds: int) -> list[str]:
    """A line a method: its linear probe after each budget, and the other scores and the work after `minutes`.

    Mean ± standard deviation over seeds, with their number where it is not `seeds`.
    """
    budgets = sorted({row["minutes"] for row in runs_of(rows, data=data)})
    head = [f"linear, {budget:g} min" for budget in budgets]
    head += [*(f"{score}, {minutes:g} min" for score in SCORES), "steps", "views", "TFLOP"]
    lines = [["%", *head], ["---", *["---:"] * len(head)]]
    for name in METHODS:
        runs = {budget: runs_of(rows, method=name, data=data, minutes=budget) for budget in budgets}
        if not runs[minutes]:
            continue
        cells = [_cell(runs[budget], "linear", seeds) for budget in budgets]
        cells += [_cell(runs[minutes], score, seeds) for score in SCORES]
        first = runs[minutes][0]
        work = [f"{first['steps']:,}", f"{first['views'] / 1e3:,.0f} k", f"{first['tflops']:,.0f}"]
        lines.append([NAMES[name], *cells, *work])
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(runs: Sequence[Row], score: str, seeds: int) -> str:
    """A score of some runs as text."""
    if not runs:
        return "–"
    count = "" if len(runs) == seeds else f" ({len(runs)})"
    return _spread([row[score] for row in runs]) + count


def _spread(values: Sequence[float]) -> str:
    sd = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{sd}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Linear top-1 over compute, a row of panels a set of images with several budgets: minutes and operations."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    plt.rcParams |= {"svg.hashsalt": "corinfomax", "svg.fonttype": "none", "font.family": "sans-serif"}
    sets = [data for data in TITLES if len({row["minutes"] for row in runs_of(rows, data=data)}) > 1]
    figure, panels = plt.subplots(len(sets), 2, figsize=(10, 4 * len(sets)), squeeze=False, layout="constrained")
    for data, pair in zip(sets, panels, strict=True):
        for axis, (what, label) in zip(pair, (("minutes", "processor minutes"), ("tflops", "TFLOP")), strict=True):
            for place, name in enumerate(METHODS):
                found = runs_of(rows, data=data, method=name)
                points = []
                for minutes in sorted({row["minutes"] for row in found}):
                    values = [row for row in found if row["minutes"] == minutes]
                    linear = [row["linear"] for row in values]
                    points.append((values[0][what], statistics.fmean(linear), max(linear) - min(linear)))
                if points:
                    x, y, spread = zip(*points, strict=True)
                    style = {"lw": 2.5, "zorder": 3} if name == "corinfomax" else {"lw": 1.2}
                    axis.errorbar(
                        x,
                        y,
                        yerr=[each / 2 for each in spread],
                        marker="o",
                        ms=4,
                        color=f"C{place}",
                        label=NAMES[name].strip("*"),
                        **style,
                    )
            axis.set(xscale="log", xlabel=label, ylabel="linear probe, top-1 %", title=TITLES[data])
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 7)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
            axis.grid(alpha=0.3)
    if sets:
        named: dict[str, Any] = {}
        for axis in panels[:, 0]:
            handles, labels = axis.get_legend_handles_labels()
            named |= dict(zip(labels, handles, strict=True))
        figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
