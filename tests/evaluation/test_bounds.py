"""Memory of evaluation: features in any batch are the same, and a whole command stays within its bound."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import tiny
from corinfomax.evaluation import features, table
from corinfomax.evaluation.features import extract_features
from corinfomax.images import cache
from corinfomax.network import build_backbone, images_at_once
from corinfomax.recipes.fields import Backbone
from corinfomax.runtime import memory

CPU = torch.device("cpu")
PROGRAM = """
import sys
from corinfomax.cli.main import main
def megabytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1000
from corinfomax.cli import train
before = megabytes("VmRSS")
code = main()
print("grown by", megabytes("VmHWM") - before)
sys.exit(code)
"""


@pytest.mark.parametrize("at_once", [1, 7, 40, 512])
def test_features_do_not_depend_on_the_batch(tmp_path, monkeypatch, at_once):
    splits = tiny.splits(tmp_path)
    model = build_backbone(tiny.RECIPE.backbone, size=16).eval()
    want = extract_features(model, splits.train, tiny.RECIPE)
    sizes = []
    model.register_forward_hook(lambda _, inputs, output: sizes.append(len(inputs[0])))
    monkeypatch.setattr(features, "images_at_once", lambda *args, **kwargs: at_once)
    got = extract_features(model, splits.train, tiny.RECIPE)
    assert max(sizes) == min(at_once, 40) and sum(sizes) == 40
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # sums of float32 in another order


def test_a_network_with_large_activations_gets_small_batches_and_keeps_its_mode():
    model = build_backbone(tiny.RECIPE.backbone).train()
    statistics = {name: x.clone() for name, x in model.state_dict().items()}
    small, large = (images_at_once(model, tiny.RECIPE, CPU, side=side, most=512) for side in (16, 224))
    assert small == 512 > large >= 1 and model.training
    assert tiny.equal_states(statistics, model.state_dict())
    with torch.inference_mode():
        each = memory.growth(lambda n: model.eval()(torch.zeros(n, 3, 224, 224)))
    assert large * each <= memory.ACTIVATIONS


def test_no_features_of_no_images_and_one_feature_of_one(tmp_path):
    splits = tiny.splits(tmp_path)
    model = build_backbone(tiny.RECIPE.backbone, size=16)
    one = extract_features(model, splits.train.select(torch.arange(1)), tiny.RECIPE)
    assert len(one) == 1 and model.training


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")
def test_evaluate_stays_within_its_bound_at_224_px(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 240), ("test", 60)):
        for i in range(count):
            place = tmp_path / "data" / split / f"{i % 2}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).resize((128, 128)).save(place / f"{i}.jpg")
    weights = timm.create_model("mobilenetv3_small_100", num_classes=0).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    words = ["evaluate", str(tmp_path / "weights.safetensors"), str(tmp_path / "data")]
    words += ["--architecture", "mobilenetv3_small_100", "--size", "224", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CORINFOMAX_CACHE": str(tmp_path / "cache")}
    asked = [sys.executable, "-c", PROGRAM, *words]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = float(done.stdout.split("grown by")[1])
    # All 240 images at once would take 1,400 MB for their activations alone.
    assert grown < 600, f"{grown:.0f} MB"


def test_raw_pixels_of_very_many_images_are_fewer():
    from corinfomax.evaluation.table import RAW_NUMBERS, _raw_side

    assert [_raw_side(n) for n in (100, 5_000, 25_000)] == [24] * 3
    assert _raw_side(50_000) == 16 and _raw_side(100_000) == 12 and _raw_side(10**6) == 8
    assert 100_000 * 3 * _raw_side(100_000) ** 2 <= RAW_NUMBERS


def test_baselines_do_not_change_with_the_memory_that_is_free(monkeypatch, tmp_path):
    images, recipe = tiny.splits(tmp_path).train, tiny.RECIPE
    before = table.random_backbone(images, recipe, device=torch.device("cpu")).state_dict()
    side = table._raw_side(len(images))
    monkeypatch.setattr(memory, "room", lambda device: 1)
    assert tiny.equal_states(table.random_backbone(images, recipe, device=torch.device("cpu")).state_dict(), before)
    assert table._raw_side(len(images)) == side


def test_a_set_in_memory_and_its_map_give_the_same_features(tmp_path):
    splits = tiny.splits(tmp_path)
    model = build_backbone(Backbone(name="resnet18", small_stem=True))
    plain = replace(splits.train, pixels=splits.train.pixels.clone(), mapped=None)
    assert isinstance(plain, cache.Images) and splits.train.mapped is not None
    ours, theirs = (extract_features(model, images, tiny.RECIPE) for images in (splits.train, plain))
    assert ours.equal(theirs)
