"""What twice the epochs bring: runs of five lengths on every set, with their looks and their scores.

    python -m benchmarks.advice.length run --root data --out runs/length
    python -m benchmarks.advice.length table

Runs that are in length.jsonl beside this file are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.advice import sets
from benchmarks.advice.panel import MILD, recipe_of, run
from corinfomax.diagnosis import measures
from corinfomax.runtime import run_folder
from corinfomax.weights import checkpoint

CPU = torch.device("cpu")
RECORDS = Path(__file__).with_suffix(".jsonl")
EPOCHS = (4.0, 8.0, 16.0, 32.0, 64.0)
Record = dict[str, Any]


def read() -> list[Record]:
    """The records."""
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def measure(data: str, epochs: float, seed: int, options: argparse.Namespace) -> None:
    """Train, and record scores, looks, and LDMI of training images beside that of held-out ones."""
    key = {"set": data, "epochs": epochs, "seed": seed}
    if any(key.items() <= record.items() for record in read()):
        return
    splits, recipe = sets.load(data, options.root), recipe_of(MILD, seed, epochs)
    folder = options.out / data.replace(" ", "-") / f"{epochs:g}-{seed}"
    scores = run(recipe, splits, folder)
    rows = run_folder.read_metrics(folder)
    network, _ = checkpoint.load_network(run_folder.checkpoints(folder)[-1])
    seen = measures.choose_sample(splits._replace(test=None), recipe, device=CPU)
    of_seen = measures.look(network, seen, recipe, device=CPU).measures
    assert of_seen is not None
    looks = [
        {"step": row.step, "lr": row.lr, "loss": round(row.loss, 4)}
        | {name: round(float(getattr(row.look.measures, name)), 4) for name in ("ldmi", "agreement", "rank_features")}
        for row in rows
        if row.look is not None and row.look.measures is not None
    ]
    record = key | {"scores": scores, "seen": {"ldmi": of_seen.ldmi, "agreement": of_seen.agreement}, "looks": looks}
    with RECORDS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(key, scores, flush=True)


def pairs(records: list[Record], probe: str) -> list[tuple[str, float, float, float]]:
    """Set, epochs, score, and score of the run of twice the epochs."""
    scores = {(r["set"], r["epochs"], r["seed"]): r["scores"][probe] for r in records}
    return [
        (data, epochs, score, scores[data, 2 * epochs, seed])
        for (data, epochs, seed), score in scores.items()
        if (data, 2 * epochs, seed) in scores
    ]


def errors_left(found: list[tuple[str, float, float, float]]) -> list[float]:
    """For each pair, the errors of the longer run as a share of those of the shorter one."""
    return [(100 - after) / (100 - before) for _, _, before, after in found]


def table(records: list[Record]) -> Iterable[str]:
    """Scores by length, the shares of errors left, and how well those of half of the sets foretell the others."""
    names = list(dict.fromkeys(record["set"] for record in records))
    lengths = sorted({record["epochs"] for record in records})
    yield f"| linear, % | {' | '.join(f'{epochs:g} epochs' for epochs in lengths)} |"
    yield "|---|" + "---:|" * len(lengths)
    for name in names:
        scores = [
            r["scores"]["linear"] for epochs in lengths for r in records if (r["set"], r["epochs"]) == (name, epochs)
        ]
        yield f"| {name} | {' | '.join(f'{score:.1f}' for score in scores)} |"
    for probe in ("linear", "kNN"):
        found = pairs(records, probe)
        low, middle, high = np.quantile(errors_left(found), (0.1, 0.5, 0.9))
        more = sum(after > before for _, _, before, after in found)
        yield f"\n{probe}: errors left {low:.2f}, {middle:.2f}, {high:.2f}; more in {more} of {len(found)}"
        for part in (0, 1):
            fitted = [pair for pair in found if names.index(pair[0]) % 2 == part]
            others = [pair for pair in found if names.index(pair[0]) % 2 != part]
            low, middle, high = np.quantile(errors_left(fitted), (0.1, 0.5, 0.9))
            inside = sum(low <= share <= high for share in errors_left(others))
            missed = [abs(100 - middle * (100 - before) - after) for _, _, before, after in others]
            yield f"by half of the sets: {inside} of {len(others)} others within, {np.mean(missed):.1f} points off"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    trained, _ = commands.add_parser("run"), commands.add_parser("table")
    trained.add_argument("--root", type=Path, default=Path("data"))
    trained.add_argument("--out", type=Path, required=True)
    trained.add_argument("--seeds", type=int, nargs="+", default=[0])
    trained.add_argument("--epochs", type=float, nargs="+", default=list(EPOCHS))
    trained.add_argument("--sets", nargs="+", default=list(sets.SETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if options.command == "run":
        for seed, epochs, data in itertools.product(options.seeds, options.epochs, options.sets):
            measure(data, epochs, seed, options)
    print("\n".join(table(read())))


if __name__ == "__main__":
    main()
