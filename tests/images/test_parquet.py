"""Images in Parquet and in data sets of the Hugging Face library: the same images are the same run in any form."""

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from corinfomax.images import cache, parquet, readers
from corinfomax.images.files import DataError
from corinfomax.images.in_memory import from_memory
from corinfomax.images.sources import Data
from corinfomax.runtime import run_folder

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
CLASSES = ["green", "red"]


def rows_of(folder: Path) -> list[tuple[bytes, str, str]]:
    """Bytes, path and class of each image, in the order of a folder."""
    files = sorted(folder.rglob("*.png"))
    return [(file.read_bytes(), file.relative_to(folder).as_posix(), file.parent.name) for file in files]


def table(rows: list[tuple[bytes, str, str]], *, numbered: bool = True) -> "pa.Table":
    """As the hub has them: bytes and path in a struct, classes as numbers with names in the metadata."""
    images = pa.array([{"bytes": content, "path": path} for content, path, _ in rows])
    labels = pa.array([CLASSES.index(name) if numbered else name for *_, name in rows])
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if numbered else {}
    return pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Data]:
    """The same 40 images as folder, archives, tables and in memory."""
    root = tmp_path_factory.mktemp("forms")
    folder = tiny.folder(root / "folder", {"": 40})
    rows = rows_of(folder)
    with zipfile.ZipFile(root / "a.zip", "w") as archive:
        for content, path, _ in rows:
            archive.writestr(path, content)
    with tarfile.open(root / "a.tar", "w") as tape:
        for content, path, _ in rows:
            info = tarfile.TarInfo(path)
            info.size = len(content)
            tape.addfile(info, io.BytesIO(content))
    lines = ["path,label", *(f"{path},{name}" for _, path, name in rows)]
    (folder / "a.csv").write_text("\n".join(lines))
    pq.write_table(table(rows), root / "a.parquet", row_group_size=7)
    (root / "parts").mkdir()
    pq.write_table(table(rows[:25]), root / "parts" / "train-00000-of-00002.parquet")
    pq.write_table(table(rows[25:]), root / "parts" / "train-00001-of-00002.parquet")
    places = {name: Data(root / name) for name in ("folder", "a.zip", "a.tar", "folder/a.csv", "a.parquet", "parts")}
    pixels = [np.asarray(Image.open(io.BytesIO(content))) for content, *_ in rows]
    places["memory"] = Data(from_memory(pixels, [name for *_, name in rows]))
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_parquet(str(root / "a.parquet"), cache_dir=str(root / "hf"))
    saved.save_to_disk(str(root / "saved"))
    places["saved"] = Data(root / "saved")
    return places


FORMS = ["a.zip", "a.tar", "folder/a.csv", "a.parquet", "parts", "memory", "saved"]


@pytest.mark.parametrize("form", FORMS)
def test_the_same_images_are_the_same_run(forms, tmp_path, form):
    """Pixels, labels, and the loss of 20 steps to the last bit."""
    losses = []
    for name in ("folder", form):
        splits = cache.load(forms[name], side=16, progress=False)
        assert splits.train.classes == tuple(CLASSES)
        losses.append((splits, tmp_path / Path(name).name))
    (ours, _), (theirs, _) = losses
    assert ours.train.pixels.equal(theirs.train.pixels) and ours.train.sizes.equal(theirs.train.sizes)
    assert ours.train.labels.equal(theirs.train.labels) and ours.test.labels.equal(theirs.test.labels)
    rows = []
    for splits, out in losses:
        tiny.run(splits, out, tiny.replace(tiny.RECIPE, epochs=5))
        rows.append([(row.step, row.loss) for row in run_folder.read_metrics(out)])
    assert rows[0] == rows[1] and len(rows[0]) == 20


def test_each_table_belongs_to_the_split_in_its_name(tmp_path):
    rows = rows_of(tiny.folder(tmp_path / "folder", {"": 10}))
    for name, part in (("train-0", rows[:6]), ("validation-0", rows[6:8]), ("test-0", rows[8:])):
        pq.write_table(table(part, numbered=False), tmp_path / f"{name}.parquet")
    splits = Data(tmp_path / "train-0.parquet").splits()
    assert splits.keys() == {"train"} and len(splits["train"].paths) == 6
    (tmp_path / "data").mkdir()
    for file in tmp_path.glob("*.parquet"):
        file.rename(tmp_path / "data" / file.name)
    splits = Data(tmp_path / "data").splits()
    assert {name: len(source.paths) for name, source in splits.items()} == {"train": 6, "val": 2, "test": 2}
    assert splits["val"].labels == tuple(name for *_, name in rows[6:8])
    (tmp_path / "data" / "train-0.parquet").unlink()
    with pytest.raises(DataError, match="no training images: no table of test and val is called train"):
        Data(tmp_path / "data").splits()


def test_folders_of_tables_are_splits_and_tables_without_one_are_named(tmp_path):
    """As the hub converts data sets: data/train/0000.parquet."""
    rows = rows_of(tiny.folder(tmp_path / "folder", {"": 9}))
    for name, part in (("train/0", rows[:4]), ("train/1", rows[4:6]), ("test/0", rows[6:8]), ("odd", rows[8:])):
        path = tmp_path / "data" / "default" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(part), path)
    data = Data(tmp_path / "data")
    assert {name: len(source.paths) for name, source in data.splits().items()} == {"train": 6, "test": 2}
    assert data.notes == ("not read: 1 table without a split in its name, first odd.parquet",)
    assert data.splits()["test"].paths[0] == "default/test/0.parquet/000000"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": ["a", "b"], "label": [0, 1]}, "has no column of images, .*: its columns are text and label"),
        ({"image": [b"x", b"y"], "label": ["a", None]}, "labels 1 of 2 images: label all of a split or none"),
    ],
)
def test_tables_that_cannot_be_read_say_why(tmp_path, columns, said):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=said):
        Data(tmp_path / "a.parquet").splits()


def test_cells_without_an_image_are_unreadable_images(tmp_path):
    content = rows_of(tiny.folder(tmp_path / "folder", {"": 1}, labelled=False))[0][0]
    Image.new("RGB", (5, 5)).save(tmp_path / "beside.png")
    cells = [{"bytes": content, "path": None}] * 200
    cells[3], cells[7], cells[9] = (
        {"bytes": b"torn", "path": None},
        {"bytes": None, "path": None},
        {"bytes": None, "path": "beside.png"},
    )
    pq.write_table(pa.table({"image": pa.array(cells)}), tmp_path / "a.parquet")
    train = cache.load(Data(tmp_path / "a.parquet"), side=16, progress=False).train
    assert [path for path, _ in train.skipped] == ["a.parquet/000003", "a.parquet/000007"]
    assert train.skipped[1][1] == "an empty cell" and len(train) == 198
    assert (5, 5) in {tuple(size) for size in train.sizes.tolist()}


def test_a_name_of_the_hub_asks_its_library_and_nothing_else_does(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = rows_of(tiny.folder(tmp_path / "folder", {"": 6}))
    pq.write_table(table(rows), tmp_path / "a.parquet")
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "hf"))
    asked = []

    def load_dataset(name):
        asked.append(name)
        return {"train": loaded, "validation": loaded.select([1, 2]), "extra": loaded}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = Data("hf:me/images")
    assert {name: len(source.paths) for name, source in data.splits().items()} == {"train": 6, "val": 2}
    assert data.notes == ("not read: the splits extra",) and data.absolute_name == "hf:me/images"
    assert data.splits()["val"].labels == tuple(name for *_, name in rows[1:3])
    assert asked == ["me/images"]
    monkeypatch.setattr(datasets, "load_dataset", lambda name: 1 / 0)
    with pytest.raises(DataError, match="cannot load hf:me/gone: division by zero"):
        Data("hf:me/gone").splits()


@pytest.mark.parametrize(
    ("module", "name", "extra"), [("pyarrow.parquet", "a.parquet", "parquet"), ("datasets", "hf:x", "hf")]
)
def test_a_missing_library_is_one_sentence(tmp_path, monkeypatch, module, name, extra):
    place = name
    if module != "datasets":
        pq.write_table(table(rows_of(tiny.folder(tmp_path / "folder", {"": 2}))), tmp_path / name)
        place = tmp_path / name
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"the extra {extra}: "):
        Data(place).splits()


def test_tests_of_parquet_use_its_own_rows(tmp_path):
    """A selection keeps the places of its rows in the files."""
    rows = rows_of(tiny.folder(tmp_path / "folder", {"": 9}))
    pq.write_table(table(rows), tmp_path / "a.parquet", row_group_size=2)
    source = parquet.from_parquet(tmp_path / "a.parquet").splits["train"].take([8, 0, 3])
    assert [source.content(row).getvalue() for row in range(3)] == [rows[row][0] for row in (8, 0, 3)]


def stacks(folder: Path) -> np.ndarray:
    """Two TIFFs of three named planes and one plain image, as files of a folder."""
    tifffile = pytest.importorskip("tifffile")
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 4000, (2, 3, 8, 9)).astype(np.uint16)
    for row, stack in enumerate(values):
        tifffile.imwrite(folder / f"{row}.tif", stack, imagej=True, metadata={"axes": "ZYX"})
    tifffile.imwrite(folder / "2.tif", values[0, 0])
    return np.concatenate((*values, values[:1, 0]))


@pytest.mark.parametrize("form", ["zip", "tar", "parquet"])
def test_every_plane_inside_archives_and_tables(tmp_path, form):
    wanted = stacks(tmp_path / "data")
    files, place = sorted((tmp_path / "data").iterdir()), tmp_path / f"a.{form}"
    if form == "parquet":
        pq.write_table(pa.table({"image": pa.array([{"bytes": file.read_bytes()} for file in files])}), place)
    elif form == "zip":
        with zipfile.ZipFile(place, "w") as archive:
            for file in files:
                archive.write(file, file.name)
    else:
        with tarfile.open(place, "w") as tape:
            for file in files:
                tape.add(file, file.name)
    data = Data(place, cache=tmp_path / "cache")
    pixels = data.survey().levels.pixels
    train = cache.load(data, side=8, pixels=pixels).train
    got = np.concatenate(train.cached(torch.arange(len(train))))
    np.testing.assert_array_equal(got, wanted)
    assert [path.rpartition("#")[2] for path in train.paths[:6]] == ["0", "1", "2"] * 2


def test_a_stack_that_was_not_looked_for_is_no_silent_first_plane(tmp_path):
    stacks(tmp_path / "data")
    with (
        pytest.raises(DataError, match="it holds 3 images, of which none is named"),
        readers.opened(io.BytesIO((tmp_path / "data" / "0.tif").read_bytes())),
    ):
        pass
