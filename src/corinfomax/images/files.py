"""Image files on disk: found, counted and located, without opening one."""

import errno
import functools
import io
import json
import os
import stat
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int64

EXTENSIONS: tuple[str, ...] = (".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg")
EXTENSIONS += (".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
ARRAYS = (".npy", ".npz")
STACKS = (*ARRAYS, ".tif", ".tiff", ".dcm", ".dicom", ".ima")  # files that may hold several images
EXTENSIONS += (*ARRAYS, ".dcm", ".dicom", ".heic", ".heif", ".ima", ".jxl")
NO_IMAGES = frozenset(".cls .csv .db .htm .html .ini .ipynb .json .jsonl .log .md .pdf .py .rst .sh .tsv .txt".split())
NO_IMAGES |= frozenset(".xls .xlsx .xml .yaml .yml".split())
"""Endings of files that most data sets hold beside images; they are ignored silently."""
SYSTEM_FOLDERS = frozenset(("@eadir", "@recycle", "#recycle", "$recycle.bin", "__macosx", "system volume information"))
"""Folders that storage devices and archivers make, with thumbnails and deleted files; in lower case."""
ABOUT = {"system folder": " with thumbnails or deleted files", "folder": " without permission"}  # not read
DICOM, DICOM_START = b"DICM", 128  # mark of a DICOM file, and the bytes before it
LARGEST = 2**30  # bytes of one unpacked file: above any image, below a bomb
PLAIN, ZIPPED, DEFLATED = range(3)  # raw bytes; raw bytes after a zip header; compressed bytes after a zip header


class DataError(ValueError):
    """Unusable images, labels or cache; the message gives the cure."""


class MissingDataError(DataError, FileNotFoundError):
    """No images at the named place."""


class Stored(NamedTuple):
    archives: tuple[str, ...]
    positions: Int64[np.ndarray, "files 4"]  # row of the archive; offset; bytes; PLAIN, ZIPPED or DEFLATED

    def read(self, row: int) -> bytes:
        """Read one file; raises OSError if it is gone, zlib.error if its bytes are damaged."""
        archive, start, size, method = self.positions[row].tolist()
        with Path(self.archives[archive]).open("rb", buffering=0) as file:
            if method != PLAIN:
                # a zip header: 30 bytes that end with two lengths, a name and extra fields of those lengths
                file.seek(start)
                header = _read(file, 30)
                start += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            file.seek(start)
            packed = _read(file, size)
        if method != DEFLATED:
            return packed
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, LARGEST)
        if len(content) == LARGEST:
            raise OSError(errno.EFBIG, f"more than {LARGEST / 1e9:.0f} GB once unpacked")
        return content


def _read(file: io.RawIOBase, size: int) -> bytes:
    """Read `size` bytes, or fewer at the end of the file: one unbuffered read may give less."""
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


@dataclass(frozen=True)
class Source:
    """The images of one split, located but not decoded."""

    root: str  # absolute folder or archive that the paths start from; the name of an array set or of images in memory
    paths: tuple[str, ...]  # one per image, with forward slashes
    stamps: Int64[np.ndarray, "files 4"]  # `stamp` of each file; of the few files that hold an array set
    labels: tuple[str, ...] | None  # class name of each image
    array: Callable[[], Any] | None = None  # gives the pixels of an array set, read once, or images in memory, by row
    stored: Stored | None = None  # positions of the files if they lie in archives
    planes: tuple[int | None, ...] | None = None  # number of each image in its file, where files hold several
    stack: Literal["channels", "images"] | None = None  # meaning of planes, where files do not record it

    def content(self, row: int) -> Path | io.BytesIO | np.ndarray:
        """The file of one image, or its pixels, as `readers.opened` takes it."""
        if self.array is not None:
            return self.array()[row]
        return Path(self.root, self.file(row)) if self.stored is None else io.BytesIO(self.stored.read(row))

    def plane(self, row: int) -> int | None:
        """The number of an image in its file; None if it is alone there."""
        return None if self.planes is None else self.planes[row]

    def file(self, row: int) -> str:
        """Path of the file of one image."""
        return self.paths[row] if self.plane(row) is None else self.paths[row].rpartition("#")[0]

    def take(self, rows: Sequence[int]) -> "Source":
        """The images in these rows."""
        read, stored = self.array, self.stored
        return replace(
            self,
            paths=tuple(self.paths[row] for row in rows),
            stamps=self.stamps if read else self.stamps[rows],
            labels=None if self.labels is None else tuple(self.labels[row] for row in rows),
            planes=None if self.planes is None else tuple(self.planes[row] for row in rows),
            array=functools.cache(lambda: read()[rows]) if read else None,
            stored=stored and stored._replace(positions=stored.positions[rows]),
        )

    def without(self, names: Collection[str]) -> "Source | None":
        """The images whose paths are not in `names`; None if no image is left."""
        rows = [row for row, path in enumerate(self.paths) if path not in names]
        if len(rows) == len(self.paths):
            return self
        return self.take(rows) if rows else None


def default_cache() -> Path:
    """Cache folder: $CORINFOMAX_CACHE, else corinfomax in $XDG_CACHE_HOME, in ~/.cache, or in the temporary folder.

    The last is for users without a home, as in containers.
    """
    if chosen := os.environ.get("CORINFOMAX_CACHE"):
        return Path(chosen).expanduser()
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        home = tempfile.gettempdir()
    return Path(home) / "corinfomax"


Stamp = tuple[int, int, int, int]
Stamps = dict[str, Stamp]  # by the file's path from the root


def stamp(status: os.stat_result) -> Stamp:
    """Size, mtime and ctime in ns, and inode: a replacement of equal size and mtime has another inode.

    Overwriting keeps the inode but changes the ctime, which is too coarse alone: two files may share one.
    """
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


class Unread:
    """Tally of the files and folders that were passed over."""

    def __init__(self) -> None:
        self._files: Counter[str] = Counter()  # by ending, in lower case
        self._first: dict[str, str] = {}
        self._others: dict[str, set[str]] = {}  # paths by their kind

    def file(self, path: str) -> None:
        """Count a file without an image extension."""
        name = path.rpartition("/")[2].lower()
        ending = name[name.find(".") :] if "." in name else ""
        if not NO_IMAGES.isdisjoint((ending, f".{name.rpartition('.')[2]}")) or name == "thumbs.db":
            return
        self._files[ending] += 1
        self._first[ending] = min(path, self._first.get(ending, path))

    def add(self, kind: str, path: str) -> None:
        """Note a folder that is not entered, or a member of an archive that is no plain file, such as a link."""
        self._others.setdefault(kind, set()).add(path)  # an archive names a folder with each of its files

    def notes(self) -> list[str]:
        """A sentence for each kind, with an example; none if every file was an image."""
        notes = []
        if self._files:
            by_count = sorted(self._files.items(), key=lambda pair: (-pair[1], pair[0]))
            kinds = [f"{count:,} {_kind(ending, count)}" for ending, count in by_count]
            notes.append(f"not read: {listed(kinds)}, first {quoted(self._first[by_count[0][0]])}")
        for kind, paths in sorted(self._others.items()):
            notes.append(f"not read: {some(len(paths), kind)}{ABOUT.get(kind, '')}, first {quoted(min(paths))}")
        return notes


def _kind(ending: str, count: int) -> str:
    files = "file" if count == 1 else "files"
    return f"{quoted(ending)} {files}" if ending else f"{files} without an ending"


class Located(NamedTuple):
    """The images behind DATA: a source for each split, and sentences about how names were read and what was not."""

    splits: dict[str, Source]
    notes: tuple[str, ...] = ()


def scan(root: Path, below: str = "", unread: Unread | None = None) -> Stamps:
    """List the image files under the folder `below` of `root`, sorted by path; others go into `unread`.

    Image files have a suffix in EXTENSIONS; hidden files and folders are ignored. Links are followed, except to a
    folder around them. A broken link is listed with size 0, so that decoding reports it.
    """
    unread = unread or Unread()
    stamps: Stamps = {}
    # folders still to read, each with those around it
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [(f"{below}/" if below else "", frozenset())]
    while pending:
        prefix, parents = pending.pop()
        try:
            status = (root / prefix).stat()
            entries = os.scandir(root / prefix)
        except PermissionError:
            if not parents:
                raise
            unread.add("folder", prefix)
            continue
        folder = (status.st_dev, status.st_ino)
        if folder in parents:  # a link led back
            entries.close()
            continue
        with entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = prefix + entry.name
                is_image = path.lower().endswith(EXTENSIONS)  # Path.suffix would take half of all the time
                try:
                    status = entry.stat()
                except OSError:  # a link to nothing or to itself
                    if is_image:
                        stamps[path] = 0, 0, 0, 0
                    continue
                if stat.S_ISDIR(status.st_mode) and entry.name.lower() in SYSTEM_FOLDERS:
                    unread.add("system folder", path)
                elif stat.S_ISDIR(status.st_mode):
                    pending.append((f"{path}/", parents | {folder}))
                elif is_image and stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                    stamps[path] = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino  # its `stamp`
                elif stat.S_ISREG(status.st_mode) and _is_bare_dicom(root / path):
                    stamps[path] = stamp(status)
                elif stat.S_ISREG(status.st_mode):
                    unread.file(path)
    # beside other images, arrays are features or labels
    arrays = [path for path in stamps if path.lower().endswith(ARRAYS)]
    if len(arrays) < len(stamps):
        for path in arrays:
            del stamps[path]
            unread.file(path)
    return dict(sorted(stamps.items()))


def _is_bare_dicom(path: Path) -> bool:
    """True for a DICOM file that is named as scanners do: without an ending, or by numbers between dots."""
    if any(letter.isalpha() for letter in path.suffix):
        return False
    try:
        with path.open("rb") as file:
            return file.read(DICOM_START + len(DICOM))[DICOM_START:] == DICOM
    except OSError:
        return False


def may_hold_several(path: str) -> bool:
    """True for the path of an image file that may hold several images, by its ending."""
    name = path.lower()
    return name.endswith(STACKS) or not name.endswith(EXTENSIONS)  # without a known ending it is DICOM


def from_files(root: Path, stamps: Stamps, labels: tuple[str, ...] | None) -> Source:
    """The source of files in the folder `root`."""
    return Source(str(root), tuple(stamps), np.array(list(stamps.values()), np.int64), labels)


def no_images(place: object, unread: Unread | None = None) -> MissingDataError:
    """The error for a place without images, with what lies there instead."""
    instead = "".join(f"; {note}" for note in unread.notes()) if unread else ""
    return MissingDataError(f"no image found in {place}; looked for files that end in {' '.join(EXTENSIONS)}{instead}")


def quoted(path: str) -> str:
    """`path` on one line that is safe to print and that `tables.read_names` reads back, perhaps as JSON."""
    # names may hold line breaks, bytes outside UTF-8 and codes that a terminal obeys
    plain = path.isprintable() and path == path.strip() and not path.startswith(("#", '"'))
    return path if plain else json.dumps(path)


def listed(names: Sequence[str], *, most: int = 4) -> str:
    """`a, b and c`; of more than `most` names the first ones and the number of the others."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most:,} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def some(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
