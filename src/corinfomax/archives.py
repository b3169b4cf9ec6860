"""Images inside zip and tar files: found by the archive's index and read in place, nothing is unpacked."""

from __future__ import annotations

import hashlib
import itertools
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corinfomax import runs
from corinfomax.files import (
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
    all else is left out of them. Of several the split is what a name begins with (train-0001.tar), and paths begin
    with the archive's name. Where every image of a split has a text of its name ending in .cls, that is its class.
    DataError for an archive that cannot be read. The index of a tar is kept in `cache`.
    """
    splits: dict[str, list[tuple[str, str, int, Member]]] = {}
    for place, archive in enumerate(archives):
        read = _zip if archive.suffix.lower() == ".zip" else lambda path: _tar(path, cache or default_cache())
        members = _read(archive, read)
        if len(archives) == 1:
            for inner, split, path, member in _as_a_folder(members):
                splits.setdefault(split, []).append((inner, path, place, member))
        else:
            split = _split_of(archive)
            for member in members:
                splits.setdefault(split, []).append((member.path, f"{archive.name}/{member.path}", place, member))
    if not splits:
        raise MissingDataError(f"no image found in {', '.join(map(str, archives))}; looked for {' '.join(EXTENSIONS)}")
    if "train" not in splits:  # no split is named, or not the one to train on
        splits = {"train": [row for rows in splits.values() for row in rows]}
    stamps = [(status.st_size, status.st_mtime_ns) for status in (path.stat() for path in archives)]
    names = tuple(str(archive) for archive in archives)
    whole = str(archives[0]) if len(archives) == 1 else str(root)
    return {split: _source(whole, names, stamps, sorted(rows)) for split, rows in splits.items()}


def _source(
    root: str, archives: tuple[str, ...], stamps: list[tuple[int, int]], rows: list[tuple[str, str, int, Member]]
) -> Source:
    folders = tuple(inner.partition("/")[0] for inner, *_ in rows if "/" in inner)
    texts = tuple(member.label for *_, member in rows if member.label)
    labels = next((each for each in (texts, folders) if len(each) == len(rows) and len(set(each)) > 1), None)
    places = [(place, member.start, member.size, member.method) for _, _, place, member in rows]
    return Source(
        root,
        tuple(path for _, path, _, _ in rows),
        np.array([stamps[place] for _, _, place, _ in rows], np.int64),
        labels,
        stored=Stored(archives, np.array(places, np.int64)),
    )


def _as_a_folder(members: Sequence[Member]) -> list[tuple[str, str, str, Member]]:
    """Path within its split, split, path and member of each, as `files.from_folder` has them."""
    around = os.path.commonpath([member.path.rpartition("/")[0] for member in members]) if members else ""
    outer = itertools.takewhile(lambda part: part.lower() not in SPLIT_NAMES, around.split("/") if around else ())
    left_out = sum(len(part) + 1 for part in outer)
    paths = [member.path[left_out:] for member in members]
    tops = {path.partition("/")[0] for path in paths if "/" in path}
    named = {top: SPLIT_NAMES[top.lower()] for top in sorted(tops) if top.lower() in SPLIT_NAMES}
    if "train" not in named.values():
        named = {}
    if len(set(named.values())) < len(named):
        raise DataError(f"the archive has two folders for one split: {', '.join(named)}; keep one of them")
    found = []
    for path, member in zip(paths, members, strict=True):
        top, _, rest = path.partition("/")
        if not named:
            found.append((path, "train", path, member))
        elif rest and top in named:
            found.append((rest, named[top], path, member))
    return found


def _split_of(archive: Path) -> str:
    """What the letters that a shard's name begins with say, or else train."""
    stem = archive.stem.lower()
    letters = stem[: next((place for place, letter in enumerate(stem) if not letter.isalpha()), len(stem))]
    return SPLIT_NAMES.get(letters, "train")


def _read(archive: Path, read: Callable[[Path], list[Member]]) -> list[Member]:
    try:
        return read(archive)
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, UnicodeDecodeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the archive {archive} cannot be read: {error}; it is damaged, or no such archive") from error


def _is_image(path: str) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.split("/"))
    return not hidden and path.lower().endswith(tuple(EXTENSIONS))


def _zip(archive: Path) -> list[Member]:
    with zipfile.ZipFile(archive) as opened:
        found = []
        for info in opened.infolist():
            path = info.filename.removeprefix("./")
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


def _tar(archive: Path, cache: Path) -> list[Member]:
    """The images of a tar. Its index is read once, header by header through the whole file, and kept."""
    status = archive.stat()
    known = f"1 {archive.absolute()} {status.st_size} {status.st_mtime_ns}".encode(errors="surrogateescape")
    kept = cache / f"tar-{hashlib.blake2b(known, digest_size=16).hexdigest()}.npy"
    try:
        rows = np.load(kept, allow_pickle=False).tolist()
        return [
            Member(os.fsdecode(path), start, size, method, os.fsdecode(label))
            for path, start, size, method, label in rows
        ]
    except (OSError, EOFError, ValueError):
        pass
    members: list[Member] = []
    labels: dict[str, tuple[int, int]] = {}
    with tarfile.open(archive, "r:") as opened:  # in place: compressed ones are refused
        while (info := opened.next()) is not None:
            opened.members = []  # type: ignore[attr-defined]  # it would keep them all
            path = info.name.removeprefix("./")
            if not info.isreg() or info.issparse():
                continue
            if path.endswith(".cls"):
                labels[path.removesuffix(".cls")] = info.offset_data, info.size
            elif _is_image(path):
                members.append(Member(path, info.offset_data, info.size, PLAIN))
    if labels:
        with archive.open("rb") as file:
            members = [member._replace(label=_text(file.fileno(), labels, member.path)) for member in members]
    rows = [(os.fsencode(member.path), *member[1:4], os.fsencode(member.label)) for member in members]
    widths = [max((len(row[field]) for row in rows), default=1) or 1 for field in (0, 4)]
    kinds = [("path", f"S{widths[0]}"), *((name, "i8") for name in Member._fields[1:4]), ("label", f"S{widths[1]}")]
    runs.write_whole(kept, lambda path: np.save(path.open("wb"), np.array(rows, kinds), allow_pickle=False))
    return members


def _text(file: int, labels: dict[str, tuple[int, int]], path: str) -> str:
    """What the .cls beside an image says; names end at the first dot, as shards have them."""
    folder, _, name = path.rpartition("/")
    stem = f"{folder}/{name.partition('.')[0]}".lstrip("/") if folder else name.partition(".")[0]
    if stem not in labels:
        return ""
    start, size = labels[stem]
    return os.pread(file, min(size, 200), start).decode().strip()
