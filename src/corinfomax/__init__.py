"""Self-supervised pretraining by maximising a log-determinant mutual information (CorInfoMax, arXiv 2209.07999)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corinfomax.api.encoder import Embedding, Encoder, load
    from corinfomax.api.run import Run, Scores, doctor, evaluate, pretrain
    from corinfomax.objective.covariance import CorInfoMaxLoss, Moments, corinfomax_loss, ldmi
    from corinfomax.objective.kernel import KernelLoss
    from corinfomax.recipes.published import RECIPES

__version__ = "0.1.0"
__all__ = [
    "RECIPES",
    "CorInfoMaxLoss",
    "Embedding",
    "Encoder",
    "KernelLoss",
    "Moments",
    "Run",
    "Scores",
    "corinfomax_loss",
    "doctor",
    "evaluate",
    "ldmi",
    "load",
    "pretrain",
]
_HOMES = {
    "recipes.published": ("RECIPES",),
    "objective.covariance": ("CorInfoMaxLoss", "Moments", "corinfomax_loss", "ldmi"),
    "objective.kernel": ("KernelLoss",),
    "api.encoder": ("Embedding", "Encoder", "load"),
    "api.run": ("Run", "Scores", "doctor", "evaluate", "pretrain"),
}


def __getattr__(name: str) -> Any:
    # Lazy, since torch takes seconds to import and `corinfomax --help` needs none of it.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"corinfomax.{home}"), name)
    raise AttributeError(f"module 'corinfomax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*globals(), *__all__))
