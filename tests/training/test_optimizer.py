"""The schedule against its definition, and which parameters decay."""

import copy
import math

import pytest
import torch
from timm.optim.muon import Muon as Timms
from torch import nn

from corinfomax.recipes.fields import Optim
from corinfomax.training import muon
from corinfomax.training import optimizer as optim

PAPER = Optim(lr=0.5, start_lr=3e-3, min_lr=1e-6, warmup_epochs=10)


def epoch_lr(epoch: int, epochs: int = 1000) -> float:
    return optim.learning_rate(PAPER, epoch * 97, steps_per_epoch=97, epochs=epochs)


def test_the_papers_schedule():
    assert epoch_lr(0) == pytest.approx(3e-3)
    assert epoch_lr(1) == pytest.approx(3e-3 + (0.5 - 3e-3) / 9)
    assert epoch_lr(9) == epoch_lr(10) == pytest.approx(0.5)
    assert epoch_lr(505) == pytest.approx((0.5 + 1e-6) / 2)
    assert epoch_lr(999) == pytest.approx(1e-6 + 0.25 * (math.pi / 990) ** 2 / 2, rel=1e-2)
    falling = [epoch_lr(e) for e in range(10, 1000)]
    assert falling == sorted(falling, reverse=True)


def test_the_papers_schedule_is_constant_within_an_epoch():
    for epoch in (0, 5, 10, 500):
        rates = {optim.learning_rate(PAPER, epoch * 97 + s, steps_per_epoch=97, epochs=1000) for s in range(97)}
        assert len(rates) == 1


def test_the_smooth_schedule_moves_every_step():
    smooth = Optim(lr=0.3, start_lr=0.01, min_lr=0.001, warmup_epochs=1.5, schedule="step")
    rates = [optim.learning_rate(smooth, s, steps_per_epoch=10, epochs=6) for s in range(60)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[15] == max(rates) == pytest.approx(0.3)
    assert rates[:16] == sorted(set(rates[:16]))
    assert rates[15:] == sorted(set(rates[15:]), reverse=True)
    assert rates[-1] == pytest.approx(0.001, abs=0.001)


@pytest.mark.parametrize("schedule", ["epoch", "step"])
@pytest.mark.parametrize(("warmup", "epochs"), [(0, 1), (0, 3), (1, 1), (10, 2), (0.1, 1)])
def test_short_runs_have_finite_rates_within_bounds(schedule, warmup, epochs):
    knobs = Optim(lr=0.5, start_lr=3e-3, min_lr=1e-6, warmup_epochs=warmup, schedule=schedule)
    rates = [optim.learning_rate(knobs, s, steps_per_epoch=4, epochs=epochs) for s in range(4 * epochs)]
    assert all(1e-6 <= rate <= 0.5 for rate in rates)


@pytest.mark.parametrize("decay_norms", [True, False])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_reaches_norms_and_biases_only_when_asked(name, decay_norms):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = optim.build(model, Optim(name=name, lr=0.1, weight_decay=0.5, decay_norms=decay_norms))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for old, p in zip(before, model.parameters(), strict=True):
        shrinks = p.ndim > 1 or decay_norms
        torch.testing.assert_close(p.detach(), old * (1 - 0.1 * 0.5) if shrinks else old)


def stepped(name, **knobs):
    """A convolution and a norm before and after one step of a random gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = optim.build(model, Optim(name=name, lr=0.1, momentum=0.0, decay_norms=False, **knobs))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return before, [p.detach() for p in model.parameters()], [p.grad for p in model.parameters()]


def test_muon_steps_are_orthogonal_and_of_the_length_of_adamws():
    (matrix, *_), (after, *_), _ = stepped("muon", weight_decay=0.0)
    values = torch.linalg.svdvals((after - matrix).flatten(1)) / (0.1 * 0.2 * 27**0.5)
    assert 0.85 < values.min() <= values.max() < 1.15


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (16, 16), (1, 7)])
@pytest.mark.parametrize(
    ("dtype", "arithmetic", "mixed"),
    [
        (torch.float32, None, 1e-4),
        (torch.float32, torch.bfloat16, 0.03),  # eight bits, five steps
        (torch.float64, None, 1e-4),
    ],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_the_orthogonal_factor_is_that_of_the_singular_values(shape, dtype, arithmetic, mixed, stacked):
    rng = torch.Generator().manual_seed(0)
    U, S, V = torch.linalg.svd(torch.randn(*shape, dtype=dtype, generator=rng), full_matrices=False)
    S = torch.logspace(0, -2, len(S), dtype=dtype)  # from the largest to a hundredth of it
    M = 7.0 * U @ torch.diag(S) @ V
    zero = torch.zeros_like(M)
    if stacked:
        got, zero = muon.orthogonal(torch.stack([M, zero]), arithmetic)
    else:
        got, zero = muon.orthogonal(M, arithmetic), muon.orthogonal(zero, arithmetic)
    assert got.dtype == dtype and got.equal(got.to(arithmetic or dtype).to(dtype))
    inner = U.T @ got @ V.T  # what it made of each singular value
    assert (inner - torch.diag(inner.diagonal())).abs().max() < mixed
    assert ((inner.diagonal() - 1).abs() < 0.15 + mixed).all()
    assert not zero.any()


def test_muon_is_timms_but_for_its_bfloat16():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5))
    theirs = copy.deepcopy(ours)
    one = optim.build(ours, Optim(name="muon", lr=0.02, weight_decay=0.1))
    other = Timms(theirs.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1, betas=(0.9, 0.95))
    begun = [p.detach().clone() for p in ours.parameters()]
    for _ in range(5):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one.step()
        other.step()
    for p, q, before in zip(ours.parameters(), theirs.parameters(), begun, strict=True):
        apart, moved = (p - q).norm(), (q - before).norm()
        assert apart <= (0.03 if p.ndim > 1 else 1e-5) * moved


@pytest.mark.parametrize("together", [False, True])
def test_muon_moves_every_parameter_as_if_it_were_alone(monkeypatch, together):
    """Also where matrices of one shape go together, as on a GPU."""
    monkeypatch.setattr(muon, "ONE_BY_ONE", () if together else ("cpu",))
    torch.manual_seed(0)
    shapes = [(4, 3, 3, 3), (5, 7), (4, 3, 3, 3), (7, 5), (5, 7), (6,), (6,), (4, 27)]
    values = [torch.randn(s) for s in shapes]
    values[2:2] = [v.to(memory_format=torch.channels_last) for v in (torch.randn(4, 3, 3, 3), torch.randn(9, 1, 2, 2))]
    every, alone = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    one = muon.Muon(every, lr=0.1, weight_decay=0.1)
    others = [muon.Muon([p], lr=0.1, weight_decay=0.1) for p in alone]
    for step in range(4):
        for i, (p, q) in enumerate(zip(every, alone, strict=True)):
            if step == 2 and i in (2, 7):  # a matrix and a vector without a gradient
                p.grad = q.grad = None
                continue
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in (one, *others):
            optimizer.step()
    torch.testing.assert_close(every, alone, rtol=1e-5, atol=1e-6)


def test_muon_gives_the_loss_of_its_closure_and_leaves_what_has_no_gradient():
    p, q = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = muon.Muon([p, q], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert q.equal(torch.ones(2, 2)) and not p.equal(torch.ones(2, 2))


def test_set_learning_rate_reaches_every_group():
    optimizer = optim.build(nn.Sequential(nn.Linear(2, 2)), Optim())
    optim.set_learning_rate(optimizer, 0.123)
    assert [group["lr"] for group in optimizer.param_groups] == [0.123, 0.123]


@pytest.mark.parametrize("most", [None, 1e-3, 0.5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_is_torchs_and_gives_the_norm_before_it(most, dtype):
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 5, dtype=dtype)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    theirs[1].bias.grad = ours[1].bias.grad = None  # a frozen parameter has none
    before = torch.cat([p.grad.flatten() for p in ours.parameters() if p.grad is not None]).norm()
    norm = optim.clip(ours.parameters(), most)
    torch.testing.assert_close(norm, before)
    if most is not None:
        nn.utils.clip_grad_norm_(theirs.parameters(), most)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is b.grad is None or a.grad.equal(b.grad)
    after = torch.cat([p.grad.flatten() for p in ours.parameters() if p.grad is not None]).norm()
    assert float(after) == pytest.approx(min(float(before), most or math.inf), rel=1e-3)


@pytest.mark.parametrize("most", [0.0, -1.0, math.nan])
def test_a_clip_that_is_no_norm_is_an_error(most):
    with pytest.raises(ValueError, match="largest norm must be above 0"):
        Optim(clip=most)


@pytest.mark.parametrize("name", ["lr", "start_lr", "min_lr", "warmup_epochs", "weight_decay", "momentum"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_rate_that_cannot_be_meant_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value}; .*must be"):
        Optim(**{name: value})


def test_rates_may_be_zero():
    Optim(lr=0.0, start_lr=0.0, min_lr=0.0, warmup_epochs=0.0, weight_decay=0.0, momentum=0.0)  # the forecast's is
