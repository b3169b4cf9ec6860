"""What frozen features are worth: the same probes on the trained network, on an untrained one and on raw pixels."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from corinfomax import embed, networks, optim, probes, views
from corinfomax.images import Images, Splits
from corinfomax.knobs import Recipe, View
from corinfomax.networks import arithmetic
from corinfomax.seeds import generator, key

FEW = (10, 1)  # labels a class


class Score(NamedTuple):
    """Top-1 accuracy in percent, with its standard deviation over draws where there were several."""

    mean: float
    sd: float | None = None


Table = dict[str, dict[str, Score]]
"""Scores by probe, for each kind of features."""


def evaluate(
    backbone: nn.Module,
    splits: Splits,
    recipe: Recipe,
    *,
    device: torch.device,
    published_probe: bool = False,
    progress: bool = True,
) -> Table:
    """Every probe on `backbone`, on the same network untrained, and on raw pixels.

    Probes are fitted on `splits.train` and scored on `splits.test`. `published_probe` adds the paper's augmented
    linear probe on each of the three: 100 epochs of forwards, hours without a GPU. Raises ValueError unless both
    have labels.
    """
    check_labels(splits)
    untrained = random_backbone(splits.train, recipe, device=device)
    small = replace(recipe, size=min(recipe.size, 32))  # raw pixels: more of them cost much and say no more
    table: Table = {}
    for name, model, sized in (
        ("pretrained", backbone, recipe),
        ("untrained", untrained, recipe),
        ("raw pixels", nn.Flatten(), small),
    ):
        train, test = (
            embed.features(
                model,
                split,
                sized,
                device=device,
                progress=f"features, {name}, {len(split)} images" if progress else None,
            )
            for split in splits
            if split is not None
        )
        table[name] = probe_features(train, test, splits, seed=recipe.seed)
        if published_probe:
            score = linear_probe(model, splits, sized, device=device, progress=progress)
            table[name]["published linear"] = Score(score)
    return table


@torch.no_grad()
def random_backbone(images: Images, recipe: Recipe, *, device: torch.device, looks: int = 1024) -> nn.Module:
    """The recipe's backbone with random weights, as strong as such a network is.

    BatchNorm has the statistics of `looks` of the images, and residual branches that start at zero, which suits
    training but leaves an untrained network next to linear, are switched on.
    """
    torch.manual_seed(key(recipe.seed, "weights"))
    model = networks.build_backbone(recipe.backbone, size=recipe.size).to(device).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the plain mean over batches
            if module.weight is not None and not module.weight.any():
                nn.init.ones_(module.weight)
    order = torch.randperm(len(images), generator=generator(recipe.seed, "calibration"))[:looks]
    model.train()
    for indices in order.split(256):
        if len(indices) > 1:
            pixels, sizes = images.batch(indices)
            model(views.centre_view(pixels.to(device), sizes, size=recipe.size, mean=recipe.mean, std=recipe.std))
    return model.eval()


def check_labels(splits: Splits) -> None:
    """ValueError unless there are test images and both splits have labels."""
    if splits.test is None:
        raise ValueError("there are no images to test on; use a folder with train and test, or --holdout 0.1")
    if splits.train.labels is None or splits.test.labels is None:
        raise ValueError(
            "a score needs labels: put each class of images in a folder of its own (train/<class>/…, test/<class>/…) "
            "or use a CSV with a label column"
        )


def probe_features(train: torch.Tensor, test: torch.Tensor, splits: Splits, *, seed: int) -> dict[str, Score]:
    """Each probe's score on one kind of features, rows as in `splits`."""
    assert splits.test is not None and splits.train.labels is not None and splits.test.labels is not None
    labels, truth = splits.train.labels, splits.test.labels
    scores = {
        "kNN": Score(probes.accuracy(probes.knn(train, labels, test), truth)),
        "ridge": Score(probes.accuracy(probes.ridge(train, labels, test).predicted, truth)),
        "linear": Score(probes.accuracy(probes.logistic(train, labels, test, seed=seed).predicted, truth)),
    }
    for count in FEW:
        mean, sd = probes.few_label(train, labels, test, truth, per_class=count, seed=seed)
        scores[f"{count} a class"] = Score(mean, sd)
    return scores


def linear_probe(
    model: nn.Module,
    splits: Splits,
    recipe: Recipe,
    *,
    device: torch.device,
    progress: bool = True,
) -> float:
    """Top-1 in percent of the published linear probe, `recipe.probe`, after its last epoch.

    One linear layer on the frozen model's features of randomly cropped and flipped images, the model in eval mode;
    SGD with momentum 0.9 and no decay.
    """
    check_labels(splits)
    assert splits.test is not None and splits.train.labels is not None and splits.test.labels is not None
    probe, images, labels = recipe.probe, splits.train, splits.train.labels
    crop = View(crop_area=(0.08, 1.0), jitter=0.0, grey=0.0)
    batch = min(probe.batch, len(images))
    per_epoch = len(images) // batch
    model.eval()
    head: nn.Linear | None = None
    bar = tqdm(
        range(probe.epochs * per_epoch),
        desc="linear probe",
        unit="step",
        leave=False,
        disable=None if progress else True,
    )
    for step in bar:
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(images), generator=generator(recipe.seed, "probe order", epoch))
        indices = order[place * batch : (place + 1) * batch]
        pixels, sizes = images.batch(indices)
        drawn = views.draw(crop, sizes, generator(recipe.seed, "probe view", step))
        x = views.apply(pixels.to(device), sizes, drawn, size=recipe.size, mean=recipe.mean, std=recipe.std)
        with torch.no_grad(), arithmetic(recipe, device):
            features = model(x).float()
        if head is None:
            torch.manual_seed(key(recipe.seed, "probe weights"))
            head = nn.Linear(features.shape[1], len(images.classes)).to(device)
            optimizer = torch.optim.SGD(head.parameters(), lr=probe.lr, momentum=0.9)
        if probe.decay_epochs is None:
            lr = probe.min_lr + (probe.lr - probe.min_lr) * (1 + math.cos(math.pi * epoch / probe.epochs)) / 2
        else:
            lr = probe.lr * 0.1 ** (epoch // probe.decay_epochs)
        optim.set_learning_rate(optimizer, lr)
        optimizer.zero_grad()
        F.cross_entropy(head(features), labels[indices].to(device)).backward()
        optimizer.step()
    assert head is not None
    if not all(bool(p.isfinite().all()) for p in head.parameters()):
        raise FloatingPointError(f"the linear probe diverged at learning rate {probe.lr:g}; a lower one is the cure")
    test = embed.features(model, splits.test, recipe, device=device)
    return probes.accuracy(head.cpu()(test).argmax(1), splits.test.labels)


def as_text(table: Table) -> str:
    """The table for a terminal: a row a kind of features, a column a probe."""
    columns = list(next(iter(table.values())))
    cells = [["top-1, %", *columns]]
    for name, scores in table.items():
        cells.append(
            [name, *(f"{s.mean:.1f}" + (f" ± {s.sd:.1f}" if s.sd is not None else "") for s in scores.values())]
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join((lines[0], "─" * len(lines[0]), *lines[1:]))


def as_json(table: Table) -> dict[str, Any]:
    """The table as JSON's types."""
    return {
        name: {probe: {k: v for k, v in score._asdict().items() if v is not None} for probe, score in scores.items()}
        for name, scores in table.items()
    }
