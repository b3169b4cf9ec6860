"""The log det in a kernel's feature space: its definition, its gradient, what it reduces to, and whole runs."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny
from corinfomax.objective.covariance import NotFiniteInputError
from corinfomax.objective.kernel import KernelLoss
from corinfomax.recipes.fields import Loss
from corinfomax.report import charts
from corinfomax.runtime import run_folder
from corinfomax.training import micro_batch, step
from corinfomax.weights import checkpoint

N, D = 11, 5


def rows(count: int = 2, seed: int = 0, n: int = N) -> list[torch.Tensor]:
    """Views that agree somewhat."""
    rng = torch.Generator().manual_seed(seed)
    common = torch.randn(n, D, generator=rng, dtype=torch.float64)
    return [
        (common + 0.5 * torch.randn(n, D, generator=rng, dtype=torch.float64)).requires_grad_() for _ in range(count)
    ]


def plainly(views, *, alpha, temperature, eps):
    """The equations, entry by entry."""
    views = [z / z.norm(dim=1, keepdim=True) for z in views]
    n, d, log_det, apart, pairs = len(views[0]), views[0].shape[1], 0.0, 0.0, 0
    for z in views:
        K = [[torch.exp(((z[i] * z[j]).sum() - 1) / temperature) + eps * (i == j) for j in range(n)] for i in range(n)]
        log_det = log_det + torch.logdet(torch.stack([torch.stack(row) for row in K]))
    for u in range(len(views)):
        for v in range(u):
            apart, pairs = apart + (views[u] - views[v]).square().sum() / (n * d), pairs + 1
    return alpha * apart / pairs - 2 / len(views) * log_det / n


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("temperature", [0.1, 0.25, 2.0])
def test_value_and_gradient_are_those_of_the_equations(count, temperature):
    ours, theirs = rows(count), rows(count)
    terms = KernelLoss(D, alpha=7.0, temperature=temperature, eps=1e-3)(*ours)
    want = plainly(theirs, alpha=7.0, temperature=temperature, eps=1e-3)
    terms.loss.backward()
    want.backward()
    assert terms.loss.item() == pytest.approx(want.item(), rel=1e-12)
    assert terms.loss.item() == pytest.approx(7.0 * terms.attraction.item() + terms.big_bang.item(), rel=1e-12)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_gradient_is_that_of_finite_differences(normalize):
    criterion = KernelLoss(D, temperature=0.5, eps=1e-4, normalize=normalize)
    assert torch.autograd.gradcheck(lambda *z: criterion(*(0.3 * view for view in z)).loss, rows())


def test_at_a_high_temperature_it_is_the_covariances_log_det():
    """exp(s/τ) is 1 + s/τ then, so that K is the Gram matrix of rows with a constant beside them, up to ε."""
    (z, _), hot, eps = rows(), 1e4, 1e-6
    z = F.normalize(z.detach(), dim=1)
    big_bang = KernelLoss(D, temperature=hot, eps=eps)(z, z).big_bang.item()
    lifted = torch.cat((torch.ones(N, 1).double(), z / math.sqrt(hot)), 1) * math.exp(-0.5 / hot)
    by_rows = torch.logdet(lifted @ lifted.T + eps * torch.eye(N))
    by_columns = torch.logdet(lifted.T @ lifted + eps * torch.eye(D + 1)) + (N - D - 1) * math.log(eps)
    assert by_rows.item() == pytest.approx(by_columns.item(), rel=1e-6)  # Sylvester's identity
    assert big_bang == pytest.approx(-2 * by_columns.item() / N, rel=1e-2)


def test_spread_is_worth_more_than_a_point_and_never_more_than_the_floor():
    criterion = KernelLoss(D, eps=1e-8)
    apart = torch.eye(D)
    least, point = criterion(apart, apart), criterion(torch.ones(D, D), torch.ones(D, D))
    assert criterion.floor < least.big_bang.item() < point.big_bang.item()
    cold = KernelLoss(D, temperature=1e-3, eps=1e-8)
    assert cold(apart, apart).big_bang.item() == pytest.approx(cold.floor, abs=1e-12)
    assert least.attraction.item() == 0.0


def test_the_order_of_images_and_of_views_does_not_matter():
    criterion, views = KernelLoss(D), rows(3)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    want = criterion(*views).loss.item()
    assert criterion(*(z[order] for z in views)).loss.item() == pytest.approx(want, rel=1e-12)
    assert criterion(*reversed(views)).loss.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_types_are_as_good_as_their_input(dtype):
    views = [z.detach().to(dtype) for z in rows()]
    lower = [z.clone().requires_grad_() for z in views]
    exact = [z.double().requires_grad_() for z in views]
    criterion = KernelLoss(D, eps=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        terms = criterion(*lower)
    terms.loss.backward()
    assert terms.loss.dtype == torch.float64
    want = criterion(*exact).loss
    want.backward()
    assert terms.loss.item() == pytest.approx(want.item(), rel=1e-5)
    for one, other in zip(lower, exact, strict=True):
        assert one.grad.dtype == dtype
        apart = torch.linalg.vector_norm(one.grad.double() - other.grad)
        assert apart < (torch.finfo(dtype).eps + 1e-5) * torch.linalg.vector_norm(other.grad)


def test_equal_images_are_held_apart_by_eps():
    """Rows that are equal make K singular; the loss and its gradient stay finite."""
    z = torch.ones(N, D).requires_grad_()
    terms = KernelLoss(D)(z, z)
    terms.loss.backward()
    assert terms.loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize(
    ("knob", "value"),
    [("dim", 0), ("alpha", -1.0), *(("temperature", value) for value in (0.0, math.nan, math.inf)), ("eps", 0.0)],
)
def test_impossible_knobs_are_errors(knob, value):
    with pytest.raises(ValueError, match=f"{knob} is"):
        KernelLoss(**{"dim": D, knob: value})


def test_wrong_input_is_an_error(without_shape_check):
    criterion, (a, b) = KernelLoss(D), rows()
    for views, said in (((a,), "at least 2 views"), ((a, b[:-1]), "same rows"), ((a[:, 1:], b[:, 1:]), "dimension")):
        with pytest.raises(ValueError, match=said):
            without_shape_check(criterion, *views)
    broken = a.detach().clone()
    broken[2, 1] = math.nan
    with pytest.raises(NotFiniteInputError, match="z2 has nan or infinity in 1 of 11 rows"):
        criterion(a, broken)


def test_micro_batches_have_the_gradient_of_the_whole():
    views = torch.randn(2, 12, 3, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64).unbind()
    nets = []
    for part in (5, 12):
        torch.manual_seed(0)
        nets.append(net := nn.Sequential(nn.Flatten(), nn.Linear(12, D)).double())
        micro_batch.backward(lambda x, i, net=net: net(x), net, KernelLoss(D), views, part)
    torch.testing.assert_close(nets[0][1].weight.grad, nets[1][1].weight.grad, rtol=1e-10, atol=1e-13)


def test_a_run_and_its_resumption(tmp_path):
    loss = Loss(name="kernel", temperature=0.5, alpha=30.0)
    recipe = dataclasses.replace(tiny.RECIPE, loss=loss, n_views=3, epochs=3)
    criterion = step.build_criterion(recipe)
    assert isinstance(criterion, KernelLoss) and criterion.alpha == 30.0 and criterion.temperature == 0.5
    assert criterion.eps == KernelLoss(D).eps == 1e-3
    splits = tiny.splits(tmp_path / "images")
    network = tiny.run(splits, tmp_path / "run", recipe, diagnoses=2, checkpoint_minutes=0.0)
    rows = run_folder.read_metrics(tmp_path / "run")
    assert all(row.big_bang >= criterion.floor and row.gap is None for row in rows) and rows[-1].look is not None
    titles = {chart.plot.title for chart in charts.charts(rows, recipe)}
    assert "Loss terms" in titles and not any("2·ln D" in title for title in titles)
    first = min(run_folder.checkpoints(tmp_path / "run"), key=run_folder.step_of)
    assert run_folder.step_of(first) < rows[-1].step
    again = tiny.run(splits, tmp_path / "again", recipe, resume=checkpoint.load_checkpoint(first))
    assert tiny.equal_states(network.state_dict(), again.state_dict())


def test_each_objective_ignores_the_settings_of_the_other():
    covariance = dataclasses.replace(tiny.RECIPE, loss=Loss(temperature=0.9, alpha=30.0, cov_decay=0.5, cov_init=2.0))
    kernel = dataclasses.replace(covariance, loss=dataclasses.replace(covariance.loss, name="kernel"))
    with_it, without = step.build_criterion(covariance), dataclasses.replace(covariance.loss, temperature=0.25)
    assert repr(with_it) == repr(step.build_criterion(dataclasses.replace(covariance, loss=without)))
    own = Loss(name="kernel", temperature=0.9, alpha=30.0)
    assert repr(step.build_criterion(kernel)) == repr(step.build_criterion(dataclasses.replace(kernel, loss=own)))
