"""Images inside zip and tar files: found by the archive's index and read in place, nothing is unpacked."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np

from corinfomax.images.files import (
    DEFLATED,
    EXTENSIONS,
    PLAIN,
    SPLIT_NAMES,
    ZIPPED,
    DataError,
    MissingDataError,
    Source,
    Stored,
    default_cache,
)

SUFFIXES = (".zip", ".tar")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".7z", ".rar")
FORMAT = 2  # of the kept indices
ANY_NAME = ("utf-8", "surrogateescape")
METHODS = {zipfile.ZIP_STORED: ZIPPED, zipfile.ZIP_DEFLATED: DEFLATED}


class Member(NamedTuple):
    """One image of an archive."""

    path: str
    start: int
    size: int
    """In bytes, as it lies there."""
    method: int
    label: str = ""
    """What the file of the same name that ends in .cls says, in shards that have those."""


def shards_in(folder: Path) -> list[Path]:
    """The archives directly in a folder, in order."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def from_archives(root: Path, archives: Sequence[Path], cache: Path | None = None) -> dict[str, Source]:
    """Splits of the images in one archive, or in several that are shards of one set; `root` is their folder.

    Of one archive paths are as in the folder that it would unpack to, and mean what they do there; a folder that holds
    all else is left out of them. Of several the split is the word of SPLIT_NAMES in a name (set-train-0001.tar), and
    paths begin with the archive's name. Where images have a text of their name ending in .cls, that is their class.
    DataError for an archive that cannot be read, or where it is not clear what is meant. An archive's index is kept in
    `cache`, if it can be, and the splits of the last call in memory, for as long as no archive changes.
    """
    stamps = []
    for path in archives:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"cannot read the archive {path}: {error.strerror}") from error
        stamps.append((status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return dict(_splits(root, tuple(archives), tuple(stamps), cache or default_cache()))


@functools.lru_cache(maxsize=1)  # a command asks several times, and a million images are ten seconds
def _splits(
    root: Path, archives: tuple[Path, ...], stamps: tuple[tuple[int, ...], ...], cache: Path
) -> dict[str, Source]:
    splits: dict[str, list[_Placed]] = {}
    for place, archive in enumerate(archives):
        members = _members(archive, stamps[place], cache)
        if len(archives) == 1:
            found = _as_a_folder(archive, members)
        else:
            found = [(_split_of(archive), member.path, f"{archive.name}/{member.path}", member) for member in members]
        for split, inner, path, member in found:
            splits.setdefault(split, []).append(_Placed(inner, path, place, member))
    if not splits:
        suffixes = " ".join(sorted(EXTENSIONS))
        raise MissingDataError(
            f"no image found in {', '.join(map(str, archives))}; looked for files that end in {suffixes}"
        )
    if "train" not in splits:  # no split is named, or not the one to train on
        splits = {"train": [row for rows in splits.values() for row in rows]}
    names = tuple(str(archive) for archive in archives)
    whole = names[0] if len(archives) == 1 else str(root)
    return {split: _source(whole, names, stamps, sorted(rows)) for split, rows in splits.items()}


class _Placed(NamedTuple):
    """An image with its path within its split, its path, and which archive it lies in."""

    inner: str
    path: str
    place: int
    member: Member


def _source(root: str, archives: tuple[str, ...], stamps: Sequence[tuple[int, ...]], rows: list[_Placed]) -> Source:
    texts = [row.member.label for row in rows]
    if any(texts) and not all(texts):
        bare = next(row for row in rows if not row.member.label)
        raise DataError(
            f"{sum(map(bool, texts)):,} of the {len(rows):,} images in {root} have a class in a .cls beside them, and "
            f"{bare.path} has none: label all of a split or none"
        )
    folders = [sys.intern(row.inner.partition("/")[0]) for row in rows if "/" in row.inner]
    labels = next((tuple(each) for each in (texts, folders) if len(each) == len(rows) and len(set(each)) > 1), None)
    places = [(row.place, row.member.start, row.member.size, row.member.method) for row in rows]
    return Source(
        root,
        tuple(row.path for row in rows),
        np.array([stamps[row.place][:2] for row in rows], np.int64),
        labels,
        stored=Stored(archives, np.array(places, np.int64)),
    )


def _as_a_folder(archive: Path, members: Sequence[Member]) -> list[tuple[str, str, str, Member]]:
    """Split, path within it, path and member of each, as `files.from_folder` has them."""
    around = os.path.commonpath([member.path.rpartition("/")[0] for member in members]) if members else ""
    outer = itertools.takewhile(lambda part: part.lower() not in SPLIT_NAMES, around.split("/") if around else ())
    left_out = sum(len(part) + 1 for part in outer)
    paths = [member.path[left_out:] for member in members]
    tops = sorted({path.partition("/")[0] for path in paths if "/" in path})
    named = {top: SPLIT_NAMES[top.lower()] for top in tops if top.lower() in SPLIT_NAMES}
    if "train" not in named.values():
        named = {}
    for split in named.values():
        if len(both := [top for top in named if named[top] == split]) > 1:
            raise DataError(f"{archive} has two folders for {split}: {' and '.join(both)}; keep one")
    found = []
    for path, member in zip(paths, members, strict=True):
        top, _, rest = path.partition("/")
        if not named:
            found.append(("train", path, path, member))
        elif rest and top in named:
            found.append((named[top], rest, path, member))
    return found


def _split_of(archive: Path) -> str:
    """The split that a word of a shard's name says, or else train. DataError where several do."""
    words = {SPLIT_NAMES[word] for word in re.split("[^a-z]+", archive.stem.lower()) if word in SPLIT_NAMES}
    if len(words) > 1:
        raise DataError(f"the name of {archive} says {' and '.join(sorted(words))}; name each shard by its split alone")
    return next(iter(words), "train")


def _members(archive: Path, stamp: tuple[int, ...], cache: Path) -> list[Member]:
    """The images of an archive; of a path that is there twice the last, which is the one that unpacking leaves."""
    known = f"{FORMAT} {archive.absolute()} {stamp}"  # times of writing alone can be set back, and are by some copies
    digest = hashlib.blake2b(known.encode(*ANY_NAME), digest_size=16).hexdigest()
    kept = cache / f"index-{digest}.npz"
    if (read := _kept(kept)) is not None:
        return read
    try:
        found = _zip(archive) if archive.suffix.lower() == ".zip" else _tar(archive)
    except DataError:
        raise
    except OSError as error:
        if error.strerror is not None:  # of the file, not of what is in it
            raise DataError(f"cannot read the archive {archive}: {error.strerror}") from error
        raise DataError(f"the archive {archive} cannot be read: {error}; it is damaged, or no such archive") from error
    except (EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"the archive {archive} cannot be read: {error}; it is damaged, or no such archive") from error
    members = list({member.path: member for member in found}.values())
    if members:
        _keep(kept, members)
    return members


def _kept(path: Path) -> list[Member] | None:
    """The index that `_keep` wrote, if it is there."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            texts = [arrays[name].tobytes().decode(*ANY_NAME).split("\0") for name in ("paths", "labels")]
            numbers = arrays["numbers"].tolist()
        return [
            Member(image, start, size, method, label)
            for image, (start, size, method), label in zip(texts[0], numbers, texts[1], strict=True)
        ]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _keep(path: Path, members: Sequence[Member]) -> None:
    """Write an index, whole or not at all; where that cannot be, the archive is read again the next time."""
    part = path.with_name(f"{path.stem}.{uuid4().hex}.part.npz")  # several processes may do so at once
    texts = [
        np.frombuffer("\0".join(column).encode(*ANY_NAME), np.uint8) for column in list(zip(*members, strict=True))[::4]
    ]
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            numbers = np.array([member[1:4] for member in members], np.int64)
            np.savez(part, paths=texts[0], labels=texts[1], numbers=numbers)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _plain(path: str) -> str:
    """A member's path as it would be unpacked: no root, no `.`."""
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _is_image(path: str) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.split("/") if part != "..")
    return not hidden and path.lower().endswith(tuple(EXTENSIONS))


def _zip(archive: Path) -> list[Member]:
    with zipfile.ZipFile(archive) as opened:
        found = []
        for info in opened.infolist():
            # Some programs of Windows write its own separators, which unpackers there take for such.
            path = _plain(info.filename.replace("\\", "/") if "/" not in info.filename else info.filename)
            if info.is_dir() or not _is_image(path):
                continue
            if info.flag_bits & 1:
                raise DataError(f"{archive} is encrypted; unpack it, or make one without a password")
            if info.compress_type not in METHODS:
                raise DataError(
                    f"{path} in {archive} is compressed by method {info.compress_type}; zip it with deflate or stored"
                )
            found.append(Member(path, info.header_offset, info.compress_size, METHODS[info.compress_type]))
        return found


def _tar(archive: Path) -> list[Member]:
    """The images of a tar, header by header through the whole file."""
    with archive.open("rb") as file:
        if (magic := file.read(6)).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
            raise DataError(f"{archive} is compressed ({magic[:3]!r}): unpack it, or make it a plain .tar or a .zip")
    members: dict[str, Member] = {}
    labels: dict[str, tuple[int, int]] = {}
    files: dict[str, tuple[int, int]] = {}  # for hard links: what is in the archive once under two names
    with tarfile.open(archive, "r:") as opened:
        while (info := opened.next()) is not None:
            opened.members = []  # type: ignore[attr-defined]  # it would keep them all
            path = _plain(info.name)
            if info.isreg() and not info.issparse():
                where = info.offset_data, info.size
            elif info.islnk() and (known := files.get(_plain(info.linkname))) is not None:
                where = known
            else:
                continue
            if path.endswith(".cls"):
                labels[path.removesuffix(".cls")] = where
            elif _is_image(path):
                files[path] = where
                members[path] = Member(path, *where, PLAIN)
    if not labels:
        return list(members.values())
    with archive.open("rb") as file:
        return [
            member._replace(label=_text(file.fileno(), labels, member.path, archive)) for member in members.values()
        ]


def _text(file: int, labels: dict[str, tuple[int, int]], path: str, archive: Path) -> str:
    """What the .cls beside an image says; names end at the first dot, as shards have them."""
    folder, slash, name = path.rpartition("/")
    stem = f"{folder}{slash}{name.partition('.')[0]}"
    if stem not in labels:
        return ""
    start, size = labels[stem]
    try:
        return os.pread(file, size, start).decode().strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{stem}.cls in {archive} is no text: {error}") from error
