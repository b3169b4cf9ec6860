"""Cached images: decoded once, read through a memory map, batched in any order."""

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import torch
from jaxtyping import Int, Int64, Num
from torch import Tensor

from corinfomax.images.conversions import conversion
from corinfomax.images.decode import check_skipped, cores, decode, map_images, padded, read_again, upright_size
from corinfomax.images.files import DataError, Source, default_cache
from corinfomax.images.mapped import MappedFile
from corinfomax.images.readers import Opened
from corinfomax.images.sources import Data
from corinfomax.recipes.fields import RGB, PixelFormat
from corinfomax.runtime.devices import sent
from corinfomax.runtime.seeds import generator

COPIED_AT_ONCE = 2**26  # bytes
IMAGES_PER_TRIM = 64  # images: each may map 2 MiB of pages
CACHE_FORMAT = 3  # raise it with every change of the decoded bytes or of their layout


class Files(NamedTuple):
    source: Source
    rows: Int[Tensor, " n"]  # of each image, in `source`
    side: int  # short side of the images in a batch


@dataclass(frozen=True, eq=False)
class Images:
    """The n images of one split in the cache or in their files, as uint8 or uint16 levels."""

    pixels: Num[Tensor, " levels"]  # channels×height×width of each cached image: a read-only map; empty with `files`
    offsets: Int[Tensor, " n"]  # start of each image in `pixels`
    sizes: Int[Tensor, "n 2"]  # height and width of each cached image, or of the upright image in each file
    paths: tuple[str, ...]  # from the root of the data, with forward slashes; name/row in an array set
    labels: Int[Tensor, " n"] | None  # index of each image's class in `classes`
    classes: tuple[str, ...]  # sorted class names of the training images; () without labels
    skipped: tuple[tuple[str, str], ...]  # path and reason of each unreadable image of the split
    fingerprint: str  # of paths, decoded pixels and selection; copying or touching files does not change it
    format: PixelFormat = RGB  # channels and levels of `pixels`
    files: Files | None = None  # the files, for images that are not cached
    mapped: MappedFile | None = None  # the file behind `pixels`
    unlabelled: str = ""  # why existing labels cannot be used
    converted: Mapping[str, int] = field(default_factory=dict)  # images of the split by their `conversion`

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, indices: Int[Tensor, " m"]) -> "Images":
        """The images at `indices`, which share `pixels`; `skipped` and `converted` stay those of the whole split."""
        return replace(
            self,
            offsets=self.offsets[indices],
            sizes=self.sizes[indices],
            paths=tuple(self.paths[index] for index in indices.tolist()),
            labels=None if self.labels is None else self.labels[indices],
            files=self.files and self.files._replace(rows=self.files.rows[indices]),
            fingerprint=_digest_of(self.fingerprint.encode(), indices.to("cpu", torch.int64).numpy().tobytes()),
        )

    @property
    def equal(self) -> bool:
        """True if all cached images have one size, so that a batch is one lookup."""
        return self._grid is not None

    @cached_property
    def _grid(self) -> tuple[Num[Tensor, "rows c h w"], Int[Tensor, " n"]] | None:
        """`pixels` as equal images, and the row of each image among them; None if sizes differ."""
        if not len(self) or self.files is not None or (self.sizes != self.sizes[0]).any():
            return None
        height, width = self.sizes[0].tolist()
        stride = self.format.channels * height * width
        if (self.offsets % stride).any():  # equal images selected from a cache of unequal ones
            return None
        rows = len(self.pixels) // stride
        return self.pixels[: rows * stride].view(rows, -1, height, width), self.offsets // stride

    def cached(self, indices: Int[Tensor, " b"]) -> list[Num[np.ndarray, "c _ _"]]:
        """The cached images at `indices`, without copying them; `pixels` must be on the CPU."""
        # NumPy: torch would start its threads for every image, ruinous on busy cores.
        pixels, sizes, channels = self.pixels.numpy(), self.sizes[indices].tolist(), self.format.channels
        if self.mapped is not None:
            self.mapped.trim()  # at what was read before
        return [
            pixels[offset : offset + channels * height * width].reshape(channels, height, width)
            for offset, (height, width) in zip(self.offsets[indices].tolist(), sizes, strict=True)
        ]

    def batch(self, indices: Int[Tensor, " b"]) -> tuple[Num[Tensor, "b c h w"], Int[Tensor, "b 2"]]:
        """Images at `indices` on the device of `pixels`, and their heights and widths on the CPU.

        Images of unequal sizes lie at the top left of the largest height and width, zeros elsewhere. Without a cache
        each is decoded from its file to the short side `files.side`; raises DataError if that fails.
        """
        if self._grid is None:
            if self.files is None:
                images = self.cached(indices)
            else:  # in threads: Pillow holds no lock in decoding, most of the work for large images
                read = partial(
                    read_again, self.files.source, work=partial(decode, side=self.files.side, pixels=self.format)
                )
                with ThreadPoolExecutor(cores()) as pool:
                    images = list(pool.map(read, self.files.rows[indices].tolist()))
            pixels, sizes = map(torch.from_numpy, padded(images))
            return pixels, sizes

        grid, rows = self._grid[0], self._grid[1][indices]
        if grid.device.type == "cpu":  # NumPy, as in `cached`
            pixels = torch.empty(len(rows), *grid.shape[1:], dtype=grid.dtype)
            for chosen, out in zip(rows.split(IMAGES_PER_TRIM), pixels.split(IMAGES_PER_TRIM), strict=True):
                grid.numpy().take(chosen.numpy(), 0, out.numpy(), "clip")  # the other modes copy `out`
                if self.mapped is not None:
                    self.mapped.trim()
            return pixels, self.sizes[indices]
        return grid.index_select(0, sent(rows, grid.device)), self.sizes[indices]

    def on(self, device: torch.device) -> "Images":
        """The same images with `pixels` on a device, copied in blocks so that the map never stands in memory whole."""
        pixels = torch.empty_like(self.pixels, device=device)
        for source, target in zip(self.pixels.split(COPIED_AT_ONCE), pixels.split(COPIED_AT_ONCE), strict=True):
            target.copy_(source)
            if self.mapped is not None:
                self.mapped.trim()
        return replace(self, pixels=pixels, mapped=None)


class Splits(NamedTuple):
    train: Images
    test: Images | None

    @property
    def labelled(self) -> bool:
        """Both splits have labels, so that scores are possible."""
        return self.train.labels is not None and self.test is not None and self.test.labels is not None


def load(
    data: str | Path | Data, *, side: int, pixels: PixelFormat = RGB, from_files: bool = False, progress: bool = True
) -> Splits:
    """Images to train on and, if there are any, to test on, decoded into the cache at first use.

    The short side of larger images is reduced to `side` pixels. The test images are the share `data.holdout` of the
    training images, else the split `data.test_name`, else a tenth of labelled training images unless holdout is 0.
    With `from_files` the cache holds sizes and a checksum alone, from decoding each file once, and batches are read
    from the files; an array set is cached all the same. Processes that find no cache all build it: let one go first.
    Raises DataError if the data is unusable, or if more than 1 % of a split (and more than one image) is unreadable.
    """
    data = data if isinstance(data, Data) else Data(data)
    splits, test = data.splits(), data.test_name
    read = partial(_load_split, cache=data.cache, side=side, pixels=pixels, from_files=from_files, progress=progress)
    classes = _class_names(splits["train"])
    images = read(splits["train"], classes)
    if len(classes) == 1:  # nothing to tell apart
        reason = f"the training images have only one class, {classes[0]}"
        images, classes = replace(images, labels=None, classes=(), unlabelled=reason), ()
    if test is not None:  # without training labels, classes of the test split
        return Splits(images, read(splits[test], classes or _class_names(splits[test])))
    share = data.holdout if data.holdout is not None else 0.1 if classes else 0.0
    return set_aside(images, share, seed=0) if share else Splits(images, None)


def load_every(
    data: str | Path | Data, *, side: int, pixels: PixelFormat = RGB, from_files: bool = False, progress: bool = True
) -> dict[str, Images]:
    """Every whole split by name; arguments and errors as for `load`, classes of all splits."""
    data = data if isinstance(data, Data) else Data(data)
    splits = data.splits()
    read = partial(_load_split, cache=data.cache, side=side, pixels=pixels, from_files=from_files, progress=progress)
    classes = _class_names(*splits.values())
    return {name: read(source, classes) for name, source in splits.items()}


def set_aside(images: Images, share: float, seed: int) -> Splits:
    """A random `share` of the images to test on, the others to train on, in their old order."""
    if len(images) < 2:
        raise DataError(f"cannot set images aside to test on: there is only {len(images)}; add images or use holdout 0")
    order = torch.randperm(len(images), generator=generator(seed, "holdout"))
    count = min(max(round(share * len(images)), 1), len(images) - 1)
    test, train = order[:count].sort().values, order[count:].sort().values
    return Splits(
        images.select(train), replace(images.select(test), skipped=(), converted={})
    )  # train reports them once


def _class_names(*sources: Source) -> tuple[str, ...]:
    return tuple(sorted({label for source in sources for label in source.labels or ()}))


def _labels(source: Source, classes: tuple[str, ...]) -> tuple[Int64[Tensor, " files"] | None, str]:
    """Index of each label in `classes`; None, and the reason, if some are not among them."""
    if source.labels is None:
        return None, ""
    if unknown := sorted(set(source.labels) - set(classes)):
        first = f"first {unknown[0]!r} ({source.paths[source.labels.index(unknown[0])]})"
        problem = f"test classes missing from the {len(classes)} training classes: {len(unknown)}, {first}"
        return None, f"{problem}; give both splits the same classes"
    indices = {name: index for index, name in enumerate(classes)}
    return torch.tensor([indices[label] for label in source.labels]), ""


class CacheContent(NamedTuple):
    """A cache on disk: a folder with pixels.bin, index.npy and index.json for each split and side."""

    table: Int64[np.ndarray, "n 3"]  # row in the source, height and width of each image
    mapped: MappedFile | None  # the pixels; None without any
    skipped: list[tuple[int, str]]  # row in the source and reason of each unreadable image
    converted: dict[str, int]  # images by their `conversion`
    digest: str  # hash of the pixels


def _load_split(
    source: Source,
    classes: tuple[str, ...],
    cache: Path | None,
    side: int,
    pixels: PixelFormat,
    from_files: bool,
    progress: bool,
) -> Images:
    """One split from its cache, which is built if it is missing or torn."""
    if side < 1:
        raise ValueError(f"side is {side}; it is the short side of the cached images in pixels, 1 or more")
    from_files = from_files and source.array is None
    labels, unlabelled = _labels(source, classes)

    # the folder's name depends on all that the decoded pixels depend on, but for the files' content: new images take
    # the place of the old ones, which would fill the disk otherwise
    form = "" if pixels == RGB else repr(pixels)
    kind = f"{CACHE_FORMAT} {'files' if from_files else side} {form}{source.stack or ''}".encode()
    names = os.fsencode("\0".join((*source.paths, source.root)))
    folder = (cache or default_cache()).absolute() / _digest_of(kind, names)
    for _ in range(3):  # another process may delete a torn cache just after this one mended it
        if (content := _open(folder, source, pixels, from_files)) is not None:
            break
        _build(source, side, pixels, folder, from_files, progress)
    else:
        raise DataError(f"the image cache {folder} does not stay whole; delete it and start one process first")
    rows, sizes = torch.from_numpy(content.table[:, 0].copy()), torch.from_numpy(content.table[:, 1:].copy())
    lengths = pixels.channels * sizes.prod(1) * (not from_files)
    levels = getattr(torch, pixels.dtype)
    paths = tuple(source.paths[row] for row in rows.tolist())
    return Images(
        pixels=torch.empty(0, dtype=levels) if content.mapped is None else content.mapped.bytes.view(levels),
        format=pixels,
        mapped=content.mapped,
        offsets=lengths.cumsum(0) - lengths,
        sizes=sizes,
        paths=paths,
        labels=None if labels is None else labels[rows],
        classes=() if labels is None else classes,
        unlabelled=unlabelled,
        skipped=tuple((source.paths[row], cause) for row, cause in content.skipped),
        fingerprint=_digest_of(os.fsencode("\0".join((content.digest, *paths))), content.table.tobytes()),
        files=Files(source, rows, side) if from_files else None,
        converted=content.converted,
    )


def _open(folder: Path, source: Source, pixels: PixelFormat, from_files: bool) -> CacheContent | None:
    """Read a cache folder; None if it is missing, torn or not of the images as they are now."""
    try:
        # index.npy and index.json, against the length of pixels.bin
        table = np.load(folder / "index.npy", allow_pickle=False)
        notes = json.loads((folder / "index.json").read_text("utf-8"))
        skipped, digest = [(row, cause) for row, cause in notes["skipped"]], str(notes["digest"])
        converted = dict(notes["converted"])
        if notes["stamps"] != _digest_of(source.stamps.tobytes()):
            return None
        size = (folder / "pixels.bin").stat().st_size
        if size != pixels.bytes * table[:, 1:].prod(1).sum() * (not from_files):
            return None
        if len(table) + len(skipped) != len(source.paths):
            return None
        mapped = None if from_files else MappedFile(folder / "pixels.bin")
        return CacheContent(table, mapped, skipped, converted, digest)
    except (OSError, EOFError, ValueError, KeyError):
        return None


def _build(source: Source, side: int, pixels: PixelFormat, folder: Path, from_files: bool, progress: bool) -> None:
    """Decode a split into `folder`, which appears whole or not at all."""

    def work(image: Opened) -> tuple[int, int, np.ndarray, str]:
        form = conversion(image, pixels)
        height, width = upright_size(image)
        levels = decode(image, 32 if from_files else side, pixels)  # reads the whole file, and so finds a torn one
        return (height, width, levels, form) if from_files else (*levels.shape[1:], levels, form)

    count = len(source.paths)
    table: list[tuple[int, int, int]] = []
    skipped: list[tuple[int, str]] = []
    converted = Counter[str]()
    digest = hashlib.blake2b(digest_size=16)
    unfinished = folder.with_name(f"{folder.name}.{uuid4().hex}.part")
    try:
        _sweep(folder.parent)
        unfinished.mkdir(parents=True)

        # pixels.bin: one image after another
        results = map_images(source, work, progress, label="checking files" if from_files else "decoding")
        with (unfinished / "pixels.bin").open("wb", buffering=1 << 20) as stream, closing(results):
            for row, result in enumerate(results):
                if isinstance(result, str):
                    skipped.append((row, result))
                    continue
                height, width, levels, form = result
                converted[form] += bool(form)
                table.append((row, height, width))
                digest.update(levels.data)
                if not from_files:
                    stream.write(levels.data)
        check_skipped(source, skipped)

        # the index; its root and side are for a person who tidies up
        np.save(unfinished / "index.npy", np.array(table, np.int64), allow_pickle=False)
        notes = {"root": source.root, "side": side, "stamps": _digest_of(source.stamps.tobytes())}
        notes |= {"skipped": skipped, "converted": +converted, "digest": digest.hexdigest()}
        (unfinished / "index.json").write_bytes(json.dumps(notes).encode())

        # all on the disk before the folder has its name
        for path in unfinished.iterdir():
            with path.open("r+b") as stream:
                os.fsync(stream.fileno())
        _publish(unfinished, folder, source, pixels, from_files)
    except OSError as error:
        done = len(table) + len(skipped)
        written = 0 if from_files else sum(pixels.bytes * height * width for _, height, width in table)
        needed = written * count // done if done else pixels.bytes * side * side * count * 4 // 3
        need = f"{count:,} images need about {needed / 1e6:,.0f} MB there"
        remedy = f"{need}: make room, or name another folder with --cache"
        raise DataError(f"cannot write the image cache in {folder.parent}: {error.strerror}; {remedy}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # exists only if it was not published


def _publish(unfinished: Path, folder: Path, source: Source, pixels: PixelFormat, from_files: bool) -> None:
    """Give a whole cache its name, unless another process was first."""
    if _open(folder, source, pixels, from_files) is not None:
        return
    shutil.rmtree(folder, ignore_errors=True)  # torn, or of other images
    try:
        unfinished.rename(folder)
    except OSError:
        if _open(folder, source, pixels, from_files) is None:
            raise


def _sweep(cache: Path) -> None:
    """Remove the remains of killed builders: half-built caches without a write for a day."""
    for folder in cache.glob("*.part"):
        with suppress(FileNotFoundError):  # its builder has just published it
            if time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) > 24 * 3600:
                shutil.rmtree(folder)


def _digest_of(*content: bytes) -> str:
    return hashlib.blake2b(b"".join(content), digest_size=16).hexdigest()
