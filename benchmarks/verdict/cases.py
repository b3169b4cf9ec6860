"""Runs that should be good and runs made to go wrong on purpose, each with what the verdict may say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.objectives.methods import KERNEL, START
from corinfomax.diagnosis import verdict
from corinfomax.evaluation import features, probes
from corinfomax.images import cache as images
from corinfomax.images.cache import Images, Splits
from corinfomax.images.sources import Data
from corinfomax.recipes.fields import IMAGENET_STATS, Recipe, View
from corinfomax.recipes.published import RECIPES
from corinfomax.runtime.records import WeightsOptions
from corinfomax.weights.load import LoadedBackbone, load_backbone

GOOD = frozenset(verdict.GOOD)
STILL = View(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0)


Spoil = Callable[[Images], Images]


def unspoilt(split: Images) -> Images:
    """The images as they are."""
    return split


@dataclass(frozen=True)
class Case:
    """One run: its data, its recipe, and the verdicts that are right for it."""

    data: str
    recipe: Recipe
    right: frozenset[str]
    tuned: bool = False
    """Whether the thresholds were set with this run in view."""
    recovers: bool = False
    """Whether it is sound again at its end, as a learning rate far too high is once it has decayed."""
    images: int = 3000
    init: str | None = None
    """Weights that it continues from, a file or run in the folder of weights."""
    spoil: Spoil = unspoilt

    @property
    def good(self) -> bool:
        return self.right == GOOD

    def start(self, weights: Path) -> LoadedBackbone | None:
        """The weights that it continues from."""
        if self.init is None:
            return None
        return load_backbone(str(weights / self.init), WeightsOptions(architecture=NETWORKS.get(self.init)))

    def splits(self, root: Path, cache: Path | None) -> Splits:
        """The images: a fixed slice of the training split, spoilt if so wanted, and the test split."""
        loaded = images.load(
            Data(self.data if self.data == "mnist5k" else root / self.data, cache=cache), side=SIDE[self.data]
        )
        order = torch.randperm(len(loaded.train), generator=torch.Generator().manual_seed(0))
        assert loaded.test is not None
        return Splits(self.spoil(loaded.train.select(order[: self.images])), self.spoil(loaded.test))


Fit = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], probes.LinearClassifier]
LITE0, VIT = "tf_efficientnet_lite0-imagenet1k.safetensors", "vit"
NETWORKS = {LITE0: "tf_efficientnet_lite0"}
SIDE = {"cifar10": 32, "mnist5k": 28, "clothing-128": 48, "tiny-imagenet-64-100c": 48}


def probe(backbone: nn.Module, splits: Splits, recipe: Recipe, *, most: int, fit: Fit = probes.ridge) -> float:
    """Top-1 in percent of a probe on at most `most` images of each split, drawn at random: files lie by class."""
    assert splits.test is not None
    some = []
    for split in splits:
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(2))
        some.append(split.select(order[:most]))
    train, test = some
    x, y = (features.extract_features(backbone, part, recipe) for part in some)
    assert train.labels is not None and test.labels is not None
    return probes.accuracy(fit(x, train.labels, y).predicted, test.labels)


def one_image(split: Images) -> Images:
    """The first image, as often as there were images."""
    return split.select(torch.zeros(len(split), dtype=torch.long))


def few_images(split: Images, count: int = 10) -> Images:
    """The first ten images over and over."""
    return split.select(torch.arange(len(split)) % count)


def frames(split: Images, noise: int = 6) -> Images:
    """One image with a little noise, as a camera gives that looks at a wall."""
    pixels, sizes = split.batch(torch.zeros(len(split), dtype=torch.long))
    drawn = torch.randint(-noise, noise + 1, pixels.shape, generator=torch.Generator().manual_seed(1))
    noisy = (pixels.int() + drawn).clamp(0, 255).to(torch.uint8)
    step = noisy[0].numel()
    return replace(split, pixels=noisy.flatten(), offsets=torch.arange(len(split)) * step, sizes=sizes)


def changed(base: Recipe, **changes: Any) -> Recipe:
    """The recipe with some fields, or fields of its parts, replaced: `optim={"lr": 3.0}`."""
    for name, value in changes.items():
        part = getattr(base, name)
        base = replace(base, **{name: replace(part, **value) if isinstance(value, dict) else value})
    return base


def smaller(base: Recipe) -> Recipe:
    """The recipe cut to 598 steps, a minute on one core; batch over D stays 2."""
    return changed(base, size=16, batch=64, epochs=13, projector={"widths": (512, 512, 32)}, optim={"warmup_epochs": 1})


def smaller_tuned(name: str) -> Recipe:
    """A recipe that continues from weights, cut to 184 steps."""
    projector, optim = {"widths": (512, 32)}, {"warmup_epochs": 0.4}
    return changed(RECIPES[name].recipe, size=64, cache_side=64, batch=64, epochs=4, projector=projector, optim=optim)


SMALL, DIGITS = smaller(START), smaller(RECIPES["mnist5k"].recipe)
ALIKE = changed(smaller(KERNEL), projector={"widths": (512, 64)})
ALIKE_DIGITS = changed(DIGITS, loss=KERNEL.loss, optim=ALIKE.optim, projector={"widths": (512, 64)})
MUON = {"name": "muon", "lr": 0.06, "start_lr": 0.006, "weight_decay": 0.1}
TUNED = replace(smaller_tuned("adapt"), mean=(0.5,) * 3, std=(0.5,) * 3)  # as EfficientNet-Lite0 was trained
TUNED_VIT = smaller_tuned("adapt-vit")
BRIEF = replace(SMALL, epochs=1)  # what is wrong with the data is seen at the first look
PLAIN = {"batch_norm": False}
INVARIANT, COLLAPSE = frozenset({"over-invariant"}), frozenset({"complete collapse", "dimensional collapse"})
UNCHANGED, FORGOTTEN = frozenset({"unchanged"}), frozenset({"features lost"})
DATA, DIVERGING, UNDER = frozenset({"data problem"}), frozenset({"diverging"}), frozenset({"under-invariant"})

CIFAR, TINY, CLOTHES = "cifar10", "tiny-imagenet-64-100c", "clothing-128"
SLOW, FAST, ALONE = {"lr_scale": 1e-5}, {"lr_scale": 100.0}, {"projector_share": 0.995}
THROWN = {"name": "sgd", "lr": 1.0}  # the projector's steps are far too large


def from_weights(
    init: str,
    data: str,
    right: frozenset[str],
    seen: bool,
    spoil: Callable[[Images], Images] = unspoilt,
    **changes: Any,
) -> Case:
    """A case that continues from `init`, whose network the run takes."""
    recipe = changed(TUNED_VIT if init == VIT else TUNED, **changes)
    return Case(data, recipe, right, seen, init=init, spoil=spoil)


def continued_cases() -> dict[str, Case]:
    """Runs that start from weights, and some with more than two views."""
    many = {"n_views": 4, "epochs": 7}
    raw = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    return {
        "tuned cifar10": from_weights(LITE0, CIFAR, GOOD, True),
        "tuned mnist5k": from_weights(LITE0, "mnist5k", GOOD, True),
        "tuned cifar10 slowly": from_weights(LITE0, CIFAR, UNCHANGED, True, tuning=SLOW),
        "tuned cifar10 SGD": from_weights(LITE0, CIFAR, DIVERGING | COLLAPSE, True, optim=THROWN),
        "tuned cifar10 bytes": from_weights(LITE0, CIFAR, DATA, True, **raw),
        "tuned cifar10 new statistics": from_weights(
            LITE0, CIFAR, FORGOTTEN, True, tuning={"batch_norm": "adapt", "blocks": 1.0}
        ),
        "tuned mnist5k new statistics": from_weights(
            LITE0, "mnist5k", FORGOTTEN, False, tuning={"batch_norm": "adapt"}
        ),
        "tuned tiny-imagenet lr-scale 100": from_weights(LITE0, TINY, FORGOTTEN | COLLAPSE, False, tuning=FAST),
        "tuned tiny-imagenet ImageNet's input": from_weights(
            LITE0, TINY, DATA, False, mean=IMAGENET_STATS[0], std=IMAGENET_STATS[1]
        ),
        "tuned clothing": from_weights(LITE0, CLOTHES, GOOD, False),
        "tuned tiny-imagenet": from_weights(LITE0, TINY, GOOD, False),
        "vit cifar10": from_weights(VIT, CIFAR, GOOD, True),
        "vit cifar10 lr-scale 100": from_weights(VIT, CIFAR, FORGOTTEN | COLLAPSE, True, tuning=FAST),
        "vit cifar10 alpha x100": from_weights(VIT, CIFAR, INVARIANT | COLLAPSE, True, loss={"alpha": 12500.0}),
        "vit cifar10 projector alone": from_weights(VIT, CIFAR, UNCHANGED, True, tuning=ALONE),
        "vit clothing": from_weights(VIT, CLOTHES, GOOD, False),
        "vit mnist5k": from_weights(VIT, "mnist5k", GOOD, False),
        "vit clothing slowly": from_weights(VIT, CLOTHES, UNCHANGED, False, tuning=SLOW),
        "vit tiny-imagenet projector alone": from_weights(VIT, TINY, UNCHANGED, False, tuning=ALONE),
        "vit mnist5k lr-scale 100": from_weights(VIT, "mnist5k", FORGOTTEN | COLLAPSE, False, tuning=FAST),
        "vit tiny-imagenet alpha x300": from_weights(VIT, TINY, INVARIANT | COLLAPSE, False, loss={"alpha": 4e4}),
        "vit clothing alpha /1000": from_weights(VIT, CLOTHES, GOOD, False, loss={"alpha": 0.125}),
        "vit clothing SGD": from_weights(VIT, CLOTHES, GOOD, False, optim=THROWN),
        "vit clothing one image": from_weights(VIT, CLOTHES, DATA, False, spoil=one_image),
        "cifar10 four views": Case(CIFAR, changed(SMALL, **many), GOOD, True),
        "cifar10 four views, alpha x100": Case(
            CIFAR, changed(SMALL, **many, loss={"alpha": 12500.0}), INVARIANT | COLLAPSE, True
        ),
        "clothing four views": Case(CLOTHES, changed(SMALL, **many), GOOD),
        "mnist5k three views": Case("mnist5k", changed(DIGITS, n_views=3, epochs=8), GOOD),
        "tiny-imagenet four views, alpha /1000": Case(TINY, changed(SMALL, **many, loss={"alpha": 0.125}), UNDER),
        "mnist5k three views, eps 0.3": Case(
            "mnist5k", changed(DIGITS, n_views=3, epochs=8, loss={"eps": 0.3}), COLLAPSE | INVARIANT
        ),
    }


CASES: dict[str, Case] = {
    "cifar10": Case("cifar10", SMALL, GOOD, True),
    "mnist5k": Case("mnist5k", DIGITS, GOOD, True),
    "mnist5k alpha x2": Case("mnist5k", changed(DIGITS, loss={"alpha": 500.0}), GOOD, True),
    "cifar10 alpha x100": Case("cifar10", changed(SMALL, loss={"alpha": 12500.0}), INVARIANT | COLLAPSE, True),
    "cifar10 alpha /1000": Case("cifar10", changed(SMALL, loss={"alpha": 0.125}), UNDER, True),
    "cifar10 eps 0.1": Case("cifar10", changed(SMALL, loss={"eps": 0.1}), COLLAPSE | INVARIANT, True),
    "cifar10 lr 30": Case("cifar10", changed(SMALL, optim={"lr": 30.0}), DIVERGING | COLLAPSE, True, recovers=True),
    "cifar10 lr 0.5 without BatchNorm": Case("cifar10", changed(SMALL, projector=PLAIN, optim={"lr": 0.5}), GOOD, True),
    "cifar10 lr 5 without BatchNorm": Case("cifar10", changed(SMALL, projector=PLAIN, optim={"lr": 5.0}), GOOD, True),
    "cifar10 lr 1000": Case("cifar10", changed(SMALL, optim={"lr": 1000.0}), DIVERGING | COLLAPSE, True, recovers=True),
    "cifar10 not normalised": Case("cifar10", changed(SMALL, loss={"normalize": False}), DIVERGING, True),
    "cifar10 one image": Case("cifar10", SMALL, DATA, True, spoil=one_image),
    "cifar10 frames": Case("cifar10", SMALL, DATA, True, spoil=frames),
    "cifar10 no augmentation": Case("cifar10", changed(SMALL, views=(STILL, STILL)), DATA, True),
    "clothing": Case("clothing-128", SMALL, GOOD),
    "tiny-imagenet": Case("tiny-imagenet-64-100c", SMALL, GOOD),
    "cifar10 AdamW": Case("cifar10", changed(SMALL, optim={"name": "adamw", "lr": 1e-3, "start_lr": 1e-4}), GOOD),
    "cifar10 D 64": Case(
        "cifar10", changed(SMALL, projector={"widths": (512, 512, 64)}, batch=128, seed=1), GOOD, True
    ),
    "tiny-imagenet without BatchNorm, slowly": Case(
        "tiny-imagenet-64-100c", changed(SMALL, projector=PLAIN, optim={"lr": 0.05}), GOOD
    ),
    "mnist5k alpha x1000": Case("mnist5k", changed(DIGITS, loss={"alpha": 250e3}), INVARIANT | COLLAPSE),
    "tiny-imagenet alpha x30": Case(
        "tiny-imagenet-64-100c", changed(SMALL, loss={"alpha": 3750.0}), INVARIANT | COLLAPSE, True
    ),
    "mnist5k alpha 0": Case("mnist5k", changed(DIGITS, loss={"alpha": 0.0}), UNDER),
    "mnist5k eps 0.3": Case("mnist5k", changed(DIGITS, loss={"eps": 0.3}), COLLAPSE | INVARIANT),
    "tiny-imagenet cov-decay 0.995": Case(
        "tiny-imagenet-64-100c", changed(SMALL, loss={"cov_decay": 0.995}), COLLAPSE | INVARIANT, True
    ),
    "clothing weight decay 0.3": Case(
        "clothing-128", changed(SMALL, optim={"weight_decay": 0.3}), COLLAPSE, recovers=True
    ),
    "clothing alpha /300": Case("clothing-128", changed(SMALL, loss={"alpha": 0.4}), UNDER),
    "mnist5k lr 100": Case("mnist5k", changed(DIGITS, optim={"lr": 100.0}), DIVERGING | COLLAPSE, recovers=True),
    "tiny-imagenet lr 100 without BatchNorm": Case(
        "tiny-imagenet-64-100c",
        changed(SMALL, projector=PLAIN, optim={"lr": 100.0}),
        DIVERGING | COLLAPSE,
        recovers=True,
    ),
    "mnist5k not normalised": Case("mnist5k", changed(DIGITS, loss={"normalize": False}), DIVERGING),
    "clothing one image": Case("clothing-128", BRIEF, DATA, spoil=one_image),
    "mnist5k frames": Case("mnist5k", replace(DIGITS, epochs=1), DATA, spoil=frames),
    "tiny-imagenet ten images": Case("tiny-imagenet-64-100c", BRIEF, DATA, spoil=few_images),
    "clothing no augmentation": Case("clothing-128", changed(BRIEF, views=(STILL, STILL)), DATA),
    "tiny-imagenet crops of 2 %": Case(
        "tiny-imagenet-64-100c", changed(SMALL, views=(View(crop_area=(0.01, 0.02)),) * 2), INVARIANT | UNDER, True
    ),
    "clothing crops of 1 %": Case(
        "clothing-128", changed(SMALL, views=(View(crop_area=(0.005, 0.01)),) * 2), INVARIANT | UNDER, True
    ),
    "cifar10 alpha x40": Case("cifar10", changed(SMALL, loss={"alpha": 5000.0}), INVARIANT | COLLAPSE),
    "cifar10 crops of 3 %": Case(
        "cifar10", changed(SMALL, views=(View(crop_area=(0.01, 0.03)),) * 2), INVARIANT | UNDER
    ),
    "mnist5k crops of 2 %": Case(
        "mnist5k", changed(DIGITS, views=(View(crop_area=(0.01, 0.02)),) * 2), INVARIANT | UNDER
    ),
    "tiny-imagenet alpha x3": Case("tiny-imagenet-64-100c", changed(SMALL, loss={"alpha": 375.0}), GOOD),
    "clothing AdamW": Case("clothing-128", changed(SMALL, optim={"name": "adamw", "lr": 1e-3, "start_lr": 1e-4}), GOOD),
    "cifar10 Muon": Case("cifar10", changed(SMALL, optim=MUON), GOOD),
    "clothing Muon": Case("clothing-128", changed(SMALL, optim=MUON), GOOD),
    "cifar10 Muon, alpha x100": Case("cifar10", changed(SMALL, optim=MUON, loss={"alpha": 12500.0}), GOOD, True),
    "cifar10 Muon, alpha x3000": Case(
        "cifar10", changed(SMALL, optim=MUON, loss={"alpha": 375e3}), INVARIANT | COLLAPSE, True
    ),
    "cifar10 AdamW, alpha x100": Case(
        "cifar10",
        changed(SMALL, optim={"name": "adamw", "lr": 1e-3, "start_lr": 1e-4}, loss={"alpha": 12500.0}),
        INVARIANT | COLLAPSE,
        True,
    ),
    "tiny-imagenet Muon, lr 100": Case(
        "tiny-imagenet-64-100c", changed(SMALL, optim=MUON | {"lr": 100.0}), DIVERGING | COLLAPSE, recovers=True
    ),
    "cifar10 kernel": Case("cifar10", ALIKE, GOOD, True),
    "cifar10 kernel, alpha x100": Case("cifar10", changed(ALIKE, loss={"alpha": 25e3}), GOOD, True),
    "cifar10 kernel, alpha x1000": Case("cifar10", changed(ALIKE, loss={"alpha": 25e4}), INVARIANT | COLLAPSE, True),
    "cifar10 kernel, SGD, alpha x100": Case(
        "cifar10", changed(ALIKE, optim=START.optim, loss={"alpha": 25e3}), INVARIANT | COLLAPSE, True
    ),
    "cifar10 kernel, alpha /1000": Case("cifar10", changed(ALIKE, loss={"alpha": 0.25}), UNDER, True),
    "cifar10 kernel, eps 100": Case("cifar10", changed(ALIKE, loss={"eps": 100.0}), COLLAPSE | INVARIANT, True),
    "cifar10 kernel, temperature 0.005": Case("cifar10", changed(ALIKE, loss={"temperature": 0.005}), GOOD, True),
    "cifar10 kernel, temperature 4": Case("cifar10", changed(ALIKE, loss={"temperature": 4.0}), GOOD, True),
    "cifar10 kernel, lr 100": Case(
        "cifar10", changed(ALIKE, optim={"lr": 100.0}), DIVERGING | COLLAPSE, True, recovers=True
    ),
    "cifar10 kernel, not normalised": Case("cifar10", changed(ALIKE, loss={"normalize": False}), DIVERGING, True),
    "cifar10 kernel, alpha x4": Case("cifar10", changed(ALIKE, loss={"alpha": 1000.0}), GOOD),
    "cifar10 kernel, SGD": Case("cifar10", changed(ALIKE, optim=START.optim, batch=64), GOOD),
    "clothing kernel": Case("clothing-128", ALIKE, GOOD),
    "tiny-imagenet kernel": Case("tiny-imagenet-64-100c", ALIKE, GOOD),
    "mnist5k kernel": Case("mnist5k", ALIKE_DIGITS, GOOD),
    "tiny-imagenet kernel, alpha x3000": Case(
        "tiny-imagenet-64-100c", changed(ALIKE, loss={"alpha": 75e4}), INVARIANT | COLLAPSE
    ),
    "mnist5k kernel, eps 30": Case("mnist5k", changed(ALIKE_DIGITS, loss={"eps": 30.0}), COLLAPSE | INVARIANT),
    "clothing kernel, alpha /300": Case("clothing-128", changed(ALIKE, loss={"alpha": 0.8}), UNDER),
    "tiny-imagenet kernel, lr 1000": Case(
        "tiny-imagenet-64-100c", changed(ALIKE, optim={"lr": 1000.0}), DIVERGING | COLLAPSE, recovers=True
    ),
} | continued_cases()
