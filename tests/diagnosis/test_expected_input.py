"""The normalisation that weights expect: read off a network whose BatchNorm has seen these very images."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import tiny
from corinfomax.cli.main import main
from corinfomax.diagnosis import expected_input, measures
from corinfomax.images import cache
from corinfomax.recipes.fields import IMAGENET_STATS, Backbone, Scaling
from corinfomax.runtime import run_folder
from corinfomax.views import operations

CPU = torch.device("cpu")
HALF = ((0.5,) * 3, (0.5,) * 3)
BYTES = ((0.0,) * 3, (1 / 255,) * 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("data"), {"train": 40, "test": 20})


@pytest.fixture(scope="module")
def images(folder):
    return cache.load(folder, side=16, progress=False).train


def recipe_with(statistics, name="test_resnet"):
    mean, std = statistics
    return replace(tiny.RECIPE, size=32, test_scale=1.0, backbone=Backbone(name=name), mean=mean, std=std)


def trained_on(images, statistics, name="test_resnet", interpolation="bicubic"):
    """A network whose BatchNorm has the statistics of these images, normalised so."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    pixels, sizes = images.batch(torch.arange(len(images)))
    mean, std = statistics
    with torch.no_grad():
        model(
            operations.centre_view(
                pixels, sizes, size=32, scaling=Scaling((255,) * 3, 3, mean, std), interpolation=interpolation
            )
        )
    return model.eval()


@pytest.mark.parametrize("right", [IMAGENET_STATS, HALF, BYTES])
@pytest.mark.parametrize("used", [IMAGENET_STATS, HALF, BYTES])
def test_another_usual_normalisation_is_named_only_where_it_fits_and_the_own_does_not(images, right, used):
    model = trained_on(images, right)
    found = expected_input.better_input(model, images, recipe_with(used), device=CPU)
    if used == right:
        assert found is None
    else:
        assert found is not None and f"--mean {' '.join(f'{value:g}' for value in right[0])}" in found


def test_nothing_is_said_where_no_usual_normalisation_fits(images):
    odd = ((0.9, 0.1, 0.5), (0.05, 0.9, 0.3))
    assert expected_input.better_input(trained_on(images, odd), images, recipe_with(HALF), device=CPU) is None


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_images_are_resized_as_for_features(images, interpolation):
    model, recipe = trained_on(images, HALF, interpolation=interpolation), recipe_with(HALF)
    recipe = replace(recipe, interpolation=interpolation)
    assert expected_input.shift(model, model.bn1, images, recipe, device=CPU) < 1e-6  # bicubic: 8e-3


def test_networks_without_batch_norm_cannot_tell(images):
    model = timm.create_model("test_vit", num_classes=0, img_size=32)
    assert expected_input.better_input(model, images, recipe_with(BYTES, "test_vit"), device=CPU) is None


def test_the_model_is_left_as_it_was(images):
    model = trained_on(images, HALF).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected_input.better_input(model, images, recipe_with(BYTES), device=CPU)
    assert tiny.equal_states(before, model.state_dict()) and model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_evaluate_warns_of_foreign_weights_alone(images, folder, tmp_path, capsys):
    model = trained_on(images, IMAGENET_STATS)  # timm records 0.5 for this network
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    words = ["evaluate", str(tmp_path / "weights.pth"), str(folder), "--architecture", "test_resnet", "--size", "32"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "warning: these weights probably expect another normalisation" in out
    flags = out.partition("): try ")[2].splitlines()[0]
    assert flags == "--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"

    # with what it names
    assert main([*words, *flags.split()]) == 0
    assert "warning" not in capsys.readouterr().out


def test_a_run_from_weights_records_what_they_expect_if_that_was_assumed(images):
    splits, model = cache.Splits(images, None), trained_on(images, HALF)

    def found(statistics, **how):
        return measures.choose_sample(splits, recipe_with(statistics), device=CPU, **how).data.better_input

    assert found(IMAGENET_STATS, start=model, assumed_input=True) == "--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"
    assert found(HALF, start=model, assumed_input=True) is None
    assert found(IMAGENET_STATS, start=model) is None
    assert found(IMAGENET_STATS) is None


@pytest.mark.parametrize(
    ("source", "words", "said"),
    [
        ("weights.pth", ["--backbone.name", "test_resnet"], True),
        ("hub", [], False),  # the folder records it, whatever the images are
        ("hub", ["--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5"], True),
        ("run", [], False),
        ("run", ["--mean", "0.9", "0.9", "0.9"], True),
    ],
)
def test_only_an_input_that_is_not_recorded_is_doubted(
    images, folder, tmp_path, monkeypatch, capsys, source, words, said
):
    """These BatchNorms fit values up to 255; timm and the folder record 0.5, and a run records its own."""
    monkeypatch.chdir(tmp_path)
    model = trained_on(images, BYTES)
    torch.save(model.state_dict(), "weights.pth")
    timm.models.save_for_hf(model, "hub", safe_serialization=True)
    short = ["--size", "32", "--batch", "8", "--epochs", "0.4", "--no-report", "--no-evaluate", "--diagnoses", "1"]
    short += ["--projector.widths", "16", "8"]
    if source == "run":
        assert main(["pretrain", str(folder), "--init", "hub", "--out", "run", *short]) == 0
    capsys.readouterr()
    assert main(["pretrain", str(folder), "--init", source, "--out", "again", *short, *words]) == 0
    out = capsys.readouterr().out
    assert ("warning: these weights probably expect" in out) is said
    judged = run_folder.read_results(tmp_path / "again").verdict
    assert (judged.kind == "data problem" and "normalised" in judged.evidence) is said


@pytest.mark.parametrize(("own", "least"), [(0.49, None), (0.51, "--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5")])
def test_a_verdict_needs_more_than_a_warning(images, monkeypatch, own, least):
    shifts = iter([own, 9.0, 0.01, 9.0, 9.0])
    monkeypatch.setattr(expected_input, "shift", lambda *_, **__: next(shifts))
    recipe, model = recipe_with(IMAGENET_STATS), trained_on(images, HALF)
    splits = cache.Splits(images, None)
    sample = measures.choose_sample(splits, recipe, device=CPU, start=model, assumed_input=True)
    assert sample.data.better_input == least
