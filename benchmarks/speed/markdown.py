"""Figures as a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.metrics import Metric

TITLES = {
    "loss": "The loss",
    "views": "Views",
    "step": "The whole training step",
    "pipeline": "The pipeline's efficiency",
    "memory": "Memory",
    "growth": "Growth",
}
COMMANDS = Path(__file__).parents[1] / "memory" / "commands.md"  # by hand: its commands take an hour
ABOUT = """\
# Benchmarks

A ratio is another program's cost over ours (under Growth, our own cost at a smaller size over that at a larger one):
above 1, ours is cheaper. Both costs are measured alternately in the same run; the ratio is the median over n rounds,
with quartiles. `python -m benchmarks --write` makes this page and `benchmarks/speed/baseline.json`. Later runs are
compared with that file: `python -m benchmarks` exits with code 1 if a figure got worse.
"""


def page(metrics: Sequence[Metric], machine: dict[str, str]) -> str:
    """The whole page: the machine, the targets and what was reached, then each suite."""
    where = " · ".join(f"{name} {value}" for name, value in machine.items() if value)
    parts = [ABOUT, f"Measured on: {where}.\n", *notes(machine)]
    targets = [m for m in metrics if m.at_least is not None]
    if targets:
        parts += ["## Targets\n", *table(targets, goals=True)]
    for suite, title in TITLES.items():
        rows = [m for m in metrics if m.suite == suite]
        if rows:
            parts += [f"## {title}\n", *table(rows, goals=False)]
    return "\n".join([*parts, COMMANDS.read_text("utf-8")]).rstrip() + "\n"


def notes(machine: dict[str, str]) -> list[str]:
    """Sentences that a reader needs to judge figures of this machine."""
    sentences = []
    if machine.get("clock") == "processor seconds":
        sentences.append(
            "The machine was shared, so costs are processor seconds of the process and its workers; idle cores do not "
            "count.\n"
        )
    if machine.get("arithmetic") == "float32":
        sentences.append(
            "This processor is no faster in bfloat16 than in float32, so all networks ran in float32: the figures do "
            "not show the gain of bfloat16 elsewhere.\n"
        )
    elif "arithmetic" in machine:
        sentences.append(
            "Our networks ran in bfloat16, which `--precision auto` chooses on this processor; the plain baseline and "
            "lightly's examples ran in float32, as they are written.\n"
        )
    return sentences


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
    """One word: the aim, yes (the target) or no."""
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
