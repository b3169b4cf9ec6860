"""Images inside zip and tar files, located by the archive's index and read in place."""

from __future__ import annotations

import itertools
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corinfomax.images import files
from corinfomax.images.files import SPLIT_NAMES, DataError, Source, Stored

SUFFIXES = (".zip", ".tar")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".7z", ".rar")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz and zstd
ZIP_METHODS = {zipfile.ZIP_STORED: files.ZIPPED, zipfile.ZIP_DEFLATED: files.DEFLATED}
Position = tuple[int, int, int]  # offset, stored bytes and method of one file, as in `Stored.positions`


class Member(NamedTuple):
    """One image of an archive; members of a split sort by their paths inside it."""

    inner: str  # path inside its split
    path: str
    archive: int  # row of its archive
    position: Position
    label: str  # text of the .cls file beside it, else empty


def shards_in(folder: Path) -> list[Path]:
    """The archives directly in a folder, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def from_archives(root: Path, archives: Sequence[Path]) -> dict[str, Source]:
    """Splits of the images in one archive, or in several shards of one set in the folder `root`.

    One archive means what the folder that it unpacks to would mean; folders around all images are left out of their
    paths. A shard's split is the word of SPLIT_NAMES in its name (set-train-0001.tar), and paths begin with its name.
    A text of an image's name but ending in .cls holds its class. Raises DataError for an archive that is ambiguous or
    cannot be read.
    """
    statuses = [archive.stat() for archive in archives]  # before reading: a later change makes other stamps
    stamps = np.array([(status.st_size, status.st_mtime_ns) for status in statuses], np.int64)
    contents = [_read_members(archive, row) for row, archive in enumerate(archives)]
    splits: dict[str, list[Member]] = {}
    place = _place_in_folder if len(archives) == 1 else _place_in_shard
    for archive, members in zip(archives, contents, strict=True):
        for split, member in place(archive, members):
            splits.setdefault(split, []).append(member)

    # without a split to train on, train on all images
    if not splits:
        raise files.no_images(", ".join(map(str, archives)))
    if "train" not in splits:
        splits = {"train": list(itertools.chain(*splits.values()))}
    start = str(archives[0] if len(archives) == 1 else root)
    return {split: _source(start, archives, stamps, sorted(members)) for split, members in splits.items()}


def _source(root: str, archives: Sequence[Path], stamps: np.ndarray, members: Sequence[Member]) -> Source:
    classes = tuple(member.label for member in members)
    if any(classes) and not all(classes):
        some = f"{sum(map(bool, classes)):,} of the {len(members):,} images in {root} have a class in a .cls"
        bare = members[classes.index("")].path
        raise DataError(f"{some} beside them, and {bare} has none: label all of a split or none")
    labels = classes if len(set(classes)) > 1 else files.folder_labels([member.inner for member in members])
    positions = np.array([(member.archive, *member.position) for member in members], np.int64)
    stored = Stored(tuple(map(str, archives)), positions)
    return Source(root, tuple(member.path for member in members), stamps[positions[:, 0]], labels, stored=stored)


def _place_in_folder(archive: Path, members: Sequence[Member]) -> Iterator[tuple[str, Member]]:
    """Split of each image, and the image with its paths, as if the archive were unpacked."""
    # leave out the folders around all images, down to one that is a split
    around = os.path.commonpath([member.path.rpartition("/")[0] for member in members]) if members else ""
    outer = itertools.takewhile(lambda folder: folder.lower() not in SPLIT_NAMES, around.split("/") if around else ())
    start = sum(len(folder) + 1 for folder in outer)

    paths = [member.path[start:] for member in members]
    folders = files.split_folders(archive, sorted({path.partition("/")[0] for path in paths if "/" in path}))
    splits = {folder: split for split, folder in folders.items()}
    for member, path in zip(members, paths, strict=True):
        top, _, inner = path.partition("/")
        if not splits:
            yield "train", member._replace(inner=path, path=path)
        elif inner and top in splits:
            yield splits[top], member._replace(inner=inner, path=path)


def _place_in_shard(archive: Path, members: Iterable[Member]) -> Iterator[tuple[str, Member]]:
    split = split_of(archive)
    return ((split, member._replace(path=f"{archive.name}/{member.path}")) for member in members)


def split_of(shard: Path) -> str:
    """Split in the name of a shard, else train; raises DataError if the name has several."""
    words = re.split("[^a-z]+", shard.stem.lower())
    splits = sorted({SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES})
    if len(splits) > 1:
        raise DataError(f"the name of {shard} says {' and '.join(splits)}; name each shard by its split alone")
    return splits[0] if splits else "train"


def _read_members(archive: Path, row: int) -> list[Member]:
    """The images of an archive by their paths inside it; of a repeated path the last, as after unpacking."""
    try:
        positions, labels = (_read_zip(archive), {}) if archive.suffix.lower() == ".zip" else _read_tar(archive)
    except DataError:
        raise
    except (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        if reason := getattr(error, "strerror", None):  # the file itself, not its content
            raise DataError(f"cannot read the archive {archive}: {reason}") from error
        raise DataError(f"the archive {archive} cannot be read: {error}; it is damaged or of another format") from error
    return [Member(name, name, row, position, labels.get(name, "")) for name, position in positions.items()]


def _read_zip(archive: Path) -> dict[str, Position]:
    positions = {}
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            # some Windows programs separate folders by \, and unpackers there accept it
            name = _clean(info.filename.replace("\\", "/") if "/" not in info.filename else info.filename)
            if info.is_dir() or not _is_image(name):
                continue
            if info.flag_bits & 1:
                raise DataError(f"{archive} is encrypted; unpack it, or make one without a password")
            if info.compress_type not in ZIP_METHODS:
                remedy = "zip it with deflate or stored"
                raise DataError(f"{name} in {archive} is compressed by method {info.compress_type}; {remedy}")
            positions[name] = info.header_offset, info.compress_size, ZIP_METHODS[info.compress_type]
    return positions


def _read_tar(archive: Path) -> tuple[dict[str, Position], dict[str, str]]:
    """Position of each image, and the text of each .cls file beside one."""
    with archive.open("rb") as file:
        if (magic := file.read(6)).startswith(MAGIC):
            raise DataError(f"{archive} is compressed ({magic[:3]!r}): unpack it, or make it a plain .tar or a .zip")

    # header by header through the whole file
    positions: dict[str, Position] = {}
    texts: dict[str, Position] = {}
    with tarfile.open(archive, "r:") as opened:
        while (info := opened.next()) is not None:
            opened.members = []  # type: ignore[attr-defined]  # else it keeps every header in memory
            name = _clean(info.name)
            linked = positions.get(_clean(info.linkname)) if info.islnk() else None  # a second name of an image
            if not linked and (not info.isreg() or info.issparse()):
                continue
            position = linked or (info.offset_data, info.size, files.PLAIN)
            if name.endswith(".cls"):
                texts[name.removesuffix(".cls")] = position
            elif _is_image(name):
                positions[name] = position

    # a shard's names end at their first dot
    labels = {}
    with archive.open("rb") as file:
        for name in positions if texts else ():
            stem = name[: name.index(".", name.rfind("/") + 1)]
            if stem not in texts:
                continue
            start, size, _ = texts[stem]
            try:
                labels[name] = os.pread(file.fileno(), size, start).decode().strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{stem}.cls in {archive} is no text: {error}") from error
    return positions, labels


def _clean(name: str) -> str:
    """A member's path as it would be unpacked: without a root or `.`."""
    return "/".join(folder for folder in name.split("/") if folder not in ("", "."))


def _is_image(name: str) -> bool:
    hidden = any(folder.startswith((".", "__MACOSX")) for folder in name.split("/") if folder != "..")
    return not hidden and name.lower().endswith(files.EXTENSIONS)
