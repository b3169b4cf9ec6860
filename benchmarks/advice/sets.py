"""Eight sets of images on which other views are right: four real ones, and four made of them or drawn.

Each has 3,000 training images at most, and labels that only scores use.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from corinfomax.images import cache
from corinfomax.images.cache import Images, Splits
from corinfomax.images.in_memory import from_memory
from corinfomax.images.sources import Data

COUNT = 3000  # training images
TEST = 1000
CLOTHES = 0.25  # share of the training images to score on: the test split has 372
CLASSES = 20  # of Tiny ImageNet
FRAME = 48  # px, of images whose object lies anywhere
OBJECT = 20
PHOTOGRAPHS, PATCH = 40, 32  # of which textures are cut


def load(name: str, root: Path) -> Splits:
    """The images of a set; `root` is the folder of the real ones."""
    return SETS[name](root)


def _real(name: str, side: int, root: Path, holdout: float | None = None) -> Splits:
    """A real set, a fixed slice of its training and of its test images."""
    loaded = cache.load(Data(name if name == "mnist5k" else root / name, holdout=holdout), side=side)
    assert loaded.test is not None
    return Splits(_slice(loaded.train, COUNT), _slice(loaded.test, TEST))


def _slice(images: Images, count: int) -> Images:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images.select(order[:count])


def _tiny_imagenet(root: Path) -> Splits:
    """Images of some classes of Tiny ImageNet."""
    loaded = cache.load(Data(root / "tiny-imagenet-64-100c"), side=48)
    assert loaded.test is not None
    parts = []
    for images, count in ((loaded.train, COUNT), (loaded.test, TEST)):
        assert images.labels is not None
        parts.append(_slice(images.select((images.labels < CLASSES).nonzero()[:, 0]), count))
    return Splits(*parts)


def _arrays(images: Images) -> list[np.ndarray]:
    return [array.transpose(1, 2, 0) for array in images.cached(torch.arange(len(images)))]


def _changed(splits: Splits, change: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Splits:
    """The images, each changed with random numbers of its own."""
    parts = []
    for seed, images in enumerate(splits):
        assert images is not None and images.labels is not None
        rng = np.random.default_rng(seed)
        parts.append(_made([change(array, rng) for array in _arrays(images)], images.labels.tolist()))
    return Splits(*parts)


def _made(arrays: list[np.ndarray], labels: list[int]) -> Images:
    names = [f"{label:03d}" for label in labels]
    loaded = cache.load(Data(from_memory(arrays, names), holdout=0.0), side=max(arrays[0].shape[:2]))
    return loaded.train


def _turned(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image at any angle, with its corner's colour around it."""
    corner = tuple(int(level) for level in array[0, 0])
    turned = Image.fromarray(array).rotate(float(rng.uniform(0, 360)), Image.Resampling.BICUBIC, fillcolor=corner)
    return np.asarray(turned)


def _anywhere(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A small image at any place of a frame of coarse noise."""
    noise = Image.fromarray(rng.integers(60, 200, (6, 6, 3), dtype=np.uint8))
    frame = np.array(noise.resize((FRAME, FRAME), Image.Resampling.BICUBIC))
    small = np.asarray(Image.fromarray(array).resize((OBJECT, OBJECT), Image.Resampling.BICUBIC))
    top, left = rng.integers(0, FRAME - OBJECT + 1, 2)
    frame[top : top + OBJECT, left : left + OBJECT] = small
    return frame


def _textures(root: Path) -> Splits:
    """Patches at any place and angle of photographs; a photograph is a class."""
    photographs = _arrays(_real("clothing-128", 128, root).train)[:PHOTOGRAPHS]
    parts = []
    for seed, count in enumerate((COUNT, TEST)):
        rng, patches, labels = np.random.default_rng(seed), [], []
        for row in range(count):
            label = row % PHOTOGRAPHS
            photograph = photographs[label]
            top, left = (rng.integers(0, length - PATCH + 1) for length in photograph.shape[:2])
            patch = photograph[top : top + PATCH, left : left + PATCH]
            patches.append(np.ascontiguousarray(np.rot90(patch, rng.integers(4))))
            labels.append(label)
        parts.append(_made(patches, labels))
    return Splits(*parts)


def _cells() -> Splits:
    """Drawn cells under uneven light: their size, number and roundness are the class."""
    parts = []
    for seed, count in enumerate((COUNT, TEST)):
        rng, drawn, labels = np.random.default_rng(seed), [], []
        for row in range(count):
            label = row % 12
            radius, number, round_ = (2.0, 3.2, 4.6)[label % 3], (5, 11)[label // 3 % 2], label < 6
            drawn.append(_field(radius, number, round_, rng))
            labels.append(label)
        parts.append(_made(drawn, labels))
    return Splits(*parts)


def _field(radius: float, number: int, round_: bool, rng: np.random.Generator) -> np.ndarray:
    side = 40
    y, x = np.mgrid[:side, :side].astype(np.float32)
    light = np.zeros((side, side), np.float32)
    for _ in range(rng.poisson(number) + 1):
        angle, (cy, cx) = rng.uniform(0, np.pi), rng.uniform(0, side, 2)
        stretch = 1.0 if round_ else 1.7
        along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        across = -(x - cx) * np.sin(angle) + (y - cy) * np.cos(angle)
        size = radius * rng.uniform(0.85, 1.15)
        distance = np.hypot(along / (size * stretch), across * stretch / size)
        light = np.maximum(light, rng.uniform(0.5, 1.0) / (1 + np.exp(6 * (distance - 1))))
    slope = rng.uniform(-0.2, 0.2, 2) @ (np.stack((y.ravel(), x.ravel())) / side - 0.5)
    light = (0.15 + 0.75 * light) * rng.uniform(0.6, 1.1) + slope.reshape(side, side)
    return np.clip(255 * light + rng.normal(0, 6, light.shape), 0, 255).astype(np.uint8)


SETS: dict[str, Callable[[Path], Splits]] = {
    "cifar10": lambda root: _real("cifar10", 32, root),
    "clothing": lambda root: _real("clothing-128", 48, root, CLOTHES),
    "tiny-imagenet": _tiny_imagenet,
    "mnist5k": lambda root: _real("mnist5k", 28, root),
    "turned digits": lambda root: _changed(_real("mnist5k", 28, root), _turned),
    "clothes anywhere": lambda root: _changed(_real("clothing-128", 48, root, CLOTHES), _anywhere),
    "textures": _textures,
    "cells": lambda root: _cells(),
}
