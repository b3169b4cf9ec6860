"""What takes a look at every file is found once, until a file changes."""

import numpy as np
import pytest
import tifffile

from corinfomax.images import levels, readers
from corinfomax.images.files import DataError
from corinfomax.images.sources import Data


@pytest.fixture
def stacks(tmp_path):
    """A folder with three files of 16 bits: one of two slices and two of one."""
    (tmp_path / "data").mkdir()
    for name, slices in (("a", 2), ("b", 1), ("c", 1)):
        values = np.random.default_rng(0).integers(0, 4000, (slices, 8, 9), np.uint16)
        tifffile.imwrite(tmp_path / "data" / f"{name}.tif", values, imagej=True, metadata={"axes": "ZYX"})
    return tmp_path / "data"


@pytest.fixture
def looks(monkeypatch):
    """The number of looks at a file so far, for its planes and for its levels."""
    made = {"planes": 0, "image_levels": 0}

    def counted(module, name):
        original = getattr(module, name)

        def look(*arguments):
            made[name] += 1
            return original(*arguments)

        monkeypatch.setattr(module, name, look)

    counted(readers, "planes")
    counted(levels, "image_levels")
    return made


def seen(stacks, **options):
    """Paths and levels of the images."""
    data = Data(stacks, **{"cache": stacks.parent / "cache"} | options)
    return data.splits()["train"].paths, data.survey().levels


def test_a_second_command_looks_at_no_file_again(stacks, looks):
    first = seen(stacks)
    assert first[0] == ("a.tif#0", "a.tif#1", "b.tif", "c.tif") and first[1].mean is not None
    assert looks == {"planes": 3, "image_levels": 4}
    assert seen(stacks) == first
    assert looks == {"planes": 3, "image_levels": 4}


def test_a_changed_file_is_seen(stacks, looks):
    seen(stacks)
    tifffile.imwrite(stacks / "c.tif", np.full((3, 8, 9), 9000, np.uint16), imagej=True, metadata={"axes": "ZYX"})
    paths, found = seen(stacks)
    assert paths[-1] == "c.tif#2" and found.pixels.high == (16383.0,)
    assert looks["planes"] == 6


def test_another_question_has_its_own_answer(stacks):
    np.save(stacks / "d.npy", np.zeros((5, 6, 7)))
    for path in stacks.glob("*.tif"):
        path.unlink()
    assert len(seen(stacks, stack="images")[0]) == 5
    assert len(seen(stacks, stack="channels")[0]) == 1
    assert len(seen(stacks, stack="images")[0]) == 5


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"stamps": 3, "answer": null}'])
def test_a_damaged_answer_is_found_again(stacks, content):
    first = seen(stacks)
    kept = list((stacks.parent / "cache" / "surveys").iterdir())
    assert len(kept) == 2
    for path in kept:
        path.write_text(content)
    assert seen(stacks) == first


def test_a_cache_that_cannot_be_written_costs_another_look(stacks, looks):
    (stacks.parent / "file").touch()
    assert seen(stacks, cache=stacks.parent / "file") == seen(stacks, cache=stacks.parent / "file")
    assert looks["planes"] == 6


def test_planes_that_a_missing_library_hides_are_not_kept(stacks, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(readers, "planes", lambda *_: (_ for _ in ()).throw(DataError("tifffile is missing")))
        assert seen(stacks)[0] == ("a.tif", "b.tif", "c.tif")
    assert len(seen(stacks)[0]) == 4
