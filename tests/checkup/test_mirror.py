"""Images whose mirror images are others are not mirrored."""

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from corinfomax.checkup import mirror
from corinfomax.cli.main import main
from corinfomax.images import cache
from corinfomax.images.in_memory import from_memory
from corinfomax.images.sources import Data
from corinfomax.weights import checkpoint


def corners(count, *, either=False, seed=0):
    """A shape like the letter L at any place, or in either direction."""
    rng, images = np.random.default_rng(seed), rng_images(count, seed)
    for image in images:
        y, x = rng.integers(0, 6, 2)
        image[y : y + 14, x : x + 4] = 230
        image[y + 10 : y + 14, x : x + 14] = 230
        if either and rng.random() < 0.5:
            image[:] = image[:, ::-1].copy()
    return list(images)


def rng_images(count, seed):
    return np.random.default_rng(seed).integers(0, 60, (count, 20, 20, 3), dtype=np.uint8)


def loaded(images):
    return cache.load(Data(from_memory(images), holdout=0.0), side=20, progress=False).train


def test_letters_are_told_from_their_mirror_images():
    assert mirror.told_apart(loaded(corners(300)), tiny.RECIPE) > 90


def test_shapes_in_either_direction_are_not():
    assert mirror.told_apart(loaded(corners(600, either=True)), tiny.RECIPE) == pytest.approx(50, abs=8)


def test_few_images_tell_nothing():
    assert mirror.told_apart(loaded(corners(mirror.LEAST - 1)), tiny.RECIPE) is None


def test_thumbnails_tell_it_too():
    thumbnails = torch.from_numpy(np.stack(corners(300))).permute(0, 3, 1, 2)
    assert mirror.of_thumbnails(thumbnails, tiny.RECIPE) > 90


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    root = tmp_path_factory.mktemp("letters")
    for row, image in enumerate(corners(240)):
        Image.fromarray(image).save(root / f"{row:03}.png")
    return root


@pytest.mark.parametrize(
    ("words", "flip"), [((), 0.0), (("--views.1.flip", "0.3"), 0.5), (("--recipe", "cpu-small"), 0.5)]
)
def test_a_run_does_not_mirror_letters_unless_asked_to(letters, words, flip, tmp_path, capsys):
    quiet = ["--no-report", "--diagnoses", "0", *tiny.KNOBS, "--epochs", "0.1"]
    assert main(["pretrain", str(letters), *quiet, *words, "--out", str(tmp_path / "run")]) == 0
    assert checkpoint.recorded(tmp_path / "run")[0].views[0].flip == flip
    assert ("left and right differ" in capsys.readouterr().out) == (flip == 0)


def test_the_doctor_says_so(letters, tmp_path, capsys):
    main(["doctor", str(letters), "--seconds", "0", "--out", str(tmp_path / "skip.txt")])
    assert "left and right differ" in capsys.readouterr().out
