"""Does being ahead of raw pixels without labels foretell a probe that is ahead of them?

    python -m benchmarks.advice.scale run --root data --panel runs/panel --length runs/length
    python -m benchmarks.advice.scale table

Judges runs of a quarter of an epoch to 64 epochs on every set, in --length, and those of the panel; what is missing in
--length is trained. Records go into scale.jsonl beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.advice import sets
from benchmarks.advice.panel import BASE, CPU, MILD, VIEWS, folder_of, recipe_of, run, score
from benchmarks.verdict.cases import changed
from corinfomax.diagnosis.baselines import AHEAD, Shared, shared_information
from corinfomax.evaluation.table import random_backbone
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import run_folder
from corinfomax.weights import checkpoint

RECORDS = Path(__file__).with_suffix(".jsonl")
EPOCHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
MARGINS = (0.0, 0.05, AHEAD, 0.2)
Record = dict[str, Any]


def measure(options: argparse.Namespace) -> None:
    """Judge the runs that are not yet recorded."""
    for data in options.sets:
        splits = sets.load(data, options.root)
        assert splits.test is not None
        untrained = random_backbone(splits.train, BASE, device=CPU)
        raw = score(nn.Flatten(), splits, replace(BASE, test_scale=1.0))["linear"]
        cases = [("recipe", epochs, _length(epochs, data, options.length)) for epochs in EPOCHS]
        cases += [(name, BASE.epochs, _panel(name, data, options.panel)) for name in VIEWS if name != "recipe"]
        for views, epochs, (recipe, folder) in cases:
            key = {"set": data, "views": views, "epochs": epochs}
            if any(key.items() <= record.items() for record in read()):
                continue
            linear = run(recipe, splits, folder)["linear"]
            network, _ = checkpoint.load_network(run_folder.checkpoints(folder)[-1])
            shared = shared_information(network.backbone, untrained, splits.test, recipe, device=CPU)
            record = key | {"linear": round(linear, 2), "raw": round(raw, 2)}
            record |= {name: round(value, 3) for name, value in shared._asdict().items()}
            with RECORDS.open("a") as file:
                file.write(json.dumps(record) + "\n")


def _length(epochs: float, data: str, out: Path) -> tuple[Recipe, Path]:
    recipe = recipe_of(MILD, 0, epochs)
    recipe = changed(recipe, optim={"warmup_epochs": epochs / 10}) if epochs < 4 else recipe
    return recipe, out / data.replace(" ", "-") / f"{epochs:g}-0"


def _panel(name: str, data: str, out: Path) -> tuple[Recipe, Path]:
    return recipe_of(VIEWS[name], 0), folder_of(out, data, name, 0)


def read() -> list[Record]:
    """The records."""
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def margin(record: Record) -> float:
    """How far the features are ahead of both baselines, in nats per dimension."""
    shared = Shared(record["features"], record["pixels"], record["untrained"])
    return shared.features - max(shared.pixels, shared.untrained)


def table(records: Sequence[Record]) -> Iterable[str]:
    """For each margin and each length: runs that are not ahead, and runs whose probe is no better than raw pixels."""
    yield "| margin, nats | not ahead | of those the probe is no better than raw pixels | of the others |"
    yield "|---:|---:|---:|---:|"
    for least in MARGINS:
        behind = [record["linear"] <= record["raw"] for record in records if margin(record) <= least]
        ahead = [record["linear"] <= record["raw"] for record in records if margin(record) > least]
        yield f"| {least:g} | {len(behind)} | {sum(behind)} | {sum(ahead)} of {len(ahead)} |"
    yield "\n| epochs | not ahead | probe no better | both |"
    yield "|---:|---:|---:|---:|"
    for epochs, some in itertools.groupby(sorted(records, key=lambda r: r["epochs"]), key=lambda r: r["epochs"]):
        rows = [(margin(record) <= AHEAD, record["linear"] <= record["raw"]) for record in some]
        counts = (sum(a for a, _ in rows), sum(b for _, b in rows), sum(a and b for a, b in rows))
        yield f"| {epochs:g} | {' | '.join(f'{count} of {len(rows)}' for count in counts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measured, _ = commands.add_parser("run"), commands.add_parser("table")
    measured.add_argument("--root", type=Path, default=Path("data"))
    measured.add_argument("--panel", type=Path, required=True, help="folder of the panel's runs")
    measured.add_argument("--length", type=Path, required=True, help="folder of the runs of several lengths")
    measured.add_argument("--sets", nargs="+", default=list(sets.SETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as commands do
    if options.command == "run":
        measure(options)
    print("\n".join(table(read())))


if __name__ == "__main__":
    main()
