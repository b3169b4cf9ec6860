"""What views share in features, beside raw pixels and the untrained network."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from corinfomax.cli.main import main
from corinfomax.diagnosis import baselines
from corinfomax.diagnosis.baselines import Shared, leading_ldmi, shared_information
from corinfomax.objective.covariance import ldmi


def views(correlation, n=2000, dim=8):
    """Four views of each image; each dimension of two views has this correlation."""
    rng = torch.Generator().manual_seed(0)
    shared, own = (torch.randn(n, count, dim, generator=rng, dtype=torch.float64) for count in (1, 4))
    return correlation**0.5 * shared + (1 - correlation) ** 0.5 * own


def test_views_that_agree_more_share_more():
    shares = [leading_ldmi(views(correlation)) for correlation in (0.0, 0.5, 0.9)]
    assert shares[0] < 0.01 < 0.4 < shares[1] < 1 < shares[2]


def test_only_the_leading_directions_count(monkeypatch):
    monkeypatch.setattr(baselines, "DIRECTIONS", 4)
    h = torch.cat((10 * views(0.9, dim=4), views(0.0, dim=20)), -1)
    h = h @ torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1)).double())[0]
    flat = (h - h.mean((0, 1))).numpy().reshape(-1, 24)
    led = flat @ np.linalg.svd(flat)[2][:4].T
    led = torch.from_numpy(led / np.linalg.norm(led, axis=1, keepdims=True)).view(-1, 4, 4)
    expected = ldmi(led[:, 0::2].flatten(0, 1), led[:, 1::2].flatten(0, 1))
    assert leading_ldmi(h) == pytest.approx(float(expected), rel=1e-6)
    assert leading_ldmi(h) > 1


@pytest.mark.parametrize(
    ("shared", "ahead"),
    [
        (Shared(0.46, 0.3, 0.2), True),
        (Shared(0.46, 0.4, 0.2), False),
        (Shared(0.46, 0.2, 0.4), False),
        (Shared(0.1, 0.3, 0.2), False),
    ],
)
def test_ahead_of_the_better_one(shared, ahead):
    assert shared.ahead == ahead
    assert shared.sentence.startswith("Ahead of" if ahead else "Not clearly ahead of")
    assert all(f"{value:.2f}" in shared.sentence for value in shared)


def test_the_same_network_shares_the_same(tmp_path):
    splits = tiny.splits(tmp_path)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
    shared = shared_information(network, network, splits.train, tiny.RECIPE, device=torch.device("cpu"))
    assert shared.features == shared.untrained and not shared.ahead
    assert shared.pixels != shared.features


@pytest.mark.parametrize("labelled", [True, False])
def test_a_run_says_it_beside_the_verdict(labelled, tmp_path, monkeypatch, capsys):
    splits = {"train": 40, "test": 30} if labelled else {"": 40}
    data, run = tiny.folder(tmp_path / "images", splits, labelled=labelled), tmp_path / "run"
    words = ["pretrain", str(data), *tiny.KNOBS, "--epochs", "2", "--out", str(run)]
    monkeypatch.setattr(baselines, "LEAST", 24)
    assert main(words) == 0
    said = json.loads((run / "results.json").read_text())["beside"]
    assert "what needs no training" in said
    assert f"{said}\n" in capsys.readouterr().out
    assert said in (run / "report.html").read_text()


def said(run):
    content = json.loads((run / "results.json").read_text()) if (run / "results.json").exists() else {}
    return "beside" in content


def test_nothing_is_said_about_few_images_or_where_looks_are_off(tmp_path, monkeypatch):
    data = tiny.folder(tmp_path / "images", {"": 40}, labelled=False)
    words = ["pretrain", str(data), *tiny.KNOBS, "--no-report", "--epochs", "1"]
    assert main([*words, "--out", str(tmp_path / "few")]) == 0
    assert not said(tmp_path / "few")
    monkeypatch.setattr(baselines, "LEAST", 24)
    assert main([*words, "--diagnoses", "0", "--out", str(tmp_path / "off")]) == 0
    assert not said(tmp_path / "off")


def test_its_failure_costs_neither_scores_nor_page(tmp_path, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(baselines, "LEAST", 24)
    monkeypatch.setattr(baselines, "shared_information", broken)
    data, run = tiny.folder(tmp_path / "images", {"train": 40, "test": 30}), tmp_path / "run"
    assert main(["pretrain", str(data), *tiny.KNOBS, "--epochs", "1", "--out", str(run)]) == 0
    assert "scores" in json.loads((run / "results.json").read_text()) and (run / "report.html").exists()
    assert "no comparison with the untrained network: RuntimeError: out of memory" in capsys.readouterr().err
