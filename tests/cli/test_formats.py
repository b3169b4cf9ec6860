"""Whole runs on images that are not 8-bit RGB: they train, score, report, export, and load again as they were."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import corinfomax
import tiny
from corinfomax.cli.main import main
from corinfomax.network import build_backbone
from corinfomax.recipes.fields import Backbone
from corinfomax.runtime import run_folder
from corinfomax.weights.checkpoint import load_last

tifffile = pytest.importorskip("tifffile")
KNOBS = [*tiny.KNOBS, "--epochs", "1", "--holdout", "0.25"]


def pictures(channels: int, count: int = 48, side: int = 18) -> np.ndarray:
    """Blobs from 0 to 1 whose channel or size is their class, (count, side, side, channels)."""
    rng = np.random.default_rng(channels)
    images = 0.1 * rng.random((count, side, side, channels))
    for i, image in enumerate(images):
        y, x = rng.integers(0, side // 2, 2)
        reach = side // 2 if i % 2 else side // 4
        image[y : y + reach, x : x + reach, (i % 2) % channels] += 0.8
    return images


def bands(path: Path, x: np.ndarray) -> None:
    values = np.ascontiguousarray((10_000 * x).astype("u2").transpose(2, 0, 1))
    tifffile.imwrite(path.with_suffix(".tif"), values, photometric="minisblack", planarconfig="separate")


def microscopy(path: Path, x: np.ndarray) -> None:
    values = np.stack([60_000 * x[:, :, 0], 300 * x[:, :, 1]]).astype("u2")
    tifffile.imwrite(path.with_suffix(".tif"), values, imagej=True, metadata={"axes": "CYX"})


def tomography(path: Path, x: np.ndarray) -> None:
    tifffile.imwrite(path.with_suffix(".tif"), (3 * x - 1).astype("f4"))


def near_infrared(path: Path, x: np.ndarray) -> None:
    values = (255 * x).astype("u1")
    tifffile.imwrite(path.with_suffix(".tif"), values, photometric="rgb", extrasamples=["unspecified"])


def dicom(path: Path, x: np.ndarray) -> None:
    from test_readers import dicom as write

    write(path.with_suffix(".dcm"), (4000 * x[:, :, 0]).astype("u2"), RescaleSlope=1, RescaleIntercept=-1024)


FORMS = {
    "bands": (13, bands, "16-bit integers", True),
    "microscopy": (2, microscopy, "16-bit integers", False),
    "tomography": (1, tomography, "32-bit floats", False),
    "near infrared": (4, near_infrared, "8-bit integers", False),
    "dicom": (1, dicom, "32-bit integers from -1,0", False),
}


def folder(root: Path, channels: int, write) -> Path:
    for i, x in enumerate(pictures(channels)):
        place = root / ("small", "large")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        write(place / f"{i:02}", x)
    return root


@pytest.mark.parametrize(("channels", "write", "said", "whole"), FORMS.values(), ids=FORMS)
def test_a_run_on_images_of_any_channels(tmp_path, monkeypatch, capsys, channels, write, said, whole):
    """Trained, scored and loaded again; 13 bands are also inspected, shown and exported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "images"))
    folder(tmp_path / "data", channels, write)
    assert main(["pretrain", "data", "--out", "run", *KNOBS, *([] if whole else ["--no-report"])]) == 0
    out = capsys.readouterr().out
    assert f"levels: {said}" in out and f"in {channels} channel" in out and "linear" in out
    saved = load_last(Path("run"))[1]
    assert saved.recipe.pixels.channels == channels == len(saved.recipe.mean)
    assert saved.network["backbone.conv1.weight"].shape[1] == channels
    first = corinfomax.load("run").embed("data").features
    assert len(first) == 48 and np.isfinite(first).all() and first.std(0).max() > 0
    if not whole:
        return

    page = Path("run/report.html").read_text()
    said = "Pictures show channels 1, 2 and 3 of 13 as red, green and blue, each stretched from its 1st to its 99th"
    assert said in page and "data:image/webp" in page
    assert main(["doctor", "data", "--seconds", "0"]) == 0
    assert "levels: 16-bit integers" in capsys.readouterr().out
    assert main(["export", "run", "--out", "kept"]) == 0  # compares the features of a fresh process
    assert np.array_equal(corinfomax.load("kept").embed("data").features, first)


def test_weights_for_colours_are_adapted_to_bands_and_given_back_with_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "data", 13, bands)
    torch.manual_seed(0)
    weights = build_backbone(Backbone(name="test_resnet")).state_dict()
    save_file(weights, "rgb.safetensors")
    words = ["--size", "32", "--batch", "8", "--epochs", "1", "--projector.widths", "32", "8", "--no-report"]
    words += ["--backbone.name", "test_resnet", "--holdout", "0.25"]
    assert main(["pretrain", "data", "--init", "rgb.safetensors", "--out", "run", *words]) == 0
    out = capsys.readouterr().out
    assert "first convolution adapted from 3 to 13 channels" in out and "before" in out
    start = corinfomax.load(run_folder.start_path(Path("run")))
    repeated = weights["conv1.0.weight" if "conv1.0.weight" in weights else "conv1.weight"].repeat(1, 5, 1, 1)[:, :13]
    first = next(tensor for name, tensor in start.backbone.state_dict().items() if name.startswith("conv1"))
    torch.testing.assert_close(first, repeated * 3 / 13)
    assert start.embed("data").features.shape[0] == 48
    assert main(["evaluate", "run", "data"]) == 0
    assert main(["embed", "rgb.safetensors", "data", "--architecture", "test_resnet", "--size", "32"]) == 2
    assert "adapt them with pretrain --init" in capsys.readouterr().err


def test_weights_for_colours_keep_their_statistics_beside_infrared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "data", 4, near_infrared)
    save_file(build_backbone(Backbone(name="test_resnet")).state_dict(), "rgb.safetensors")
    words = ["--size", "32", "--batch", "8", "--epochs", "1", "--projector.widths", "32", "8", "--no-report"]
    words += ["--backbone.name", "test_resnet", "--no-evaluate", "--out", "run"]
    assert main(["pretrain", "data", "--init", "rgb.safetensors", *words]) == 0
    recipe = load_last(Path("run"))[1].recipe
    assert recipe.mean[:3] == corinfomax.load("rgb.safetensors", architecture="test_resnet", size=32).recipe.mean
    assert len(recipe.mean) == 4 and 0 < recipe.mean[3] < 0.3


def test_a_killed_run_on_bands_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "data", 13, bands)
    words = [*tiny.KNOBS, "--no-report", "--no-evaluate", "--holdout", "0"]
    assert main(["pretrain", "data", "--out", "whole", *words]) == 0
    assert main(["pretrain", "data", "--out", "part", *words]) == 0
    last = run_folder.checkpoints(Path("part"))
    for path in last[1:]:
        path.unlink()
    assert main(["pretrain", "--resume", "part"]) == 0
    assert tiny.equal_states(load_last(Path("whole"))[1].network, load_last(Path("part"))[1].network)
