"""Images that lie on the user's disk: the splits of a folder, list or table, found but not opened."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import stat
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

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


LARGEST = 2**30  # bytes of one packed file: no image is as large, and a bomb is
PLAIN, ZIPPED, DEFLATED = range(3)  # as it is; after a zip entry's header; so too, and compressed


class Stored(NamedTuple):
    """Where in archives the files of images lie."""

    archives: tuple[str, ...]
    places: Int64[np.ndarray, "files 4"]
    """Which archive, where in it, how many bytes, and how it lies there: PLAIN, ZIPPED or DEFLATED."""

    def read(self, row: int) -> bytes:
        """The bytes of one file. OSError where they are not there, zlib.error where they are not what was packed."""
        place, start, size, method = self.places[row].tolist()
        with Path(self.archives[place]).open("rb", buffering=0) as file:
            if method != PLAIN:
                header = os.pread(file.fileno(), 30, start)
                start += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            packed = os.pread(file.fileno(), size, start)
        if method != DEFLATED:
            return packed
        found = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, LARGEST)
        if len(found) == LARGEST:
            raise OSError(errno.EFBIG, f"more than {LARGEST / 1e9:.0f} GB once unpacked")
        return found


@dataclass(frozen=True)
class Source:
    """The images of one split, found but not decoded."""

    root: str
    """Absolute folder or archive that the paths start from; of an array set, its name."""
    paths: tuple[str, ...]
    """One an image, with forward slashes."""
    stamps: Int64[np.ndarray, "files 2"]
    """Size in bytes and mtime in ns of each image file; of an array set, of the few files it is read from."""
    labels: tuple[str, ...] | None
    """Name of each image's class."""
    array: Callable[[], UInt8[np.ndarray, "n h w *rgb"]] | None = None
    """Reads the pixels of an array set; None where each path is a file."""
    stored: Stored | None = None
    """Where the files lie, if that is in archives."""

    def file(self, row: int) -> Path | io.BytesIO:
        """What Pillow opens to read that image; of an array set there is none."""
        return Path(self.root, self.paths[row]) if self.stored is None else io.BytesIO(self.stored.read(row))

    def take(self, rows: Sequence[int]) -> Source:
        """The images in these rows."""
        read, stored = self.array, self.stored
        return replace(
            self,
            paths=tuple(self.paths[row] for row in rows),
            stamps=self.stamps if read else self.stamps[rows],
            labels=None if self.labels is None else tuple(self.labels[row] for row in rows),
            array=(lambda: read()[rows]) if read else None,
            stored=stored and stored._replace(places=stored.places[rows]),
        )


def default_cache() -> Path:
    """Folder of the decoded images: $CORINFOMAX_CACHE, else corinfomax in $XDG_CACHE_HOME, else ~/.cache/corinfomax."""
    if chosen := os.environ.get("CORINFOMAX_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "corinfomax"


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
    return from_files(root, below, files, classes if labelled else None)


def from_files(root: Path, below: str, files: Sequence[File], labels: tuple[str, ...] | None) -> Source:
    """These files, found in the folder `below` of `root`, as one split; raises MissingDataError if there are none."""
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
    return _from_rows(file, [Row(at, line) for at, line in _lines(file)])


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The number and text of each line that is not empty and no comment."""
    # Path names need not be UTF-8: surrogateescape is how Python itself spells the others.
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    return ((at, line) for at, line in enumerate(text.split("\n"), 1) if line.strip() and not line.startswith("#"))


def quoted(path: str) -> str:
    """`path` as one line that is safe to show and that `read_names` reads back.

    It is the path itself where that can be printed, and else a JSON string in ASCII: names may hold line breaks, bytes
    that are no UTF-8, and codes that a terminal obeys.
    """
    plain = path.isprintable() and path == path.strip() and not path.startswith(("#", '"'))
    return path if plain else json.dumps(path)


def read_names(file: Path) -> frozenset[str]:
    """The paths that a list names, one a line as `quoted` writes them; empty lines and those that start with # are not.

    Raises MissingDataError where there is no such file, DataError with the line where a quoted name is no JSON string.
    """
    if not file.is_file():
        raise MissingDataError(f"there is no list {file} of images to leave out; corinfomax doctor writes one")
    return frozenset(_unquoted(file, at, line) for at, line in _lines(file))


def names_as_text(names: Iterable[str]) -> str:
    """A list that `read_names` reads."""
    return "".join(f"{quoted(name)}\n" for name in names)


def _unquoted(file: Path, at: int, line: str) -> str:
    if not line.startswith('"'):
        return line
    try:
        return str(json.loads(line))
    except json.JSONDecodeError as error:
        raise DataError(
            f"line {at} of {file} starts with a quote and is no JSON string ({error.msg}): {line!r}; quotes are for "
            "names that are not plain text"
        ) from error


def without(source: Source, names: Collection[str]) -> Source | None:
    """The images of `source` whose paths `names` does not have, as if the others were not there; None if none is left.

    Classes stay what the whole folder says they are.
    """
    kept = [row for row, path in enumerate(source.paths) if path not in names]
    if len(kept) == len(source.paths):
        return source
    return source.take(kept) if kept else None


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
        try:
            rows = [
                Row(
                    reader.line_num, row[path], row[label].strip() if label else "", row[split].strip() if split else ""
                )
                for row in reader
            ]
        except csv.Error as error:
            raise DataError(f"line {reader.line_num} of {file}: {error}; is a quotation mark left open?") from error
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
    return from_files(file.parent, "", files, None if bare else tuple(row.label for row in rows))
