"""Decoded images: one uint8 cache on disk read through a memory map, and batches of any of its images."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, NamedTuple
from uuid import uuid4

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from corinfomax.images.decode import FORMATS, check_skipped, cores, decode, each, upright_size
from corinfomax.images.files import DataError, Source, default_cache
from corinfomax.images.sources import find
from corinfomax.runtime.seeds import generator

FORMAT = 2  # raise it with every change to the bytes that decoding gives or to their layout
DEFAULT_HOLDOUT = 0.1
GLANCE = 32  # short side at which a file without a copy is looked at
ABANDONED = 24 * 3600.0  # seconds without a byte written, after which a half-built cache has no living builder


class Opened(NamedTuple):
    """What is in a cache."""

    table: np.ndarray
    """Row in the source, height and width of each image."""
    pixels: Tensor
    skipped: list[tuple[int, str]]
    """Row and reason."""
    digest: str
    """Of the pixels."""


class Files(NamedTuple):
    """The files that images are read from where there are no copies of them."""

    source: Source
    rows: Int[Tensor, " n"]
    """Of each image, in the source."""
    side: int
    """The short side of what a batch gives; crops are cut at full resolution."""


@dataclass(frozen=True, eq=False)
class Images:
    """The n images of one split, RGB, uint8: decoded copies, or the files themselves."""

    pixels: UInt8[Tensor, " bytes"]
    """Images one after another, each 3×height×width; a memory map of the cache, only to be read. Empty without one."""
    offsets: Int[Tensor, " n"]
    """Where each image starts in `pixels`."""
    sizes: Int[Tensor, "n 2"]
    """Height and width of each copy, or of each file's image."""
    paths: tuple[str, ...]
    """Of each image from the root of its data, with forward slashes; of an array set, name/row."""
    labels: Int[Tensor, " n"] | None
    """Place of each image's class in `classes`."""
    classes: tuple[str, ...]
    """Names of the classes of the training images, sorted; () without labels."""
    skipped: tuple[tuple[str, str], ...]
    """Path and reason of each image of the split that could not be read."""
    fingerprint: str
    """Changes when an image's path or decoded pixels do, or the selection; not when files are copied or touched."""
    files: Files | None = None
    """Where they are read from, without copies."""

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, indices: Int[Tensor, " m"]) -> Images:
        """The images at `indices`, in that order; they share `pixels`, and `skipped` stays that of the whole split."""
        return replace(
            self,
            offsets=self.offsets[indices],
            sizes=self.sizes[indices],
            paths=tuple(self.paths[index] for index in indices.tolist()),
            labels=None if self.labels is None else self.labels[indices],
            files=self.files and self.files._replace(rows=self.files.rows[indices]),
            fingerprint=_digest(self.fingerprint.encode(), indices.to("cpu", torch.int64).numpy().tobytes()),
        )

    @property
    def equal(self) -> bool:
        """Whether all are of one size, and a batch of them is one lookup."""
        return self._grid is not None

    @cached_property
    def _grid(self) -> tuple[UInt8[Tensor, "rows 3 h w"], Int[Tensor, " n"]] | None:
        """`pixels` as equal images, and each image's row among them; None when sizes differ."""
        if not len(self) or self.files is not None or (self.sizes != self.sizes[0]).any():
            return None
        height, width = self.sizes[0].tolist()
        stride = 3 * height * width
        if (self.offsets % stride).any():  # equal images chosen from a cache of unequal ones
            return None
        rows = len(self.pixels) // stride
        return self.pixels[: rows * stride].view(rows, 3, height, width), self.offsets // stride

    def copies(self, indices: Int[Tensor, " b"]) -> list[UInt8[np.ndarray, "3 _ _"] | UInt8[Tensor, "3 _ _"]]:
        """The copies at `indices` as they lie in `pixels`; NumPy's of those on the CPU."""
        # There torch would start its threads for each of them, ruinous where the cores are busy.
        pixels = self.pixels.numpy() if self.pixels.device.type == "cpu" else self.pixels
        sizes = self.sizes[indices].tolist()
        return [
            pixels[offset : offset + 3 * h * w].reshape(3, h, w)
            for offset, (h, w) in zip(self.offsets[indices].tolist(), sizes, strict=True)
        ]

    def batch(self, indices: Int[Tensor, " b"]) -> tuple[UInt8[Tensor, "b 3 h w"], Int[Tensor, "b 2"]]:
        """Copies of the images at `indices`, on the device of `pixels`, and the height and width of each, on the CPU.

        Images of unequal sizes lie at the top left of the largest height and width among them, zeros elsewhere. Without
        copies each is read from its file, its short side reduced to `files.side`; DataError where one cannot be.
        """
        if self.files is not None:
            return _read(self.files, indices)
        sizes = self.sizes[indices]
        if self._grid is not None:
            grid, rows = self._grid
            if grid.device.type == "cpu":  # NumPy, as in `copies`
                return torch.from_numpy(grid.numpy().take(rows[indices].numpy(), 0)), sizes
            return grid.index_select(0, rows[indices].to(grid.device, non_blocking=True)), sizes
        height, width = sizes.amax(0).tolist() if len(sizes) else (0, 0)
        out = self.pixels.new_zeros(len(sizes), 3, height, width)
        slots = out.numpy() if out.device.type == "cpu" else out
        for slot, copy in zip(slots, self.copies(indices), strict=True):
            slot[:, : copy.shape[1], : copy.shape[2]] = copy
        return out, sizes


class Splits(NamedTuple):
    train: Images
    test: Images | None


def load(
    data: str | Path,
    *,
    side: int,
    holdout: float | None = None,
    seed: int = 0,
    root: Path | None = None,
    download: bool = False,
    cache: Path | None = None,
    test_split: str | None = None,
    skip: Collection[str] = (),
    copies: bool = True,
    progress: bool = True,
) -> Splits:
    """Images to train on and, where there are any, to test on; decoded on first use, mapped from the cache after that.

    `data`, `root`, `download` and `skip` are those of `sources.find`. The short side of larger images is reduced to
    `side` pixels; smaller images are kept.
    The test images are, in this order: a `holdout` share of the training images, drawn from `seed`, and then no other
    split is opened; `test_split`; the split test, or else val, unless it lacks the labels that train has; a tenth of
    the training images if they have labels and `holdout` is not 0; none.
    Without `copies` the cache has sizes and a checksum alone, from one look at each file, and batches are read from
    the files; a set that is one array has copies all the same.
    The cache lies in `cache`, else $CORINFOMAX_CACHE, else $XDG_CACHE_HOME/corinfomax, else ~/.cache/corinfomax, one
    folder a split and side. Any of them may be deleted while no run uses it. Many processes may load at once, but each
    that finds no cache builds it: let one go first.
    Raises DataError where the data cannot be used, or more than 1 % of a split (and more than one image) is unreadable.
    """
    if side < 1:
        raise ValueError(f"side is {side}; it is the short side of the cached images in pixels, 1 or more")
    if holdout is not None and not 0 <= holdout < 1:
        raise ValueError(f"holdout is {holdout}; it is a share of the training images, from 0 up to but not 1")
    if holdout and test_split:
        raise ValueError(f"holdout {holdout} and test_split {test_split!r} both say what to test on; give one of them")
    folder = cache or default_cache()
    sources = find(data, root=root, download=download, skip=skip, cache=folder)
    classes = tuple(sorted(set(sources["train"].labels or ())))
    train = _images(sources["train"], classes, side, folder, progress, copies)
    name = None if holdout else _test_name(data, sources, test_split)
    if name is not None:
        # Labels of a test split say nothing about training images without any: its classes are then its own.
        known = classes or tuple(sorted(set(sources[name].labels or ())))
        return Splits(train, _images(sources[name], known, side, folder, progress, copies))
    share = holdout if holdout is not None else DEFAULT_HOLDOUT if classes else 0.0
    return set_aside(train, share, seed) if share else Splits(train, None)


def load_every(
    data: str | Path,
    *,
    side: int,
    root: Path | None = None,
    download: bool = False,
    cache: Path | None = None,
    skip: Collection[str] = (),
    copies: bool = True,
    progress: bool = True,
) -> dict[str, Images]:
    """Every split of `data` by name, whole and in the order of its paths; arguments and errors as of `load`.

    Classes are those of all splits together.
    """
    folder = cache or default_cache()
    sources = find(data, root=root, download=download, skip=skip, cache=folder)
    classes = tuple(sorted({label for source in sources.values() for label in source.labels or ()}))
    return {name: _images(source, classes, side, folder, progress, copies) for name, source in sources.items()}


def set_aside(images: Images, share: float, seed: int) -> Splits:
    """A `share` of the images, drawn from `seed`, to test on, and the others to train on, both in their old order."""
    if len(images) < 2:
        raise DataError(f"cannot set images aside to test on: there is only {len(images)}; add images or use holdout 0")
    order = torch.randperm(len(images), generator=generator(seed, "holdout"))
    count = min(max(round(share * len(images)), 1), len(images) - 1)
    test, train = order[:count].sort().values, order[count:].sort().values
    return Splits(images.select(train), replace(images.select(test), skipped=()))  # named once, by train


def _test_name(data: str | Path, sources: dict[str, Source], test_split: str | None) -> str | None:
    others = [name for name in sources if name != "train"]
    if test_split is not None and test_split not in others:
        have = f"it has {', '.join(others)}" if others else "it has only train; holdout sets a share of it aside"
        raise DataError(f"{data} has no split {test_split!r} to test on: {have}")
    labelled = sources["train"].labels is not None
    usable = (name for name in ("test", "val") if name in sources and (sources[name].labels is not None) >= labelled)
    return test_split or next(usable, None)


def _read(files: Files, indices: Int[Tensor, " b"]) -> tuple[UInt8[Tensor, "b 3 h w"], Int[Tensor, "b 2"]]:
    """A batch from the files of its images, by threads: of large ones decoding is most, which Pillow does without
    Python's lock."""
    source, rows = files.source, files.rows[indices].tolist()

    def one(row: int) -> np.ndarray:
        try:
            with Image.open(source.file(row), formats=FORMATS) as image:
                return decode(image, files.side)
        except Exception as error:  # whatever a malformed file makes Pillow raise
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{source.paths[row]} in {source.root} cannot be read any more: {reason}") from error

    with ThreadPoolExecutor(cores()) as pool:
        found = list(pool.map(one, rows))
    sizes = torch.tensor([image.shape[1:] for image in found]).view(-1, 2)
    out = np.zeros((len(found), 3, *(sizes.amax(0).tolist() if found else (0, 0))), np.uint8)
    for slot, image in zip(out, found, strict=True):
        slot[:, : image.shape[1], : image.shape[2]] = image
    return torch.from_numpy(out), sizes


def _images(
    source: Source, classes: tuple[str, ...], side: int, cache: Path, progress: bool, copies: bool = True
) -> Images:
    """One split from its cache, which is built if it is not there whole."""
    copies = copies or source.array is not None
    labels = None
    if source.labels is not None:
        if unknown := sorted(set(source.labels) - set(classes)):
            raise DataError(
                f"{len(unknown)} classes to test on are not among the {len(classes)} to train on, first "
                f"{unknown[0]!r} ({source.paths[source.labels.index(unknown[0])]}); give both splits the same classes"
            )
        places = {name: place for place, name in enumerate(classes)}
        labels = torch.tensor([places[label] for label in source.labels])
    names = os.fsencode("\0".join((*source.paths, source.root)))
    kind = f"{FORMAT} {side if copies else 'files'} "
    folder = cache.absolute() / _digest(kind.encode(), source.stamps.tobytes(), names)
    for _ in range(3):  # another process may take away a cache that it saw torn in the moment after we mend it
        if (opened := _open(folder, len(source.paths), copies)) is not None:
            break
        _build(source, side, folder, progress, copies)
    else:
        raise DataError(f"the image cache {folder} does not stay whole; delete it and start one process first")
    index, pixels, skipped, content = opened
    kept, sizes = torch.from_numpy(index[:, 0].copy()), torch.from_numpy(index[:, 1:].copy())
    lengths = 3 * sizes.prod(1) * copies
    paths = tuple(source.paths[row] for row in kept.tolist())
    return Images(
        pixels=pixels,
        offsets=lengths.cumsum(0) - lengths,
        sizes=sizes,
        paths=paths,
        labels=None if labels is None else labels[kept],
        classes=() if labels is None else classes,
        skipped=tuple((source.paths[row], reason) for row, reason in skipped),
        fingerprint=_digest(os.fsencode("\0".join((content, *paths))), index.tobytes()),
        files=None if copies else Files(source, kept, side),
    )


def _open(folder: Path, count: int, copies: bool = True) -> Opened | None:
    """What is in a cache; None where it is not there, not whole, or not of `count` images."""
    try:
        index = np.load(folder / "index.npy", allow_pickle=False)
        notes = json.loads((folder / "index.json").read_text("utf-8"))
        skipped = [(row, reason) for row, reason in notes["skipped"]]
        digest = str(notes["digest"])
        size = (folder / "pixels.bin").stat().st_size
        if size != 3 * index[:, 1:].prod(1).sum() * copies or len(index) + len(skipped) != count:
            return None
        if not copies:
            return Opened(index, torch.empty(0, dtype=torch.uint8), skipped, digest)
        # Mode "r": a copy-on-write map counts as memory, and Linux refuses one larger than the machine has.
        mapped = np.memmap(folder / "pixels.bin", np.uint8, "r")
    except (OSError, EOFError, ValueError, KeyError):
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor do we write to it
        return Opened(index, torch.from_numpy(mapped), skipped, digest)


def _build(source: Source, side: int, folder: Path, progress: bool, copies: bool) -> None:
    """Decode a split into `folder`, which appears whole or not at all."""

    def look(image: Image.Image) -> tuple[tuple[int, ...], np.ndarray]:
        size = upright_size(image)
        pixels = decode(image, side if copies else GLANCE)  # the whole file is read either way, and a torn one found
        return pixels.shape[1:] if copies else size, pixels

    count, written = len(source.paths), 0
    index: list[tuple[int, int, int]] = []
    skipped: list[tuple[int, str]] = []
    digest = hashlib.blake2b(digest_size=16)
    part = folder.with_name(f"{folder.name}.{uuid4().hex}.part")
    try:
        _sweep(folder.parent)
        part.mkdir(parents=True)
        with (part / "pixels.bin").open("wb", buffering=1 << 20) as stream:
            with closing(each(source, look, progress, said="decoding" if copies else "looking")) as results:
                for row, result in enumerate(results):
                    if isinstance(result, str):
                        skipped.append((row, result))
                        continue
                    (height, width), pixels = result
                    index.append((row, height, width))
                    digest.update(pixels.data)
                    written += stream.write(pixels.data) if copies else 0
            _sync(stream)
        check_skipped(source, skipped)
        with (part / "index.npy").open("wb") as stream:
            np.save(stream, np.array(index, np.int64), allow_pickle=False)
            _sync(stream)
        with (part / "index.json").open("wb") as stream:
            # root and side are for the person who tidies up the cache
            notes = {"root": source.root, "side": side, "skipped": skipped, "digest": digest.hexdigest()}
            stream.write(json.dumps(notes).encode())
            _sync(stream)
        _publish(part, folder, count, copies)
    except OSError as error:
        done = len(index) + len(skipped)
        needed = written * count // done if done else 4 * side * side * count
        raise DataError(
            f"cannot write the image cache in {folder.parent}: {error.strerror}; {count:,} images need about "
            f"{needed / 1e6:,.0f} MB there: make room, or name another folder in CORINFOMAX_CACHE"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)  # there only if it was not published


def _publish(part: Path, folder: Path, count: int, copies: bool) -> None:
    """Give a whole cache its name, unless another process was first."""
    if _open(folder, count, copies) is not None:
        return
    shutil.rmtree(folder, ignore_errors=True)  # torn
    try:
        part.rename(folder)
    except OSError:
        if _open(folder, count, copies) is None:
            raise


def _sweep(cache: Path) -> None:
    """Remove what builders that were killed left behind."""
    for part in cache.glob("*.part"):
        with suppress(FileNotFoundError):  # its builder is alive and just published it
            if time.time() - max(path.stat().st_mtime for path in (part, *part.iterdir())) > ABANDONED:
                shutil.rmtree(part)


def _digest(*parts: bytes) -> str:
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _sync(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
