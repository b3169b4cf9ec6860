"""A recipe for each published row, and ours, with what the paper got and what we measured; and which suits whom."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import NamedTuple

from corinfomax.recipes.fields import Backbone, Loss, Optim, Probe, Projector, Recipe, View

CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))
CIFAR100_STATS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


class Measured(NamedTuple):
    """One figure of our own, with what is needed to judge and repeat it."""

    score: str
    value: float
    """Top-1 in percent."""
    sd: float | None
    n: int
    """Number of seeds."""
    data: str
    hardware: str
    minutes: float
    """Training time."""
    commit: str


class Entry(NamedTuple):
    """A recipe with its name's meaning, the data it is for, and its results."""

    recipe: Recipe
    about: str
    data: str
    paper: float | None = None
    """Top-1 in percent of the paper's linear probe."""
    measured: tuple[Measured, ...] = ()


_R18_SMALL = Backbone(name="resnet18", small_stem=True)
_IMAGENET = Recipe(
    size=224,
    cache_side=256,
    projector=Projector(widths=(4096, 4096, 128)),
    loss=Loss(alpha=500.0),
    optim=Optim(lr=1.0, min_lr=5e-3),
    batch=1024,
)
_DIGIT = View(
    rotate=15.0, crop_area=(0.4, 1.0), flip=0.0, jitter=0.0, grey=0.0
)  # digits change their meaning when mirrored, and have no colour

# Few epochs on few cores: what counts is images a second and steps. Reasons and figures are in docs/log.md.
_MILD = View(crop_area=(0.25, 1.0))
_COMPACT = Backbone(small_stem=True, stem_stride=2, layers=(1, 1, 1, 0), channels=(32, 64, 128, 128))
_COMPACT_OPTIM = Optim(lr=0.6, warmup_epochs=1, schedule="step", weight_decay=5e-4, decay_norms=False)
_MUON = replace(_COMPACT_OPTIM, name="muon", lr=0.06, start_lr=0.006, weight_decay=0.1)
_SHALLOW = Projector(widths=(2048, 64), batch_norm=True)

RECIPES: dict[str, Entry] = {
    "cifar10": Entry(
        Recipe(
            mean=CIFAR10_STATS[0],
            std=CIFAR10_STATS[1],
            backbone=_R18_SMALL,
            loss=Loss(alpha=250.0),
            epochs=1000,
        ),
        "the paper's ResNet-18 on CIFAR-10",
        data="cifar10",
        paper=93.18,
    ),
    "cifar100": Entry(
        Recipe(
            mean=CIFAR100_STATS[0],
            std=CIFAR100_STATS[1],
            backbone=_R18_SMALL,
            projector=Projector(widths=(4096, 4096, 128)),
            loss=Loss(alpha=1000.0),
            epochs=1000,
        ),
        "the paper's ResNet-18 on CIFAR-100",
        data="cifar100",
        paper=71.61,
    ),
    "tiny-imagenet": Entry(
        Recipe(
            size=64,
            cache_side=64,
            backbone=Backbone(name="resnet50"),
            projector=Projector(widths=(4096, 4096, 128)),
            loss=Loss(alpha=500.0, cov_decay=0.1, mean_decay=0.1),
            epochs=800,
            batch=1024,
        ),
        "the paper's ResNet-50 on Tiny ImageNet at 64 px",
        data="tiny-imagenet",
        paper=54.86,
    ),
    "imagenet100-r18": Entry(
        replace(_IMAGENET, backbone=Backbone(name="resnet18"), epochs=400),
        "the paper's ResNet-18 on ImageNet-100 (CMC's list), cropped from 256 px copies",
        data="imagenet100",
        paper=80.48,
    ),
    "imagenet100-r50": Entry(
        replace(
            _IMAGENET, backbone=Backbone(name="resnet50"), epochs=200, optim=replace(_IMAGENET.optim, warmup_epochs=5)
        ),
        "the paper's ResNet-50 on ImageNet-100 (CMC's list), cropped from 256 px copies",
        data="imagenet100",
        paper=82.64,
    ),
    "imagenet1k": Entry(
        replace(
            _IMAGENET,
            backbone=Backbone(name="resnet50"),
            projector=Projector(widths=(8192, 8192, 512), batch_norm=True),
            loss=Loss(alpha=2000.0, cov_decay=0.1, mean_decay=0.1),
            optim=Optim(lr=0.2),
            probe=Probe(lr=25.0, decay_epochs=20),
            epochs=100,
            batch=1536,
        ),
        "the paper's ResNet-50 on ImageNet-1K, cropped from 256 px copies",
        data="imagenet1k",
        paper=69.08,
    ),
    "cifar10-fast": Entry(
        Recipe(
            mean=CIFAR10_STATS[0],
            std=CIFAR10_STATS[1],
            views=(_MILD, _MILD),
            backbone=_R18_SMALL,
            projector=_SHALLOW,
            optim=_MUON,
            epochs=240,
        ),
        "the paper's ResNet-18 on CIFAR-10 in a quarter of its epochs: cpu-small's views, projector and optimiser",
        data="cifar10",
    ),
    "mnist5k": Entry(
        Recipe(
            size=16,
            test_scale=1.5,
            cache_side=28,
            mean=(0.1307, 0.1307, 0.1307),
            std=(0.3081, 0.3081, 0.3081),
            views=(_DIGIT, _DIGIT),
            backbone=replace(_COMPACT, zero_init_last=False),
            projector=Projector(widths=(512, 512, 32), batch_norm=True),
            loss=Loss(alpha=250.0),  # twice the rule: ten classes need few directions, which agree well
            optim=replace(_COMPACT_OPTIM, weight_decay=1e-3),
            epochs=80,
            batch=128,
            precision="float32",  # one arithmetic on all processors; bfloat16 saves a seventh here
        ),
        "5,000 digits that come with the demo extra: a whole run in minutes on two cores",
        data="mnist5k",
        measured=(Measured("linear", 98.4, None, 1, "mnist5k", "2 cores of a Xeon, float32", 3.0, "07c8e05"),),
    ),
    "cpu-small": Entry(
        Recipe(
            size=24,
            test_scale=5 / 3,
            views=(_MILD, _MILD),
            backbone=_COMPACT,
            projector=_SHALLOW,
            optim=_MUON,
            epochs=18,
            batch=256,
        ),
        "small images on two cores: a compact ResNet, ten minutes for 50,000 images of 32 px",
        data="any folder of small images",
        measured=(
            Measured("linear", 69.8, None, 1, "CIFAR-10 (JPEG copy)", "2 cores of an EPYC, bfloat16", 9.3, "21f7aa5"),
        ),
    ),
}


def named(name: str) -> Recipe:
    """The recipe of that name; ValueError that lists the names when there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"unknown recipe {name!r}{hint}; choose from {', '.join(RECIPES)}")
    return RECIPES[name].recipe


def choose(data: str, count: int, short_side: int, *, cuda: bool) -> tuple[str, Recipe, str]:
    """Name, recipe and reason: a sensible choice for `count` images of that median short side in pixels.

    A named set with a recipe of its own gets it, if the hardware can run it in reasonable time. Other images get the
    published recipe for their size, or cpu-small without a GPU, with as many epochs as give about the same number of
    images in all.
    """
    for name, entry in RECIPES.items():
        if entry.data == data and (cuda or name == "mnist5k"):
            return name, entry.recipe, f"{name}: {entry.about}"
    if not cuda:
        name, size = "cpu-small", min(max(short_side * 3 // 4 // 8 * 8, 24), 64)
    elif short_side <= 48:
        name, size = "cifar10", 32
    elif short_side <= 96:
        name, size = "tiny-imagenet", 64
    else:
        name, size = "imagenet100-r18", 224
    base = RECIPES[name].recipe
    seen = IMAGES_SEEN[name]
    if not cuda:
        seen = seen * base.size**2 // size**2  # the same minutes
    epochs = min(max(seen // max(count, 1), 1), 1000)
    recipe = replace(
        base,
        size=size,
        early_sizes=tuple(round(side * size / base.size) for side in base.early_sizes),
        cache_side=min(short_side, 2 * size) if size < 224 else base.cache_side,
        epochs=epochs,
        optim=replace(base.optim, warmup_epochs=min(base.optim.warmup_epochs, epochs / 10)),
    )
    hardware = "a GPU" if cuda else "no GPU"
    return name, recipe, f"{name} at {size} px, {epochs} epochs, for {count:,} images of {short_side} px and {hardware}"


IMAGES_SEEN = {
    "cpu-small": 900_000,
    "cifar10": 50_000_000,
    "tiny-imagenet": 80_000_000,
    "imagenet100-r18": 50_000_000,
}
"""Images in all, epochs times images, that `choose` plans for."""
