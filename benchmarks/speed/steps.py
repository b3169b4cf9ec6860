"""Whole training steps: ours, a plain baseline, lightly's own VICReg and Barlow Twins; one network and batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.speed.augmentation import pictures, pil_transform
from benchmarks.speed.clock import Effort, now, of_workers
from benchmarks.speed.loss import Plain
from benchmarks.speed.machine import installed
from benchmarks.speed.metrics import Metric, metric
from benchmarks.speed.views import make_views
from corinfomax import network as networks
from corinfomax.images.cache import Images
from corinfomax.recipes.fields import Backbone, Projector, Recipe
from corinfomax.recipes.published import RECIPES
from corinfomax.training import batches
from corinfomax.training.step import build, update

CPU = torch.device("cpu")
WORKERS = 2
STEPS = 1  # a round of each; one of ResNet-18 at batch 256 is seconds
AGAINST = {
    "plain": "float32, PIL views in 2 workers, float64 autograd",
    "vicreg": "lightly's VICReg",
    "barlow": "lightly's Barlow Twins",
}


def run(effort: Effort) -> Iterator[Metric]:
    """ResNet-18 with the CIFAR stem, batch 256, 32 px; costs are of the process and its workers together."""
    recipe = whole(effort)
    contestants = {
        "ours": ours(recipe, effort),
        "plain": loaded(recipe, *plain(recipe), effort),
    }
    if installed("lightly"):
        contestants["vicreg"] = loaded(recipe, *lightly_vicreg(recipe), effort)
        contestants["barlow"] = loaded(recipe, *lightly_barlow(recipe), effort)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(min(effort.rounds, 3)):  # the first is warm-up too: of three the median leaves the slowest out
        for name, call in contestants.items():
            seconds[name].append(call(STEPS))
    each = {name: [1e3 * s / recipe.batch for s in samples] for name, samples in seconds.items()}
    for name in list(contestants)[1:]:
        yield metric(
            "step",
            f"training step, {recipe.backbone.name} with 3×3 stem, batch {recipe.batch}, {recipe.size} px",
            AGAINST[name],
            each["ours"],
            each[name],
            unit=f"{effort.clock}-ms/image",
            at_least=3.5,
            aim=5.0,
        )


def whole(effort: Effort) -> Recipe:
    """The published CIFAR-10 recipe at batch 256, with learning rate 0: the work is the same and nothing runs away."""
    recipe = replace(RECIPES["cifar10"].recipe, batch=256)
    if effort.quick:
        small = Backbone(small_stem=True, layers=(1, 1, 1, 1), channels=(8, 8, 8, 16))
        recipe = replace(recipe, batch=8, size=16, cache_side=16, backbone=small, projector=Projector(widths=(32, 8)))
    recipe = replace(recipe, optim=replace(recipe.optim, lr=0.0, start_lr=0.0, min_lr=0.0))
    return replace(recipe, precision=networks.choose_precision(recipe, CPU))


def as_images(pixels: Tensor) -> Images:
    """A batch of equal images as a data set in memory."""
    count, _, height, width = pixels.shape
    return Images(
        pixels=pixels.reshape(-1),
        offsets=torch.arange(count) * (3 * height * width),
        sizes=torch.tensor([height, width]).expand(count, 2).contiguous(),
        paths=("",) * count,
        labels=None,
        classes=(),
        skipped=(),
        fingerprint="",
    )


def body(recipe: Recipe, images: Images) -> Callable[[], object]:
    """One call is one step of the loop of training: indices, images, views, update."""
    learner = build(recipe, CPU)
    steps = iter(range(10**9))

    def call() -> None:
        step = next(steps)
        pixels, sizes = images.batch(batches.indices(recipe, step, len(images)))
        update(recipe, learner, make_views(recipe, pixels, sizes, step, CPU), step, CPU)

    return call


def ours(recipe: Recipe, effort: Effort) -> Callable[[int], float]:
    """Seconds a step of this package."""
    step = body(recipe, as_images(pictures(4 * recipe.batch, recipe.cache_side)))

    def call(count: int) -> float:
        began = now(effort.clock)
        for _ in range(count):
            step()
        return (now(effort.clock) - began) / count

    return call


class Pairs(Dataset[Any]):
    """Two views of each PIL image; `transform` gives both."""

    def __init__(self, images: list[Image.Image], transform: Callable[[Image.Image], Any]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.images[index])


def loaded(
    recipe: Recipe,
    transform: Callable[[Image.Image], Any],
    update: Callable[[Tensor, Tensor], object],
    effort: Effort,
) -> Callable[[int], float]:
    """Seconds a step of a rival whose views come from a DataLoader with workers.

    On the processor's clock all that the workers compute counts and idle cores do not; on the wall's clock the first
    step is left out, since it waits for the workers to start.
    """
    images = [
        Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pictures(4 * recipe.batch, recipe.cache_side)
    ]
    data = Pairs(images, transform)

    def call(count: int) -> float:
        extra = int(effort.clock == "wall")
        order = torch.arange((count + extra) * recipe.batch) % len(images)
        batches: Any = iter(DataLoader(data, recipe.batch, sampler=order.tolist(), num_workers=WORKERS))
        for _ in range(extra):
            update(*next(batches))
        began = now(effort.clock)
        for _ in range(count):
            update(*next(batches))
        seconds = now(effort.clock) - began
        if effort.clock == "cpu":
            seconds += of_workers(worker.pid for worker in batches._workers)
        return seconds / count

    return call


def plain(recipe: Recipe) -> tuple[Callable[[Image.Image], Any], Callable[[Tensor, Tensor], object]]:
    """What one writes first: torchvision on PIL, float32, the loss left to autograd."""
    both = [pil_transform(view, recipe.size, pillow_blur=True) for view in recipe.views]
    network = networks.network_for(recipe)
    criterion = Plain(recipe.projector.widths[-1], alpha=recipe.loss.alpha)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)

    def update(x1: Tensor, x2: Tensor) -> None:
        optimizer.zero_grad()
        criterion(network(x1), network(x2)).backward()
        optimizer.step()

    return lambda image: [transform(image) for transform in both], update


def lightly_vicreg(recipe: Recipe) -> tuple[Callable[[Image.Image], Any], Callable[[Tensor, Tensor], object]]:
    """lightly's example of VICReg with this backbone."""
    from lightly.loss import VICRegLoss
    from lightly.models.modules.heads import VICRegProjectionHead
    from lightly.transforms.vicreg_transform import VICRegTransform

    return VICRegTransform(input_size=recipe.size), _rival(recipe, VICRegProjectionHead, VICRegLoss())


def lightly_barlow(recipe: Recipe) -> tuple[Callable[[Image.Image], Any], Callable[[Tensor, Tensor], object]]:
    """lightly's example of Barlow Twins with this backbone."""
    from lightly.loss import BarlowTwinsLoss
    from lightly.models.modules.heads import BarlowTwinsProjectionHead
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform

    transform = BYOLTransform(BYOLView1Transform(input_size=recipe.size), BYOLView2Transform(input_size=recipe.size))
    return transform, _rival(recipe, BarlowTwinsProjectionHead, BarlowTwinsLoss())


def _rival(recipe: Recipe, head: Callable[..., nn.Module], criterion: nn.Module) -> Callable[[Tensor, Tensor], object]:
    backbone = networks.backbone_for(recipe)
    width = 2048 if recipe.batch >= 256 else 32
    network = nn.Sequential(backbone, head(networks.feature_width(backbone), width, width))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)

    def update(x1: Tensor, x2: Tensor) -> None:
        optimizer.zero_grad()
        criterion(network(x1), network(x2)).backward()
        optimizer.step()

    return update
