"""The rows of `benchmarks.frontier` as a table and a plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.objectives.methods import ABLATIONS, CHOSEN, METHODS, Changes, ablated, changed
from corinfomax.recipes import fields

Row = dict[str, Any]
SCORES = ("kNN", "linear", "10 a class")
NAMES = {
    "paper": "CorInfoMax, the paper's settings",
    "kernel": "CorInfoMax with a kernel",
    "corinfomax": "**CorInfoMax, ours**",
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


def runs_of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows of runs with these fields, and the settings that are chosen now."""
    runs = (row for row in rows if row["kind"] == "run" and row["changes"] == as_json(CHOSEN[row["method"]]))
    return [row for row in runs if all(row[name] == value for name, value in wanted.items())]


def as_json(changes: Changes) -> Any:
    """Settings as a row has them once it is read."""
    return json.loads(json.dumps(changes))


def table(rows: Sequence[Row], data: str, minutes: float) -> list[str]:
    """A line a method: mean ± standard deviation over seeds."""
    head = ["%", *SCORES, "seeds", "steps", "crops", "TFLOP"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name in METHODS:
        found = runs_of(rows, method=name, data=data, minutes=minutes)
        if not found:
            continue
        cells = [_spread([row[score] for row in found]) for score in SCORES]
        one = found[0]
        size = [str(len(found)), f"{one['steps']:,}", f"{one['crops'] / 1e3:,.0f} k", f"{one['tflops']:,.0f}"]
        lines.append([NAMES[name], *cells, *size])
    return ["| " + " | ".join(line) + " |" for line in lines]


def by_minutes(rows: Sequence[Row], data: str) -> list[str]:
    """A line a method: its linear probe after each of the budgets; no line where there is one budget."""
    budgets = sorted({row["minutes"] for row in runs_of(rows, data=data)})
    if len(budgets) < 2:
        return []
    lines = [
        "| linear, % (seeds), after processor minutes | " + " | ".join(f"{minutes:g}" for minutes in budgets) + " |",
        "|---|" + "---:|" * len(budgets),
    ]
    for name in METHODS:
        cells = []
        for minutes in budgets:
            found = runs_of(rows, method=name, data=data, minutes=minutes)
            cells.append(f"{_spread([row['linear'] for row in found])} ({len(found)})" if found else "–")
        if any(cell != "–" for cell in cells):
            lines.append("| " + " | ".join([NAMES[name], *cells]) + " |")
    return lines


def _spread(values: Sequence[float]) -> str:
    sd = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{sd}"


def chosen() -> list[str]:
    """A line a method: what the search changed of the settings that all begin with."""
    lines = ["| method | settings found on the slice |", "|---|---|"]
    for name, method in METHODS.items():
        words = " ".join(fields.typed(changed(method.start, CHOSEN[name]), method.start))
        lines.append(f"| {NAMES[name]} | {f'`{words}`' if words else 'as begun'} |")
    return lines


def ablations(rows: Sequence[Row]) -> list[str]:
    """A line a change of CorInfoMax's settings: scores over seeds, and the difference to none of the same seeds."""
    lines = [
        "| change | steps | linear | kNN | 10 a class | Δ linear | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = {row["seed"]: row for row in _of(rows, ablated({}))}
    start = changed(METHODS["corinfomax"].start, ablated({}))
    for change in ({}, *ABLATIONS):
        found = _of(rows, ablated(change))
        if not found:
            continue
        words = " ".join(fields.typed(changed(METHODS["corinfomax"].start, ablated(change)), start))
        said, seeds = f"`{words}`" if words else "none", str(len(found))
        errors = {row["error"] for row in found if "error" in row}
        if errors:
            lines.append(f"| {said}: {', '.join(sorted(errors))} | – | – | – | – | – | {seeds} |")
            continue
        cells = [_spread([row[score] for row in found]) for score in ("linear", "kNN", "10 a class")]
        apart = [row["linear"] - base[row["seed"]]["linear"] for row in found if row["seed"] in base]
        delta = f"{statistics.fmean(apart):+.1f}".replace("-", "−") if apart and change else "–"
        lines.append("| " + " | ".join([said, f"{found[0]['steps']:,}", *cells, delta, seeds]) + " |")
    return lines


def _of(rows: Iterable[Row], changes: Changes) -> list[Row]:
    wanted = as_json(changes)
    return [row for row in rows if row["kind"] == "ablation" and row["changes"] == wanted]


def trials(rows: Iterable[Row]) -> list[str]:
    """A line a trial of the search; of one that was done again the last."""
    lines = ["| method | change | steps | linear | kNN |", "|---|---|---:|---:|---:|"]
    last = {(row["method"], json.dumps(row["changes"], sort_keys=True)): row for row in rows if row["kind"] == "trial"}
    for row in sorted(last.values(), key=lambda row: list(METHODS).index(row["method"])):
        start = METHODS[row["method"]].start
        recipe = fields.from_json(fields.to_json(changed(start, row["changes"])))
        words = " ".join(fields.typed(recipe, start)) or "–"
        linear, knn = (f"{row[name]:.1f}" if "error" not in row else "–" for name in ("linear", "kNN"))
        said = f" ({row['error']})" if "error" in row else ""
        lines.append(f"| {row['method']} | {words}{said} | {row['steps']:,} | {linear} | {knn} |")
    return lines


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
