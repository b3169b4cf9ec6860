"""Rival objectives: each against its definition, and a whole run in the same loop."""

import dataclasses
import math
import sys

import pytest
import torch
import torch.nn.functional as F

import tiny
from benchmarks.objectives.rivals import AUTHORS, PAIRED, SLICES, Rival
from corinfomax import CorInfoMaxLoss
from corinfomax.runtime import processes, run_folder
from corinfomax.training import batches
from corinfomax.training.step import build, update

pytest.importorskip("lightly")

CPU = torch.device("cpu")
N, D = 12, 5


def rows(count: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Views that agree somewhat, off the origin."""
    rng = torch.Generator().manual_seed(seed)
    common = torch.randn(N, D, generator=rng) + 0.3
    return [(common + 0.5 * torch.randn(N, D, generator=rng)).requires_grad_() for _ in range(count)]


def ldmi(a, b):
    a, b = (F.normalize(z.double(), dim=1) for z in (a, b))
    a, b = a - a.mean(0), b - b.mean(0)
    r1, r2, r12, eye = a.T @ a / N, b.T @ b / N, a.T @ b / N, 1e-3 * torch.eye(D).double()
    e12 = r1 - r12 @ torch.linalg.inv(r2 + eye) @ r12.T
    e21 = r2 - r12.T @ torch.linalg.inv(r1 + eye) @ r12
    return -(torch.logdet(r1 + eye) + torch.logdet(r2 + eye) - torch.logdet(e12 + eye) - torch.logdet(e21 + eye)) / D


def vicreg(a, b):
    def spread(z):
        covariance = torch.cov(z.T)
        hinge = (1 - (covariance.diagonal() + 1e-4).sqrt()).clamp_min(0).mean()
        return 25 * hinge / 2, (covariance.square().sum() - covariance.diagonal().square().sum()) / D

    (h1, c1), (h2, c2) = spread(a), spread(b)
    return 25 * (a - b).square().sum() / (N * D) + h1 + h2 + c1 + c2


def barlow_twins(a, b):
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (a, b))
    total = 0.0
    for i in range(D):
        for j in range(D):
            c = (a[:, i] * b[:, j]).mean()
            total = total + ((1 - c) ** 2 if i == j else 0.0051 * c**2)
    return total


def simclr(a, b):
    z = F.normalize(torch.cat((a, b)), dim=1)
    cosines = z @ z.T / 0.5
    total = 0.0
    for i in range(2 * N):
        others = [j for j in range(2 * N) if j != i]
        total = total - cosines[i, (i + N) % (2 * N)] + cosines[i, others].logsumexp(0)
    return total / (2 * N)


def sigreg(*views):
    """Epps and Pulley's statistic of random directions: n times the integral over t in [-3, 3] of the squared distance
    of characteristic functions, weighted by exp(-t²/2), here on 17 knots of its even half."""
    z = torch.stack(views)
    directions = torch.randn(D, SLICES)
    directions = directions / directions.norm(dim=0)
    t = torch.linspace(0, 3, 17)
    statistic = 0.0
    for view in z:
        at = (view @ directions)[..., None] * t
        error = (at.cos().mean(0) - (-(t**2) / 2).exp()) ** 2 + at.sin().mean(0) ** 2
        statistic = statistic + 2 * N * torch.trapezoid(error * (-(t**2) / 2).exp(), t).mean() / len(z)
    return 0.05 * statistic + 0.95 * (z - z.mean(0)).square().mean()


PLAIN = {"ldmi": ldmi, "vicreg": vicreg, "barlow-twins": barlow_twins, "simclr": simclr, "sigreg": sigreg}


@pytest.mark.parametrize(("name", "count"), [*((name, 2) for name in PLAIN), ("sigreg", 4)])
def test_each_is_what_its_paper_says(name, count):
    ours, theirs = rows(count), rows(count)
    torch.manual_seed(0)
    terms = Rival(name)(*ours)
    torch.manual_seed(0)
    want = PLAIN[name](*theirs)
    torch.testing.assert_close(terms.loss, want, rtol=1e-4, atol=1e-5)
    terms.loss.backward()
    want.backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_less_is_better(name):
    """Views that agree and are spread have a lower loss than views of nothing in common, and than a point."""
    of = Rival(name)
    rng = torch.Generator().manual_seed(1)
    z, other = torch.randn(2, 256, D, generator=rng)
    assert float(of(z, z).loss) < float(of(z, other).loss)
    point = torch.ones(256, D)
    assert float(of(z, z).loss) < float(of(point, point + 1e-3 * other).loss)


def test_the_meter_is_that_of_corinfomax():
    views = rows(3)
    ours, theirs = (of(*views).attraction for of in (Rival("sigreg"), CorInfoMaxLoss(D, views=3)))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("name", AUTHORS)
def test_weights_are_the_objectives_own(name):
    usual = AUTHORS[name]
    pair = rows()
    torch.manual_seed(0)
    same = Rival(name, usual)(*pair).loss
    torch.manual_seed(0)
    assert Rival(name)(*pair).loss.item() == same.item()
    torch.manual_seed(0)
    other = Rival(name, (usual[0] / 2, *usual[1:]))(*pair).loss
    assert other.item() != same.item()
    with pytest.raises(ValueError, match=rf"{name} has {len(usual)} weights"):
        Rival(name, (*usual, 1.0))


@pytest.mark.parametrize("name", PLAIN)
def test_a_run(name, tmp_path):
    recipe = dataclasses.replace(tiny.RECIPE, epochs=3)
    splits = tiny.splits(tmp_path / "images")
    network = tiny.run(splits, tmp_path / "run", recipe, diagnoses=2, criterion=Rival(name))
    rows = run_folder.read_metrics(tmp_path / "run")
    assert all(math.isfinite(row.loss) and row.gap is None and row.big_bang is None for row in rows)
    assert network.projector[-1].weight.isfinite().all() and rows[-1].look is not None


def test_the_loop_trains_by_the_rivals_loss(tmp_path):
    """Views of the first step by hand."""
    splits, recipe, criterion = tiny.splits(tmp_path / "images"), tiny.RECIPE, Rival("simclr")
    learner = build(recipe, CPU, criterion=criterion)
    assert learner.criterion is criterion
    views = batches.apply_views(recipe, batches.read_batch(recipe, splits.train, 0, CPU), CPU)
    want = criterion(*map(learner.network, views))
    got = update(recipe, build(recipe, CPU, criterion=criterion), views, 0, CPU)
    assert got[:2].tolist() == [want.loss.item(), want.attraction.item()]


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "size", lambda: 2)
    with pytest.raises(ValueError, match="one process alone, and here are 2"):
        Rival("simclr")


def test_a_rival_whose_library_is_missing_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly", None)
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    command = "uv run --extra baselines python -m benchmarks.objectives.frontier"
    with pytest.raises(ValueError, match=f"vicreg needs lightly, the extra baselines: {command}"):
        Rival("vicreg")


@pytest.mark.parametrize("name", PAIRED)
def test_a_pair_is_a_pair(name):
    with pytest.raises(ValueError, match=f"{name} compares two views; got 4"):
        Rival(name)(*rows(4))
