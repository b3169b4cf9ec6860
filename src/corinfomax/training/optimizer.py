"""Optimisers, and their learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corinfomax.recipes.fields import Optim
from corinfomax.training.muon import Muon


def build(model: nn.Module, optim: Optim, arithmetic: torch.dtype | None = None) -> torch.optim.Optimizer:
    """The optimiser of a model's trainable parameters: matrices in one group, norms and biases in another.

    Muon orthogonalises the step of each matrix, in `arithmetic` or the parameter's own dtype; vectors get AdamW.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim.weight_decay},
        {
            "params": [p for p in parameters if p.ndim <= 1],
            "weight_decay": optim.weight_decay if optim.decay_norms else 0.0,
        },
    ]
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.momentum, 0.999))
    if optim.name == "muon":
        return Muon(groups, lr=optim.lr, momentum=optim.momentum, arithmetic=arithmetic)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)


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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(parameters: Iterable[nn.Parameter], most: float | None) -> Float[Tensor, ""]:
    """The norm of all gradients together, on the device; gradients above norm `most` are scaled down to it.

    Infinite when the sum of squares overflows, from a norm of about 1e19 in float32.
    """
    parameters = list(parameters)
    norm = nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
    if most is not None:
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm
