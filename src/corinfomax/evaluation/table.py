"""Scores of frozen features: the same probes on trained, rival and untrained networks and on raw pixels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from corinfomax import network
from corinfomax.evaluation import features, fine_tuning, intervals, probes
from corinfomax.images import files
from corinfomax.images.cache import Images, Splits
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import memory
from corinfomax.runtime.records import Comparison, Results, Score, Table
from corinfomax.runtime.seeds import generator, key
from corinfomax.views import operations

BASELINES = ("untrained", "raw pixels")
BEFORE = "before"  # the weights that a run started from
CPU = torch.device("cpu")
FEWEST_TEST = 20  # test images of a score; with fewer, one image is more than five points
RAW_SIDE = 24  # px, of raw pixels to score: 32 px cost three times as much and score no better
RAW_NUMBERS = 25_000 * 3 * RAW_SIDE**2  # of all training images: 170 MB of float32, and once more to fit
FEATURE_COPIES = 5  # memory of the probes in sizes of the features; logistic regression holds four
OTHER_BYTES = 2 << 30  # for the rankings of kNN and mAP and the matrices of ridge, whatever the features take
CALIBRATED = 256  # most images in a batch for the BatchNorm statistics of an untrained network
LEGEND = "±: half the 95 % interval over test images, none for mAP; N a class: sd over draws of the N labels"

Outcomes = dict[str, Float[Tensor, "draws m"]]
"""By probe and draw of the labels: 1 for an image classified correctly, else 0; for mAP its precision, or nan."""


class Contender(NamedTuple):
    """Features to score: a network, its input size and statistics, and images cached for that size."""

    name: str
    model: nn.Module
    recipe: Recipe
    splits: Splits


def evaluate(
    backbone: nn.Module,
    splits: Splits,
    recipe: Recipe,
    *,
    device: torch.device,
    published_probe: bool = False,
    probe_baselines: bool = False,
    fine_tune: bool = False,
    rivals: Sequence[Contender] = (),
    remarks: Sequence[str] = (),
    log: Callable[[str], object] = lambda line: None,
) -> Results:
    """Score `backbone`, the `rivals`, the same network untrained, and raw pixels, with every probe.

    A rival needs the same images in the same order; one called BEFORE is what `backbone` started from. `remarks` come
    after those on the data.
    `published_probe` adds the paper's augmented linear probe, hours without a GPU, on `backbone` and the rivals, and
    with `probe_baselines` on the baselines too. `log` gets a line after each of its epochs. `fine_tune` adds training
    on 1 % and 10 % of the labels. ValueError unless both splits have labels.
    """
    check_labels(splits)
    assert splits.test is not None
    small = replace(recipe, size=min(recipe.size, _raw_side(len(splits.train), recipe.pixels.channels)), test_scale=1.0)
    untrained = random_backbone(splits.train, recipe, device=device)
    contenders = [Contender("pretrained", backbone, recipe, splits), *rivals]
    pixels = Contender("raw pixels", nn.Flatten(), small, splits)
    contenders += [Contender("untrained", untrained, recipe, splits), pixels]
    outcomes: dict[str, Outcomes] = {}
    for contender in contenders:
        # a rival's images may be cached at another size
        if [images and images.paths for images in contender.splits] != [splits.train.paths, splits.test.paths]:
            raise ValueError(f"{contender.name} has other images than the weights to evaluate: some became unreadable")
        probed = published_probe and (probe_baselines or contender.name not in BASELINES)
        outcomes[contender.name] = _outcomes(contender, device, log if probed else None, fine_tune)

    comparisons, sentences = compare_all(outcomes, seed=recipe.seed)
    assert splits.train.labels is not None and splits.test.labels is not None
    return Results(
        table=tabulate(outcomes, seed=recipe.seed),
        keep_start=BEFORE in outcomes and comparisons[0].verdict != "better",
        comparisons=comparisons,
        sentences=sentences,
        remarks=(
            *remarks_on(splits.train.labels, splits.test.labels, splits.train.classes),
            *remark_on_start(outcomes, seed=recipe.seed),
            *remarks,
        ),
        train=len(splits.train),
        test=len(splits.test),
    )


def _raw_side(images: int, channels: int = 3) -> int:
    """Side of the raw pixels to score, smaller for more than 25,000 images.

    It depends on the images alone: scores must not change with the memory that is free.
    """
    return min(RAW_SIDE, max(8, math.isqrt(RAW_NUMBERS // (channels * images))))


def _outcomes(
    contender: Contender, device: torch.device, probe_log: Callable[[str], object] | None, fine_tune: bool
) -> Outcomes:
    """The outcomes of every probe; of the published one only if `probe_log` is given."""
    name, model, recipe, (train, test) = contender
    assert test is not None and test.labels is not None

    # frozen features
    vectors = []
    for images in (train, test):
        title = f"features, {name}, {len(images)} images"
        vectors.append(features.extract_features(model, images, recipe, device=device, progress=title))
    outcomes = probe_features(vectors[0], vectors[1], contender.splits, seed=recipe.seed, device=device)

    # protocols that train on images
    if probe_log is not None:
        try:
            predicted = fine_tuning.linear_probe(
                model, train, test, recipe, device=device, log=lambda line: probe_log(f"{name}, {line}")
            )
            outcomes["published linear"] = _correct(predicted, test.labels)
        except FloatingPointError as error:  # the other scores are worth keeping
            probe_log(f"{name}: {error}")
    if fine_tune and name != "raw pixels":  # they have nothing to tune
        for share in fine_tuning.HEAD_LR:
            predicted = fine_tuning.fine_tune(model, train, test, recipe, share=share, device=device)
            outcomes[f"tuned, {share:.0%}"] = _correct(predicted, test.labels)
    return outcomes


def probe_features(
    train: Float[Tensor, "n d"], test: Float[Tensor, "m d"], splits: Splits, *, seed: int, device: torch.device = CPU
) -> Outcomes:
    """The outcomes of every probe on features whose rows are the images of `splits`; on the device if they fit."""
    assert splits.test is not None and splits.train.labels is not None and splits.test.labels is not None
    device = device if has_room(device, OTHER_BYTES + FEATURE_COPIES * (train.nbytes + test.nbytes)) else CPU
    train, labels, test, truth = (x.to(device) for x in (train, splits.train.labels, test, splits.test.labels))

    # all labels, then few; memory is returned after each probe, so that peaks do not add up
    fits: dict[str, Callable[[], Tensor]] = {
        "kNN": lambda: probes.knn(train, labels, test),
        "ridge": lambda: probes.ridge(train, labels, test).predicted,
        "linear": lambda: probes.logistic(train, labels, test, seed=seed).predicted,
        "10 a class": lambda: probes.few_label(train, labels, test, per_class=10, seed=seed),
        "1 a class": lambda: probes.few_label(train, labels, test, per_class=1, seed=seed),
    }
    outcomes: Outcomes = {}
    for name, fit in fits.items():
        outcomes[name] = _correct(fit(), truth)
        memory.give_back()

    # retrieval
    precision = intervals.average_precision(test, truth).cpu()
    if not precision.isnan().all():
        outcomes["mAP"] = precision[None]
    return outcomes


def has_room(device: torch.device, size: int) -> bool:
    """True if the device is a GPU with `size` bytes free; only CUDA can tell."""
    torch.cuda.empty_cache()  # training has released its memory
    return device.type == "cuda" and memory.room(device) >= size


def _correct(predicted: Tensor, truth: Tensor) -> Float[Tensor, "draws m"]:
    return (predicted == truth).float().reshape(-1, len(truth)).cpu()


def tabulate(outcomes: dict[str, Outcomes], *, seed: int) -> Table:
    """Means in percent with 95 % intervals, and the standard deviation over several draws of the labels."""
    cells = [(name, probe) for name, by_probe in outcomes.items() for probe in by_probe]
    values = 100 * torch.stack([outcomes[name][probe].mean(0) for name, probe in cells], 1)
    bounds = intervals.central_intervals(intervals.resample_means(values, seed=seed))

    table: Table = {name: {} for name in outcomes}
    for (name, probe), mean, (low, high) in zip(cells, values.nanmean(0).tolist(), bounds, strict=True):
        draws = 100 * outcomes[name][probe].mean(1)
        sd = float(draws.std()) if len(draws) > 1 else None
        if sd is None and low == high:  # all correct or all wrong, and every resample agrees
            low, high = intervals.wilson(mean, len(values))
        # mAP: every image is also in the galleries of the others, so resampling rows says too little
        table[name][probe] = Score(mean) if probe == "mAP" else Score(mean, sd, low, high)
    return table


def compare_all(outcomes: dict[str, Outcomes], *, seed: int) -> tuple[tuple[Comparison, ...], tuple[str, ...]]:
    """Pretrained features against their start, or the better baseline, and each rival; then a sentence for each."""

    def against(probe: str, *names: str) -> Comparison:
        rows = {name: outcomes[name][probe][0] for name in names}
        return intervals.compare(outcomes["pretrained"][probe][0], rows, seed=seed)

    # The linear probe decides; kNN speaks up when it disagrees. A run that continued is compared with its start.
    rivals = [name for name in outcomes if name not in ("pretrained", *BASELINES)]
    bases = (BEFORE,) if BEFORE in outcomes else BASELINES
    helped, nearest = against("linear", *bases), against("kNN", *bases)
    sentence = intervals.continuing_sentence if BEFORE in outcomes else intervals.pretraining_sentence
    comparisons = [against("linear", name) for name in rivals if name != BEFORE]
    return (helped, *comparisons), (sentence(helped, nearest), *map(intervals.rival_sentence, comparisons))


@torch.no_grad()
def random_backbone(images: Images, recipe: Recipe, *, device: torch.device) -> nn.Module:
    """The recipe's backbone with random weights, as strong as an untrained network can be.

    BatchNorm gets the statistics of 1024 images. Residual branches that start at zero would leave it almost linear, and
    are switched on.
    """
    torch.manual_seed(key(recipe.seed, "weights"))
    model = network.backbone_for(recipe).to(device).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the plain mean over batches
            if module.weight is not None and not module.weight.any():
                nn.init.ones_(module.weight)

    order = torch.randperm(len(images), generator=generator(recipe.seed, "calibration"))[:1024]
    # The statistics of small batches are as good: their variances are unbiased, and 8 images have many pixels.
    # Their size depends on the network alone: scores must not change with the memory that is free.
    bytes_per_image = network.activations(model, recipe, device, side=recipe.test_side)
    size = min(CALIBRATED, max(8, memory.ACTIVATIONS // bytes_per_image))
    for indices in order.split(size):
        if len(indices) > 1:
            model(operations.test_view(*images.batch(indices), recipe, device))
    memory.give_back()
    return model.eval()


def quick_knn(backbone: nn.Module, splits: Splits, recipe: Recipe, *, device: torch.device) -> float | None:
    """kNN top-1 in percent at training's size, on at most 5,000 training and 2,000 test images; no final score.

    None if a feature is not finite.
    """
    recipe = replace(recipe, test_scale=1.0)
    sample: list[tuple[Tensor, Tensor]] = []
    for images, most in ((splits.train, 5000), (splits.test, 2000)):
        assert images is not None
        if len(images) > most:
            images = images.select(torch.randperm(len(images), generator=generator(0, "quick kNN"))[:most])
        assert images.labels is not None
        sample.append((features.extract_features(backbone, images, recipe, device=device), images.labels))
    (train, labels), (test, truth) = sample
    if not (train.isfinite().all() and test.isfinite().all()):
        return None
    return probes.accuracy(probes.knn(train, labels, test), truth)


def remarks_on(train: Int[Tensor, " n"], test: Int[Tensor, " m"], classes: Sequence[str]) -> tuple[str, ...]:
    """Sentences on why the scores mean little: too few images, or labels too uneven; none for most data."""
    remarks, present = [], train.unique()

    # training images
    if len(train) == len(classes) == len(present) > 1:
        remarks.append("Every class has one training image: the scores say little about the features.")
    elif len(train) < 2 * len(classes):
        reason = f"{len(classes)} classes for {len(train)} training images, fewer than two a class"
        remarks.append(f"{reason}: the scores say little about the features.")
    if len(present) == 1:
        remarks.append("All training images belong to one class, so every classifier predicts it.")
    if unseen := int((~torch.isin(test, present)).sum()):
        remarks.append(f"{unseen} of {len(test)} test images belong to classes without training images: always wrong.")

    # test images
    if len(test) < FEWEST_TEST:
        number = "1 test image is" if len(test) == 1 else f"{len(test)} test images are"
        remarks.append(f"{number} too few for a score: one image is {100 / len(test):.0f} points.")
    if len(test) > 1 and len(test.unique()) == 1:
        name = files.quoted(classes[int(test[0])])
        remarks.append(f"All {len(test)} test images are of one class ({name}): always answering it scores 100 %.")
    return tuple(remarks)


def remark_on_start(outcomes: dict[str, Outcomes], *, seed: int) -> tuple[str, ...]:
    """A sentence if a baseline is clearly above weights that continued, both before and after."""
    if BEFORE not in outcomes:
        return ()
    linear = {name: by_probe["linear"][0] for name, by_probe in outcomes.items()}
    best = max(BASELINES, key=lambda name: float(linear[name].mean()))
    compared = intervals.compare(linear[best], {name: linear[name] for name in ("pretrained", BEFORE)}, seed=seed)
    if compared.verdict != "better":
        return ()
    words = {"raw pixels": "Raw pixels reach", "untrained": "An untrained network reaches"}[best]
    scores = f"linear {compared.score:.1f}, clearly more than the {compared.other_score:.1f} of these weights"
    return (f"{words} {scores}: the weights do not suit these images.",)


def check_labels(splits: Splits) -> None:
    """ValueError unless there are test images and both splits have labels."""
    for split in splits:
        if split is not None and split.unlabelled:
            raise ValueError(f"no score is possible: {split.unlabelled}")
    if any(split is not None and split.labels is None for split in splits):
        folders = "put each class of images into its own folder (train/<class>/…, test/<class>/…)"
        raise ValueError(f"a score needs labels: {folders} or use a CSV with a label column")
    if splits.test is None:
        raise ValueError("there are no images to test on: use a folder with train and test, or --holdout 0.1")


def distinct_names(names: Sequence[str]) -> list[str]:
    """Short names of other weights for the table: the last part of a path, or the whole path when that is taken."""
    short_names: list[str] = []
    for name in names:
        short = name if name.startswith("timm:") else PurePath(name).stem or name
        candidates = (short, name, *(f"{name} ({i})" for i in range(2, 99)))
        reserved = {"pretrained", BEFORE, *BASELINES, *short_names}
        short_names.append(next(candidate for candidate in candidates if candidate not in reserved))
    return short_names


def as_text(table: Table) -> str:
    """The table for a terminal: one row per kind of features, one column per probe, in blocks of 100 characters."""
    names = ["%", *table]
    first = [name.ljust(max(map(len, names))) for name in names]

    # Columns into blocks.
    blocks, room = list[list[list[str]]](), 0
    for probe in dict.fromkeys(probe for scores in table.values() for probe in scores):
        cells = [probe, *(cell(scores.get(probe)) for scores in table.values())]
        width = max(map(len, cells)) + 2
        if width > room:
            blocks.append([first])
            room = 100 - len(first[0])
        blocks[-1].append([cell.rjust(width) for cell in cells])
        room -= width

    # Blocks into lines.
    texts = []
    for block in blocks:
        head, *lines = map("".join, zip(*block, strict=True))
        texts.append("\n".join((head, "─" * len(head), *lines)))
    return "\n\n".join(texts)


def cell(score: Score | None) -> str:
    """A score in words: its mean, and its standard deviation or half of its interval."""
    if score is None:
        return "–"
    spread = score.sd
    if spread is None and score.low is not None and score.high is not None:
        spread = (score.high - score.low) / 2
    return f"{score.mean:.1f}" + ("" if spread is None else f" ±{spread:.1f}")
