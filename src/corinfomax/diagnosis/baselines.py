"""LDMI of two views in trained features, beside raw pixels and the untrained network."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from corinfomax.diagnosis.measures import features_of_views
from corinfomax.images.cache import Images
from corinfomax.objective.covariance import ldmi
from corinfomax.recipes.fields import Recipe, View
from corinfomax.runtime.seeds import generator

SAMPLE, LEAST = 512, 128  # images; fewer than LEAST would measure the size of the sample
DIRECTIONS = 32
VIEW = View(crop_area=(0.25, 1.0))  # the same for every run, whatever its recipe
PIXELS = 2000  # numbers of an image as raw pixels, at most
AHEAD = 0.1  # nats per dimension; docs/length.md shows what this margin predicts


class Shared(NamedTuple):
    """LDMI of two views along the leading directions of each kind of features, nats per dimension."""

    features: float
    pixels: float
    untrained: float

    @property
    def ahead(self) -> bool:
        """True if the features share clearly more than what needs no training."""
        return self.features > max(self.pixels, self.untrained) + AHEAD

    @property
    def sentence(self) -> str:
        """The comparison in words."""
        shares = f"two views share {self.features:.2f} nats per dimension in the features"
        others = f"{self.pixels:.2f} in raw pixels and {self.untrained:.2f} in the untrained network"
        where = "Ahead of" if self.ahead else "Not clearly ahead of"
        return f"{where} what needs no training: {shares}, against {others}."


def shared_information(
    backbone: nn.Module, untrained: nn.Module, images: Images, recipe: Recipe, *, device: torch.device
) -> Shared:
    """Compare a backbone with the same network untrained and with raw pixels, on the same views of the same images."""
    order = torch.randperm(len(images), generator=generator(0, "baselines"))[:SAMPLE]
    sample, judged = images.select(order), replace(recipe, views=(VIEW, VIEW))
    side = max(1, min(math.isqrt(PIXELS // recipe.pixels.channels), recipe.size))
    pixels = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten())
    models = (backbone, pixels, untrained)
    return Shared(*(leading_ldmi(features_of_views(model, sample, judged, device=device)) for model in models))


def leading_ldmi(h: Float[Tensor, "n q f"]) -> float:
    """LDMI of the first and second, third and fourth … views, in the leading DIRECTIONS, rows of unit length."""
    h = h - h.mean((0, 1))
    flat = h.flatten(0, 1)
    leading = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -DIRECTIONS:]
    led = normalize(h @ leading, dim=-1)
    return float(ldmi(led[:, 0::2].flatten(0, 1), led[:, 1::2].flatten(0, 1)))
