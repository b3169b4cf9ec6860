"""`python -m benchmarks [SUITE ...]`: measure, compare with the baseline, write the page."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.speed import markdown, metrics
from benchmarks.speed.clock import Effort
from benchmarks.speed.machine import commit, machine
from benchmarks.speed.metrics import Metric

HERE = Path(__file__).resolve().parent
SUITES = {
    "loss": "loss",
    "views": "augmentation",
    "step": "steps",
    "pipeline": "pipeline",
    "memory": "memory",
    "growth": "growth",
}
"""Each suite's module."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 when something is worse than the baseline."""
    options = arguments().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    elif options.clock == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other burn processor time
    effort = Effort(2 if options.quick else options.rounds, options.clock, options.quick)
    here = machine(options.clock)
    if os.getloadavg()[0] > 0.5 and options.clock == "wall":
        print(f"others compute here (load {here['load']}); --clock cpu measures processor time", file=sys.stderr)
    old, of_old = metrics.read(options.baseline) if options.baseline.exists() else ([], {})
    found: list[Metric] = []
    for suite in options.suites or SUITES:
        for m in importlib.import_module(f"benchmarks.speed.{SUITES[suite]}").run(effort):
            print(f"{m.name}, against {m.against}: {m.ratio:.2f} ({m.low:.2f} – {m.high:.2f})", flush=True)
            found.append(m._replace(commit=commit()))
    worse = metrics.regressions(found, old)
    for sentence in (*worse, *metrics.missing(found, old)):
        print(f"! {sentence}")
    if worse and of_old.get("processor") != here["processor"]:
        print(f"the baseline is of another machine: {of_old.get('processor')}")
    if old and not worse:
        print("nothing is worse than the baseline")
    if options.write:
        ran = {m.suite for m in found}
        kept = [m for m in old if m.suite not in ran]
        if kept and of_old.get("processor") != here["processor"]:
            print(f"! not written: the other figures are of {of_old.get('processor')}, and a page is of one machine")
            return 1
        found = in_order([*kept, *found])
        metrics.write(options.baseline, found, here)
        options.page.write_text(markdown.page(found, here), "utf-8")
        print(f"written: {options.baseline}, {options.page}")
    return int(bool(worse))


def in_order(found: Sequence[Metric]) -> list[Metric]:
    """Suites in the order of SUITES."""
    order = list(SUITES)
    return sorted(found, key=lambda m: order.index(m.suite))


def arguments() -> argparse.ArgumentParser:
    """What can be typed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"which of {', '.join(SUITES)}; all unless given")
    parser.add_argument("--quick", action="store_true", help="small shapes and two rounds: the figures say nothing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu where others compute too")
    parser.add_argument("--threads", type=int, help="of torch; its own choice unless given, 1 on the clock cpu")
    parser.add_argument("--baseline", type=Path, default=HERE / "speed" / "baseline.json")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    parser.add_argument("--write", action="store_true", help="make this the baseline, and write the page")
    return parser


if __name__ == "__main__":
    sys.exit(main())
