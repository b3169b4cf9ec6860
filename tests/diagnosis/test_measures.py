"""Measures without labels: against NumPy written from the papers, closed forms, and a training they must not touch."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from corinfomax.diagnosis import measures
from corinfomax.images import cache
from corinfomax.network import Network
from corinfomax.objective.covariance import CorInfoMaxLoss
from corinfomax.recipes.fields import View
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import DataMeasures, Measures, Options
from corinfomax.training import loop

CPU = torch.device("cpu")


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(eigenvalues, rows=400, seed=0):
    """Rows with zero mean and exactly this covariance, in directions along no axis."""
    d = len(eigenvalues)
    x = gaussian(rows, d, seed=seed)
    white = torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(rows)
    turn = torch.linalg.qr(gaussian(d, d, seed=seed + 1)).Q
    return white * torch.tensor(eigenvalues, dtype=torch.float64).sqrt() @ turn


def test_spectrum_is_the_covariances_own_as_shares():
    x = with_spectrum([4.0, 3.0, 2.0, 1.0]) + 7.0  # a mean is no variance
    assert measures.covariance_spectrum(x).tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    x = gaussian(50, 6) @ gaussian(6, 6, seed=1)
    expected = np.linalg.eigvalsh(np.cov(x.numpy().T))[::-1]
    assert measures.covariance_spectrum(x).numpy() == pytest.approx(expected / expected.sum())
    assert measures.covariance_spectrum(torch.ones(5, 3, dtype=torch.float64)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(60, 7), (7, 60)])
def test_effective_rank_is_rankme(shape):
    x = gaussian(*shape) @ torch.diag(torch.linspace(0.01, 3, shape[1], dtype=torch.float64)) + 0.5
    sigma = np.linalg.svd(x.numpy(), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert float(measures.effective_rank(x)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_counts_equal_directions(rank):
    x = with_spectrum([1.0] * rank + [0.0] * (8 - rank))
    assert float(measures.effective_rank(x)) == pytest.approx(rank, rel=1e-3)
    assert float(measures.effective_rank(torch.zeros(9, 4, dtype=torch.float64))) == 1


@pytest.mark.parametrize("delta", [1e-4, 0.1])
def test_lidar_is_the_rank_of_the_lda_matrix(delta):
    x = gaussian(30, 5, 6) * 0.3 + gaussian(30, 1, 6, seed=1) @ gaussian(6, 6, seed=2)
    means = x.numpy().mean(1)
    within = sum(np.cov(group.T, bias=True) for group in x.numpy()) / 30 * 5 / 4 + delta * np.eye(6)
    value, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(value**-0.5) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ np.cov(means.T) @ root)
    p = eigenvalues / eigenvalues.sum() + 1e-7
    assert float(measures.lidar(x, delta=delta)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_lidar_counts_the_directions_that_tell_images_apart():
    """Three directions in which images differ equally; in the other five only views do, and far more."""
    between = with_spectrum([1.0] * 3 + [0.0] * 5, rows=500)
    turn = torch.linalg.qr(gaussian(8, 8, seed=1)).Q
    noise = (gaussian(500, 4, 8, seed=3) @ turn) * 0.01
    assert float(measures.lidar(between[:, None] + noise)) == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.5])
def test_power_law_finds_its_exponent(exponent):
    spectrum = torch.arange(1, 61, dtype=torch.float64) ** -exponent
    spectrum[:2], spectrum[50:] = 40.0, 1e-9  # outside the fitted ranks 3 … 50
    assert measures.power_law(spectrum) == pytest.approx(exponent)
    spectrum[10:] = 0  # a collapsed rest is left out
    assert measures.power_law(spectrum) == pytest.approx(exponent)
    assert measures.power_law(spectrum[:4]) is None


def test_power_law_is_a_least_squares_line_on_logarithms():
    spectrum = gaussian(40).abs().sort(descending=True).values
    slope = np.polyfit(np.log(np.arange(3, 41)), np.log(spectrum[2:].numpy()), 1)[0]
    assert measures.power_law(spectrum) == pytest.approx(-slope)


@pytest.mark.parametrize("d", [3, 8])
def test_gap_is_zero_for_unit_rows_in_all_directions_alike(d):
    axes = torch.cat((torch.eye(d), -torch.eye(d))).double()
    assert float(measures.spread_gap(axes)) == pytest.approx(0, abs=1e-5)
    # Halving every row takes ln 4 off each log eigenvalue, twice over D dimensions and divided by D.
    assert float(measures.spread_gap(axes / 2)) == pytest.approx(2 * math.log(4), abs=1e-5)


def test_gap_is_the_losss_big_bang_less_its_floor():
    z = torch.nn.functional.normalize(gaussian(200, 5) + 1, dim=1)
    criterion = CorInfoMaxLoss(5, cov_decay=0.0, mean_decay=0.0)
    terms = criterion(z, z)
    assert float(measures.spread_gap(z)) == pytest.approx(float(terms.big_bang) - criterion.floor, rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_agreement_is_the_share_of_variance_between_images(share):
    between, within = gaussian(4000, 1, 6) * math.sqrt(share), gaussian(4000, 4, 6, seed=1) * math.sqrt(1 - share)
    assert float(measures.agreement(between + within + 9)) == pytest.approx(share, abs=0.01)
    assert float(measures.agreement(torch.ones(5, 4, 2, dtype=torch.float64))) == 0


def test_uniformity_by_hand():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).double()
    # Squared distances of the three pairs: 2, 4, 2.
    assert float(measures.uniformity(z)) == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))


def test_dead_and_duplicate_dimensions_are_counted():
    x = gaussian(300, 8)
    x[:, 1] = 5.0
    x[:, 2] = x[:, 2] * 1e-4 + 3
    x[:, 5] = -2 * x[:, 0] + 1  # mirrored is the same
    x[:, 6] = 0.98 * x[:, 3] + 0.02 * x[:, 4]
    x[:, 7] = x[:, 3] + x[:, 4]  # correlated, not the same
    assert measures.dead(x) == 2 / 8
    assert measures.duplicate(x) == 2 / 8
    assert measures.dead(torch.ones(5, 4, dtype=torch.float64)) == 1
    assert measures.duplicate(torch.ones(5, 4, dtype=torch.float64)) == 0


def test_measure_is_each_measure_of_the_right_rows():
    h, z = gaussian(80, 4, 10), torch.nn.functional.normalize(gaussian(80, 4, 6, seed=1), dim=-1)
    m = measures.measure(h, z)
    z1, z2 = z[:, [0, 2]].flatten(0, 1), z[:, [1, 3]].flatten(0, 1)
    assert m.alignment == pytest.approx(float((z1 - z2).square().sum(1).mean()))
    R = np.cov(torch.cat((z1, z2), 1).numpy().T, bias=True) + 1e-8 * np.eye(12)
    dets = [np.linalg.slogdet(block)[1] for block in (R[:6, :6], R[6:, 6:], R)]
    assert m.ldmi == pytest.approx(2 / 6 * (dets[0] + dets[1] - dets[2]))
    assert m.rank == pytest.approx(float(measures.effective_rank(z.reshape(-1, 6))))
    assert m.rank_features == pytest.approx(float(measures.effective_rank(h.reshape(-1, 10))))
    assert m.lidar_features == pytest.approx(float(measures.lidar(h)))
    assert len(m.spectrum) == 6
    assert len(m.spectrum_features) == 10
    assert sum(m.spectrum) == pytest.approx(1, abs=0.01)
    json.dumps(m._asdict(), allow_nan=False)
    assert measures.measure(h[:5], z[:5]).ldmi is None  # ten rows for two times six columns


def test_data_measures_know_equal_views_equal_images_and_twins():
    x1, x2, plain = gaussian(40, 50), gaussian(40, 50, seed=1), gaussian(40, 50, seed=2)
    assert measures.measure_pixels(x1, x1, plain).views_differ == 0
    assert measures.measure_pixels(x1, x2, plain).views_differ == pytest.approx(1, rel=0.05)
    assert measures.measure_pixels(x1, x2, plain).images_differ == pytest.approx(1, rel=0.05)
    assert measures.measure_pixels(x1, x2, plain[:1].expand(40, 50))[:3] == pytest.approx((1.0, 0, 1), rel=0.05)
    assert measures.measure_pixels(x1, x2, torch.cat((plain[:30], plain[:10]))).twins == 0.5
    json.dumps(measures.measure_pixels(x1 * 0, x1 * 0, x1 * 0)._asdict(), allow_nan=False)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return cache.load(tiny.folder(root, {"train": 40, "test": 20}), side=16, progress=False)


def choose(splits, recipe=tiny.RECIPE):
    return measures.choose_sample(splits, recipe, device=CPU)


def test_the_slice_is_held_out_where_it_can_be_and_always_the_same(splits):
    part = choose(splits)
    assert part.held_out
    assert set(part.images.paths) == set(splits.test.paths)
    assert part.images.paths == choose(splits).images.paths
    for without in (splits._replace(test=None), splits._replace(test=splits.test.select(torch.arange(15)))):
        part = choose(without)
        assert not part.held_out
        assert set(part.images.paths) == set(splits.train.paths)


@pytest.mark.parametrize("steps", [1, 3, 100, 4300, 100_000])
def test_looks_are_early_few_and_include_the_last_step(splits, steps):
    part = choose(splits)
    at = sorted(measures.look_steps(steps, 10_000, 25, part))
    assert at[-1] == steps
    assert 1 <= at[0] <= max(1, steps / 20)
    assert len(at) == min(25, steps)
    if steps >= 100:
        assert sum(step <= steps / 5 for step in at) >= 8
    few = measures.look_steps(steps, 2, 1000, part)
    assert len(few) <= max(measures.LEAST_LOOKS, measures.COST * steps * 2 / (measures.VIEW_COST * 4 * 20))
    assert measures.look_steps(steps, 128, 0, part) == set()


def test_a_look_leaves_the_network_and_the_random_numbers_alone(splits):
    network = Network(tiny.RECIPE.backbone, tiny.RECIPE.projector)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    part = choose(splits)
    state = torch.get_rng_state()
    first = measures.look(network, part, tiny.RECIPE, device=CPU)
    assert network.training
    assert torch.get_rng_state().equal(state)
    assert tiny.equal_states(before, network.state_dict())
    assert measures.look(network, part, tiny.RECIPE, device=CPU) == first
    with torch.no_grad():
        network.projector[-1].weight.fill_(math.nan)
    assert measures.look(network, part, tiny.RECIPE, device=CPU).measures is None
    assert network.training


def test_a_look_sees_views_of_the_recipe(splits):
    """Without augmentation the two views of an image are one, and their projections too."""
    still = View(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0)
    network, part = Network(tiny.RECIPE.backbone, tiny.RECIPE.projector), choose(splits)
    none = replace(tiny.RECIPE, views=(still, still))
    assert measures.look(network, part, none, device=CPU).measures.alignment == 0
    assert measures.look(network, part, tiny.RECIPE, device=CPU).measures.alignment > 0
    assert measures.measure_images(part.images, none, device=CPU).views_differ == 0
    assert 0.05 < measures.measure_images(part.images, tiny.RECIPE, device=CPU).views_differ < 1
    one = part.images.select(torch.zeros(20, dtype=torch.long))
    data = measures.measure_images(one, tiny.RECIPE, device=CPU)
    assert (data.images_differ, data.twins) == (pytest.approx(0, abs=1e-9), 1)


def test_losses_are_bitwise_the_same_with_and_without_looks(splits, tmp_path):
    rows, states = [], []
    for diagnoses in (0, 5):
        folder = tmp_path / str(diagnoses)
        folder.mkdir()
        options = Options(log_steps=1, scores=0, diagnoses=diagnoses)
        network = loop.pretrain(tiny.RECIPE, splits, folder, device=CPU, options=options)
        rows.append(run_folder.read_metrics(folder))
        states.append(network.state_dict())
    assert [row.loss for row in rows[0]] == [row.loss for row in rows[1]]
    assert tiny.equal_states(*states)
    assert not any(row.look is not None for row in rows[0])
    looked = [row for row in rows[1] if row.look is not None]
    assert [row.step for row in looked] == sorted(measures.look_steps(10, 8, 5, choose(splits)))
    assert set(looked[0].to_json()) >= {"held_out", *Measures._fields, *DataMeasures._fields}


def test_cka_is_that_of_the_centred_gram_matrices():
    x, y = gaussian(30, 8) + 3, gaussian(30, 5, seed=1) - 2
    K, L = (((z - z.mean(0)) @ (z - z.mean(0)).T).numpy() for z in (x, y))
    expected = (K * L).sum() / np.sqrt((K * K).sum() * (L * L).sum())
    assert float(measures.cka(x, y)) == pytest.approx(expected)

    # rotation, scale and shift change nothing; unrelated features have little in common; constant ones nothing
    turn = torch.linalg.qr(gaussian(8, 8, seed=2)).Q
    assert float(measures.cka(x, 5 * x @ turn + 1)) == pytest.approx(1)
    assert float(measures.cka(gaussian(4000, 8), gaussian(4000, 8, seed=1))) < 0.01
    assert float(measures.cka(x, torch.ones(30, 3, dtype=torch.float64))) == 0


def test_looks_of_a_run_from_weights_tell_how_far_the_features_have_moved(splits):
    start, now = (Network(tiny.RECIPE.backbone, tiny.RECIPE.projector) for _ in range(2))
    part = measures.choose_sample(splits, tiny.RECIPE, device=CPU, start=start.backbone)
    assert measures.look(start, part, tiny.RECIPE, device=CPU).measures.cka == pytest.approx(1)
    assert measures.look(now, part, tiny.RECIPE, device=CPU).measures.cka < 0.99
    assert measures.look(start, choose(splits), tiny.RECIPE, device=CPU).measures.cka is None
