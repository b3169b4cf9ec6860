"""Scores before and after continuing from weights, and from scratch in the same time: a markdown table.

    python -m benchmarks.continuing.gain run weights.safetensors tf_efficientnet_lite0 clothing mnist5k cifar10 \
        --root data --out runs/gain --lengths 1 3 --seeds 0 1 2
    python -m benchmarks.continuing.gain table

Every row is a run of the `pretrain` command as a user types it. Its scores go into gain.jsonl beside this file; what is
there is not run again. Length 1 is the recipe's own, about ten minutes on two cores; 3 has three times the epochs. The
interval is that of the paired difference to the weights before, over test images. Scratch is the recipe chosen without
--init, of the same length.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.speed.machine import machine
from corinfomax import network
from corinfomax.evaluation.table import BEFORE
from corinfomax.images.sources import Data
from corinfomax.recipes import published
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import WeightsOptions
from corinfomax.weights.load import load_backbone

Record = dict[str, Any]
RECORDS = Path(__file__).with_suffix(".jsonl")
PROBES = ("kNN", "linear", "10 a class", "1 a class")
SCRATCH = "scratch"


def read(path: Path) -> list[Record]:
    """The runs that are recorded."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(data: str, options: argparse.Namespace) -> None:
    """Run and record what is not yet recorded on one set of images."""
    images = str(options.root / data) if (options.root / data).exists() else data
    survey = Data(images).survey()
    loaded = load_backbone(options.init, WeightsOptions(architecture=options.architecture or None))
    one_size = network.has_fixed_size(loaded.recipe.backbone)
    _, adapted = published.adapt(one_size, loaded.recipe.size, survey.images, survey.short_side, cuda=False)
    _, chosen, _ = published.choose(images, survey.images, survey.short_side, cuda=False)

    from_weights = ["--init", options.init]
    from_weights += ["--backbone.name", options.architecture] if options.architecture else []
    kinds = [(f"{length}", [*from_weights, *longer(adapted, length)]) for length in options.lengths]
    if options.scratch:
        kinds += [(f"{SCRATCH} {length}", longer(chosen, length)) for length in options.lengths]
    for seed, (kind, words) in itertools.product(options.seeds, kinds):
        run = {"set": Path(data).name, "init": Path(options.init).stem, "kind": kind, "seed": seed}
        if any(run.items() <= record.items() for record in read(options.records)):
            continue
        out = options.out / run["init"] / run["set"] / f"{kind.replace(' ', '-')}-{seed}"
        if not run_folder.read_results(out).table:
            command = [sys.executable, "-m", "corinfomax", "pretrain", images, *words, "--seed", str(seed)]
            subprocess.run([*command, "--out", str(out), "--no-report"], check=True)
        with options.records.open("a") as file:
            file.write(json.dumps(run | record_of(out)) + "\n")


def longer(recipe: Recipe, length: int) -> list[str]:
    """The flags that make a recipe `length` times as long."""
    return [] if length == 1 else ["--epochs", f"{length * recipe.epochs:g}"]


def record_of(out: Path) -> Record:
    """Scores, minutes and machine of a finished run."""
    results, rows, hardware = run_folder.read_results(out), run_folder.read_metrics(out), machine("wall")
    gain = results.comparisons[0]
    means = {name: {probe: round(row[probe].mean, 2) for probe in PROBES} for name, row in results.table.items()}
    return {
        "minutes": round(rows[-1].seconds / 60, 1),
        "processor": hardware["processor"],
        "threads": hardware["threads"],
        "scores": means,
        "against": gain.other,
        "gain": [round(value, 2) for value in (gain.difference, gain.low, gain.high)],
        "sentence": results.sentences[0],
        "verdict": None if results.verdict is None else results.verdict.kind,
    }


def table(records: Iterable[Record]) -> list[str]:
    """A row for the weights before and for each kind of run, means over seeds."""
    lines = ["| set | weights | minutes | seeds | kNN | linear | difference | 10 a class | 1 a class |"]
    lines += ["|---|---|---:|---:|---:|---:|---|---:|---:|"]
    by_kind: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        by_kind.setdefault((record["set"], record["init"], record["kind"]), []).append(record)
    shown = set()
    for (name, init, kind), runs in sorted(by_kind.items()):
        # the weights before are the same in every run that continued
        before = runs[0]["scores"].get(BEFORE)
        if before is not None and (name, init) not in shown:
            shown.add((name, init))
            lines.append(_row(name, f"{init}, frozen", "", [before], ""))
        gains = "; ".join("{:+.1f} ({:+.1f} to {:+.1f})".format(*run["gain"]) for run in runs) if before else ""
        words = f"continued, length {kind}" if before else kind
        minutes = f"{fmean(run['minutes'] for run in runs):.0f}"
        lines.append(_row(name, words, minutes, [run["scores"]["pretrained"] for run in runs], gains))
    return lines


def _row(data: str, name: str, minutes: str, scores: Sequence[dict[str, float]], gains: str) -> str:
    cells = []
    for probe in PROBES:
        values = [each[probe] for each in scores]
        cells.append(f"{fmean(values):.1f}" + (f" ±{stdev(values):.1f}" if len(values) > 1 else ""))
    cells = [data, name, minutes, str(len(scores)), *cells[:2], gains.replace("-", "−"), *cells[2:]]
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
    run.add_argument("--scratch", action="store_true", help="runs from random weights too")
    run.add_argument("--out", type=Path, required=True, help="folder of the runs")
    for command in (run, shown):
        command.add_argument("--records", type=Path, default=RECORDS, help="file of finished runs")
    options = parser.parse_args()
    if options.command == "run":
        for data in options.data:
            measure(data, options)
    print("\n".join(table(read(options.records))))


if __name__ == "__main__":
    main()
