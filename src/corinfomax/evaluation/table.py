"""What frozen features are worth: the same probes on the trained network, on other weights, on an untrained one and on
raw pixels, and whether the training helped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corinfomax import network
from corinfomax.evaluation import features, fine_tuning, intervals, probes
from corinfomax.evaluation.intervals import Comparison, Score
from corinfomax.images.cache import Images, Splits
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime.seeds import generator, key
from corinfomax.views import operations

FEW = (10, 1)  # labels a class
BASELINES = ("untrained", "raw pixels")
CPU = torch.device("cpu")
ROOM = 5  # times the features, which a logistic regression holds four times
SPACE = 2 << 30  # bytes for the rankings of kNN and mAP and for ridge's matrices, whatever the features take
DECIDING = "linear"  # the probe that says whether pretraining helped

Table = dict[str, dict[str, Score]]
"""Scores by probe, for each kind of features."""
Outcomes = dict[str, Float[Tensor, "draws m"]]
"""By probe, 1 for each test image classified rightly and 0 for the others, for each draw of the labels; of retrieval
the average precision, nan where it has none."""


class Contender(NamedTuple):
    """Features to be scored: a network, what it sees of an image, and the images, cached for its size."""

    name: str
    model: nn.Module
    recipe: Recipe
    splits: Splits
    crops: int = 0
    """How many crops of an image its features are averaged over; 0 is its centre view."""


class Result(NamedTuple):
    """The scores, and what they say."""

    table: Table
    comparisons: tuple[Comparison, ...]
    """First of the pretrained features and the better baseline, then with each rival's; of the deciding probe."""
    sentences: tuple[str, ...]
    """Those comparisons in words."""


def evaluate(
    backbone: nn.Module,
    splits: Splits,
    recipe: Recipe,
    *,
    device: torch.device,
    published_probe: bool = False,
    fine_tune: bool = False,
    crops: int = 0,
    rivals: Sequence[Contender] = (),
    progress: bool = True,
) -> Result:
    """Every probe on `backbone`, on the `rivals`, on the backbone's network untrained, and on raw pixels.

    Probes are fitted on `splits.train` and scored on `splits.test`; a rival has the same images in the same order.
    `published_probe` adds the paper's augmented linear probe on each: 100 epochs of forwards, hours without a GPU.
    `fine_tune` adds training the whole network on 1 % and 10 % of the labels. `crops` adds `backbone` once more, its
    features averaged over so many crops of each image. Raises ValueError unless both splits have
    labels, and for fewer crops than none.
    """
    check_labels(splits)
    assert splits.test is not None
    check_crops(crops)
    small = replace(
        recipe, size=min(recipe.size, 32), test_scale=1.0
    )  # raw pixels: more of them cost much and say no more
    contenders = (
        Contender("pretrained", backbone, recipe, splits),
        *([Contender(averaged(crops), backbone, recipe, splits, crops)] if crops else []),
        *rivals,
        Contender("untrained", random_backbone(splits.train, recipe, device=device), recipe, splits),
        Contender("raw pixels", nn.Flatten(), small, splits),
    )
    outcomes: dict[str, Outcomes] = {}
    for contender in contenders:
        check_same_images(splits, contender)
        outcomes[contender.name] = _outcomes(contender, device, published_probe, fine_tune, progress)
    return Result(tabulate(outcomes, seed=recipe.seed), *verdicts(outcomes, seed=recipe.seed))


def _outcomes(
    contender: Contender, device: torch.device, published_probe: bool, fine_tune: bool, progress: bool
) -> Outcomes:
    name, model, recipe, (train, test), crops = contender
    assert test is not None and test.labels is not None
    vectors = (
        features.features(
            model,
            split,
            recipe,
            device=device,
            crops=crops,
            progress=f"features, {name}, {len(split)} images" if progress else None,
        )
        for split in (train, test)
    )
    found = probe_features(next(vectors), next(vectors), contender.splits, seed=recipe.seed, device=device)
    if crops:  # the others train networks or layers of their own, on crops anyway
        return found
    if published_probe:
        predicted = fine_tuning.linear_probe(model, train, test, recipe, device=device, progress=progress)
        found["published linear"] = _right(predicted, test.labels)
    if fine_tune and any(True for _ in model.parameters()):  # raw pixels have nothing to tune
        for share in fine_tuning.SHARES:
            predicted = fine_tuning.fine_tune(model, train, test, recipe, share=share, device=device, progress=progress)
            found[f"tuned, {share:.0%}"] = _right(predicted, test.labels)
    return found


def probe_features(
    train: Float[Tensor, "n d"],
    test: Float[Tensor, "m d"],
    splits: Splits,
    *,
    seed: int,
    device: torch.device = CPU,
) -> Outcomes:
    """What each probe makes of one kind of features, rows as in `splits`; on the device, if it has room for them."""
    assert splits.test is not None and splits.train.labels is not None and splits.test.labels is not None
    device = device if has_room(device, SPACE + ROOM * (train.nbytes + test.nbytes)) else CPU
    train, labels, test, truth = (x.to(device) for x in (train, splits.train.labels, test, splits.test.labels))
    found = {
        "kNN": _right(probes.knn(train, labels, test), truth),
        "ridge": _right(probes.ridge(train, labels, test).predicted, truth),
        DECIDING: _right(probes.logistic(train, labels, test, seed=seed).predicted, truth),
    }
    for count in FEW:
        found[f"{count} a class"] = _right(probes.few_label(train, labels, test, per_class=count, seed=seed), truth)
    precision = intervals.average_precision(test, truth).cpu()
    if not precision.isnan().all():
        found["mAP"] = precision[None]
    return found


def has_room(device: torch.device, size: int) -> bool:
    """Whether a GPU has so many bytes free; only CUDA's says so."""
    if device.type != "cuda":
        return False
    torch.cuda.empty_cache()  # what training had is free
    return torch.cuda.mem_get_info(device)[0] >= size


def _right(predicted: Tensor, truth: Tensor) -> Float[Tensor, "draws m"]:
    return (predicted == truth).float().reshape(-1, len(truth)).cpu()


def tabulate(outcomes: dict[str, Outcomes], *, seed: int) -> Table:
    """Means in percent with their intervals; of several draws of the labels also the standard deviation over them."""
    cells = [(name, probe) for name, found in outcomes.items() for probe in found]
    values = 100 * torch.stack([outcomes[name][probe].mean(0) for name, probe in cells], 1)
    table: Table = {name: {} for name in outcomes}
    bounds = intervals.intervals(intervals.resample_means(values, seed=seed))
    for (name, probe), mean, (low, high) in zip(cells, values.nanmean(0).tolist(), bounds, strict=True):
        draws = 100 * outcomes[name][probe].mean(1)
        if (
            probe == "mAP"
        ):  # every image is a query and in the others' galleries: rows that are drawn anew say too little
            table[name][probe] = Score(mean, None, None, None)
        elif len(draws) == 1 and low == high:  # all right or all wrong, of which drawing anew knows no doubt
            table[name][probe] = Score(mean, None, *intervals.wilson(mean, len(values)))
        else:
            table[name][probe] = Score(mean, float(draws.std()) if len(draws) > 1 else None, low, high)
    return table


def verdicts(outcomes: dict[str, Outcomes], *, seed: int) -> tuple[tuple[Comparison, ...], tuple[str, ...]]:
    """Whether pretraining helped beyond the better baseline, and how each rival compares; in numbers and in words."""
    right = {name: found[DECIDING][0] for name, found in outcomes.items()}
    first = intervals.compare(right["pretrained"], {name: right[name] for name in BASELINES}, seed=seed)
    nearest = {name: found["kNN"][0] for name, found in outcomes.items()}
    dissent = intervals.compare(nearest["pretrained"], {name: nearest[name] for name in BASELINES}, seed=seed)
    rivals = [
        intervals.compare(right["pretrained"], {name: right[name]}, seed=seed)
        for name in right
        if name not in ("pretrained", *BASELINES)
    ]
    words = [intervals.beside("pretrained", comparison, probe=DECIDING) for comparison in rivals]
    verdict = intervals.in_words(first, probe=DECIDING, dissent=dissent, dissenter="kNN")
    return (first, *rivals), (verdict, *words)


@torch.no_grad()
def random_backbone(images: Images, recipe: Recipe, *, device: torch.device, looks: int = 1024) -> nn.Module:
    """The recipe's backbone with random weights, as strong as such a network is.

    BatchNorm has the statistics of `looks` of the images, and residual branches that start at zero, which suits
    training but leaves an untrained network next to linear, are switched on.
    """
    torch.manual_seed(key(recipe.seed, "weights"))
    model = network.build_backbone(recipe.backbone, size=recipe.size).to(device).to(memory_format=torch.channels_last)
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
            model(
                operations.centre_view(
                    pixels.to(device), sizes, size=recipe.test_side, mean=recipe.mean, std=recipe.std
                )
            )
    return model.eval()


def check_crops(crops: int) -> None:
    """ValueError unless features can be averaged over so many crops, 0 for none."""
    if crops < 0:
        raise ValueError(f"test_crops is {crops}; it must be a number of crops, or 0 for none")


def averaged(crops: int) -> str:
    """What features averaged over crops are called in the table."""
    return f"mean of {crops} crops"


def check_labels(splits: Splits) -> None:
    """ValueError unless there are test images and both splits have labels."""
    if any(split is not None and split.labels is None for split in splits):
        raise ValueError(
            "a score needs labels: put each class of images in a folder of its own (train/<class>/…, test/<class>/…) "
            "or use a CSV with a label column"
        )
    if splits.test is None:
        raise ValueError("there are no images to test on; use a folder with train and test, or --holdout 0.1")


def check_same_images(splits: Splits, rival: Contender) -> None:
    """ValueError unless a rival, whose images may be cached at another size, sees the same ones in the same order."""
    for ours, theirs in zip(splits, rival.splits, strict=True):
        if ours is None or theirs is None or ours.paths != theirs.paths:
            raise ValueError(f"{rival.name} sees other images than the weights to evaluate; some became unreadable")


def distinct_names(given: Sequence[str], crops: int = 0) -> list[str]:
    """What to call other weights in a table: the last part of a path, or all of it where that is taken."""
    taken, names = {"pretrained", averaged(crops), *BASELINES}, []
    for whole in given:
        short = whole if whole.startswith("timm:") else PurePath(whole).stem or whole
        name = next(name for name in (short, whole, *(f"{whole} ({i})" for i in range(2, 99))) if name not in taken)
        taken.add(name)
        names.append(name)
    return names


WIDTH = 100


def as_text(table: Table) -> str:
    """The table for a terminal: a row a kind of features, a column a probe, in blocks of at most WIDTH characters."""
    columns = list(dict.fromkeys(probe for found in table.values() for probe in found))
    names = ["%", *table]
    first = max(map(len, names))
    blocks: list[list[list[str]]] = []
    room = 0
    for probe in columns:
        cells = [probe, *(_cell(found.get(probe)) for found in table.values())]
        width = max(map(len, cells))
        cells = [cell.rjust(width) for cell in cells]
        if not blocks or width + 2 > room:
            blocks.append([[name.ljust(first) for name in names]])
            room = WIDTH - first
        blocks[-1].append(cells)
        room -= width + 2
    texts = []
    for block in blocks:
        head, *lines = ("  ".join(row) for row in zip(*block, strict=True))
        texts.append("\n".join((head, "─" * len(head), *lines)))
    return "\n\n".join(texts)


LEGEND = "±: half the 95 % interval over test images, none for mAP; N a class: sd over draws of the N labels"


def _cell(score: Score | None) -> str:
    if score is None:
        return "–"
    spread = score.sd
    if spread is None and score.low is not None and score.high is not None:
        spread = (score.high - score.low) / 2
    return f"{score.mean:.1f}" + ("" if spread is None else f" ±{spread:.1f}")


def as_json(result: Result) -> dict[str, Any]:
    """Scores and comparisons as JSON's types: mean, sd, low and high of each probe on each kind of features."""
    return {
        "scores": {
            name: {probe: {k: v for k, v in score._asdict().items() if v is not None} for probe, score in found.items()}
            for name, found in result.table.items()
        },
        "comparisons": [
            {"probe": DECIDING, **comparison._asdict(), "sentence": sentence}
            for comparison, sentence in zip(result.comparisons, result.sentences, strict=True)
        ],
    }
