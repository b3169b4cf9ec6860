"""Figures as a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.speed.metrics import Metric

TITLES = {
    "loss": "The loss",
    "views": "Views",
    "step": "The whole training step",
    "pipeline": "The pipeline's efficiency",
    "memory": "Memory",
    "growth": "Growth",
}
ABOUT = """\
# Benchmarks

Each figure is the cost of something else over ours, measured by turns in the same run: more is better, 1 is as good. It
is the median over n rounds of that round's ratio, with quartiles. Made by `python -m benchmarks --write`;
`benchmarks/baseline.json` holds the same numbers, and every later run is compared with it.
"""


def page(metrics: Sequence[Metric], machine: dict[str, str]) -> str:
    """The whole page: where it was measured, what was agreed and got, then every suite."""
    where = " · ".join(f"{name} {value}" for name, value in machine.items() if value)
    parts = [ABOUT, f"Measured on: {where}.\n", *notes(machine)]
    agreed = [m for m in metrics if m.at_least is not None]
    if agreed:
        parts += ["## What was agreed, and what was got\n", *table(agreed, goals=True)]
    for suite, title in TITLES.items():
        rows = [m for m in metrics if m.suite == suite]
        if rows:
            parts += [f"## {title}\n", *table(rows, goals=False)]
    return "\n".join(parts).rstrip() + "\n"


def notes(machine: dict[str, str]) -> list[str]:
    """What a reader must know of this machine to read the figures right."""
    said = []
    if machine.get("clock") == "processor seconds":
        said.append(
            "The machine was shared, so costs are processor seconds of the process and its workers: idle cores are not "
            "counted, for or against anyone.\n"
        )
    if machine.get("arithmetic") == "float32":
        said.append(
            "This processor does not multiply bfloat16 faster than float32, so all networks ran in float32: what "
            "bfloat16 gives elsewhere is not in these figures.\n"
        )
    elif "arithmetic" in machine:
        said.append(
            "Our networks ran in bfloat16, which is `--precision auto` on this processor; those of the plain baseline "
            "and of lightly in float32, as they are written.\n"
        )
    return said


def table(metrics: Sequence[Metric], *, goals: bool) -> list[str]:
    """Rows of one table."""
    head = ["figure", "against", "ratio", "quartiles", "n", "ours", "theirs"]
    head += ["at least", "aim", "reached"] if goals else ["commit"]
    lines = [row(head), row(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for m in metrics:
        cells = [m.name, m.against, f"**{ratio(m.ratio)}**", f"{ratio(m.low)} – {ratio(m.high)}", str(m.n)]
        cells += [f"{number(m.ours)} {m.unit}", f"{number(m.theirs)} {m.unit}"]
        if goals:
            assert m.at_least is not None
            cells += [f"{m.at_least:g}", "" if m.aim is None else f"{m.aim:g}", reached(m)]
        else:
            cells.append(m.commit)
        lines.append(row(cells))
    return [*lines, ""]


def reached(m: Metric) -> str:
    """Whether the figure is what was agreed, in a word."""
    if m.aim is not None and m.ratio >= m.aim:
        return "the aim"
    if m.at_least is not None and m.ratio >= m.at_least:
        return "yes"
    return "no"


def ratio(value: float) -> str:
    """Two decimals, or two digits that count where those would be all noughts."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def number(value: float) -> str:
    """Three digits that count, thousands separated."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
