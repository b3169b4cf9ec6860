"""Images inside zip and tar files, located by the archive's index and read in place."""

import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corinfomax.images import files, layout
from corinfomax.images.files import DataError, Located, Source, Stored, Unread

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


def from_archives(root: Path, archives: Sequence[Path]) -> Located:
    """Splits of the images in one archive, or in several shards of one set in the folder `root`.

    One archive means what the folder that it unpacks to would mean; folders around all images are left out of their
    paths. The split of a shard is in its name (set-train-0001.tar), and paths begin with its name. A text of an image's
    name but ending in .cls holds its class. Raises DataError for an archive that is ambiguous or cannot be read.
    """
    # before reading: a later change makes other stamps
    stamps = np.array([files.stamp(archive.stat()) for archive in archives], np.int64)
    unread = Unread()
    members = [member for row, archive in enumerate(archives) for member in _read_members(archive, row, unread)]
    if not members:
        raise files.no_images(", ".join(map(str, archives)), unread)
    arranged = _as_folder(archives[0], members) if len(archives) == 1 else _as_shards(root, archives, members)
    splits, notes = arranged
    if not splits["train"]:
        raise files.no_images(f"the training folder of {archives[0]}", unread)

    # classes: those of .cls texts, or folders
    labels, remarks = layout.class_labels({split: [member.inner for member in splits[split]] for split in splits})
    start = str(archives[0] if len(archives) == 1 else root)
    sources = {split: _source(start, archives, stamps, splits[split], labels[split]) for split in splits}
    return Located(sources, (*notes, *(remarks if not members[0].label else ()), *unread.notes()))


def _source(
    root: str, archives: Sequence[Path], stamps: np.ndarray, members: Sequence[Member], labels: tuple[str, ...] | None
) -> Source:
    classes = tuple(member.label for member in members)
    if any(classes) and not all(classes):
        count = f"{sum(map(bool, classes)):,} of the {len(members):,} images in {root} have a class in a .cls"
        bare = members[classes.index("")].path
        raise DataError(f"{count} beside them, and {bare} has none: label all of a split or none")
    positions = np.array([(member.archive, *member.position) for member in members], np.int64).reshape(-1, 4)
    stored = Stored(tuple(map(str, archives)), positions)
    paths, labels = tuple(member.path for member in members), classes if any(classes) else labels
    return Source(root, paths, stamps[positions[:, 0]], labels, stored=stored)


Arranged = tuple[dict[str, list[Member]], Sequence[str]]  # sorted images of each split, and notes


def _as_folder(archive: Path, members: Sequence[Member]) -> Arranged:
    """The images of each split as if the archive were unpacked, without the folders around all of them."""
    members = sorted(members, key=lambda member: member.path)
    meant = layout.arrange([member.path for member in members], archive)
    splits: dict[str, list[Member]] = {}
    for split, folder in meant.folders.items():
        top, start = meant.start + (folder and f"{folder}/"), len(meant.start)
        inside = [member for member in members if member.path.startswith(top)]
        splits[split] = [m._replace(inner=m.path[len(top) :], path=m.path[start:]) for m in inside]
    return splits, meant.notes


def _as_shards(root: Path, archives: Sequence[Path], members: Sequence[Member]) -> Arranged:
    """The images of each split of a set of shards."""
    # the split in the name of each archive
    names = [layout.split_in(archive.stem) for archive in archives]
    notes = []
    if "train" not in names and len({*names} - {None}) > 1:
        have = files.listed(sorted({archive.name for archive in archives}))
        raise DataError(f"{root} has no training images: no shard of {have} has train in its name: rename some")
    if "train" not in names and (only := next(filter(None, names), None)):
        notes.append(f"no shard has train in its name: those of {only} are training images too")
        names = [None] * len(names)

    # no split in any name: perhaps in the folders inside
    if not any(names):
        meant = layout.arrange(sorted(member.path for member in members), root)
        if set(meant.folders) != {"train"}:
            tops = {split: f"{meant.start}{folder}/" for split, folder in meant.folders.items()}
            inside = {split: [m for m in members if m.path.startswith(top)] for split, top in tops.items()}
            splits = {s: [m._replace(inner=m.path[len(tops[s]) :]) for m in images] for s, images in inside.items()}
            return {split: _of_shards(archives, images) for split, images in splits.items()}, meant.notes
        notes.extend(meant.notes)

    # their images; beside shards of training images those of no split are left out
    named = {split: [m for m in members if names[m.archive] == split] for split in filter(None, names)}
    bare = [m for m in members if names[m.archive] is None]
    if "train" not in named:
        named["train"] = bare
    elif bare:
        shards = files.listed(sorted({archives[member.archive].name for member in bare}), most=6)
        notes.append(f"not read: {shards} ({files.some(len(bare), 'image')}), without a split in their names")
    return {split: _of_shards(archives, images) for split, images in named.items()}, notes


def _of_shards(archives: Sequence[Path], members: Sequence[Member]) -> list[Member]:
    return sorted(m._replace(path=f"{archives[m.archive].name}/{m.path}") for m in members)


def _read_members(archive: Path, row: int, unread: Unread) -> list[Member]:
    """The images of an archive by their paths inside it; of a repeated path the last, as after unpacking."""
    try:
        is_zip = archive.suffix.lower() == ".zip"
        positions, labels = (_read_zip(archive, unread), {}) if is_zip else _read_tar(archive, unread)
    except DataError:
        raise
    except (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        if reason := getattr(error, "strerror", None):  # the file itself, not its content
            raise DataError(f"cannot read the archive {archive}: {reason}") from error
        raise DataError(f"the archive {archive} cannot be read: {error}; it is damaged or of another format") from error
    return [Member(name, name, row, position, labels.get(name, "")) for name, position in positions.items()]


def _read_zip(archive: Path, unread: Unread) -> dict[str, Position]:
    positions = {}
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            # some Windows programs separate folders by \, and unpackers there accept it
            name = _clean(info.filename.replace("\\", "/") if "/" not in info.filename else info.filename)
            if info.is_dir() or not _is_image(name, unread):
                continue
            if info.flag_bits & 1:
                raise DataError(f"{archive} is encrypted; unpack it, or make one without a password")
            if info.compress_type not in ZIP_METHODS:
                remedy = "zip it with deflate or stored"
                raise DataError(f"{name} in {archive} is compressed by method {info.compress_type}; {remedy}")
            positions[name] = info.header_offset, info.compress_size, ZIP_METHODS[info.compress_type]
    return positions


def _read_tar(archive: Path, unread: Unread) -> tuple[dict[str, Position], dict[str, str]]:
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
            linked = positions.get(_target(name, info)) if info.islnk() or info.issym() else None
            if not linked and (not info.isreg() or info.issparse()):
                if not info.isdir():
                    unread.add("sparse file" if info.issparse() else "link" if info.linkname else "device", name)
                continue
            position = linked or (info.offset_data, info.size, files.PLAIN)
            if name.endswith(".cls"):
                texts[name.removesuffix(".cls")] = position
            elif _is_image(name, unread):
                positions[name] = position

    # a shard's names end at their first dot
    labels = {}
    with archive.open("rb") as file:
        for name in positions if texts else ():
            stem = name[: name.index(".", name.rfind("/") + 1)]
            if stem not in texts:
                continue
            start, size, _ = texts[stem]
            file.seek(start)
            try:
                labels[name] = file.read(size).decode().strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{stem}.cls in {archive} is no text: {error}") from error
    return positions, labels


def _target(name: str, info: tarfile.TarInfo) -> str:
    """Path of the member that a link is another name of: hard links count from the root, others from their folder."""
    if info.islnk():
        return _clean(info.linkname)
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), info.linkname))


def _clean(name: str) -> str:
    """A member's path as it would be unpacked: without a root or `.`."""
    return "/".join(folder for folder in name.split("/") if folder not in ("", "."))


def _is_image(name: str, unread: Unread) -> bool:
    """True for an image; others are counted as they would be in a folder."""
    folders = name.split("/")
    if ".." in folders:
        unread.add("outside path", name)
        return False
    if any(folder.startswith((".", "__MACOSX")) for folder in folders):
        return False
    if system := [folder for folder in folders[:-1] if folder.lower() in files.SYSTEM_FOLDERS]:
        unread.add("system folder", name[: name.index(system[0]) + len(system[0])])
        return False
    if not name.lower().endswith(files.EXTENSIONS):
        unread.file(name)
        return False
    return True
