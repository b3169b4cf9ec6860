"""The code's way on a GPU, on machines that have none."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import absent
import tiny
from benchmarks.speed.views import make_views
from corinfomax.cli.main import main
from corinfomax.evaluation import probes
from corinfomax.images import cache
from corinfomax.images.sources import Data
from corinfomax.recipes.fields import Loss, Optim, Recipe, View
from corinfomax.recipes.published import RECIPES
from corinfomax.training import batches
from corinfomax.training.muon import Muon
from corinfomax.training.prefetch import prefetch
from corinfomax.training.step import build, update

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch that knows CUDA"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"),
]
CUDA = torch.device("cuda")
VARIANTS: dict[str, Recipe] = {
    name: replace(entry.recipe, size=min(32, entry.recipe.size)) for name, entry in RECIPES.items()
} | {
    "sgd": tiny.RECIPE,
    "adamw": replace(tiny.RECIPE, optim=Optim(name="adamw", clip=1.0)),
    "parts": replace(tiny.RECIPE, micro_batch=4),
    "three views": replace(tiny.RECIPE, n_views=3),
    "kernel": replace(tiny.RECIPE, loss=Loss(name="kernel")),
    "every view": replace(tiny.RECIPE, views=(View(rotate=20, blur=1.0, solarize=0.5), View(blur=0.5, grey=1.0))),
    "bfloat16": replace(tiny.RECIPE, precision="bfloat16"),
    "float64": replace(tiny.RECIPE, precision="float64"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_on_a_gpu_mixes_no_devices_and_never_waits(monkeypatch, name):
    recipe = replace(VARIANTS[name], batch=8)
    with absent.gpu(monkeypatch):
        learner = build(recipe, CUDA)
        for step in range(2):
            sizes = torch.tensor([[40, 36], [36, 40]] * 4)
            pixels = torch.zeros((8, 3, 40, 40), dtype=torch.uint8, device=CUDA)
            views = make_views(recipe, pixels, sizes, step, CUDA)
            numbers = update(recipe, learner, views, step, CUDA)
        assert {view.device.type for view in views} == {numbers.device.type} == {"cuda"}
        assert [tuple(view.shape) for view in views] == [(8, 3, recipe.size, recipe.size)] * recipe.n_views
        for parameter in learner.network.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.shape == parameter.shape


def test_batches_of_images_on_a_gpu_are_made_without_waiting(monkeypatch, tmp_path):
    train = tiny.splits(tmp_path).train
    with absent.gpu(monkeypatch):
        there = replace(train, pixels=train.pixels.to(CUDA, non_blocking=True))
        pixels, sizes = there.batch(torch.tensor([3, 1, 2]))
        assert (pixels.device.type, tuple(pixels.shape), sizes.device.type) == ("cuda", (3, 3, 16, 16), "cpu")


def test_unequal_images_are_cut_and_sent_without_waiting(monkeypatch, tmp_path):
    for i in range(16):
        side = Image.fromarray(tiny.pictures(1, 60, i)[0]).crop((0, 0, 60, 16) if i % 2 else (0, 0, 16, 50))
        side.save(tmp_path / f"{i}.png")
    train, recipe = cache.load(Data(tmp_path, holdout=0), side=16, progress=False).train, tiny.RECIPE
    with absent.gpu(monkeypatch), prefetch(recipe, train, 2, CUDA) as ahead:
        for step in range(2):
            batch = ahead.take(step)
            views = batches.apply_views(recipe, batch, CUDA)
            assert [tuple(view.shape) for view in views] == [(8, 3, 16, 16)] * 2
            assert {view.device.type for view in views} == {"cuda"} and batch.pixels[0].boxes is not None


@pytest.mark.parametrize("side", [32, 256])
def test_how_many_launches_views_take_does_not_grow_with_the_images(monkeypatch, side):
    recipe = RECIPES["imagenet100-r18"].recipe

    def launches(count):
        with absent.gpu(monkeypatch) as there:
            sizes = torch.full((count, 2), side)
            before = there.launched
            pixels = torch.zeros((count, 3, side, side), dtype=torch.uint8, device=CUDA)
            make_views(recipe, pixels, sizes, 0, CUDA)
            return there.launched - before

    assert launches(256) < 1.5 * launches(64)


def test_how_many_launches_muon_takes_does_not_grow_with_matrices_of_one_shape(monkeypatch):
    def launches(layers):
        with absent.gpu(monkeypatch) as there:
            shapes = [(6, 4), (4, 6), (6, 4, 3, 3), (40, 4, 3, 3), (6,)] * layers
            params = [torch.zeros(shape, device=CUDA) for shape in shapes]
            params = [p.to(memory_format=torch.channels_last) if p.ndim == 4 else p for p in params]
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer = Muon(params)
            optimizer.step()  # makes its buffers
            before = there.launched
            optimizer.step()
            return there.launched - before

    assert launches(30) == launches(1)


def test_commands_run_on_a_gpu(monkeypatch, tmp_path, capsys):
    data, run = tiny.folder(tmp_path / "data", {"train": 16, "test": 8}), tmp_path / "run"
    knn, devices = probes.knn, set()
    monkeypatch.setattr(probes, "_check_finite", lambda train, test: None)  # no number is known on a pretended GPU
    monkeypatch.setattr(
        probes, "knn", lambda train, *args, **kw: devices.add(train.device.type) or knn(train, *args, **kw)
    )
    with absent.gpu(monkeypatch, answers=True):
        words = ["--device", "cuda", *tiny.KNOBS, "--recipe", "cpu-small", "--epochs", "1"]
        assert main(["pretrain", str(data), "--out", str(run), *words]) == 0, capsys.readouterr().err
        assert main(["embed", str(run), str(data), "--device", "cuda", "--out", str(tmp_path / "x.npz")]) == 0
    assert (run / "report.html").stat().st_size > 10_000 and (tmp_path / "x.npz").exists()
    assert json.loads((run / "results.json").read_text())
    assert "cuda" in devices  # of the final probes; the looks between are at features on the CPU


def test_what_would_stop_a_gpu_is_seen(monkeypatch):
    with absent.gpu(monkeypatch):
        x = torch.zeros(4, 3, device=CUDA)
        with pytest.raises(RuntimeError, match="device"):
            _ = x + torch.ones(3)
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, generator=torch.Generator(), device=CUDA)
        with pytest.raises(RuntimeError, match="indexed"):
            _ = torch.ones(3)[torch.zeros(2, dtype=torch.int64, device=CUDA)]
        for wait in (
            x.cpu,
            x.tolist,
            lambda: torch.ones(3).to(CUDA),
            lambda: bool((x > 0).any()),
            lambda: x[x > 0],
            lambda: torch.ones(4, 3).copy_(x),
        ):
            with pytest.raises(absent.WaitsError):
                wait()


def test_gradients_node_by_node_are_those_of_torch():
    recipe = replace(tiny.RECIPE, precision="float64")
    x = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradients(way):
        learner = build(recipe, torch.device("cpu"))
        way(learner.criterion(*map(learner.network, x)).loss)
        return [parameter.grad for parameter in learner.network.parameters()]

    for a, b in zip(gradients(absent.backward), gradients(torch.Tensor.backward), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
