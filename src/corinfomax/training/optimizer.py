"""Optimisers and their learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from timm.optim.lars import Lars
from torch import Tensor, nn

from corinfomax.recipes.fields import Optim
from corinfomax.training.muon import Muon


def build(model: nn.Module, optim: Optim, arithmetic: torch.dtype | None = None) -> torch.optim.Optimizer:
    """The optimiser over the model's parameters; norms and biases (one-dimensional) in a group of their own.

    LARS (timm's) scales each matrix's step to its norm, and what does not decay not at all; Muon makes each matrix's
    step orthogonal, in `arithmetic` or else the parameters' own, vectors get AdamW.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for _, p in named if p.ndim > 1]
    vectors = [p for _, p in named if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": optim.weight_decay if optim.decay_norms else 0.0},
    ]
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.momentum, 0.999))
    if optim.name == "lars":
        return Lars(groups, lr=optim.lr, momentum=optim.momentum)
    if optim.name == "muon":
        return Muon(groups, lr=optim.lr, momentum=optim.momentum, arithmetic=arithmetic)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)


def learning_rate(optim: Optim, step: int, *, steps_per_epoch: int, epochs: float) -> float:
    """The learning rate of a step: linear warm-up from `start_lr` to `lr`, then a cosine to `min_lr`.

    With schedule "epoch", the paper's, it is constant within an epoch: epoch 0 has `start_lr`, the last warm-up epoch
    and the one after it have `lr`. With "step" both parts are smooth in the step.
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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Every group's learning rate becomes `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(parameters: Iterable[nn.Parameter], most: float | None) -> Float[Tensor, ""]:
    """The norm of all gradients as one vector; with `most` they are then scaled so that it is at most that.

    Stays on the device. Infinite where the sum of squares is, from about 1e19 in float32.
    """
    parameters = list(parameters)
    norm = nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
    if most is not None:
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


@torch.no_grad()
def follow(teacher: nn.Module, network: nn.Module, *, past: float, step: int) -> None:
    """The teacher's parameters move on to the network's; early steps, counted from 0, weigh less past."""
    past = min(past, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(teacher.parameters()), list(network.parameters()), 1 - past)
