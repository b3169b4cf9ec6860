"""How label-free measures rank recipes and checkpoints against a linear probe: Spearman's correlations, as markdown.

    python -m benchmarks.verdict.ranking --root data --out runs/ranking

Per data set eight recipes, the same but for one knob, and ten checkpoints of the first. Each network is looked at with
its own recipe's views, as `pretrain` does, and with those of the first, the same for all. Runs that are in --out
already are only read. About two CPU minutes a recipe on one thread.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.verdict.cases import SMALL, Case, changed, probe
from corinfomax.diagnosis import measures
from corinfomax.evaluation import probes
from corinfomax.recipes.fields import Recipe, View
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Options
from corinfomax.training import loop
from corinfomax.weights import checkpoint

CPU = torch.device("cpu")
COUNT = 10_000  # images to train on
BASE = changed(SMALL, size=24, epochs=10, optim={"warmup_epochs": 1})
MILD = BASE.views[0]
GREY = View(crop_area=MILD.crop_area, jitter=0.0, grey=0.0)
RECIPES: dict[str, Recipe] = {
    "base": BASE,
    "lr 0.06": changed(BASE, optim={"lr": 0.06}),
    "alpha x4": changed(BASE, loss={"alpha": 500.0}),
    "alpha /8": changed(BASE, loss={"alpha": 15.6}),
    "crops from 0.7": changed(BASE, views=(replace(MILD, crop_area=(0.7, 1.0)),) * 2),
    "no colour changes": changed(BASE, views=(GREY, GREY)),
    "no BatchNorm in the projector": changed(BASE, projector={"batch_norm": False}),
    "AdamW": changed(BASE, optim={"name": "adamw", "lr": 1e-3, "start_lr": 1e-4}),
}
# Which sign says "better": more information, more directions, less gap; the alignment of a good network is small too,
# but so is that of a collapsed one.
MEASURES = {
    "ldmi": 1,
    "rank": 1,
    "rank_features": 1,
    "lidar": 1,
    "lidar_features": 1,
    "req": -1,
    "spread_gap": -1,
    "agreement": 1,
    "alignment": -1,
    "uniformity": -1,
}
SAME = ", same views"
"""Of a measure by the first recipe's views."""


def spearman(a: list[float], b: list[float]) -> float:
    """The correlation of the ranks; equal values share the mean of their ranks."""

    def ranks(values: list[float]) -> np.ndarray:
        x = np.array(values)
        return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2

    ra, rb = ranks(a), ranks(b)
    if ra.std() == 0 or rb.std() == 0:
        return float("nan")
    return float(np.corrcoef(ra, rb)[0, 1])


def run(name: str, data: str, folder: Path, root: Path, cache: Path | None) -> list[dict[str, float]]:
    """The measures and the probe of every checkpoint kept, oldest first: all of the base's, the last of the others."""
    if (folder / "done.json").exists():
        read: list[dict[str, float]] = run_folder.read_json(folder / "done.json")
        return read
    recipe = RECIPES[name]
    splits = Case(data, recipe, frozenset(), images=COUNT).splits(root, cache)
    folder.mkdir(parents=True, exist_ok=True)
    every = 0.03 if name == "base" else 60.0
    options = Options(checkpoint_minutes=every, keep=10_000, scores=0, diagnoses=0)
    loop.pretrain(recipe, splits, folder, device=CPU, options=options)
    part, found = measures.choose_sample(splits, recipe, device=CPU), []
    saved = run_folder.checkpoints(folder)
    # Ten checkpoints, evenly over the run; the first stands where a short run's network has just begun.
    places = {round((i + 1) * len(saved) / 10) - 1 for i in range(10)} if name == "base" else {len(saved) - 1}
    for place in sorted(places):
        network, _ = checkpoint.load_network(saved[place])
        own, same = (measures.look(network, part, of, device=CPU).measures for of in (recipe, BASE))
        score = probe(network.backbone, splits, recipe, most=COUNT, fit=probes.logistic)
        found.append(
            {m: getattr(own, m) for m in MEASURES} | {m + SAME: getattr(same, m) for m in MEASURES} | {"linear": score}
        )
    for path in saved:
        path.unlink()
    run_folder.write_json(folder / "done.json", found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--cache", type=Path, default=None, help="folder of decoded images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--data", nargs="*", default=["cifar10", "tiny-imagenet-64-100c", "clothing-128"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    # By turns, so that what is there is balanced if it is stopped early.
    rows: dict[str, dict[str, list[dict[str, float]]]] = {data: {} for data in options.data}
    for name in RECIPES:
        for data in options.data:
            folder = options.out / data / name.replace("/", "over").replace(" ", "-")
            rows[data][name] = run(name, data, folder, options.root, options.cache)
            print(data, name, rows[data][name][-1], flush=True)
    sets = {}
    for data, by_name in rows.items():
        sets[f"{data}, {len(by_name)} recipes"] = [found[-1] for found in by_name.values()]
        sets[f"{data}, {len(by_name['base'])} checkpoints"] = by_name["base"]
    print("\n| measure | " + " | ".join(sets) + " | mean |\n|---|" + "---:|" * (len(sets) + 1))
    for which in ("", SAME):
        for measure, sign in MEASURES.items():
            cells = [
                spearman([sign * row[measure + which] for row in some], [row["linear"] for row in some])
                for some in sets.values()
            ]
            values = " | ".join(f"{c:+.2f}" for c in (*cells, np.mean(cells)))
            print(f"| {'−' if sign < 0 else ''}{measure}{which} | {values} |")
    for name, some in sets.items():
        print(f"\n{name}: linear " + ", ".join(f"{row['linear']:.1f}" for row in some))


if __name__ == "__main__":
    main()
