"""Archives: the same images, labels and fingerprint as the folder that they would unpack to; clear errors else."""

import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from corinfomax.images import archives, cache, files, layout
from corinfomax.images.files import DataError, MissingDataError
from corinfomax.images.sources import Data


def zipped(folder, out, *, inside="", method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(out, "w", method) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, Path(inside, path.relative_to(folder)))
    return out


def tarred(folder, out, *, inside="", form=tarfile.PAX_FORMAT):
    with tarfile.open(out, "w", format=form) as archive:
        archive.add(folder, inside or ".")
    return out


def find(path):
    return Data(path).splits()


FORMS = {
    "zip": zipped,
    "deflated zip": lambda folder, out: zipped(folder, out, method=zipfile.ZIP_DEFLATED),
    "zip of a folder": lambda folder, out: zipped(folder, out, inside="my data/v2"),
    "tar": tarred,
    "old tar of a folder": lambda folder, out: tarred(folder, out, inside="data", form=tarfile.GNU_FORMAT),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("splits", "labelled"),
    [({"train": 9, "test": 4}, True), ({"": 7}, True), ({"": 5}, False), ({"Training": 6}, True)],
)
def test_an_archive_is_the_folder(tmp_path, form, splits, labelled):
    folder = tiny.folder(tmp_path / "data", splits, labelled=labelled)
    long = folder / next(iter(splits)) / ("red" if labelled else "") / ("é" * 60 + "x" * 60 + ".png")  # over 100 bytes
    shutil.copy(next(folder.rglob("*.png")), long)
    (folder / ".hidden.png").write_bytes(b"no")
    (folder / "notes.txt").write_text("no")
    out = FORMS[form](folder, tmp_path / f"data{'.tar' if 'tar' in form else '.zip'}")
    want = cache.load(Data(folder, cache=tmp_path / "a"), side=16, progress=False)
    got = cache.load(Data(out, cache=tmp_path / "b"), side=16, progress=False)
    for ours, theirs in zip(got, want, strict=True):
        if theirs is None:
            assert ours is None
            continue
        assert ours.paths == theirs.paths
        assert ours.classes == theirs.classes
        assert ours.fingerprint == theirs.fingerprint
        assert torch.equal(ours.pixels, theirs.pixels)
        assert theirs.labels is None if ours.labels is None else torch.equal(ours.labels, theirs.labels)
    assert Data(str(out)).survey().short_side == 16


@pytest.mark.parametrize("form", FORMS)
def test_an_archive_without_images_says_so(tmp_path, form):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("no image")
    out = FORMS[form](tmp_path / "data", tmp_path / f"data{'.tar' if 'tar' in form else '.zip'}")
    with pytest.raises(MissingDataError, match="no image"):
        find(out)


def test_another_archive_of_the_same_size_and_time_is_another(tmp_path):
    for name, classes in (("one", ("blue", "rose")), ("two", ("tall", "wide"))):
        for label, picture in zip(classes, tiny.pictures(2), strict=True):
            (tmp_path / name / label).mkdir(parents=True)
            Image.fromarray(picture).save(tmp_path / name / label / "a.png")
    out, labels = tmp_path / "data.zip", []
    for name in ("one", "two"):
        out.unlink(missing_ok=True)
        zipped(tmp_path / name, out)
        os.utime(out, (1, 1))
        size = out.stat().st_size
        labels.append(find(out)["train"].labels)
    assert zipped(tmp_path / "one", tmp_path / "again.zip").stat().st_size == size
    assert labels == [("blue", "rose"), ("tall", "wide")]


@pytest.mark.parametrize("form", FORMS)
def test_an_archive_is_read_once_for_each_data(tmp_path, monkeypatch, form):
    folder = tiny.folder(tmp_path / "data", {"": 5})
    data = Data(FORMS[form](folder, tmp_path / f"data{'.tar' if 'tar' in form else '.zip'}"))
    paths = data.splits()["train"].paths
    for reader in ("_read_tar", "_read_zip"):
        monkeypatch.setattr(archives, reader, lambda *a, **k: pytest.fail("read again"))
    assert data.splits()["train"].paths == paths
    assert data.survey().images == data.whole_splits["train"].labels.count("red") + 2 == 5


def shard(out, rows, first):
    """A shard as webdataset writes it: the image, its class and more beside it, all of one name."""
    with tarfile.open(out, "w") as archive:
        for place, (image, label) in enumerate(rows, first):
            paths = {ending: out.parent / f"content.{ending}" for ending in ("cls", "json", "png")}
            Image.fromarray(image).save(paths["png"])
            paths["cls"].write_text(f"{label}\n")
            paths["json"].write_text("{}")
            for ending, path in paths.items():
                archive.add(path, f"{place:06}.{ending}")
                path.unlink()


@pytest.mark.parametrize("named", [True, False])
def test_shards_are_one_set_with_the_classes_beside_the_images(tmp_path, named):
    pictures = tiny.pictures(12)
    names = ("train-0000", "train-0001", "val-0000") if named else ("part1", "part2", "part3")
    for place, name in enumerate(names):
        rows = [(pictures[i], i % 2) for i in range(4 * place, 4 * place + 4)]
        shard(tmp_path / f"{name}.tar", rows, 4 * place)
    train, test = cache.load(
        Data(tmp_path, cache=tmp_path / "cache", holdout=None if named else 0), side=16, progress=False
    )
    assert train.classes == ("0", "1")
    assert len(train) == (8 if named else 12) and (test is None) != named
    seen = {}
    for split in (train, test):
        if split is not None:
            pixels, _ = split.batch(torch.arange(len(split)))
            for path, image, label in zip(split.paths, pixels.permute(0, 2, 3, 1).numpy(), split.labels, strict=True):
                seen[path] = image, int(label)
    assert seen.keys() == {f"{names[i // 4]}.tar/{i:06}.png" for i in range(12)}
    for path, (image, label) in seen.items():
        i = int(path[-10:-4])
        assert np.array_equal(image, pictures[i]) and label == i % 2


def test_a_damaged_image_in_an_archive_is_skipped_by_name(tmp_path):
    folder = tiny.folder(tmp_path / "data", {"": 120})
    (folder / "red" / "000.png").write_bytes(b"no image")
    for out in (zipped(folder, tmp_path / "a.zip", method=zipfile.ZIP_DEFLATED), tarred(folder, tmp_path / "a.tar")):
        train, _ = cache.load(Data(out, cache=tmp_path / "cache", holdout=0), side=16, progress=False)
        assert len(train) == 119 and train.skipped == (("red/000.png", "not an image"),)


@pytest.mark.parametrize("cut", [0, 10, 300, -40])
@pytest.mark.parametrize("make", [zipped, tarred])
def test_a_torn_archive_is_a_sentence(tmp_path, make, cut):
    out = make(tiny.folder(tmp_path / "data", {"": 6}), tmp_path / f"a.{'zip' if make is zipped else 'tar'}")
    if make is tarred and cut == -40:
        cut = 5000  # within the second image; the last bytes of a tar are padding
    out.write_bytes(out.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a\.(zip|tar)"):
        cache.load(Data(out, cache=tmp_path / "cache"), side=16, progress=False)


def test_what_cannot_be_read_in_place_says_what_to_do(tmp_path):
    folder = tiny.folder(tmp_path / "data", {"": 4})
    with pytest.raises(DataError, match="method 12; zip it with deflate"):
        find(zipped(folder, tmp_path / "b.zip", method=zipfile.ZIP_BZIP2))
    packed = tmp_path / "c.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(folder, "c")
    with pytest.raises(DataError, match=r"c\.tar\.gz .*unpack it"):
        find(packed)
    packed.rename(tmp_path / "d.tar")
    with pytest.raises(DataError, match=r"d\.tar is compressed"):
        find(tmp_path / "d.tar")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_text("")
    with pytest.raises(MissingDataError, match="no image"):
        find(zipped(empty, tmp_path / "e.zip"))
    encrypted = bytearray(zipped(folder, tmp_path / "f.zip").read_bytes())
    for at in range(len(encrypted)):
        if encrypted[at : at + 4] == b"PK\x01\x02":
            encrypted[at + 8] |= 1
    (tmp_path / "f.zip").write_bytes(encrypted)
    with pytest.raises(DataError, match="encrypted"):
        find(tmp_path / "f.zip")


def test_the_split_of_a_shard_is_the_word_in_its_name(tmp_path):
    names = {"train-01": "train", "TEST_2": "test", "set-v1-validation-00": "val", "valley1": None}
    assert {name: layout.split_in(name) for name in names} == names
    with pytest.raises(DataError, match="test and train"):
        layout.split_in("train-test")
    for name in ("val-0", "test-0"):
        shard(tmp_path / f"{name}.tar", [(image, 0) for image in tiny.pictures(2)], 0)
    with pytest.raises(DataError, match=r"no training images: no shard of test-0\.tar and val-0\.tar has train"):
        find(tmp_path)
    (tmp_path / "test-0.tar").rename(tmp_path / "val-1.tar")
    assert find(tmp_path).keys() == {"train"}
    assert "those of val are training images too" in Data(tmp_path).notes[0]


def test_shards_without_a_split_beside_some_that_have_one_are_not_trained_on(tmp_path):
    folder = tiny.folder(tmp_path / "data", {"": 4})
    (coco := tmp_path / "coco").mkdir()
    for name in ("train2017", "val2017", "stuff_masks", "unlabeled2017"):
        zipped(folder, coco / f"{name}.zip")
    assert {split: len(source.paths) for split, source in find(coco).items()} == {"train": 4, "val": 4}
    unread = "not read: stuff_masks.zip and unlabeled2017.zip (8 images), without a split in their names"
    assert unread in Data(coco).notes


def test_splits_inside_shards_are_splits(tmp_path):
    for part in ("part1", "part2"):
        folder = tiny.folder(tmp_path / part, {"train": 8, "test": 4})
        zipped(folder, tmp_path / f"{part}.zip")
        shutil.rmtree(folder)
    splits = find(tmp_path)
    assert {split: len(source.paths) for split, source in splits.items()} == {"train": 16, "test": 8}
    assert set(splits["train"].labels) == set(splits["test"].labels) and len(set(splits["train"].labels)) > 1
    assert splits["train"].paths[0].startswith("part1.zip/train/")


LAYOUTS = [
    "train2017/1.png train2017/2.png val2017/3.png notes/a.json",
    "bus/1.png car/2.png train/3.png",
    "data/train/cat/1.png data/train/dog/2.png data/test/dog/3.png data/dev/4.png data/5.png",
    "cat/1.png dog/2.png 3.png 4.heic",
    "train/cat/1.png train/dog/2.png val/cat/3.png @eaDir/4.png",
    "val/1.png test/2.png",
]


@pytest.mark.parametrize("paths", LAYOUTS)
def test_a_folder_and_its_archives_are_read_alike(tmp_path, paths):
    folder = tmp_path / "d"
    for path in paths.split():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode())

    def read(name):
        data = Data(name)
        try:
            found = data.splits()
        except DataError as error:
            return str(error).replace(str(name), "")
        # an archive leaves out the folders around all images
        inner = {split: [path.removeprefix("data/") for path in found[split].paths] for split in found}
        notes = [note.replace("data/", "").replace("x/y/", "") for note in data.notes]
        return inner, {split: found[split].labels for split in found}, notes

    want = read(folder)
    for out in (
        zipped(folder, tmp_path / "d.zip"),
        tarred(folder, tmp_path / "d.tar"),
        tarred(folder, tmp_path / "e.tar", inside="x/y"),
    ):
        assert read(out) == want


def entries(out, paths, folder):
    """A zip of one image under each of these names."""
    picture = next(folder.rglob("*.png")).read_bytes()
    with zipfile.ZipFile(out, "w") as archive:
        for path in paths:
            info = zipfile.ZipInfo("x")
            info.filename = path
            archive.writestr(info, picture)
    return out


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        (["train\\a\\0.png", "train\\b\\1.png", "test\\a\\2.png"], {"train": ["train/a/0.png", "train/b/1.png"]}),
        (["/abs/0.png", "x/1.png"], {"train": ["abs/0.png", "x/1.png"]}),
        (["./a/0.png", "a/./1.png"], {"train": ["0.png", "1.png"]}),
        (["a/0.png", "__MACOSX/a/._0.png", "a/.thumb/1.png"], {"train": ["0.png"]}),
        (["a/0.png", "b/1.png", "a/0.png"], {"train": ["a/0.png", "b/1.png"]}),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_as_other_programs_write_them(tmp_path, paths, found):
    out = entries(tmp_path / "a.zip", paths, tiny.folder(tmp_path / "data", {"": 1}))
    splits = find(out)
    assert {name: list(splits[name].paths) for name in found} == found
    assert set(splits) == ({"train", "test"} if "\\" in paths[0] else {"train"})


def test_hard_links_and_appended_files_are_those_that_unpacking_leaves(tmp_path):
    folder = tiny.folder(tmp_path / "data", {"": 4}, labelled=False)
    os.link(folder / "000.png", folder / "link.png")
    out = tarred(folder, tmp_path / "a.tar")
    (folder / "001.png").write_bytes((folder / "002.png").read_bytes())
    with tarfile.open(out, "a") as archive:
        archive.add(folder / "001.png", "001.png")
    ours, _ = cache.load(Data(out, cache=tmp_path / "cache"), side=16, progress=False)
    theirs, _ = cache.load(Data(folder, cache=tmp_path / "cache"), side=16, progress=False)
    assert ours.fingerprint == theirs.fingerprint and "link.png" in ours.paths


def test_links_inside_a_tar_are_images_and_others_are_counted(tmp_path):
    folder = tiny.folder(tmp_path / "data", {"": 4}, labelled=False)
    (folder / "other").mkdir()
    (folder / "other" / "link.png").symlink_to("../000.png")
    (folder / "out.png").symlink_to("/nowhere/x.png")
    (folder / "self").symlink_to("other")
    data = Data(tarred(folder, tmp_path / "a.tar"))
    assert [*data.splits()["train"].paths] == [f"{i:03}.png" for i in range(4)] + ["other/link.png"]
    assert "not read: 2 links, first out.png" in data.notes


def test_members_that_would_leave_the_folder_are_not_read(tmp_path):
    paths = ["a/0.png", "b/1.png", "../esc/2.png", "a/../../3.png"]
    data = Data(entries(tmp_path / "a.zip", paths, tiny.folder(tmp_path / "data", {"": 1})))
    assert data.splits()["train"].labels == ("a", "b")
    assert data.notes == ("not read: 2 outside paths, first ../esc/2.png",)


def test_what_is_not_clear_is_asked(tmp_path):
    folder = tiny.folder(tmp_path / "data", {"": 4})
    beside = tmp_path / "beside"
    beside.mkdir()
    tarred(folder, beside / "a.tar")
    shutil.copy(next(folder.rglob("*.png")), beside / "thumb.png")
    with pytest.raises(DataError, match=r"1 images and also 1 archives, first a\.tar"):
        find(beside)
    inner = tmp_path / "inner" / "train"
    inner.mkdir(parents=True)
    tarred(folder, inner / "0.tar")
    with pytest.raises(DataError, match=r"0\.tar.*named by its split"):
        find(tmp_path / "inner")
    shard(tmp_path / "some.tar", [(image, 1) for image in tiny.pictures(3)], 0)
    with tarfile.open(tmp_path / "some.tar", "a") as archive:
        archive.add(next(folder.rglob("*.png")), "000009.png")
    with pytest.raises(DataError, match=r"3 of the 4 images .* 000009\.png has none"):
        find(tmp_path / "some.tar")


def test_a_packed_bomb_is_unreadable_and_no_memory_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 10_000)
    folder = tiny.folder(tmp_path / "data", {"": 120})
    (folder / "red" / "000.png").write_bytes(bytes(1_000_000))
    out = zipped(folder, tmp_path / "a.zip", method=zipfile.ZIP_DEFLATED)
    train, _ = cache.load(Data(out, cache=tmp_path / "cache", holdout=0), side=16, progress=False)
    assert train.skipped[0][0] == "red/000.png" and "once unpacked" in train.skipped[0][1]
