"""Images inside tables: Parquet with image bytes, and data sets of the Hugging Face library."""

import functools
import hashlib
import importlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from corinfomax.images import files
from corinfomax.images.files import DataError, Located, Source, stamp
from corinfomax.images.layout import split_in
from corinfomax.images.tables import LABEL_COLUMNS, PATH_COLUMNS
from corinfomax.runtime import extras

HUB = "hf:"  # before the name of a data set on the hub
ON_DISK = ("dataset_dict.json", "state.json")  # files of a folder that `datasets` saved: of several splits, of one
ENDING = ".parquet"


def from_parquet(place: Path) -> Located:
    """Splits of a Parquet file, or of a folder of them: each file belongs to the split in its name.

    An image column holds bytes, alone or with a path, as on the Hugging Face hub. Labels come from a column of
    LABEL_COLUMNS, with the names of their classes if the file records them. Raises DataError without an image column.
    """
    parts = sorted(place.rglob(f"*{ENDING}")) if place.is_dir() else [place]
    names = [_split_of(part, place) for part in parts]
    notes = []
    if "train" not in names:
        if len({*names} - {None}) > 1:
            have = files.listed(sorted(filter(None, {*names})))
            raise DataError(f"{place} has no training images: no table of {have} is called train")
        names = ["train"] * len(names)
    elif bare := [part for part, name in zip(parts, names, strict=True) if name is None]:
        notes.append(f"not read: {files.some(len(bare), 'table')} without a split in its name, first {bare[0].name}")
    splits = {}
    for split in ("train", "val", "test"):
        if own := [part for part, name in zip(parts, names, strict=True) if name == split]:
            splits[split] = _source_of_parts(place, own)
    return Located(splits, tuple(notes))


def _split_of(part: Path, place: Path) -> str | None:
    """The split in the name of a table, or else of the nearest folder inside `place` that has one."""
    folders = part.relative_to(place).parent.parts if part != place else ()
    return next((split for name in (part.stem, *reversed(folders)) if (split := split_in(name))), None)


class _Columns(NamedTuple):
    image: str
    label: str | None
    classes: list[str] | None  # names of the labels, if these are numbers


def _source_of_parts(place: Path, parts: Sequence[Path]) -> Source:
    parquet = _library("pyarrow.parquet", "Parquet", "pyarrow", extra="parquet")

    # row and class of each image
    places, paths, labels = [], list[str](), list[str]()
    columns = None
    for number, part in enumerate(parts):
        with parquet.ParquetFile(part) as table:
            columns = _columns(part, table.schema_arrow)
            label = [] if columns.label is None else table.read([columns.label]).column(0).to_pylist()
            labels += [_class_name(value, columns.classes) for value in label]
            first = len(paths)
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                places += [(number, group, row) for row in range(rows)]
            name = part.relative_to(place).as_posix() if part != place else part.name
            paths += [f"{name}/{row:06d}" for row in range(len(places) - first)]
    assert columns is not None

    # the images, read when they are needed
    stamps = np.array([stamp(part.stat()) for part in parts], np.int64)
    rows = ParquetImages([str(part) for part in parts], columns.image, np.array(places, np.int64).reshape(-1, 3))
    return Source(str(place.absolute()), tuple(paths), stamps, _all_labels(place, labels), rows)


def _columns(part: Path, schema: Any) -> _Columns:
    """The columns of images and of labels, from what the file records or from their names and types."""
    import pyarrow as pa

    recorded = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = recorded.get("info", {}).get("features", {})
    images = [name for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "Image"]
    for field in schema:
        holds_bytes = pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        if holds_bytes or (pa.types.is_binary(field.type) and field.name.lower() in (*PATH_COLUMNS, "bytes")):
            images.append(field.name)
    if not images:
        named = files.listed(list(schema.names), most=8)
        raise DataError(f"{part} has no column of images, as bytes or with a field bytes: its columns are {named}")
    label = next((name for name in schema.names if name.lower() in LABEL_COLUMNS), None)
    kind = features.get(label)
    return _Columns(images[0], label, kind.get("names") if isinstance(kind, dict) else None)


def _class_name(value: Any, classes: Sequence[str] | None) -> str:
    if value is None or value == -1:  # as the hub marks test images without a label
        return ""
    return classes[value] if classes is not None and isinstance(value, int) else str(value)


def _all_labels(place: object, labels: Sequence[str]) -> tuple[str, ...] | None:
    if not any(labels):
        return None
    if not all(labels):
        raise DataError(
            f"{place} labels {sum(map(bool, labels)):,} of {len(labels):,} images: label all of a split or none"
        )
    return tuple(labels)


class ParquetImages:
    """The images in the rows of Parquet files, as the `array` of a source; row groups are read as they are needed."""

    def __init__(self, parts: list[str], column: str, places: Int64[np.ndarray, "n 3"]) -> None:
        self._parts, self._column, self._places = parts, column, places

    def __call__(self) -> "ParquetImages":
        return self

    def __getitem__(self, rows: int | Sequence[int]) -> Any:
        if not isinstance(rows, int):
            return ParquetImages(self._parts, self._column, self._places[rows])
        part, group, row = self._places[rows].tolist()
        return as_content(
            _row_group(self._parts[part], group, self._column)[row].as_py(), Path(self._parts[part]).parent
        )


@functools.lru_cache(maxsize=2)  # images are read in order, several processes at a time
def _row_group(part: str, group: int, column: str) -> Any:
    parquet = importlib.import_module("pyarrow.parquet")
    with parquet.ParquetFile(part) as table:
        return table.read_row_group(group, columns=[column]).column(0)


def as_content(cell: Any, folder: Path) -> io.BytesIO | Path:
    """The file in a cell: its bytes, or the path beside them."""
    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if content is not None:
        return io.BytesIO(content)
    if path is None:
        raise DataError("an empty cell")
    return folder / path


# The `datasets` library.


def is_saved(place: Path) -> bool:
    """True for a folder that `datasets` saved."""
    return any((place / name).is_file() for name in ON_DISK)


def from_saved(place: Path) -> Located:
    """Splits of a folder that `save_to_disk` wrote."""
    loaded = _library("datasets", "this folder", "datasets", extra="hf").load_from_disk(str(place))
    return _from_datasets(loaded, str(place.absolute()))


def from_hub(name: str) -> Located:
    """Splits of a data set on the Hugging Face hub, `hf:owner/name`, downloaded into that library's cache."""
    load = _library("datasets", name, "datasets", extra="hf").load_dataset
    try:
        return _from_datasets(load(name.removeprefix(HUB)), name)
    except Exception as error:  # of a network, a hub, or a data set that needs another name
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot load {name}: {reason}") from error


def _from_datasets(loaded: Any, place: str) -> Located:
    by_name = loaded if isinstance(loaded, dict) else {"train": loaded}
    named = {split_in(name): name for name in by_name}
    if "train" not in named:
        raise DataError(f"{place} has no split train: it has {files.listed(sorted(by_name))}")
    splits = {split: _source_of_dataset(by_name[name], place, split) for split, name in named.items() if split}
    unread = [name for name in by_name if split_in(name) is None]
    return Located(splits, (f"not read: the splits {files.listed(unread)}",) if unread else ())


def _source_of_dataset(dataset: Any, place: str, split: str) -> Source:
    library = importlib.import_module("datasets")
    images = [name for name, kind in dataset.features.items() if isinstance(kind, library.Image)]
    if not images:
        raise DataError(f"{place} has no column of images: its columns are {files.listed(list(dataset.features))}")
    label = next((name for name in dataset.features if name.lower() in LABEL_COLUMNS), None)
    classes = getattr(dataset.features.get(label), "names", None)
    labels = [] if label is None else [_class_name(value, classes) for value in dataset[label]]
    digest = hashlib.blake2b(dataset._fingerprint.encode(), digest_size=32).digest()
    rows = DatasetImages(
        dataset.select_columns(images[:1]).cast_column(images[0], library.Image(decode=False)), images[0]
    )
    paths = tuple(f"{split}/{row:06d}" for row in range(len(dataset)))
    return Source(place, paths, np.frombuffer(digest, np.int64).reshape(1, 4), _all_labels(place, labels), rows)


class DatasetImages:
    """The images of a data set of the Hugging Face library, as the `array` of a source."""

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset, self._column = dataset, column

    def __call__(self) -> "DatasetImages":
        return self

    def __getitem__(self, rows: int | Sequence[int]) -> Any:
        if not isinstance(rows, int):
            return DatasetImages(self._dataset.select(rows), self._column)
        return as_content(self._dataset[rows][self._column], Path())


def _library(module: str, what: str, package: str, *, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(extras.missing(what, package, extra=extra)) from None
