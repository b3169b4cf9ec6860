"""Accuracy that the linear probe loses by its choice of a penalty, beside other rules: a markdown table.

    python -m benchmarks.probe.penalty data/cifar10 random runs/short lite0.safetensors \
        --architecture tf_efficientnet_lite0 --size 64 --out runs/penalty

A network is `random` (ResNet-18 at 32 px) or weights as `corinfomax evaluate` takes them. Random subsets of its
training features, of sizes even on a log scale, are fitted with every penalty of the grid. A rule loses the points of
test accuracy between its penalty and the best one for that subset: an optimistic oracle, because the test images name
it. --out keeps features and rows; rows that are there are only read. scikit-learn takes most of the time.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegressionCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from corinfomax.evaluation import features, probes, table
from corinfomax.images import cache
from corinfomax.images.sources import Data
from corinfomax.recipes.fields import Backbone, Recipe
from corinfomax.runtime.records import WeightsOptions
from corinfomax.runtime.seeds import generator
from corinfomax.weights.load import load_backbone

CPU = torch.device("cpu")
POOL = 20_000  # training images to draw from
GRID = tuple(p for p in probes.LOGISTIC_PENALTIES if p > 9e-5)  # weaker ones never won, and are slow
RANDOM = Recipe(size=32, backbone=Backbone(name="resnet18"), precision="float32")
OURS, BEFORE = "held-out log-loss (ours)", "accuracy on one fifth (before)"
RIVALS = {"accuracy": "LogisticRegressionCV, accuracy", "loss": "LogisticRegressionCV, log-loss"}
Row = dict[str, Any]


def extract(name: str, options: argparse.Namespace) -> dict[str, Tensor]:
    """Features and labels of the pool and of the test images, from the file in --out if it is there."""
    path = options.out / f"{Path(name).stem}.pt"
    if path.exists():
        read: dict[str, Tensor] = torch.load(path)
        return read
    train, test = cache.load(Data(options.data, cache=options.cache), side=32)
    assert test is not None and train.labels is not None and test.labels is not None
    train = train.select(torch.randperm(len(train), generator=generator(0, "pool"))[:POOL])
    if name == "random":
        model, recipe = table.random_backbone(train, RANDOM, device=CPU), RANDOM
    else:
        of_timm = {"architecture": options.architecture, "size": options.size} if Path(name).is_file() else {}
        model, recipe, *_ = load_backbone(name, WeightsOptions(**of_timm))
    x, y = (features.extract_features(model, images, recipe, progress=name) for images in (train, test))
    found = {"train": x, "labels": train.labels, "test": y, "truth": test.labels}
    torch.save(found, path)
    return found


@torch.no_grad()
def measure(data: dict[str, Tensor], subset: int, options: argparse.Namespace) -> Row:
    """Test accuracy of every penalty on one subset, and the penalty that each rule chooses."""
    rng = generator(subset, "subset")
    low, high = options.images
    n = round(low * (high / low) ** float(torch.rand((), generator=rng)))
    rows = torch.randperm(len(data["train"]), generator=rng)[:n]
    classes, codes = torch.unique(data["labels"][rows], return_inverse=True)
    scaler = StandardScaler().fit(data["train"][rows].double())
    x, x_test = (torch.tensor(scaler.transform(part.double())).float() for part in (data["train"][rows], data["test"]))
    basis, z, spectrum = probes._rotate(x)

    # Every penalty, as exactly as the rule's own fits: a tenth of a point.
    fixed, theta = {}, None
    for penalty in sorted(GRID, reverse=True):
        theta, _ = probes._softmax_regression(z, codes, spectrum, penalty, theta, rough=True)
        logits = x_test @ (basis @ theta[:-1]).float() + theta[-1].float()
        fixed[penalty] = probes.accuracy(classes[logits.argmax(1)], data["truth"])

    # the rules
    began = time.process_time()
    chosen = {OURS: probes._choose_penalty(z, codes, spectrum, GRID, generator(0, "validation"))[0]}
    seconds = time.process_time() - began
    chosen[BEFORE] = most_accurate(z, codes, spectrum)
    if subset < options.rivals:
        chosen |= cross_validate(z.numpy(), codes.numpy())
    scores = {f"{penalty:g}": score for penalty, score in fixed.items()}
    return {"images": n, "fixed": scores, "chosen": {k: f"{p:g}" for k, p in chosen.items()}, "seconds": seconds}


def most_accurate(z: Tensor, codes: Tensor, spectrum: Tensor) -> float:
    """The rule before: decades from 1 down, by accuracy on one fifth, until two fall behind; the stronger of equals."""
    held_out = probes.rank_in_class(codes, generator(0, "validation")) < codes.bincount()[codes] // 5
    best, highest, behind, theta = 1.0, -1.0, 0, None
    for penalty in GRID[::-2][1:]:
        theta, _ = probes._softmax_regression(z[~held_out], codes[~held_out], spectrum, penalty, theta, rough=True)
        score = probes.accuracy((z[held_out].to(theta) @ theta[:-1] + theta[-1]).argmax(1), codes[held_out])
        behind += score < highest
        if score > highest:
            best, highest, behind = penalty, score, 0
        if behind == 2:
            break
    return best


def cross_validate(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Penalties of LogisticRegressionCV by accuracy and by log-loss; one run gives both, for it fits the same.

    Takes standardised features in any orthonormal basis: neither the penalty nor L-BFGS notices a rotation.
    """
    accuracies: list[float] = []

    def log_loss(model: Any, x: np.ndarray, y: np.ndarray) -> float:
        accuracies.append(float((model.predict(x) == y).mean()))
        return float(model.predict_log_proba(x)[np.arange(len(y)), y].mean())

    strengths = [1 / (penalty * len(x)) for penalty in sorted(GRID, reverse=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits that 100 steps did not finish
        found = LogisticRegressionCV(Cs=strengths, cv=5, scoring=log_loss, refit=False).fit(x, y)
    losses = next(iter(found.scores_.values()))  # by fold, then by penalty
    means = {"accuracy": np.reshape(accuracies, losses.shape).mean(0), "loss": losses.mean(0)}
    return {RIVALS[name]: 1 / (strengths[int(mean.argmax())] * len(x)) for name, mean in means.items()}


def summary(rows: dict[str, list[Row]]) -> list[str]:
    """Lines of the table: mean and worst loss of each rule on each network."""
    lines = ["| network | rule | subsets | mean | worst | above 1 point |", "|---|---|---:|---:|---:|---:|"]
    for network, of_network in rows.items():
        for rule in (OURS, BEFORE, *RIVALS.values()):
            lost = [
                max(row["fixed"].values()) - row["fixed"][row["chosen"][rule]]
                for row in of_network
                if rule in row["chosen"]
            ]
            if lost:
                cells = f"{len(lost)} | {fmean(lost):.2f} | {max(lost):.2f} | {sum(x > 1 for x in lost)}"
                lines.append(f"| {network} | {rule} | {cells} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder of labelled images with train and test")
    parser.add_argument("networks", nargs="+", help="random, a run, or weights")
    parser.add_argument("--architecture", default=None, help="of a state dict")
    parser.add_argument("--size", type=int, default=None, help="input side for a state dict")
    parser.add_argument("--images", type=int, nargs=2, default=(500, 5000), help="fewest and most of a subset")
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument("--rivals", type=int, default=50, help="subsets that scikit-learn takes too")
    parser.add_argument("--cache", type=Path, default=None, help="folder of decoded images")
    parser.add_argument("--out", type=Path, required=True, help="folder of features and rows")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    rows: dict[str, list[Row]] = {}
    for name in options.networks:
        data, network = extract(name, options), Path(name).stem
        path = options.out / f"{network} {options.images[0]}-{options.images[1]}.jsonl"
        rows[network] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for subset in range(len(rows[network]), options.subsets):
            rows[network].append(measure(data, subset, options))
            with path.open("a") as file:
                file.write(json.dumps(rows[network][-1]) + "\n")
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
