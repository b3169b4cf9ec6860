"""From one argument, DATA, to its splits: a folder, list, table or named set, before anything is decoded."""

from __future__ import annotations

import difflib
import statistics
import zlib
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from corinfomax.images.archives import PACKED, SUFFIXES, from_archives, shards_in
from corinfomax.images.files import DataError, MissingDataError, Source, from_folder, from_list, from_table, without
from corinfomax.images.named_sets import NAMED

ROOT = Path("data")
"""The folder of the named sets unless one is given."""


def find(
    data: str | Path,
    *,
    root: Path | None = None,
    download: bool = False,
    skip: Collection[str] = (),
    cache: Path | None = None,
) -> dict[str, Source]:
    """Splits of `data` by name: `train` always, `val` and `test` where it has them; without the images in `skip`.

    `data` is the name of a set in NAMED, else a folder of images or of archives, a list (.txt), a table (.csv) or an
    archive (.zip, .tar), the index of which is kept in `cache`, the folder of the decoded images. A string that names
    a set means the set, wherever the program runs; `./cifar10`, or a Path, means the folder. `root` is where the named
    sets lie, ./data unless given; `download` lets torchvision fetch CIFAR when it is not there. `skip` has paths as
    `Source.paths` has them; those of no image say nothing, and a split without any other image is none.
    Raises MissingDataError where there is nothing of that name, DataError where what is there cannot be used.
    """
    kept = {name: without(source, skip) for name, source in _all(data, root, download, cache).items()}
    if kept["train"] is None:
        raise DataError(f"every training image of {data} is among those to leave out; shorten that list")
    return {name: source for name, source in kept.items() if source is not None}


def _all(data: str | Path, root: Path | None, download: bool, cache: Path | None) -> dict[str, Source]:
    if isinstance(data, str) and data in NAMED:
        return NAMED[data](data, root or ROOT, download)
    place = Path(data).expanduser()
    if place.is_dir():
        return _of_folder(place.resolve(), cache)
    if place.is_file():
        if place.suffix.lower() in SUFFIXES:
            return from_archives(place.absolute().parent, [place.absolute()], cache)
        if place.name.lower().endswith(PACKED):
            raise DataError(f"images in {place} cannot be read in place; unpack it, or make it a .tar or .zip")
        readers = {".txt": from_list, ".csv": from_table}
        if reader := readers.get(place.suffix.lower()):
            return reader(place.absolute())
        raise DataError(
            f"{place} is a file, but no list of images (.txt), table (.csv) or archive (.zip, .tar); give one of those "
            "or a folder"
        )
    close = difflib.get_close_matches(str(data), NAMED, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise MissingDataError(
        f"no folder or file {str(data)!r} here, and no set of that name: {hint}The named sets are {', '.join(NAMED)}"
    )


def _of_folder(place: Path, cache: Path | None) -> dict[str, Source]:
    """The images in a folder, or in the archives in it where there are no others."""
    shards = shards_in(place)
    try:
        found = from_folder(place)
    except MissingDataError:
        if shards:
            return from_archives(place, shards, cache)
        if inner := [path for below in sorted(place.iterdir()) if below.is_dir() for path in shards_in(below)]:
            raise DataError(
                f"no image in {place}, but archives in its folders, first {inner[0]}: put them into one folder, each "
                "named by its split (train-0001.tar)"
            ) from None
        raise
    count = sum(len(source.paths) for source in found.values())
    if len(shards) >= count:  # one beside its own content is common
        raise DataError(
            f"{place} holds {count:,} images and also {len(shards):,} archives, first {shards[0].name}: move what "
            "is not meant, or name the archive"
        )
    return found


def absolute(data: str) -> str:
    """`data` as it can be named from any folder: a named set as it is, a path from the root."""
    return data if data in NAMED else str(Path(data).expanduser().absolute())


def root_of(data: str, root: Path | None) -> Path | None:
    """Where a named set lies, as it can be named from any folder; None where `data` lies in no such place."""
    return None if data not in NAMED or data == "mnist5k" else (root or ROOT).absolute()


class Survey(NamedTuple):
    """What can be said of training images without decoding them."""

    images: int
    short_side: int
    """Median over some of them, in pixels."""


def survey(
    data: str | Path,
    *,
    root: Path | None = None,
    download: bool = False,
    skip: Collection[str] = (),
    cache: Path | None = None,
    looks: int = 64,
) -> Survey:
    """How many training images `data` has, and their median short side, read from the headers of up to `looks` files.

    Raises as `find` does, and DataError when none of the files looked at is an image.
    """
    train = find(data, root=root, download=download, skip=skip, cache=cache)["train"]
    if train.array is not None:
        return Survey(len(train.paths), min(train.array().shape[1:3]))
    sides = []
    some = range(0, len(train.paths), max(1, len(train.paths) // looks))[:looks]
    for row in some:
        with suppress(OSError, zlib.error, Image.DecompressionBombError), Image.open(train.file(row)) as image:
            sides.append(min(image.size))
    if not sides:
        raise DataError(f"none of {len(some)} files looked at in {train.root} is an image that can be opened")
    return Survey(len(train.paths), int(statistics.median(sides)))
