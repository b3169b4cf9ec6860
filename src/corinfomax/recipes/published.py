"""The named recipes, with the paper's score and ours, and the choice of one for a set of images."""

import difflib
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from corinfomax.recipes import fields
from corinfomax.recipes.fields import Backbone, Loss, Optim, Probe, Projector, Recipe, Tuning, View


class Measured(NamedTuple):
    """A score of our own, with all that is needed to judge and repeat it."""

    score: str
    value: float  # top-1 in percent
    sd: float | None  # over seeds
    n: int  # number of seeds
    data: str
    hardware: str
    minutes: float  # of training
    commit: str


class Entry(NamedTuple):
    """A recipe, a line about it, its data and its results."""

    recipe: Recipe
    about: str
    data: str
    paper: float | None = None  # the paper's linear probe, top-1 in percent
    measured: tuple[Measured, ...] = ()


# The paper's, on CIFAR-10 and on ImageNet.
_WIDE = Projector(widths=(4096, 4096, 128))
_CIFAR10 = Recipe(
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.247, 0.243, 0.261),
    backbone=Backbone(name="resnet18", small_stem=True),
    loss=Loss(alpha=250.0),
    epochs=1000,
)
_IMAGENET = Recipe(
    size=224,
    cache_side=256,
    backbone=Backbone(name="resnet50"),
    projector=_WIDE,
    loss=Loss(alpha=500.0),
    optim=Optim(lr=1.0, min_lr=5e-3),
    batch=1024,
)
# Mirrored digits are other digits, and digits have no colour.
_DIGIT = View(rotate=15.0, crop_area=(0.4, 1.0), flip=0.0, jitter=0.0, grey=0.0)

# Few epochs on few cores: images per second and the number of steps matter. Reasons and figures are in dev/LOG.md.
_MILD = View(crop_area=(0.25, 1.0))
_COMPACT = Backbone(small_stem=True, stem_stride=2, layers=(1, 1, 1, 0), channels=(32, 64, 128, 128))
_COMPACT_OPTIM = Optim(lr=0.6, warmup_epochs=1, schedule="step", weight_decay=5e-4, decay_norms=False)
_MUON = replace(_COMPACT_OPTIM, name="muon", lr=0.06, start_lr=0.006, weight_decay=0.1)
_SHALLOW = Projector(widths=(2048, 64), batch_norm=True)

RECIPES: dict[str, Entry] = {
    "cifar10": Entry(_CIFAR10, "the paper's ResNet-18 on CIFAR-10", data="cifar10", paper=93.18),
    "cifar100": Entry(
        replace(
            _CIFAR10,
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            projector=_WIDE,
            loss=Loss(alpha=1000.0),
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
            projector=_WIDE,
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
        replace(_IMAGENET, epochs=200, optim=replace(_IMAGENET.optim, warmup_epochs=5)),
        "the paper's ResNet-50 on ImageNet-100 (CMC's list), cropped from 256 px copies",
        data="imagenet100",
        paper=82.64,
    ),
    "imagenet1k": Entry(
        replace(
            _IMAGENET,
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
        replace(_CIFAR10, views=(_MILD, _MILD), projector=_SHALLOW, loss=Loss(), optim=_MUON, epochs=240),
        "the paper's ResNet-18 on CIFAR-10 in a quarter of the epochs, with cpu-small's views, projector and optimiser",
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
            loss=Loss(alpha=250.0),  # twice the rule: ten classes need few dimensions, which agree well
            optim=replace(_COMPACT_OPTIM, weight_decay=1e-3),
            epochs=80,
            batch=128,
            precision="float32",  # the same digits on all processors; bfloat16 would save a seventh of the time
        ),
        "5,000 digits from the demo extra: a whole run in minutes on two cores",
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

# Recipes that continue from weights (--init), which give the network and the statistics of its input.
_ADAPT = Recipe(
    size=96,
    views=(_MILD, _MILD),
    projector=_SHALLOW,
    optim=Optim(name="adamw", lr=1e-3, start_lr=1e-4, warmup_epochs=1, schedule="step", decay_norms=False),
    # New BatchNorm statistics cost Lite0 12 points; pull and average keep what few labels need (dev/LOG.md).
    tuning=Tuning(blocks=0.5, projector_share=1 / 6, batch_norm="keep", pull=30.0, average=0.5),
    epochs=10,
    batch=128,
)
RECIPES["adapt"] = Entry(_ADAPT, "continue from the weights of a convolutional network", data="any images, with --init")
RECIPES["adapt-vit"] = Entry(
    replace(_ADAPT, tuning=replace(_ADAPT.tuning, layer_decay=0.75)),
    "continue from the weights of a ViT",
    data="any images, with --init",
)


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, or in that JSON file; ValueError with the names there are."""
    if name not in RECIPES and name.endswith(".json"):
        return _read(Path(name))
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"unknown recipe {name!r}{hint}; choose from {', '.join(RECIPES)}, or name a .json file")
    return RECIPES[name].recipe


def _read(path: Path) -> Recipe:
    """The recipe in a file of `tune`, or in the recipe.json of a run."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return fields.from_json(content["recipe"])
    except OSError as error:
        raise ValueError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no recipe: {error}") from error


def adapt(
    vit: bool, side: int, count: int, short_side: int, *, cuda: bool, one_size: bool = False
) -> tuple[str, Recipe]:
    """Name and recipe to continue from weights made for `side` px on `count` images of this median short side.

    On a GPU, and for a network of `one_size`, views have that side; else less, and the epochs make about ten minutes on
    two cores with a small network.
    """
    name = "adapt-vit" if vit else "adapt"
    base = RECIPES[name].recipe
    size = side if cuda or one_size else min(side, 160 if short_side >= 112 else 96)
    images_seen = 10_000_000 if cuda else 60_000 * 96**2 // size**2
    epochs = float(f"{min(images_seen / max(count, 1), 100.0):.2g}")
    return name, replace(
        base,
        size=size,
        cache_side=min(short_side, 2 * size),
        epochs=epochs,
        optim=replace(base.optim, warmup_epochs=epochs / 10),
    )


def choose(data: str, count: int, short_side: int, *, cuda: bool) -> tuple[str, Recipe, str]:
    """Name, recipe and reason for `count` images of that median short side in pixels.

    The digits get their own recipe. Other images get cpu-small, or on a GPU cifar10-fast up to 96 px and the published
    ImageNet-100 recipe above, shorter; the epochs give about the same number of images in all.
    """
    if data == "mnist5k":
        return data, RECIPES[data].recipe, f"{data}: {RECIPES[data].about}"

    # By the size of the images: name, size, and epochs times images.
    if not cuda:
        # photographs gain more from epochs than from pixels: 69.6 and 71.8 at 32 px, 64.0 at 64 px in the same time
        size = min(max(short_side * 3 // 4 // 8 * 8, 24), 32)
        name, images_seen = "cpu-small", 900_000 * 24**2 // size**2
    elif short_side <= 96:
        name, size, images_seen = "cifar10-fast", 32 if short_side <= 48 else 64, 12_000_000
    else:
        name, size, images_seen = "imagenet100-r18", 224, 12_000_000

    # As many epochs as take the same time.
    base = RECIPES[name].recipe
    epochs = min(max(images_seen // max(count, 1), 1), 1000)
    recipe = replace(
        base,
        size=size,
        cache_side=min(short_side, 2 * size) if size < 224 else base.cache_side,
        epochs=epochs,
        optim=replace(base.optim, warmup_epochs=min(base.optim.warmup_epochs, epochs / 10)),
    )
    device = "a GPU" if cuda else "no GPU"
    return name, recipe, f"{name} at {size} px, {epochs} epochs, for {count:,} images of {short_side} px and {device}"
