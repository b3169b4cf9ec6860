"""Tell mirrored and turned images from the others: views mirror and turn only if that fails."""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from corinfomax.images.cache import Images
from corinfomax.recipes.fields import IMAGENET_STATS, RGB, Recipe, View
from corinfomax.runtime.seeds import generator
from corinfomax.views import operations

SAMPLE = 3000  # images
LEAST = 300  # images; fewer teach too little
HELD_OUT = 4  # one image in four is held out to judge by
SQUARE, SIDE = 36, 28  # pixels of an image, and of a crop at a random place in it
BATCH, RATE = 128, 3e-3
ROUNDS = (250, 500)  # steps; the second only if the first cannot tell how images were turned
LOOKS = 4  # crops of each held-out image
WHOLE = View(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0)

# Chance is 50 % and 25 %; docs/views.md has the figures of eight sets.
MIRROR_TOLD, TURN_TOLD = 60.0, 32.0
TURN = 45.0  # degrees each way, for images that lie at any angle; more helps some of them and costs others dearly


class Symmetry(NamedTuple):
    """Accuracy of a small network on held-out images, in percent."""

    mirrored: float  # mirrored or not: 50 by chance
    turned: float  # which of four quarter turns: 25 by chance
    judged: float  # number of held-out images

    @property
    def mirrors(self) -> bool:
        """True if mirrored images look like the others."""
        return self.mirrored < MIRROR_TOLD

    @property
    def turns(self) -> bool:
        """True if turned images look like the others, by a standard error: few images must agree better."""
        return self.turned + 100 * (0.25 * 0.75 / self.judged) ** 0.5 < TURN_TOLD

    @property
    def mirror_seen(self) -> str:
        """The finding on mirrored images, in words."""
        return f"left and right differ (a small network tells mirrored images with {self.mirrored:.0f} % accuracy)"

    @property
    def turn_seen(self) -> str:
        """The finding on turned images, in words."""
        return f"images lie at any angle (a small network guesses {self.turned:.0f} % of quarter turns; chance is 25)"


def adjustable(recipe: Recipe) -> frozenset[str]:
    """The parts of a recipe's views that the symmetry of images may change: "flip" and "rotate"."""
    flip = {"flip"} if any(view.flip for view in recipe.views) else set()
    rotate = set() if recipe.from_files or any(view.rotate for view in recipe.views) else {"rotate"}
    return frozenset(flip | rotate)


def symmetry(images: Images, recipe: Recipe) -> Symmetry | None:
    """Train the network for some seconds on crops that are mirrored and turned at random, and judge it.

    None for fewer than LEAST images.
    """
    if len(images) < LEAST:
        return None
    order = torch.randperm(len(images), generator=generator(0, "symmetry"))[:SAMPLE]
    x = _squares(images.select(order), recipe)
    judged, learned = x[: len(x) // HELD_OUT], x[len(x) // HELD_OUT :]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed GPUs too
        network = _network(recipe.pixels.channels)
        for number, steps in enumerate(ROUNDS):
            _train(network, learned, number=number, steps=steps)
            found = _judge(network, judged)
            if not found.turns:
                break
    return found


def of_thumbnails(thumbnails: UInt8[Tensor, "n 3 s s"], recipe: Recipe) -> Symmetry | None:
    """The same for small RGB images."""
    n, _, side, _ = thumbnails.shape
    offsets, sizes = torch.arange(n) * 3 * side * side, torch.full((n, 2), side)
    images = Images(thumbnails.flatten(), offsets, sizes, ("",) * n, None, (), (), fingerprint="thumbnails")
    return symmetry(images, replace(recipe, pixels=RGB, mean=IMAGENET_STATS[0], std=IMAGENET_STATS[1]))


def _squares(images: Images, recipe: Recipe) -> Float[Tensor, "n c s s"]:
    """The middle of each image, small, read once."""
    squares = []
    for index in torch.arange(len(images)).split(64):
        pixels, sizes = images.batch(index)
        parameters = operations.draw(WHOLE, sizes, generator(0, "symmetry squares"), recipe.pixels)
        squares.append(operations.apply(pixels.cpu(), sizes, parameters, size=SQUARE, scaling=recipe.scaling))
    return torch.cat(squares)


def _network(channels: int) -> nn.Module:
    """Eight logits: four quarter turns, then the same of mirrored images."""
    widths, layers = (16, 32, 64), []
    for row, width in enumerate(widths):
        before = channels if row == 0 else widths[row - 1]
        kernel, stride = (5, 2) if row == 0 else (3, 1)
        layers += [nn.Conv2d(before, width, kernel, stride, kernel // 2), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if row == 1 else []
    head = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * widths[-1], 8))
    return nn.Sequential(*layers, *head)


def _train(network: nn.Module, x: Float[Tensor, "n c s s"], *, number: int, steps: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    rng = generator(0, "symmetry", number)
    network.train()
    for _ in range(steps):
        images = x[torch.randint(len(x), (BATCH,), generator=rng)]
        action = torch.randint(8, (BATCH,), generator=rng)
        loss = F.cross_entropy(network(_acted(_crops(images, rng), action)), action)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _judge(network: nn.Module, x: Float[Tensor, "n c s s"]) -> Symmetry:
    network.eval()
    right: list[Tensor] = []
    for look in range(LOOKS):
        rng = generator(0, "symmetry judged", look)
        action = torch.randint(8, (len(x),), generator=rng)
        chances = network(_acted(_crops(x, rng), action)).softmax(1).view(-1, 2, 4)  # mirrored, quarter turns
        told = (chances.sum(2).argmax(1) == action // 4, chances.sum(1).argmax(1) == action % 4)
        right.append(torch.stack(told))
    mirrored, turned = (100 * torch.cat(right, 1).double().mean(1)).tolist()
    return Symmetry(mirrored, turned, len(x))


def _crops(x: Float[Tensor, "n c s s"], rng: torch.Generator) -> Float[Tensor, "n c r r"]:
    """A crop at a random place of each image, so that what is told holds anywhere in it."""
    windows = x.unfold(2, SIDE, 1).unfold(3, SIDE, 1)
    top, left = torch.randint(SQUARE - SIDE + 1, (2, len(x)), generator=rng)
    return windows[torch.arange(len(x)), :, top, left]


def _acted(x: Float[Tensor, "n c s s"], action: Int64[Tensor, " n"]) -> Float[Tensor, "n c s s"]:
    """Each image turned by `action` % 4 quarters, then also mirrored if `action` is 4 or more."""
    out = torch.empty_like(x)
    for number in range(8):
        chosen = action == number
        turned = x[chosen].rot90(number % 4, (2, 3))
        out[chosen] = turned.flip(3) if number >= 4 else turned
    return out
