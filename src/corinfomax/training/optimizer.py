"""Optimisers, and their learning rate as a pure function of the step."""

import math
from collections.abc import Iterable, Mapping
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corinfomax import network
from corinfomax.recipes.fields import Optim, Recipe, Tuning
from corinfomax.training.muon import Muon


def build(
    model: nn.Module, optim: Optim, arithmetic: torch.dtype | None = None, *, tuning: Tuning | None = None
) -> torch.optim.Optimizer:
    """The optimiser of a model's trainable parameters: matrices in one group, norms and biases in another.

    With a `tuning`, `model` is a Network: its projector's groups come first, then those of each learning rate in the
    backbone. Muon orthogonalises the step of each matrix, in `arithmetic` or the parameter's own dtype; vectors get
    AdamW.
    """
    scales = {} if tuning in (None, Tuning()) else _lr_scales(model, tuning)
    by_group: dict[tuple[float | None, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_group.setdefault((scales.get(name), parameter.ndim <= 1), []).append(parameter)

    groups = []
    ordered = sorted(by_group.items(), key=lambda item: (item[0][0] or inf, not item[0][1]), reverse=True)
    for (scale, vectors), parameters in ordered:
        decay = optim.weight_decay if optim.decay_norms or not vectors else 0.0
        groups.append({"params": parameters, "weight_decay": decay, "lr_scale": scale})
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.momentum, 0.999))
    if optim.name == "muon":
        return Muon(groups, lr=optim.lr, momentum=optim.momentum, arithmetic=arithmetic)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)


def _lr_scales(model: nn.Module, tuning: Tuning) -> dict[str, float]:
    """Learning rate of each of the backbone's parameters ÷ the projector's, by name."""
    backbone = model.get_submodule("backbone")
    if tuning.layer_decay == 1:
        return {f"backbone.{name}": tuning.lr_scale for name, _ in backbone.named_parameters()}
    return {
        f"backbone.{name}": tuning.lr_scale * tuning.layer_decay**depth
        for depth, names in enumerate(reversed(network.blocks_of(backbone)))
        for name in names
    }


def learning_rate(optim: Optim, step: int, *, steps_per_epoch: int, epochs: float) -> float:
    """The learning rate of a step: linear warm-up from `start_lr` to `lr`, then a cosine down to `min_lr`.

    Schedule "epoch", the paper's, is constant within an epoch: epoch 0 has `start_lr`; the last warm-up epoch and the
    one after it have `lr`. Schedule "step" changes at every step.
    """
    if optim.schedule == "epoch":
        now, warmup, end, rise = step // steps_per_epoch, optim.warmup_epochs, epochs, optim.warmup_epochs - 1
    else:
        warmup = rise = optim.warmup_epochs * steps_per_epoch
        now, end = step, epochs * steps_per_epoch
    if now < warmup:
        return optim.start_lr + (optim.lr - optim.start_lr) * min(1.0, now / max(rise, 1))
    fall = (now - warmup) / max(end - warmup, 1)
    return optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * fall)) / 2


def backbone_share(recipe: Recipe, step: int, *, steps_per_epoch: int) -> float:
    """Share of its learning rate that the backbone has in a step.

    It is 0 while the projector is trained alone, then rises to 1 within the length of the warm-up.
    """
    steps = round(recipe.epochs * steps_per_epoch)
    alone = min(round(recipe.tuning.projector_share * steps), steps - 1)
    if step < alone:
        return 0.0
    rise = recipe.optim.warmup_epochs * steps_per_epoch
    return 1.0 if alone == 0 else min(1.0, (step - alone + 1) / max(rise, 1))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, backbone_share: float = 1.0) -> None:
    """Set the learning rate of every group; groups of a backbone that is tuned have a part of it."""
    for group in optimizer.param_groups:
        scale = group.get("lr_scale")
        group["lr"] = lr if scale is None else lr * scale * backbone_share


@torch.no_grad()
def pull(optimizer: torch.optim.Optimizer, start: Mapping[nn.Parameter, Tensor], strength: float) -> None:
    """Move weights by lr · strength of the way to their start: L2-SP (arXiv 1802.01483), decoupled as in AdamW."""
    for group in optimizer.param_groups:
        if pulled := [parameter for parameter in group["params"] if parameter in start]:
            share = min(1.0, group["lr"] * strength)
            torch._foreach_lerp_(pulled, [start[parameter] for parameter in pulled], share)


def clip(parameters: Iterable[nn.Parameter], most: float | None) -> Float[Tensor, ""]:
    """The norm of all gradients together, on the device; gradients above norm `most` are scaled down to it.

    Infinite when the sum of squares overflows, from a norm of about 1e19 in float32.
    """
    parameters = list(parameters)
    norm = nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
    if most is not None:
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm
