"""Scores before and after continuing from weights, and from scratch in the same time: a markdown table.

    python -m benchmarks.continuing.gain run weights.safetensors tf_efficientnet_lite0 clothing mnist5k cifar10 \
        --root data --out runs/gain --lengths 1 3 --seeds 0 1 2
    python -m benchmarks.continuing.gain table --out runs/gain

Every row is a run of the `pretrain` command as a user types it, kept in --out; runs that are there are only read.
Length 1 is the recipe's own, about ten minutes on two cores; 3 has three times the epochs. The interval is that of the
paired difference to the weights before, over test images. Scratch is the recipe chosen without --init.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from corinfomax.evaluation.table import BEFORE
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Score
from corinfomax.weights import checkpoint

PROBES = ("kNN", "linear", "10 a class", "1 a class")


def pretrain(out: Path, *words: str) -> None:
    """Run the command into `out`, unless it is there."""
    if not run_folder.read_results(out).table:
        command = [sys.executable, "-m", "corinfomax", "pretrain", *words, "--out", str(out), "--no-report"]
        subprocess.run(command, check=True)


def measure(data: str, options: argparse.Namespace) -> None:
    """All runs on one set of images, the first of each kind first."""
    images = [str(options.root / data) if (options.root / data).exists() else data]
    place = options.out / Path(data).name
    named = ["--backbone.name", options.architecture] if options.architecture else []
    for seed in options.seeds:
        for length in options.lengths:
            words = [*images, "--init", options.init, *named, "--seed", str(seed)]
            if length != 1:
                usual = checkpoint.load_resumable(place / f"1-{options.seeds[0]}").recipe
                for flag, value in (
                    ("epochs", usual.epochs),
                    ("optim.warmup-epochs", usual.optim.warmup_epochs),
                ):
                    words += [f"--{flag}", f"{length * value:g}"]
            pretrain(place / f"{length}-{seed}", *words)
        if options.scratch:
            pretrain(place / f"scratch-{seed}", *images, "--seed", str(seed))


def table(out: Path) -> list[str]:
    """A row for the weights before and for each kind of run, means over seeds."""
    lines = ["| set | weights | minutes | seeds | kNN | linear | difference | 10 a class | 1 a class |"]
    lines += ["|---|---|---:|---:|---:|---:|---|---:|---:|"]
    for place in sorted(path for path in out.iterdir() if path.is_dir()):
        before = None
        for kind in sorted({run.name.rpartition("-")[0] for run in place.iterdir()}):
            runs = [run for run in sorted(place.glob(f"{kind}-*")) if run_folder.read_results(run).table]
            results = [run_folder.read_results(run) for run in runs]
            if not runs:
                continue

            # the weights before are the same in every run that continued
            if before is None and BEFORE in results[0].table:
                before = results[0].table[BEFORE]
                lines.append(_row(place.name, "before", "", [before], ""))

            minutes = fmean(run_folder.read_metrics(run)[-1].seconds for run in runs) / 60
            continued = [each.comparisons[0] for each in results if BEFORE in each.table]
            gains = "; ".join(f"{c.difference:+.1f} ({c.low:+.1f} to {c.high:+.1f})" for c in continued)
            name = f"continued, length {kind}" if continued else kind
            lines.append(
                _row(place.name, name, f"{minutes:.0f}", [each.table["pretrained"] for each in results], gains)
            )
    return lines


def _row(data: str, name: str, minutes: str, scores: list[dict[str, Score]], gains: str) -> str:
    means = [f"{fmean(each[probe].mean for each in scores):.1f}" for probe in PROBES]
    cells = [data, name, minutes, str(len(scores)), *means[:2], gains.replace("-", "−"), *means[2:]]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run, shown = commands.add_parser("run"), commands.add_parser("table")
    run.add_argument("init", help="weights, as --init takes them")
    run.add_argument("architecture", nargs="?", default=None, help="of weights that do not record it; '' for none")
    run.add_argument("data", nargs="+", help="folders in --root, or named sets")
    run.add_argument("--root", type=Path, default=Path("data"))
    run.add_argument("--lengths", type=int, nargs="+", default=[1])
    run.add_argument("--seeds", type=int, nargs="+", default=[0])
    run.add_argument("--scratch", action="store_true", help="a run from random weights too")
    for command in (run, shown):
        command.add_argument("--out", type=Path, required=True, help="folder of the runs")
    options = parser.parse_args()
    if options.command == "run":
        for data in options.data:
            measure(data, options)
    print("\n".join(table(options.out)))


if __name__ == "__main__":
    main()
