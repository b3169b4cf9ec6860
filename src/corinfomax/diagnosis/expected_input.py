"""The mean and standard deviation that weights expect of their input, read off their first BatchNorm.

Its running statistics come from images normalised as in training. Photographs normalised the same way reproduce them;
another common normalisation does not. Networks without BatchNorm give no hint.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from corinfomax.images.cache import Images
from corinfomax.network import evaluating, match_dtype
from corinfomax.recipes import fields
from corinfomax.recipes.fields import IMAGENET_STATS, Recipe
from corinfomax.views import operations

USUAL = (
    IMAGENET_STATS,
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # Inception, EfficientNet of TensorFlow, most ViTs
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # values from 0 to 1
    ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),  # from 0 to 255
)
# Nats between the channels' Gaussians, the median over channels. EfficientNet-Lite0 on photographs: 0.02 or less as it
# was trained, 0.29 and more otherwise; on digits 0.6 as trained and 0.3 otherwise, so that neither fits. CLIP's values
# are left out: photographs of a third more contrast would look like them under ImageNet's.
FITS, FAR = 0.05, 0.1
CERTAIN = 0.5  # far enough for a verdict: photographs with half of their contrast reach 0.4
IMAGES = 64  # as in the figures above; more would take memory


class _Reached(Exception):  # noqa: N818 (not an error)
    """The input of the first BatchNorm."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def better_input(
    backbone: nn.Module, images: Images, recipe: Recipe, *, device: torch.device, far: float = FAR
) -> str | None:
    """Flags of a usual normalisation that fits the weights, if the recipe's is `far` from them; None without one."""
    norm = next((module for module in backbone.modules() if isinstance(module, _BatchNorm)), None)
    if norm is None or norm.running_mean is None or not recipe.pixels.is_rgb:
        return None
    sample = images.select(torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:IMAGES])
    current = shift(backbone, norm, sample, recipe, device=device)
    if current < far:
        return None
    candidates = [replace(recipe, mean=mean, std=std) for mean, std in USUAL]
    shifts = [shift(backbone, norm, sample, candidate, device=device) for candidate in candidates]
    best = min(range(len(candidates)), key=shifts.__getitem__)
    return " ".join(fields.difference(candidates[best], recipe)) if shifts[best] < FITS else None


@torch.inference_mode()
def shift(backbone: nn.Module, norm: _BatchNorm, images: Images, recipe: Recipe, *, device: torch.device) -> float:
    """Kullback-Leibler divergence in nats of `norm`'s input from its running statistics, the median over channels."""
    x = operations.test_view(*images.batch(torch.arange(len(images))), recipe, device)

    # the network runs up to the layer, and no further
    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _Reached(inputs[0])

    handle = norm.register_forward_pre_hook(stop)
    try:
        with evaluating(backbone):
            backbone(match_dtype(x, backbone))
        return 0.0  # never reached: the layer is not used
    except _Reached as reached:
        z = reached.x.float().transpose(0, 1).flatten(1)
    finally:
        handle.remove()

    mean, variance = z.mean(1), z.var(1) + norm.eps
    assert norm.running_mean is not None and norm.running_var is not None
    usual = norm.running_var + norm.eps
    nats = ((variance + (mean - norm.running_mean).square()) / usual - 1 - (variance / usual).log()) / 2
    return float(nats.median())
