"""Views mirror and turn only images that look the same mirrored and turned."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from corinfomax.checkup import symmetry as checked
from corinfomax.checkup.symmetry import LEAST, of_thumbnails, symmetry
from corinfomax.cli import fit
from corinfomax.cli.main import main
from corinfomax.images import cache
from corinfomax.images.cache import Images
from corinfomax.images.in_memory import from_memory
from corinfomax.images.sources import Data
from corinfomax.recipes.published import RECIPES
from corinfomax.weights import checkpoint


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Letters need fewer steps than photographs."""
    monkeypatch.setattr(checked, "ROUNDS", (120, 40))
    monkeypatch.setattr(checked, "BATCH", 64)


def letters(count=600, *, mirrored=False, turned=False):
    """A shape like the letter L at any place; mirrored or turned, one in two or three in four."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (count, 20, 20, 3), dtype=np.uint8)
    for image in images:
        y, x = rng.integers(0, 6, 2)
        image[y : y + 14, x : x + 4] = 230
        image[y + 10 : y + 14, x : x + 9] = 230
        if mirrored and rng.random() < 0.5:
            image[:] = image[:, ::-1].copy()
        if turned:
            image[:] = np.rot90(image, rng.integers(4)).copy()
    return list(images)


def found(images):
    return symmetry(cache.load(Data(from_memory(images), holdout=0.0), side=20, progress=False).train, tiny.RECIPE)


def test_letters_are_told_from_mirrored_and_turned_ones():
    result = found(letters())
    assert result.mirrored > 90 and result.turned > 90
    assert not result.mirrors and not result.turns


def test_letters_in_either_direction_are_upright():
    result = found(letters(mirrored=True))
    assert result.mirrors and not result.turns


def test_letters_at_any_angle_must_not_be_mirrored():
    """No pixel tells left from right there, since the letters lie at any angle; their shape does."""
    result = found(letters(turned=True))
    assert not result.mirrors and result.turns


def test_shapes_without_direction_are_mirrored_and_turned():
    result = found(letters(mirrored=True, turned=True))
    assert result.mirrors and result.turns
    assert result.mirrored == pytest.approx(50, abs=9) and result.turned == pytest.approx(25, abs=6)


def test_the_answer_is_the_same_again_and_leaves_the_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(checked, "ROUNDS", (20, 10))
    images = letters(mirrored=True)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert found(images) == found(images)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_second_round_is_for_those_that_the_first_could_not_tell(monkeypatch):
    rounds = []
    monkeypatch.setattr(checked, "_train", lambda *_, number, steps: rounds.append(number))
    for answers, trained in (((26.0, 48.0), [0, 1]), ((60.0, 60.0), [0])):
        rounds.clear()
        answer = iter(answers)
        monkeypatch.setattr(checked, "_judge", lambda *_, answer=answer: checked.Symmetry(50.0, next(answer), 750))
        assert found(letters()).turned == answers[-1]
        assert rounds == trained


def test_few_images_must_agree_better():
    assert checked.Symmetry(50.0, 29.0, 750).turns
    assert not checked.Symmetry(50.0, 29.0, 75).turns
    assert checked.Symmetry(50.0, 25.0, 75).turns
    assert not checked.Symmetry(50.0, 34.0, 5000).turns


def test_images_of_other_channels_and_sizes(monkeypatch):
    """Read once, in small batches, whatever their shape."""
    sizes, batch = [], Images.batch

    def watched(images, indices):
        sizes.append(len(indices))
        return batch(images, indices)

    monkeypatch.setattr(Images, "batch", watched)
    monkeypatch.setattr(checked, "ROUNDS", (20, 10))
    rng = np.random.default_rng(0)
    for channels, dtype in ((1, np.uint8), (5, np.uint16)):
        sizes.clear()
        shapes = [(20, 30, channels) if row % 2 else (26, 20, channels) for row in range(LEAST)]
        images = [rng.integers(0, 200, shape).astype(dtype) for shape in shapes]
        data = Data(from_memory([image[..., 0] for image in images] if channels == 1 else images), holdout=0.0)
        levels = data.survey().levels
        recipe = fit.with_levels(tiny.RECIPE, levels)
        result = symmetry(cache.load(data, side=20, pixels=recipe.pixels, progress=False).train, recipe)
        assert result is not None and result.turned == pytest.approx(25, abs=9)
        assert max(sizes) <= 64 and sum(sizes) == LEAST


@pytest.mark.parametrize(
    ("name", "changes", "parts"),
    [
        ("cpu-small", {}, {"flip", "rotate"}),
        ("mnist5k", {}, set()),  # neither mirrored nor upright: nothing to decide
        ("imagenet100-r18", {"from_files": True}, {"flip"}),
    ],
)
def test_only_what_may_change_is_looked_at(name, changes, parts):
    recipe = dataclasses.replace(RECIPES[name].recipe, **changes)
    assert checked.adjustable(recipe) == parts


def test_few_images_tell_nothing():
    assert found(letters(LEAST - 1)) is None


def test_thumbnails_tell_it_too():
    thumbnails = torch.from_numpy(np.stack(letters())).permute(0, 3, 1, 2)
    result = of_thumbnails(thumbnails, tiny.RECIPE)
    assert result is not None and result.mirrored > 90 and result.turned > 90


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Upright letters, and letters at any angle, in flat folders."""
    root = tmp_path_factory.mktemp("letters")
    for turned in (False, True):
        folder = root / ("turned" if turned else "upright")
        folder.mkdir()
        for row, image in enumerate(letters(turned=turned)):
            Image.fromarray(image).save(folder / f"{row:03}.png")
    return root


def views_of_a_run(folder, run, *words):
    quiet = ["--no-report", "--diagnoses", "0", *tiny.KNOBS, "--epochs", "0.1"]
    assert main(["pretrain", str(folder), *quiet, *words, "--out", str(run)]) == 0
    return [(view.flip, view.rotate) for view in checkpoint.recorded(run)[0].views]


@pytest.mark.parametrize(
    ("name", "words", "views"),
    [
        ("upright", (), [(0.0, 0.0)] * 2),
        ("upright", ("--views.1.flip", "0.3"), [(0.5, 0.0), (0.3, 0.0)]),
        ("turned", (), [(0.0, 45.0)] * 2),
        ("turned", ("--views.0.rotate", "0"), [(0.0, 0.0)] * 2),
        ("turned", ("--recipe", "cpu-small"), [(0.5, 0.0)] * 2),
    ],
)
def test_a_run_mirrors_and_turns_by_what_it_saw_unless_asked_otherwise(folders, name, words, views, tmp_path, capsys):
    assert views_of_a_run(folders / name, tmp_path / "run", *words) == views
    printed = capsys.readouterr().out
    not_mirrored = "views are not mirrored; --views.0.flip 0.5 --views.1.flip 0.5 mirrors them"
    turned = "views turn by up to 45 degrees; --views.0.rotate 0 --views.1.rotate 0 keeps them upright"
    assert ((not_mirrored in printed), (turned in printed)) == (views[0][0] == 0, views[0][1] > 0)


def test_a_run_that_continues_from_weights_decides_on_mirroring_alone(folders, tmp_path, capsys):
    views_of_a_run(folders / "turned", tmp_path / "first", "--recipe", "cpu-small")
    words = ["--init", str(tmp_path / "first"), "--epochs", "0.1", "--batch", "8", "--size", "16"]
    quiet = ["--no-report", "--diagnoses", "0", "--out", str(tmp_path / "second")]
    assert main(["pretrain", str(folders / "turned"), *words, *quiet]) == 0
    assert [(view.flip, view.rotate) for view in checkpoint.recorded(tmp_path / "second")[0].views] == [(0.0, 0.0)] * 2


def test_the_doctor_says_so(folders, tmp_path, capsys):
    for name, sentences in (
        ("upright", ("left and right differ",)),
        ("turned", ("left and right differ", "images lie at any angle")),
    ):
        main(["doctor", str(folders / name), "--seconds", "0", "--out", str(tmp_path / f"{name}.txt")])
        printed = capsys.readouterr().out
        assert all(sentence in printed for sentence in sentences)
        assert ("any angle" in printed) == (name == "turned")
