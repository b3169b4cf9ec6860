"""Which label-free measure ranks views as a linear probe does: Spearman's correlation and regret, as markdown.

    python -m benchmarks.advice.panel --root data --out runs/panel
    python -m benchmarks.advice.rank measure --root data --out runs/panel
    python -m benchmarks.advice.rank table

`measure` reads the networks of the panel; its figures go into rank.jsonl beside this file, so that `table` needs no
run. Regret is the points of the probe that are lost by the choice, against the best views of the set.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import pdist, squareform
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.advice import sets
from benchmarks.advice.panel import BASE, VIEWS, folder_of, recipe_of, run, score
from benchmarks.verdict.ranking import spearman
from corinfomax.diagnosis import measures
from corinfomax.diagnosis.baselines import leading_ldmi
from corinfomax.evaluation import features, probes
from corinfomax.evaluation.table import random_backbone
from corinfomax.images.cache import Images, Splits
from corinfomax.network import Network
from corinfomax.recipes.fields import Recipe, View
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import DataMeasures
from corinfomax.weights import checkpoint

CPU = torch.device("cpu")
RECORDS = Path(__file__).with_suffix(".jsonl")
SAMPLE = 512  # images
NO_DATA = DataMeasures(views_differ=1.0, images_differ=1.0, twins=0.0)
STILL = View(crop_area=(0.9, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0)
JUDGES: dict[str, View] = {
    "mild": BASE.views[0],
    "strong": View(crop_area=(0.08, 1.0), blur=0.5),
    "weak": View(crop_area=(0.6, 1.0), jitter=0.4),
    "crops": replace(STILL, crop_area=(0.3, 0.8), crop_ratio=(0.75, 1.33)),
    "colours": replace(STILL, jitter=1.0, grey=0.2),
    "blur": replace(STILL, blur=1.0, blur_sigma=(0.8, 1.6)),
    "turns": replace(STILL, rotate=20.0),
}
BASELINES = ("untrained", "raw pixels")
Record = dict[str, Any]


def judge(network: Network, splits: Splits, recipe: Recipe) -> dict[str, float]:
    """Every measure of a network; higher should be better."""
    sample = _sample(splits)
    own = measures.look(network, measures.Sample(sample, True, NO_DATA), recipe, device=CPU).measures
    assert own is not None
    found = {"own ldmi": own.ldmi or 0.0, "own agreement": own.agreement, "own lidar": own.lidar_features}
    found["own rank of features"] = own.rank_features
    return found | judge_features(network.backbone, sample, recipe)


def judge_features(backbone: nn.Module, sample: Images, recipe: Recipe) -> dict[str, float]:
    """Every measure of features."""
    found = {}
    for name, view in JUDGES.items():
        h = measures.features_of_views(backbone, sample, replace(recipe, views=(view, view)), device=CPU)
        found |= {f"{measure}, {name}": value for measure, value in _of_views(h).items()}
    plain = features.extract_features(backbone, sample, recipe).double()
    found["rank, centre"] = float(measures.effective_rank(plain - plain.mean(0)))
    found["IdEst, centre"] = spanning_dimension(functional.normalize(plain, dim=1))
    found["clusters, centre"] = cluster_learnability(plain)
    return found


def _sample(splits: Splits) -> Images:
    images = splits.test
    assert images is not None
    return images.select(torch.arange(min(SAMPLE, len(images))))


def _of_views(h: Float[Tensor, "n q f"]) -> dict[str, float]:
    """Measures of features in several views."""
    flat = h.flatten(0, 1)
    h = h - flat.mean(0)
    unit = functional.normalize(h, dim=-1)
    cosines = unit[:, 0] @ unit[:, 1].T
    place = (cosines > cosines.diagonal()[:, None]).double().sum(1)
    return {
        "ldmi": leading_ldmi(h),
        "agreement": float(measures.agreement(h)),
        "unit agreement": float(measures.agreement(unit)),
        "lidar": float(measures.lidar(unit)),
        "found": float((place == 0).double().mean()),
        "log place": -float((1 + place).log().mean()),
    }


def spanning_dimension(x: Float[Tensor, "n d"]) -> float:
    """Dimension of a cloud of points by the length of minimum spanning trees of parts of it.

    The length for n points grows as n^((d − 1) / d): the slope of its logarithm gives d.
    """
    rng = np.random.default_rng(0)
    points, counts, lengths = x.numpy(), [], []
    for count in (96, 192, 384, len(points)):
        for _ in range(3):
            part = points[rng.permutation(len(points))[:count]]
            counts.append(np.log(count))
            lengths.append(np.log(minimum_spanning_tree(squareform(pdist(part) + 1e-12)).sum()))
    slope = float(np.polyfit(counts, lengths, 1)[0])
    return 1 / max(1 - slope, 1e-3)


def cluster_learnability(x: Float[Tensor, "n d"], clusters: int = 20) -> float:
    """How well neighbours in one half of the images predict k-means clusters of the other half."""
    from sklearn.cluster import KMeans

    unit = functional.normalize(x - x.mean(0), dim=1).float()
    label = torch.as_tensor(KMeans(clusters, n_init=4, random_state=0).fit_predict(unit.numpy())).long()
    half = len(unit) // 2
    return probes.accuracy(probes.knn(unit[:half], label[:half], unit[half:], k=5), label[half:])


def measure(options: argparse.Namespace) -> None:
    """Measure the networks of the panel that are not yet recorded."""
    for data in options.sets:
        splits = None
        for name in BASELINES:
            key = {"set": data, "views": name, "seed": 0}
            if any(key.items() <= row.items() for row in read()):
                continue
            splits = splits or sets.load(data, options.root)
            untrained = random_backbone(splits.train, BASE, device=CPU)
            model, recipe = (untrained, BASE) if name == "untrained" else (nn.Flatten(), replace(BASE, test_scale=1.0))
            record = key | {"scores": score(model, splits, recipe)}
            record["measures"] = judge_features(model, _sample(splits), recipe)
            with RECORDS.open("a") as file:
                file.write(json.dumps(record) + "\n")
        for seed, (views, view) in itertools.product(options.seeds, VIEWS.items()):
            folder = folder_of(options.out, data, views, seed)
            key = {"set": data, "views": views, "seed": seed}
            if not (folder / "done.json").exists() or any(key.items() <= row.items() for row in read()):
                continue
            splits = splits or sets.load(data, options.root)
            recipe = recipe_of(view, seed)
            network, _ = checkpoint.load_network(run_folder.checkpoints(folder)[-1])
            record = key | {"scores": run(recipe, splits, folder), "measures": judge(network, splits, recipe)}
            with RECORDS.open("a") as file:
                file.write(json.dumps(record) + "\n")


def read() -> list[Record]:
    """The records."""
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def table(records: list[Record]) -> Iterable[str]:
    """A row for each measure: correlation and regret on each set, means over seeds."""
    records = [record for record in records if record["views"] not in BASELINES]
    names = sorted({record["set"] for record in records}, key=list(sets.SETS).index)
    yield f"| measure | {' | '.join(names)} | mean rho | mean regret | worst |"
    yield "|---|" + "---|" * (len(names) + 3)
    every = list(records[0]["measures"])
    rows = []
    for name in [*every, "recipe's views"]:
        rhos, regrets = [], []
        for data in names:
            for seed in sorted({record["seed"] for record in records}):
                some = [r for r in records if r["set"] == data and r["seed"] == seed]
                if len(some) < 4:
                    continue
                truth = [r["scores"]["linear"] for r in some]
                values = [r["views"] == "recipe" if name == "recipe's views" else r["measures"][name] for r in some]
                rhos.append((data, spearman(values, truth)))
                regrets.append((data, max(truth) - truth[int(np.argmax(values))]))
        rows.append((name, rhos, regrets))
    for name, rhos, regrets in sorted(rows, key=lambda row: np.mean([r for _, r in row[2]])):
        cells = []
        for data in names:
            rho = np.mean([r for d, r in rhos if d == data])
            cells.append(f"{rho:+.2f} / {np.mean([r for d, r in regrets if d == data]):.1f}")
        lost = [r for _, r in regrets]
        yield (
            f"| {name} | {' | '.join(cells)} | {np.nanmean([r for _, r in rhos]):+.2f} | {np.mean(lost):.1f} "
            f"| {max(lost):.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measured, _ = commands.add_parser("measure"), commands.add_parser("table")
    measured.add_argument("--root", type=Path, default=Path("data"))
    measured.add_argument("--out", type=Path, required=True, help="folder of the panel")
    measured.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    measured.add_argument("--sets", nargs="+", default=list(sets.SETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "measure":
        measure(options)
    print("\n".join(table(read())))


if __name__ == "__main__":
    main()
