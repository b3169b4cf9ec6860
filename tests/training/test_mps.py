"""The code's way on the GPU of a Mac, on machines that have none: MPS without float64 and with fewer operations.

A pretended device has no values: whether Metal's kernels compute the right numbers can be seen on a Mac alone.
"""

import sys
from dataclasses import replace

import pytest
import torch

import absent
import tiny
from benchmarks.speed.views import make_views
from corinfomax.cli.main import main
from corinfomax.evaluation import probes
from corinfomax.objective.covariance import CorInfoMaxLoss
from corinfomax.recipes.fields import View
from corinfomax.recipes.published import RECIPES
from corinfomax.training.step import build, update

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="pretends by a library that torch has on Linux"),
    pytest.mark.filterwarnings("ignore:MPS has no float64"),
]
MPS = torch.device("mps", 0)


@pytest.mark.parametrize("name", ["cpu-small", "adapt"])
def test_a_step_has_no_float64_never_waits_and_has_a_kernel_for_all(monkeypatch, name):
    every = View(rotate=20, blur=0.5, solarize=0.5, grey=0.5)
    recipe = replace(RECIPES[name].recipe, size=32, views=(every, *RECIPES[name].recipe.views[:1]))
    with absent.gpu(monkeypatch, kind="mps") as there:
        learner = build(recipe, MPS)
        sizes = torch.tensor([[40, 36], [36, 40]] * 4)
        views = make_views(recipe, torch.zeros((8, 3, 40, 40), dtype=torch.uint8, device=MPS), sizes, 0, MPS)
        numbers = update(recipe, learner, views, 0, MPS)
    assert {view.device for view in views} == {numbers.device} == {MPS}
    assert {"grid_sampler_2d", "convolution_backward", "linalg_cholesky_ex"} <= there.operations
    assert absent.without_mps(there.operations) == set()


def test_training_looks_scores_and_page_have_no_float64(monkeypatch, tmp_path, capsys):
    data, run = tiny.folder(tmp_path / "data", {"train": 16, "test": 8}), tmp_path / "run"
    monkeypatch.setattr(probes, "_check_finite", lambda train, test: None)  # no number is known on a pretended GPU
    with absent.gpu(monkeypatch, answers=True, kind="mps") as there:
        words = ["--device", "mps:0", *tiny.KNOBS, "--recipe", "cpu-small", "--epochs", "1"]
        assert main(["pretrain", str(data), "--out", str(run), *words]) == 0, capsys.readouterr().err
    assert (run / "report.html").stat().st_size > 10_000
    assert absent.without_mps(there.operations) == set()


def test_what_would_stop_a_mac_is_seen(monkeypatch):
    with absent.gpu(monkeypatch, kind="mps"):
        x = torch.zeros(4, 3, device=MPS)
        for float64 in (x.double, lambda: x.new_zeros(2, dtype=torch.float64), lambda: torch.ones(3).double().to(MPS)):
            with pytest.raises(TypeError, match="float64"):
                float64()
        with pytest.raises(AssertionError, match="freed"):
            torch.ones(3).to(MPS, non_blocking=True)
        with pytest.raises(absent.WaitsError):
            x.cpu()
        with pytest.warns(UserWarning, match="float32 here"):
            assert CorInfoMaxLoss(4).to(MPS).R.dtype == torch.float32
    assert absent.without_mps(["linalg_eig", "mm", "relu_"]) == {"linalg_eig"}
