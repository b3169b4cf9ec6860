"""Image files on disk: splits of a folder, list or table, without opening an image."""

from __future__ import annotations

import csv
import errno
import functools
import io
import json
import os
import stat
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

EXTENSIONS: tuple[str, ...] = (".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg")
EXTENSIONS += (".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
SPLIT_NAMES = {name: split for split, names in SPLITS.items() for name in names}
PATH_COLUMNS = ("path", "file", "filename", "image", "filepath")
LABEL_COLUMNS = ("label", "class", "target")
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
                header = os.pread(file.fileno(), 30, start)
                start += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            packed = os.pread(file.fileno(), size, start)
        if method != DEFLATED:
            return packed
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, LARGEST)
        if len(content) == LARGEST:
            raise OSError(errno.EFBIG, f"more than {LARGEST / 1e9:.0f} GB once unpacked")
        return content


@dataclass(frozen=True)
class Source:
    """The images of one split, located but not decoded."""

    root: str  # absolute folder or archive that the paths start from; the name of an array set
    paths: tuple[str, ...]  # one per image, with forward slashes
    stamps: Int64[np.ndarray, "files 2"]  # bytes and mtime in ns of each file; of the few files that hold an array set
    labels: tuple[str, ...] | None  # class name of each image
    array: Callable[[], UInt8[np.ndarray, "n h w *rgb"]] | None = None  # reads the pixels of an array set, once
    stored: Stored | None = None  # positions of the files if they lie in archives

    def content(self, row: int) -> Path | io.BytesIO | UInt8[np.ndarray, "h w *rgb"]:
        """One image as `decode.open_image` takes it."""
        if self.array is not None:
            return self.array()[row]
        return Path(self.root, self.paths[row]) if self.stored is None else io.BytesIO(self.stored.read(row))

    def take(self, rows: Sequence[int]) -> Source:
        """The images in these rows."""
        read, stored = self.array, self.stored
        return replace(
            self,
            paths=tuple(self.paths[row] for row in rows),
            stamps=self.stamps if read else self.stamps[rows],
            labels=None if self.labels is None else tuple(self.labels[row] for row in rows),
            array=functools.cache(lambda: read()[rows]) if read else None,
            stored=stored and stored._replace(positions=stored.positions[rows]),
        )

    def without(self, names: Collection[str]) -> Source | None:
        """The images whose paths are not in `names`; None if no image is left."""
        rows = [row for row, path in enumerate(self.paths) if path not in names]
        if len(rows) == len(self.paths):
            return self
        return self.take(rows) if rows else None


def default_cache() -> Path:
    """Cache folder: $CORINFOMAX_CACHE, else corinfomax in $XDG_CACHE_HOME, else in ~/.cache."""
    if chosen := os.environ.get("CORINFOMAX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "corinfomax"


Stamps = dict[str, tuple[int, int]]  # bytes and mtime in ns of each file, by its path from the root


def scan(root: Path, below: str = "") -> Stamps:
    """List the image files under the folder `below` of `root`, sorted by path.

    Image files have a suffix in EXTENSIONS; hidden files and folders are ignored. Links are followed, except to a
    folder around them. A broken link is listed with size 0, so that decoding reports it.
    """
    stamps: Stamps = {}
    # folders still to read, each with those around it
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [(f"{below}/" if below else "", frozenset())]
    while pending:
        prefix, parents = pending.pop()
        status = (root / prefix).stat()
        folder = (status.st_dev, status.st_ino)
        if folder in parents:  # a link led back
            continue
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = prefix + entry.name
                is_image = path.lower().endswith(EXTENSIONS)  # Path.suffix would take half of all the time
                try:
                    status = entry.stat()
                except OSError:  # a link to nothing or to itself
                    if is_image:
                        stamps[path] = 0, 0
                    continue
                if stat.S_ISDIR(status.st_mode):
                    pending.append((f"{path}/", parents | {folder}))
                elif is_image and stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                    stamps[path] = status.st_size, status.st_mtime_ns
    return dict(sorted(stamps.items()))


def from_folder(root: Path) -> dict[str, Source]:
    """Splits of an image folder: flat, nested, `<class>/…`, or `<split>/…` around any of these.

    Folders that SPLIT_NAMES lists, in any case, are splits if one of them is train; all else is then ignored.
    """
    tops = [entry.name for entry in sorted(root.iterdir()) if entry.name.lower() in SPLIT_NAMES and entry.is_dir()]
    sources = {}
    for split, below in (split_folders(root, tops) or {"train": ""}).items():
        stamps = scan(root, below)
        labels = folder_labels([path.removeprefix(f"{below}/") for path in stamps])
        sources[split] = from_files(root, below, stamps, labels)
    return sources


def split_folders(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Folder of each split; {} without train. Raises DataError for two folders of one split."""
    folders: dict[str, str] = {}
    for name in names:
        if (split := SPLIT_NAMES.get(name.lower())) in folders:
            raise DataError(f"{root} has two folders for {split}: {folders[split]} and {name}; keep one")
        if split is not None:
            folders[split] = name
    return folders if "train" in folders else {}


def folder_labels(paths: Sequence[str]) -> tuple[str, ...] | None:
    """First folder of each path; None if a path has no folder or all have the same."""
    folders = tuple(sys.intern(path.partition("/")[0]) for path in paths if "/" in path)
    return folders if len(folders) == len(paths) and len(set(folders)) > 1 else None


def from_files(root: Path, below: str, stamps: Stamps, labels: tuple[str, ...] | None) -> Source:
    """One split from its files in the folder `below` of `root`; MissingDataError for none."""
    if not stamps:
        raise no_images(f"{root / below} or its folders")
    return Source(str(root), tuple(stamps), np.array(list(stamps.values()), np.int64), labels)


def no_images(place: str) -> MissingDataError:
    """The error for a place without images."""
    return MissingDataError(f"no image found in {place}; looked for files that end in {' '.join(EXTENSIONS)}")


class Line(NamedTuple):
    number: int
    path: str
    label: str = ""
    split: str = "train"


def from_list(file: Path) -> dict[str, Source]:
    """The one split of a text file with a path a line, from its folder; # starts a comment."""
    return _from_lines(file, [Line(number, path) for number, path in _text_lines(file)])


def from_table(file: Path) -> dict[str, Source]:
    """Splits of a CSV table: a column of PATH_COLUMNS, perhaps of LABEL_COLUMNS and `split`.

    Paths start from the table's folder; images keep its order. Raises DataError, with the line, for a path that is
    listed twice or has no file, an unknown split, and a split with images that have a label and images that have none.
    """
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        # the columns, by their names in any case
        reader = csv.DictReader(stream, skipinitialspace=True, restval="")
        columns = {name.strip().lower(): name for name in reader.fieldnames or ()}
        path = next((columns[name] for name in PATH_COLUMNS if name in columns), None)
        label = next((columns[name] for name in LABEL_COLUMNS if name in columns), None)
        split = columns.get("split")
        if path is None:
            problem = f"has no column of paths: its first line names {', '.join(columns) or 'nothing'}"
            raise DataError(f"{file} {problem}; call one column {' or '.join(PATH_COLUMNS)}")
        lines: list[Line] = []
        try:
            for cells in reader:
                line = Line(reader.line_num, cells[path], cells[label].strip() if label else "")
                lines.append(line._replace(split=cells[split].strip()) if split else line)
        except csv.Error as error:
            raise DataError(f"line {reader.line_num} of {file}: {error}; is a quotation mark left open?") from error
    return _from_lines(file, lines)


def _from_lines(file: Path, lines: Sequence[Line]) -> dict[str, Source]:
    numbers: dict[str, int] = {}
    splits: dict[str, list[Line]] = {}
    for line in lines:
        number, path, _, split = line
        if not path.strip():
            raise DataError(f"line {number} of {file} has no path; fill it in or remove the line")
        if split.lower() not in SPLIT_NAMES:
            choices = ", ".join(SPLIT_NAMES)
            raise DataError(f"line {number} of {file} has split {split!r}; choose from {choices}, or remove the column")
        if path in numbers:
            raise DataError(f"{file} names {path} twice, in lines {numbers[path]} and {number}; keep one")
        numbers[path] = number
        splits.setdefault(SPLIT_NAMES[split.lower()], []).append(line)
    if "train" not in splits:
        raise DataError(f"{file} names no image to train on" + (": no row has split train" if lines else ""))
    return {split: _from_split(file, split, images) for split, images in splits.items()}


def _from_split(file: Path, split: str, lines: Sequence[Line]) -> Source:
    # the files themselves
    stamps: Stamps = {}
    missing: list[Line] = []
    for line in lines:
        try:
            status = (file.parent / line.path).stat()
            stamps[line.path] = status.st_size, status.st_mtime_ns
        except OSError:
            missing.append(line)
    if missing:
        problem = f"{len(missing)} of the {len(lines)} {split} images in {file} do not exist"
        first = f"line {missing[0].number}: {missing[0].path}"
        raise MissingDataError(f"{problem}, first {first}; paths start from {file.parent}")

    # labels: all or none
    bare = [line for line in lines if not line.label]
    if 0 < len(bare) < len(lines):
        first = f"the first without a label is {bare[0].path} in line {bare[0].number}: label all of a split or none"
        raise DataError(f"{file} labels {len(lines) - len(bare)} of its {len(lines)} {split} images; {first}")
    return from_files(file.parent, "", stamps, None if bare else tuple(line.label for line in lines))


def _text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is neither empty nor a comment."""
    # Path names need not be UTF-8: surrogateescape is Python's own spelling of the others.
    lines = enumerate(file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n"), 1)
    return ((number, line) for number, line in lines if line.strip() and not line.startswith("#"))


def read_names(file: Path) -> frozenset[str]:
    """Paths in a skip list, one a line as `quoted` writes them; # starts a comment.

    Raises MissingDataError if there is no such file, DataError with the line if a quoted name is not a JSON string.
    """
    if not file.is_file():
        raise MissingDataError(f"no list of images to leave out at {file}; corinfomax doctor writes one")
    names = set()
    for number, line in _text_lines(file):
        try:
            names.add(str(json.loads(line)) if line.startswith('"') else line)
        except json.JSONDecodeError as error:
            problem = f"starts with a quote but is no JSON string ({error.msg}): {line!r}"
            remedy = "quote only names that are not plain text"
            raise DataError(f"line {number} of {file} {problem}; {remedy}") from error
    return frozenset(names)


def names_as_text(names: Iterable[str]) -> str:
    """The inverse of `read_names`."""
    return "".join(f"{quoted(name)}\n" for name in names)


def quoted(path: str) -> str:
    """`path` on one line that is safe to print and that `read_names` reads back, perhaps as JSON."""
    # names may hold line breaks, bytes outside UTF-8 and codes that a terminal obeys
    plain = path.isprintable() and path == path.strip() and not path.startswith(("#", '"'))
    return path if plain else json.dumps(path)
