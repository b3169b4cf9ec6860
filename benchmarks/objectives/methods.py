"""The methods that are compared, where the search for their settings begins and what it may change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.objectives.rivals import AUTHORS, PAIRED, Rival
from corinfomax.recipes.fields import ALPHA_PER_DIM, PAPER_VIEWS, Loss, Optim, Projector, Recipe
from corinfomax.recipes.published import RECIPES

Changes = dict[str, dict[str, Any]]
"""Fields of parts of a recipe, "" for those of its own, "views" for each of its views, "rival" for a rival's weights:
{"optim": {"lr": 0.3}, "": {"batch": 256}, "views": {"blur": 0.5}, "rival": {"weights": (0.5,)}}."""
SUPERVISED = "supervised"
SGD = Optim(lr=0.6, warmup_epochs=1, schedule="step", weight_decay=5e-4, decay_norms=False)
START: Recipe = replace(
    RECIPES["cpu-small"].recipe,
    loss=Loss(),
    projector=Projector(widths=(512, 512, 64), batch_norm=True),
    optim=SGD,
    epochs=12,
    batch=128,
    precision="float32",
)
"""What `cpu-small` was before this search changed it; its arithmetic is the same on all machines."""


class Setting(NamedTuple):
    """A recipe, with the weights of a rival objective in place of the recipe's own."""

    recipe: Recipe
    weights: tuple[float, ...] = ()
    """() for the recipe's own objective."""


def changed(setting: Setting, changes: Changes) -> Setting:
    """The setting with these fields replaced."""
    recipe, weights = setting
    for part, fields in changes.items():
        if part == "rival":
            weights = fields["weights"]
        elif part == "":
            recipe = replace(recipe, **fields)
        elif part == "views":
            first, second = (replace(view, **fields) for view in recipe.views)
            recipe = replace(recipe, views=(first, second))
        else:
            recipe = replace(recipe, **{part: replace(getattr(recipe, part), **fields)})
    return Setting(recipe, weights)


class Data(NamedTuple):
    """A set of images, how it is seen, and what else is another than usual, as the network."""

    folder: str
    size: int
    cache_side: int
    also: Changes

    def fit(self, setting: Setting) -> Setting:
        """A setting for 32 px, or for the 24 px of crops of them, at the same share of these images' side."""
        size = round(setting.recipe.size * self.size / 24)
        return changed(changed(setting, {"": {"size": size, "cache_side": self.cache_side}}), self.also)


RESNET18: Changes = {"backbone": {"small_stem": True, "stem_stride": 2, "layers": None, "channels": None}}
DATA = {
    "cifar10": Data("cifar10", 24, 32, {}),
    "tiny-imagenet-64-100c": Data("tiny-imagenet-64-100c", 36, 64, {}),
    "cifar10-resnet18": Data("cifar10", 24, 32, RESNET18 | {"": {"precision": "bfloat16"}}),
}


class Method(NamedTuple):
    """An objective, where its search begins, and the search: of each list of changes the best is kept, if it helps."""

    name: str
    start: Setting
    options: Sequence[Callable[[Setting], list[Changes]]] = ()
    late: Sequence[Callable[[Setting], list[Changes]]] = ()
    """Tried after those: what they cost is measured with what was chosen so far."""
    again: Sequence[Callable[[Setting], list[Changes]]] = ()
    """Tried in the end, and for as long as they help."""
    criterion: Callable[[Setting], Rival | None] = lambda setting: None
    """Makes a rival's criterion for the training loop; None for the recipe's own objective."""


def merged(changes: Changes, more: Changes) -> Changes:
    """Both; what is in both is as in `more`."""
    return {**changes, **{part: {**changes.get(part, {}), **fields} for part, fields in more.items()}}


def _projectors(*widths: tuple[int, ...]) -> Callable[[Setting], list[Changes]]:
    return lambda setting: [{"projector": {"widths": each}} for each in widths]


def _rates(setting: Setting) -> list[Changes]:
    return [{"optim": {"lr": round(setting.recipe.optim.lr * by, 4)}} for by in (0.5, 2.0)]


def _weights(setting: Setting) -> list[Changes]:
    """Half and twice what the objective weighs its first part by, its temperature or its share."""
    recipe = setting.recipe
    if setting.weights:
        first, *rest = setting.weights
        return [{"rival": {"weights": (first * by, *rest)}} for by in (0.5, 2.0)]
    if recipe.loss.name == "kernel":
        return [{"loss": {"temperature": recipe.loss.temperature * by}} for by in (0.5, 2.0)]
    alpha = ALPHA_PER_DIM * recipe.projector.widths[-1] if recipe.loss.alpha is None else recipe.loss.alpha
    return [{"loss": {"alpha": round(alpha * by, 1)}} for by in (0.5, 2.0)]


def _decays(setting: Setting) -> list[Changes]:
    return [{"optim": {"weight_decay": decay}} for decay in (1e-4, 1e-3)]


def _batches(setting: Setting) -> list[Changes]:
    return [{"": {"batch": 256}, "optim": {"lr": round(setting.recipe.optim.lr * by, 4)}} for by in (1.0, 2.0)]


def _adam(setting: Setting) -> list[Changes]:
    return [{"optim": {"name": "adamw", "lr": lr, "start_lr": lr / 100, "weight_decay": 0.05}} for lr in (1e-3, 3e-3)]


def _muon(setting: Setting) -> list[Changes]:
    return [{"optim": {"name": "muon", "lr": lr, "start_lr": lr / 10, "weight_decay": 0.1}} for lr in (0.02, 0.06)]


def _three_views(setting: Setting) -> list[Changes]:
    return [{"": {"n_views": 3}}]


def _starts(setting: Setting) -> list[Changes]:
    return [{"backbone": {"zero_init_last": False}}]


def _method(name: str, *projectors: tuple[int, ...], shallow: tuple[tuple[int, ...], ...]) -> Method:
    first, *others = projectors
    start = replace(START, projector=Projector(widths=first, batch_norm=True))
    options = (_projectors(*others), _rates, _weights, _decays, _adam, _starts, _muon)
    return Method(
        name,
        Setting(start, AUTHORS.get(name, ())),
        (*options, _batches) if name in PAIRED else (*options, _three_views, _batches),
        (_projectors(*shallow),),
        (_rates, _weights),
        lambda setting: Rival(name, setting.weights) if name in AUTHORS else None,
    )


PAPER = replace(
    RECIPES["cifar10"].recipe,
    mean=START.mean,
    std=START.std,
    views=PAPER_VIEWS,
    backbone=START.backbone,
    optim=Optim(warmup_epochs=1),
    precision="float32",
)
"""The published settings on the network that all of these have; ten epochs of warm-up become a tenth at most."""

KERNEL = replace(
    START,
    loss=Loss(name="kernel"),
    projector=Projector(widths=(2048, 128), batch_norm=True),
    optim=replace(SGD, name="muon", lr=0.06, start_lr=0.006, weight_decay=0.1),
    batch=256,
)
"""Optimiser and batch as the search found them for the covariance, the rest as a few tries with another seed did."""

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("paper", Setting(PAPER)),
        Method("kernel", Setting(KERNEL), (_rates, _weights, _starts), (), (_rates, _weights)),
        _method("corinfomax", (512, 512, 64), (2048, 2048, 64), (512, 512, 128), shallow=((2048, 64), (2048, 32))),
        _method("vicreg", (2048, 2048, 2048), (512, 512, 512), (512, 512, 128), shallow=((2048, 512), (2048, 256))),
        _method(
            "barlow-twins", (2048, 2048, 2048), (512, 512, 512), (512, 512, 128), shallow=((2048, 128), (2048, 64))
        ),
        _method("simclr", (2048, 128), (512, 512, 64), (512, 512, 128), shallow=((2048, 64), (4096, 128))),
        _method("sigreg", (2048, 2048, 64), (512, 512, 64), (512, 512, 16), shallow=((2048, 64), (2048, 32))),
        Method(SUPERVISED, Setting(START), (_rates, _decays, _adam, _starts, _muon, _batches), (), (_rates,)),
    )
}

CHOSEN: dict[str, Changes] = {key: {} for key in METHODS} | {
    "kernel": {"optim": {"lr": 0.12}, "loss": {"temperature": 0.5}},
    "corinfomax": {
        "projector": {"widths": (2048, 64)},
        "optim": {"name": "muon", "lr": 0.06, "start_lr": 0.006, "weight_decay": 0.1},
        "": {"batch": 256},
    },
    "vicreg": {
        "projector": {"widths": (512, 512, 512)},
        "rival": {"weights": (12.5, 25.0, 1.0)},
        "optim": {"name": "muon", "lr": 0.02, "start_lr": 0.002, "weight_decay": 0.1},
        "": {"batch": 256},
    },
    "barlow-twins": {
        "projector": {"widths": (2048, 64)},
        "rival": {"weights": (0.0204,)},
        "optim": {"name": "muon", "lr": 0.02, "start_lr": 0.002, "weight_decay": 0.1},
    },
    "simclr": {
        "rival": {"weights": (0.125,)},
        "optim": {"name": "muon", "lr": 0.12, "start_lr": 0.006, "weight_decay": 0.1},
        "": {"batch": 256},
    },
    "sigreg": {
        "projector": {"widths": (512, 512, 64)},
        "optim": {"name": "muon", "lr": 0.02, "start_lr": 0.002, "weight_decay": 0.1},
        "": {"n_views": 3},
    },
    SUPERVISED: {
        "optim": {"name": "muon", "lr": 0.04, "start_lr": 0.002, "weight_decay": 0.1},
        "": {"batch": 256},
    },
}
"""What the search kept."""

ABLATED: Changes = {"optim": {"lr": 1.2}}
"""What the search had kept for CorInfoMax before Muon was offered: SGD, D = 64, batch 128, two views."""
ABLATIONS: tuple[Changes, ...] = (
    {"backbone": {"zero_init_last": False}},
    {"views": {"crop_area": (0.08, 1.0)}},
    {"views": {"crop_area": (0.4, 1.0)}},
    {"views": {"blur": 0.5}},
    {"projector": {"batch_norm": False}},
    {"projector": {"widths": (512, 512, 32)}},
    {"optim": {"decay_norms": True}},
    {"optim": {"name": "muon", "lr": 0.02}},
    {"optim": {"name": "muon", "lr": 0.06}},
    {"optim": {"name": "muon", "lr": 0.06, "weight_decay": 0.1}},
    {"optim": {"name": "muon", "lr": 0.06, "weight_decay": 0.1}, "": {"n_views": 3}},
    {"optim": {"name": "muon", "lr": 0.06, "weight_decay": 0.1}, "": {"batch": 256}},
    {"loss": {"cov_decay": 0.1, "mean_decay": 0.1}},
    {"loss": {"cov_decay": 0.5, "mean_decay": 0.5}},
    {"": {"n_views": 3}},
    {"": {"n_views": 4}},
    {"": {"batch": 64}, "optim": {"lr": 0.6}},
)
"""Changes of `ABLATED`, one each or, where it wants another rate or decay, with that. The search tried rate, alpha,
decay, AdamW and larger batch and D."""


def ablated(change: Changes) -> Changes:
    """The settings that ablations change, with this change."""
    return merged(ABLATED, change)
