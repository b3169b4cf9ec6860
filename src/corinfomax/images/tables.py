"""Lists of images, tables with labels and splits, and lists of images to skip."""

import contextlib
import csv
import functools
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from corinfomax.images import files
from corinfomax.images.files import DataError, Located, MissingDataError, Source, quoted
from corinfomax.images.layout import SPLIT_NAMES, rest_of, split_in

PATH_COLUMNS = ("path", "file", "filename", "image", "filepath", "file_name", "file_path", "image_path", "img_path")
LABEL_COLUMNS = ("label", "class", "target", "labels", "category", "class_name", "label_name")
SPLIT_COLUMNS = ("split", "subset", "partition", "set")  # all but the first count only if each row names a split
DELIMITERS = ",;\t|"
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}  # first bytes of a text


class Line(NamedTuple):
    number: int
    path: str
    label: str = ""
    split: str = "train"


def from_list(file: Path) -> Located:
    """The one split of a text file with a path a line, from its folder; # starts a comment."""
    lines, comments = _text_lines(file)
    notes: tuple[str, ...] = ()
    if comments:
        meaning = "line that starts with # is a comment"
        if len(comments) > 1:
            meaning = "lines that start with # are comments"
        count, first = len(comments), quoted(comments[0])
        notes = (f"{count:,} {meaning} in {file.name}, first {first} (a path may start with ./#)",)
    return Located(_from_lines(file, [Line(number, path) for number, path in lines]), notes)


def from_table(file: Path) -> Located:
    """Splits of a table: a column of PATH_COLUMNS, perhaps of LABEL_COLUMNS and of SPLIT_COLUMNS.

    Columns are parted by one of DELIMITERS. Paths start from the table's folder; images keep its order. Raises
    DataError, with the line, for a path that is listed twice or has no file, an unknown split, and a split with images
    that have a label and images that have none.
    """
    text = _read_text(file)
    rows, columns = _read_rows(file, text)

    # the columns, by their names in any case
    path = next((columns[name] for name in PATH_COLUMNS if name in columns), None)
    label = next((columns[name] for name in LABEL_COLUMNS if name in columns), None)
    split = _split_column(columns, rows)
    if path is None:
        problem = f"has no column of paths: its first line names {', '.join(columns) or 'nothing'}"
        raise DataError(f"{file} {problem}; call one column {' or '.join(PATH_COLUMNS)}")
    lines: list[Line] = []
    for number, cells in rows:
        line = Line(number, cells[path], cells[label].strip() if label else "")
        lines.append(line._replace(split=cells[split].strip()) if split else line)

    # what was read, unless that is all
    notes: tuple[str, ...] = ()
    if unread := [name for name in columns if columns[name] not in (path, label, split) and name]:
        named = {"paths": path, "labels": label, "splits": split}
        read = files.listed([f"{content} from {column.strip()}" for content, column in named.items() if column])
        notes = (f"columns of {file.name}: {read}; not read: {files.listed(unread)}",)
    return Located(_from_lines(file, lines), notes)


def _read_text(file: Path) -> str:
    """The text of a list or table in UTF-8, or UTF-16 with its mark."""
    content = file.read_bytes()
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    if encoding != "utf-16" and b"\0" in content:
        raise DataError(f"{file} is not text in UTF-8: perhaps UTF-16 without a byte-order mark; save it as UTF-8")
    # Path names need not be UTF-8: surrogateescape is Python's own spelling of the others.
    errors = "replace" if encoding == "utf-16" else "surrogateescape"
    return content.decode(encoding, errors).replace("\r\n", "\n").replace("\r", "\n")


def _read_rows(file: Path, text: str) -> tuple[list[tuple[int, dict[str, str]]], dict[str, str]]:
    """Line number and cells of each row, and the header's names in lower case with the names as they stand."""
    header = text.partition("\n")[0]
    parted = {
        mark: {name.strip().lower() for name in next(csv.reader([header], delimiter=mark))} for mark in DELIMITERS
    }
    delimiter = next((mark for mark, names in parted.items() if not names.isdisjoint(PATH_COLUMNS)), ",")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, restval="")
    names = [name.strip().lower() for name in reader.fieldnames or ()]
    if twins := [name for name in (*PATH_COLUMNS, *LABEL_COLUMNS, *SPLIT_COLUMNS) if names.count(name) > 1]:
        raise DataError(f"{file} has {names.count(twins[0])} columns called {twins[0]!r}; rename those not to read")
    rows = []
    try:
        for cells in reader:
            surplus = cells.pop(None, [])
            if any(surplus):
                excess = f"line {reader.line_num} of {file} has {len(names) + len(surplus)} cells"
                raise DataError(f"{excess} and the first line {len(names)}: put text with {delimiter!r} in quotes")
            rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise DataError(f"line {reader.line_num} of {file}: {error}; is a quote left open?") from error
    return rows, dict(zip(names, reader.fieldnames or (), strict=True))


def _split_column(columns: Mapping[str, str], rows: Sequence[tuple[int, Mapping[str, str]]]) -> str | None:
    for name in SPLIT_COLUMNS:
        column = columns.get(name)
        if column and (name == SPLIT_COLUMNS[0] or all(_split_of(cells[column]) for _, cells in rows)):
            return column
    return None


def _split_of(cell: str) -> str | None:
    name = cell.strip()
    is_text = " " in name and rest_of(name)  # such as "not in test"
    return SPLIT_NAMES.get(name.lower()) or (None if is_text else split_in(name))


def _from_lines(file: Path, lines: Sequence[Line]) -> dict[str, Source]:
    splits: dict[str, list[Line]] = {}
    for line in lines:
        if "\n" in line.path + line.label + line.split:
            raise DataError(f"line {line.number} of {file} ends a cell of several lines: is a quote left open?")
        if not line.path.strip():
            raise DataError(f"line {line.number} of {file} has no path; fill it in or remove the line")
        if (split := _split_of(line.split)) is None:
            wrong = f"line {line.number} of {file} has split {line.split!r}"
            raise DataError(f"{wrong}; choose from {', '.join(SPLIT_NAMES)}, or remove the column")
        splits.setdefault(split, []).append(line)
    if "train" not in splits:
        raise DataError(f"{file} names no image to train on" + (": no row has split train" if lines else ""))

    # each image once, whatever its path is called
    numbers: dict[str, Line] = {}
    real_folder = functools.cache(os.path.realpath)
    located = {split: _locate(file, split, images) for split, images in splits.items()}
    for split, images in splits.items():
        for line, (path, _) in zip(images, located[split], strict=True):
            folder, name = os.path.split(file.parent / path)
            first = numbers.setdefault(str(Path(real_folder(folder), name)), line)
            if first is not line:
                same = line.path if line.path == first.path else f"one file as {first.path} and {line.path},"
                raise DataError(f"{file} names {same} twice, in lines {first.number} and {line.number}; keep one")
    return {split: _source(file, split, splits[split], dict(stamps)) for split, stamps in located.items()}


def _locate(file: Path, split: str, lines: Sequence[Line]) -> list[tuple[str, files.Stamp]]:
    """Path and stamp of each line's file; MissingDataError for files that do not exist."""
    places = [_find(file.parent, line.path) for line in lines]
    missing = [line for line, place in zip(lines, places, strict=True) if place is None]
    if missing:
        problem = f"{len(missing)} of the {len(lines)} {split} images in {file} do not exist"
        first = f"line {missing[0].number}: {quoted(missing[0].path)}"
        raise MissingDataError(f"{problem}, first {first}; paths are relative to {file.parent}")
    return [place for place in places if place is not None]


def _find(folder: Path, path: str) -> tuple[str, files.Stamp] | None:
    # as it stands, without spaces around it, with the slashes of this system
    bare = path.strip()
    for name in dict.fromkeys((path, bare, bare.replace("\\", "/"))):
        with contextlib.suppress(OSError, ValueError):  # a NUL in a path is a ValueError
            return name, files.stamp((folder / name).stat())
    return None


def _source(file: Path, split: str, lines: Sequence[Line], stamps: files.Stamps) -> Source:
    """The images of one split, with labels for all of them or none."""
    bare = [line for line in lines if not line.label]
    if 0 < len(bare) < len(lines):
        first = f"the first without a label is {bare[0].path} in line {bare[0].number}: label all of a split or none"
        raise DataError(f"{file} labels {len(lines) - len(bare)} of its {len(lines)} {split} images; {first}")
    return files.from_files(file.parent, stamps, None if bare else tuple(line.label for line in lines))


def _text_lines(file: Path) -> tuple[list[tuple[int, str]], list[str]]:
    """Number and text of each line that is neither empty nor a comment, and the comments."""
    lines = [(number, line) for number, line in enumerate(_read_text(file).split("\n"), 1) if line.strip()]
    comments = [line for _, line in lines if line.startswith("#")]
    return [(number, line) for number, line in lines if not line.startswith("#")], comments


def read_names(file: Path) -> frozenset[str]:
    """Paths in a skip list, one a line as `quoted` writes them; # starts a comment.

    Raises MissingDataError if there is no such file, DataError with the line if a quoted name is not a JSON string.
    """
    if not file.exists() or file.is_dir():
        raise MissingDataError(f"no list of images to leave out at {file}; corinfomax doctor writes one")
    names = set()
    for number, line in _text_lines(file)[0]:
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
