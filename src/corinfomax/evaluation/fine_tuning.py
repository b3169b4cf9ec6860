"""Protocols that train on labelled, augmented images: the published linear probe and fine-tuning with few labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from corinfomax.evaluation import features as embed
from corinfomax.evaluation import probes
from corinfomax.images.cache import Images
from corinfomax.network import arithmetic
from corinfomax.recipes.fields import Recipe, View
from corinfomax.runtime.seeds import generator, key
from corinfomax.views import operations

SHARES = (0.01, 0.1)  # of the labels, that fine-tuning gets
HEAD_LR = {
    0.01: 0.4,
    0.1: 0.8,
}  # times the linear probe's: 10 and 20 in the published ImageNet-1K row, whose probe has 25
BACKBONE_LR = 0.005
EPOCHS, BATCH = 20, 256
FEWEST_STEPS = 400  # ImageNet-1K's 1 % gives 1,000; twenty epochs of forty images would be twenty


def linear_probe(
    model: nn.Module, train: Images, test: Images, recipe: Recipe, *, device: torch.device, progress: bool = True
) -> Int[Tensor, " m"]:
    """The classes that the published linear probe, `recipe.probe`, predicts after its last epoch.

    One linear layer on the frozen model's features of randomly cropped and flipped images, the model in eval mode;
    SGD with momentum 0.9 and no decay. Both splits have labels. Raises FloatingPointError when it diverges.
    """
    assert train.labels is not None
    probe = recipe.probe
    crop = View(crop_area=(0.08, 1.0), jitter=0.0, grey=0.0)
    batch = min(probe.batch, len(train))
    per_epoch = len(train) // batch
    model.eval()
    head: nn.Linear | None = None
    for step in _bar("linear probe", probe.epochs * per_epoch, progress):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = torch.randperm(len(train), generator=generator(recipe.seed, "probe order", epoch))
        indices = order[place * batch : (place + 1) * batch]
        x = _view(train, indices, crop, recipe, generator(recipe.seed, "probe view", step), device)
        with torch.no_grad(), arithmetic(recipe, device):
            features = model(x).float()
        if head is None:
            torch.manual_seed(key(recipe.seed, "probe weights"))
            head = nn.Linear(features.shape[1], len(train.classes)).to(device)
            optimizer = torch.optim.SGD(head.parameters(), lr=probe.lr, momentum=0.9)
        if probe.decay_epochs is None:
            lr = probe.min_lr + (probe.lr - probe.min_lr) * (1 + math.cos(math.pi * epoch / probe.epochs)) / 2
        else:
            lr = probe.lr * 0.1 ** (epoch // probe.decay_epochs)
        _set_rate(optimizer, lr)
        optimizer.zero_grad()
        F.cross_entropy(head(features), train.labels[indices].to(device, non_blocking=True)).backward()
        optimizer.step()
    assert head is not None
    if not all(bool(p.isfinite().all()) for p in head.parameters()):
        raise FloatingPointError(f"the linear probe diverged at learning rate {probe.lr:g}; a lower one is the cure")
    return head.cpu()(embed.features(model, test, recipe, device=device)).argmax(1)


def fine_tune(
    backbone: nn.Module,
    train: Images,
    test: Images,
    recipe: Recipe,
    *,
    share: float,
    device: torch.device,
    progress: bool = True,
) -> Int[Tensor, " m"]:
    """The classes predicted by a copy of the backbone trained whole on a `share` of each class's labels.

    The published semi-supervised protocol, 20 epochs of batches of 256 without decay, SGD with one optimiser for the
    new head and one for the backbone, their rates times 0.1 and 0.2 at each quarter. So that it works on any data:
    each class gives at least one image; images fewer than a batch are one, at the same rates, since it has no noise
    that smaller ones would have to average out; there are at least FEWEST_STEPS; the head's rate is HEAD_LR times that
    of the recipe's linear probe, the published 10 and 20 for ImageNet-1K and in keeping with other features' scale.
    Views are the recipe's own crop, flip and rotation, without colour. Raises FloatingPointError when it diverges.
    """
    assert train.labels is not None
    few = labelled_share(train.labels, share, recipe.seed)
    batch = min(BATCH, len(few))
    per_epoch = len(few) // batch
    epochs = max(EPOCHS, math.ceil(FEWEST_STEPS / per_epoch))
    head_lr = HEAD_LR[share] * recipe.probe.lr
    crop = replace(recipe.views[0], jitter=0.0, grey=0.0, blur=0.0, solarize=0.0)
    model = copy.deepcopy(backbone).train()
    torch.manual_seed(key(recipe.seed, "fine-tuning weights"))
    width = embed.features(model, test.select(torch.zeros(1, dtype=torch.long)), recipe, device=device).shape[1]
    head = nn.Linear(width, len(train.classes)).to(device)
    nn.init.zeros_(head.weight)  # so that the first gradient that reaches the backbone is not a random head's
    nn.init.zeros_(head.bias)
    optimizers = (
        torch.optim.SGD(head.parameters(), lr=head_lr, momentum=0.9),
        torch.optim.SGD(model.parameters(), lr=BACKBONE_LR, momentum=0.9),
    )
    for step in _bar(f"fine-tuning on {len(few)} labels", epochs * per_epoch, progress):
        epoch, place = divmod(step, per_epoch)
        quarter = 4 * epoch // epochs
        order = torch.randperm(len(few), generator=generator(recipe.seed, "fine-tuning order", epoch))
        indices = few[order[place * batch : (place + 1) * batch]]
        x = _view(train, indices, crop, recipe, generator(recipe.seed, "fine-tuning view", step), device)
        with arithmetic(recipe, device):
            logits = head(model(x)).float()
        _set_rate(optimizers[0], head_lr * 0.1**quarter)
        _set_rate(optimizers[1], BACKBONE_LR * 0.2**quarter)
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(logits, train.labels[indices].to(device, non_blocking=True)).backward()
        for optimizer in optimizers:
            optimizer.step()
    if not all(bool(p.isfinite().all()) for p in (*head.parameters(), *model.parameters())):
        raise FloatingPointError(f"fine-tuning diverged at learning rates {head_lr:g} and {BACKBONE_LR:g}")
    features = embed.features(model, test, recipe, device=device)
    with torch.no_grad():
        return head.cpu()(features).argmax(1)


def labelled_share(labels: Int[Tensor, " n"], share: float, seed: int) -> Int[Tensor, " k"]:
    """Rows with that share of each class, at least one, drawn by `seed`; a larger share contains a smaller one's."""
    _, codes = torch.unique(labels, return_inverse=True)
    most = (codes.bincount() * share).round().clamp_min(1)
    return (probes.rank_in_class(codes, generator(seed, "labelled share")) < most[codes]).nonzero()[:, 0]


def _view(
    images: Images, indices: Tensor, view: View, recipe: Recipe, rng: torch.Generator, device: torch.device
) -> Tensor:
    pixels, sizes = images.batch(indices)
    drawn = operations.draw(view, sizes, rng)
    pixels = pixels.to(device, non_blocking=True)
    return operations.apply(pixels, sizes, drawn, size=recipe.test_side, mean=recipe.mean, std=recipe.std)


def _set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _bar(what: str, steps: int, progress: bool) -> Iterable[int]:
    return tqdm(range(steps), desc=what, unit="step", leave=False, disable=None if progress else True)
