"""The memory of a step before it is run, and the micro-batch with which it fits."""

from dataclasses import replace

import pytest
import torch

import tiny
from corinfomax.cli.main import main
from corinfomax.network import Network
from corinfomax.recipes.fields import Backbone, Tuning
from corinfomax.runtime import memory
from corinfomax.training import footprint
from corinfomax.training.footprint import Footprint

CPU = torch.device("cpu")


@pytest.fixture
def free(monkeypatch):
    """Set the free memory in bytes."""
    return lambda size: monkeypatch.setattr(memory, "room", lambda device: size)


def test_activations_grow_with_images_and_weights_do_not():
    recipe = replace(tiny.RECIPE, size=32)
    found, larger = (footprint.measure_footprint(replace(recipe, batch=n), CPU) for n in (8, 64))
    assert found == larger
    network = Network(recipe.backbone, recipe.projector)
    weights = sum(p.nbytes for p in network.parameters())
    assert 5 * weights <= found.fixed - footprint.COMPILED / footprint.HEAP <= 5.2 * weights  # with BatchNorm's numbers
    assert footprint.measure_footprint(replace(recipe, size=64), CPU).saved == pytest.approx(4 * found.saved, rel=0.1)


def test_what_is_saved_is_what_autograd_keeps():
    recipe = replace(tiny.RECIPE, size=32)
    network, kept = Network(recipe.backbone, recipe.projector), {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    inside = {x.untyped_storage().data_ptr() for x in network.state_dict().values()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        z = network(torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last))
    saved = sum(size for place, size in kept.items() if place not in inside)
    assert footprint.measure_footprint(recipe, CPU).saved == pytest.approx(saved / len(z), rel=0.25)


def test_parts_need_less_and_a_part_above_the_batch_is_the_batch():
    step = Footprint(fixed=100, waiting=1, saved=10, passing=2)
    assert step.needs(64, 2) == pytest.approx(footprint.HEAP * (100 + 64 + 64 * 22))
    assert step.needs(64, 2, 8) == pytest.approx(footprint.HEAP * (100 + 64 + 8 * 12))
    assert step.needs(64, 2, 64) == step.needs(64, 2, 100) == step.needs(64, 2)


def test_a_step_that_fits_says_nothing(free):
    free(1e12)
    assert footprint.warning(tiny.RECIPE, CPU) is None


@pytest.mark.parametrize(("batch", "part"), [(64, 32), (65, 2), (96, 64)])
def test_the_largest_part_that_fits_is_named(free, monkeypatch, batch, part):
    # 65 images leave one in parts of 64, 32, 16, 8 and 4, and of 2 as well: no part is possible
    monkeypatch.setattr(footprint, "measure_footprint", lambda recipe, device: Footprint(0, 0, 1e8, 0))
    needs = footprint.HEAP * 1e8
    free(needs * part)
    text = footprint.warning(replace(tiny.RECIPE, batch=batch), CPU)
    assert text.startswith(f"a step of {batch} images needs about {2 * batch * needs / 1e9:.1f} GB, but ")
    if batch == 65:
        assert "too little for any --micro-batch" in text
    else:
        assert f"--micro-batch {part} needs {part * needs / 1e9:.1f} GB (the gradient stays exact" in text


def test_a_chosen_part_that_does_not_fit_is_told_a_smaller_one(free, monkeypatch):
    monkeypatch.setattr(footprint, "measure_footprint", lambda recipe, device: Footprint(0, 0, 1e8, 0))
    free(footprint.HEAP * 1e8 * 8)
    text = footprint.warning(replace(tiny.RECIPE, batch=64, micro_batch=32), CPU)
    assert "in parts of 32 needs about" in text and "--micro-batch 8 " in text
    assert footprint.warning(replace(tiny.RECIPE, batch=64, micro_batch=8), CPU) is None


def test_pretrain_and_doctor_say_it_before_they_decode(tmp_path, capsys, monkeypatch):
    data = tiny.folder(tmp_path / "data", {"train": 24, "test": 8})
    limit = ["--memory", "0.1", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    words = ["pretrain", str(data), *tiny.KNOBS, "--epochs", "1", "--no-evaluate", "--no-report", *limit]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "a step of 8 images needs about" in said and "0.0 GB are free" in said
    assert said.index("a step of 8") < said.index("24 images to train on")
    assert main(["doctor", str(data), "--seconds", "0.1", *limit]) == 0
    said = capsys.readouterr().out
    assert "images needs about" in said and "training takes about" not in said
    assert memory._limit == float("inf")  # the next command in this process has none
    assert main(["doctor", str(data), "--memory", "0"]) == 2


def test_a_network_without_batch_norm_has_a_footprint():
    recipe = replace(tiny.RECIPE, backbone=Backbone(name="convnext_atto"), size=32)
    assert footprint.measure_footprint(recipe, CPU).saved > 0


def test_frozen_blocks_need_no_gradient_and_no_activations():
    recipe = replace(tiny.RECIPE, size=32)
    whole = footprint.measure_footprint(recipe, CPU)
    half = footprint.measure_footprint(replace(recipe, tuning=Tuning(blocks=0.5, batch_norm="keep")), CPU)
    assert half.fixed < whole.fixed and half.saved < 0.6 * whole.saved
