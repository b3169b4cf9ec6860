"""Situations that people meet: nothing is silently read, built, scored or lost in another way than it was meant."""

import io
import itertools
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import tiny
from corinfomax.cli import main as cli
from corinfomax.cli import pretrain
from corinfomax.cli.parse import parse
from corinfomax.images.files import default_cache
from corinfomax.recipes.published import RECIPES
from corinfomax.runtime import run_folder
from corinfomax.weights.checkpoint import load_checkpoint

KNOBS = [*tiny.KNOBS, "--no-report"]


def planned(*words):
    command, flags = parse(["pretrain", "mnist5k", *words])
    return pretrain.plan_run(command, flags, torch.device("cpu")).recipe


def run(*words):
    return cli.main([str(word) for word in words])


# --- a setting acts on what it says ---


@pytest.mark.parametrize(
    ("recipe", "name", "size"),
    [
        ("cpu-small", "resnet50", "23.5 million weights, 2,048"),
        ("cifar10", "resnet34", "21.3 million weights, 512"),
        ("mnist5k", "resnet26", "13.9 million weights, 2,048"),
    ],
)
def test_another_resnet_has_its_own_shape_and_keeps_the_stem_for_the_images(recipe, name, size, capsys):
    backbone = planned("--recipe", recipe, "--backbone.name", name).backbone
    assert (backbone.layers, backbone.channels) == (None, None)
    assert backbone.small_stem == RECIPES[recipe].recipe.backbone.small_stem
    assert f"network {name} with a small stem: {size} features" in capsys.readouterr().out


def test_typed_shapes_stay(capsys):
    typed = ["--backbone.layers", "1", "1", "1", "1", "--backbone.channels", "8", "8", "8", "16"]
    backbone = planned("--recipe", "cpu-small", "--backbone.name", "resnet34", *typed).backbone
    assert (backbone.layers, backbone.channels) == ((1, 1, 1, 1), (8, 8, 8, 16))
    # the same network by name is no other network
    assert (
        planned("--recipe", "cpu-small", "--backbone.name", "resnet18").backbone == RECIPES["cpu-small"].recipe.backbone
    )


@pytest.mark.parametrize(("name", "side"), [("vit_tiny_patch16_224", 32), ("vit_small_patch14_dinov2", 28)])
def test_another_network_over_a_recipe_needs_its_name_alone(name, side, capsys):
    recipe = planned("--recipe", "cpu-small", "--backbone.name", name)
    assert recipe.size == side
    assert f"{name} cannot take views of 24 px: using --size {side}" in capsys.readouterr().out
    assert not recipe.backbone.small_stem


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backbone.name", "inception_v3", "--size", "32"], "inception_v3 cannot take views of 32 px: try --size 75"),
        (["--backbone.name", "vit_tiny_patch16_224", "--size", "8"], "cannot take views of 8 px: try --size 16"),
        (["--backbone.name", "vit_tiny_patch16_224", "--size", "40"], "cannot take views of 40 px: try --size 48"),
        (["--backbone.name", "vit_tiny_patch16_224", "--test-scale", "1.5"], "--test-scale must be 1, not 1.5"),
        (["--backbone.name", "ResNet50"], "timm knows no network 'ResNet50'; closest: resnet50"),
        (["--mean", "123.675", "116.28", "103.53"], "from 0 to 1: divide means of levels from 0 to 255 by 255"),
        (["--std", "58.4", "57.1", "57.4"], "at most 1: divide those of 0 to 255 by 255"),
        (["--mean", "-0.1", "0", "0"], "each is from 0 to 1"),
    ],
)
def test_settings_that_cannot_be_meant_name_the_number_that_can(words, message, tmp_path, capsys):
    data = tiny.folder(tmp_path / "data", {"": 16}, labelled=False)
    assert run("pretrain", data, "--recipe", "cpu-small", "--out", tmp_path / "run", *words) == 2
    assert message in capsys.readouterr().err


def test_the_card_names_a_shape_that_is_not_timms(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tiny.folder(tmp_path / "data", {"": 16}, labelled=False)
    assert run("pretrain", data, "--out", "run", *KNOBS) == 0
    assert run("export", "run", "--out", "card") == 0
    text = (tmp_path / "card" / "README.md").read_text()
    assert "timm's resnet18 without classifier, with layers 1 1 1 1, channels 8 8 8 16, a small stem" in text


# --- one bad file does not end everything ---


def with_long_text(path):
    """A PNG with a compressed text of two million letters, as editors and generators of images write."""
    about = PngImagePlugin.PngInfo()
    about.add_text("workflow", "x" * 2_000_000, zip=True)
    Image.open(path).copy().save(path, pnginfo=about)


def damaged(wanted):
    """The first damage of one byte that Pillow refuses in this way."""

    def damage(path):
        good = path.read_bytes()
        for place, value in itertools.product(range(len(good)), (0, 255, 1, 8)):
            bad = good[:place] + bytes([good[place] ^ value if value in (1, 8) else value]) + good[place + 1 :]
            try:
                Image.open(io.BytesIO(bad)).close()
            except Exception as error:
                if type(error) is wanted:
                    path.write_bytes(bad)
                    return
        pytest.skip(f"this Pillow never raises {wanted.__name__} here")

    return damage


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("ending", "damage"), [("png", with_long_text), ("tiff", damaged(ValueError)), ("ppm", damaged(ValueError))]
)
def test_a_file_that_pillow_refuses_in_any_way_is_named_and_left_out(tmp_path, capsys, ending, damage):
    data = tmp_path / "data"
    data.mkdir()
    for number, picture in enumerate(tiny.pictures(30)):
        Image.fromarray(picture).save(data / f"{number:03}.{ending}")
    damage(data / f"007.{ending}")
    assert run("doctor", data, "--seconds", "0", "--out", tmp_path / "skip.txt") == 1
    assert f"1 of 30 training images cannot be read and will be ignored: 007.{ending}" in capsys.readouterr().out
    assert run("pretrain", data, "--out", tmp_path / "run", *KNOBS) == 0
    assert f"left out 1 unreadable image of train, 007.{ending}: " in capsys.readouterr().out


# --- what belongs to a run stays with it ---


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """A run without the training images that are also test images: six of each class."""
    root = tmp_path_factory.mktemp("leaky")
    data = tiny.folder(root / "d", {"train": 40, "test": 12})
    for path in sorted((data / "test").rglob("*.png")):
        shutil.copy(path, data / "train" / path.parent.name / f"leak{path.name}")
    names = [path.relative_to(data).as_posix() for path in sorted(data.rglob("leak*"))]
    (root / "skip.txt").write_text("\n".join(names))
    assert run("pretrain", data, "--skip", root / "skip.txt", "--out", root / "run", *KNOBS) == 0
    return data, root


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("weights", ["run", "run/checkpoints/step-00000010.safetensors"])
def test_scores_and_features_leave_out_what_the_run_left_out(leaky, tmp_path, capsys, moved, weights):
    data, root = leaky
    if moved:
        data = shutil.copytree(data, tmp_path / "elsewhere")
    assert run("evaluate", root / weights, data, "--out", tmp_path / "a.json") == 0
    out = capsys.readouterr().out
    assert f"as in the run: --skip {root / 'run' / 'skip.txt'}" in out and "12 images skipped" in out
    results = run_folder.read_json(tmp_path / "a.json")
    assert results["train"] == 40
    assert results["scores"] == run_folder.read_json(root / "run" / "results.json")["scores"]
    assert run("embed", root / weights, data, "--out", tmp_path / "v.npz") == 0
    assert len(np.load(tmp_path / "v.npz")["path"]) == 52


def test_an_empty_list_makes_no_images_the_runs_own(tmp_path, capsys):
    (tmp_path / "none.txt").write_text("# nothing\n")
    data, other = tiny.folder(tmp_path / "a", {"": 40}), tiny.folder(tmp_path / "b", {"": 40})
    words = ["--skip", tmp_path / "none.txt", "--holdout", "0.3", "--out", tmp_path / "run"]
    assert run("pretrain", data, *words, *KNOBS) == 0
    capsys.readouterr()
    assert run("evaluate", tmp_path / "run", other) == 0
    assert "as in the run" not in capsys.readouterr().out


def test_a_typed_list_wins_and_other_images_have_none(leaky, tmp_path, capsys):
    data, root = leaky
    (tmp_path / "none.txt").write_text("")
    assert run("evaluate", root / "run", data, "--skip", tmp_path / "none.txt", "--out", tmp_path / "a.json") == 0
    assert run_folder.read_json(tmp_path / "a.json")["train"] == 52
    other = tiny.folder(tmp_path / "other", {"train": 20, "test": 6})
    capsys.readouterr()
    assert run("evaluate", root / "run", other, "--out", tmp_path / "b.json") == 0
    assert "as in the run" not in capsys.readouterr().out
    assert run_folder.read_json(tmp_path / "b.json")["train"] == 20


def test_names_alone_make_no_images_the_runs_own(leaky, tmp_path, capsys):
    """Other pictures under the same names, as in any numbered set."""
    data, root = leaky
    other = shutil.copytree(data, tmp_path / "other")
    for number, path in enumerate(sorted(other.rglob("*.png"))):
        Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(path)
    capsys.readouterr()
    assert run("evaluate", root / "run", other, "--out", tmp_path / "a.json") == 0
    assert "as in the run" not in capsys.readouterr().out
    assert run_folder.read_json(tmp_path / "a.json")["train"] == 52


def test_the_scores_of_a_run_are_of_its_own_images(leaky, tmp_path, capsys):
    data, root = leaky
    mine = shutil.copytree(root / "run", tmp_path / "run")
    before = (mine / "results.json").read_text()
    other = tiny.folder(tmp_path / "other", {"train": 20, "test": 6})
    for weights, images in ((mine, other), (root / "run", data)):
        assert run("evaluate", weights, images, "--out", mine / "results.json") == 2
        assert "holds the scores of a run on its own images: name another file" in capsys.readouterr().err
    assert (mine / "results.json").read_text() == before
    assert run("evaluate", mine, data, "--out", mine / "results.json") == 0


def test_a_resumed_run_says_that_its_test_images_changed(leaky, tmp_path, capsys):
    data, root = leaky
    mine, moved = shutil.copytree(root / "run", tmp_path / "run"), shutil.copytree(data, tmp_path / "d")
    words = ("pretrain", moved, "--resume", mine, "--no-report")
    changed = "test images or labels changed since the run began: its scores are of the new ones"
    capsys.readouterr()
    assert run(*words) == 0
    assert changed not in capsys.readouterr().out
    for path in (moved / "test").rglob("*0.png"):
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(path)
    assert run(*words) == 0
    assert changed in capsys.readouterr().out


def test_scores_are_on_the_images_that_the_run_set_aside(tmp_path, capsys):
    data = tiny.folder(tmp_path / "d", {"": 40})
    assert run("pretrain", data, "--holdout", "0.3", "--out", tmp_path / "run", *KNOBS) == 0
    assert run("evaluate", tmp_path / "run", data, "--out", tmp_path / "a.json") == 0
    assert "as in the run: --holdout 0.3" in capsys.readouterr().out
    again, first = (run_folder.read_json(path) for path in (tmp_path / "a.json", tmp_path / "run" / "results.json"))
    assert (again["test"], again["scores"]) == (12, first["scores"])


# --- keep first, print second ---


class Broken(io.TextIOWrapper):
    """A full disk, or a pipe whose reader has gone."""

    def __init__(self, error):
        super().__init__(io.BytesIO(), "utf-8")
        self.kind = error

    def write(self, text):
        raise self.kind

    def flush(self):
        pass


@pytest.mark.parametrize(
    ("error", "code"), [(OSError(28, "No space left on device"), 2), (BrokenPipeError(32, "Broken pipe"), 141)]
)
def test_an_output_that_cannot_be_written_costs_no_scores(leaky, tmp_path, monkeypatch, capsys, error, code):
    data, root = leaky
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Broken(error))
        assert run("evaluate", root / "run", data, "--out", tmp_path / "a.json") == code
        patch.setattr(sys, "stdout", Broken(error))
        assert run("pretrain", data, "--out", tmp_path / "run", *tiny.KNOBS) == code
    assert "scores" in run_folder.read_json(tmp_path / "a.json")
    assert "scores" in run_folder.read_json(tmp_path / "run" / "results.json")
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("encoding", ["cp1252", "iso-8859-1", "ascii"])
def test_an_output_without_our_characters_gets_question_marks(leaky, tmp_path, monkeypatch, encoding):
    data, root = leaky
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    assert run("evaluate", root / "run", data, "--out", tmp_path / "a.json") == 0
    sys.stdout.flush()
    assert b"???" in raw.getvalue() and b"pretrained" in raw.getvalue()
    assert "scores" in run_folder.read_json(tmp_path / "a.json")


def test_a_program_without_standard_output_and_error_works(tmp_path, monkeypatch):
    data = tiny.folder(tmp_path / "data", {"train": 16, "test": 6})
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        assert run("pretrain", data, "--out", tmp_path / "run", *KNOBS) == 0
        assert run("doctor", data, "--seconds", "0", "--out", tmp_path / "skip.txt") in (0, 1)
        assert sys.stdout is None
    assert "scores" in run_folder.read_json(tmp_path / "run" / "results.json")


@pytest.mark.parametrize(
    ("command", "name", "message"),
    [
        ("evaluate", "folder", "is a folder: name a file in it"),
        ("evaluate", "file/a.json", "cannot write"),
        ("evaluate", "list.json", "holds no JSON object"),
        ("evaluate", "torn.json", "is not readable JSON"),
        ("embed", "file/a.npz", "cannot write"),
        ("neighbors", "folder", "is a folder"),
    ],
)
def test_where_the_result_goes_is_known_before_the_work(leaky, tmp_path, monkeypatch, capsys, command, name, message):
    data, root = leaky
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "torn.json").write_text("{")
    monkeypatch.setattr("corinfomax.weights.load.load_backbone", lambda *_, **__: pytest.fail("work was done"))
    words = ["--query", next(data.rglob("*.png"))] if command == "neighbors" else []
    assert run(command, root / "run", data, "--out", tmp_path / name, *words) == 2
    assert message in capsys.readouterr().err


def test_names_that_are_not_utf8_are_spelt_out_in_parquet(tmp_path, capsys):
    data = tiny.folder(tmp_path / "data", {"": 16})
    assert run("pretrain", data, "--out", tmp_path / "run", *KNOBS) == 0
    odd = next((data / "red").iterdir())
    odd.rename(os.fsdecode(os.fsencode(data / "red") + b"/bild\xfc.png"))
    (data / "green").rename(os.fsdecode(os.fsencode(data) + b"/gr\xfcn"))
    for ending in ("parquet", "npz"):
        assert run("embed", tmp_path / "run", data, "--out", tmp_path / f"v.{ending}") == 0
    assert "spelt out because they are not UTF-8: 9 names, first " in capsys.readouterr().out
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "v.parquet")
    assert "red/bild\\xfc.png" in table["path"].to_pylist() and "gr\\xfcn" in table["label"].to_pylist()
    assert os.fsdecode(b"red/bild\xfc.png") in np.load(tmp_path / "v.npz")["path"]


def test_labels_of_one_split_are_kept_when_another_has_none(tmp_path):
    data = tiny.folder(tmp_path / "data", {"train": 16})
    tiny.folder(data, {"test": 4}, labelled=False)
    assert run("pretrain", data, "--out", tmp_path / "run", *KNOBS) == 0
    assert run("embed", tmp_path / "run", data, "--out", tmp_path / "v.npz") == 0
    table = np.load(tmp_path / "v.npz")
    assert {(split, label) for split, label in zip(table["split"], table["label"], strict=True)} == {
        ("train", "red"),
        ("train", "green"),
        ("test", ""),
    }


def test_a_user_without_a_home_has_a_cache(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("CORINFOMAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert default_cache() == tmp_path / "corinfomax"


# --- sentences that are true ---


@pytest.mark.parametrize(("images", "epochs"), [(2, "2"), (5, "1"), (12, "200")])
def test_a_handful_of_images_is_too_few_to_say(tmp_path, capsys, images, epochs):
    data = tiny.folder(tmp_path / "few", {"": images}, labelled=False)
    words = [*KNOBS, "--epochs", epochs, "--projector.widths", "32", "64"]
    assert run("pretrain", data, "--out", tmp_path / "run", *words) == 0
    verdict = run_folder.read_json(tmp_path / "run" / "results.json")["verdict"]
    assert verdict["kind"] in ("too few to say", "dimensional collapse", "over-invariant")
    assert "healthy" not in capsys.readouterr().out


def test_labels_are_for_scoring_alone(tmp_path, capsys):
    data = tiny.folder(tmp_path / "data", {"train": 16, "test": 6})
    (data / "test" / "red").rename(data / "test" / "Red")
    assert run("pretrain", data, "--out", tmp_path / "run", *KNOBS) == 0
    assert "no scores: test classes missing from the 2 training classes: 1, first 'Red'" in capsys.readouterr().out
    assert run("evaluate", tmp_path / "run", data) == 2
    assert "first 'Red'" in capsys.readouterr().err


def test_one_class_has_no_scores(tmp_path, capsys):
    data = tiny.folder(tmp_path / "data", {"": 16}, labelled=False)
    (tmp_path / "t.csv").write_text("path,label\n" + "".join(f"data/{path.name},cat\n" for path in data.iterdir()))
    assert run("pretrain", tmp_path / "t.csv", "--out", tmp_path / "run", *KNOBS) == 0
    assert "no scores: the training images have only one class, cat" in capsys.readouterr().out
    assert run("evaluate", tmp_path / "run", tmp_path / "t.csv") == 2
    assert "only one class, cat" in capsys.readouterr().err
    assert run("embed", tmp_path / "run", tmp_path / "t.csv", "--out", tmp_path / "v.npz") == 0
    assert set(np.load(tmp_path / "v.npz")["label"]) == {"cat"}


def test_the_file_of_a_checkpoint_is_no_run_to_resume(leaky, capsys):
    _, root = leaky
    file = run_folder.checkpoints(root / "run")[-1]
    assert run("pretrain", "--resume", file) == 2
    assert f"--resume takes the folder of a run, such as {root / 'run'}" in capsys.readouterr().err


# --- values that would be lost ---


def deep(folder, top, kind, low=0):
    folder.mkdir()
    for number, picture in enumerate(tiny.pictures(24)):
        levels = low + picture.mean(-1) / picture.mean(-1).max() * (top - low)
        levels.flat[0] = low
        Image.fromarray(levels.astype(kind)).save(folder / f"{number:02}.tif")
    return folder


@pytest.mark.parametrize(
    ("top", "low", "kind", "said", "stored"),
    [
        (4095, 0, "uint16", "16-bit integers from 0 to 4,095 in 1 channel", (0.0, 4095.0, 4095)),
        (1023, 0, "uint16", "16-bit integers from 0 to 1,023 in 1 channel", (0.0, 1023.0, 1023)),
        (200, 0, "int32", "32-bit integers from 0 to 200 in 1 channel", (0.0, 255.0, 65535)),
        (3000, -1000, "int32", "32-bit integers from -1,000 to 3,000 in 1 channel", (-1000.0, 3000.0, 4000)),
        (1_000_000, 0, "int32", "32-bit integers from 0 to 1,000,000 in 1 channel", (0.0, 1e6, 65535)),
        (4095, -7, "float32", "32-bit floats from -7 to 4,095 in 1 channel", (-7.0, 4095.0, 65535)),
    ],
)
def test_levels_of_any_range_are_read_and_said(tmp_path, capsys, top, low, kind, said, stored):
    data = deep(tmp_path / "data", top, kind, low)
    assert run("doctor", data, "--seconds", "0", "--out", tmp_path / "skip.txt") == 0
    out = capsys.readouterr().out
    assert f"levels: {said}" in out and "blank" not in out
    assert not (tmp_path / "skip.txt").exists()
    assert run("pretrain", data, "--out", tmp_path / "run", *KNOBS) == 0
    assert f"levels: {said}" in capsys.readouterr().out
    pixels = load_checkpoint(run_folder.checkpoints(tmp_path / "run")[-1]).recipe.pixels
    assert (*pixels.low, *pixels.high, *pixels.steps) == pytest.approx(stored) and pixels.channels == 1


def test_doctor_prints_no_command_that_must_fail(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for number in range(6):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(data / f"{number}.png")
    assert run("doctor", data, "--seconds", "0") == 1
    out = capsys.readouterr().out
    assert "→" not in out and "no command to train: 0 training images would be left" in out
    assert not (tmp_path / "skip.txt").exists()


def test_what_doctor_reads_otherwise_is_a_remark(tmp_path, capsys):
    data = tiny.folder(tmp_path / "data", {"": 16})
    (data / "loose.png").write_bytes(next(data.rglob("*.png")).read_bytes())
    run("doctor", data, "--seconds", "0", "--out", tmp_path / "skip.txt")
    out = capsys.readouterr().out
    assert "remark: no labels in train: 1 of 17 images lies beside the class folders, first loose.png" in out
    assert "nothing is wrong" not in out
