"""The loss against the reference values, closed forms, and what the method promises."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from corinfomax import CorInfoMaxLoss, Moments, corinfomax_loss, ldmi
from corinfomax.objective.covariance import check_views, moment_dtype, plain_loss


def unit(n: int, d: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    z = torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return F.normalize(z, dim=1)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


def by_autograd(views, moments, *, alpha, cov_decay, mean_decay, eps):
    """The equations as they stand in the paper, for all pairs of views, differentiated by autograd."""
    n, d = views[0].shape
    new, log_dets = [], []
    for z, R, mu in zip(views, *moments, strict=True):
        mu = mean_decay * mu + (1 - mean_decay) * z.mean(0)
        R = cov_decay * R + (1 - cov_decay) * (z - mu).T @ (z - mu) / n
        log_dets.append(torch.logdet(R + eps * torch.eye(d, dtype=R.dtype)))
        new.append((R.detach(), mu.detach()))
    # The mean over pairs of what the paper says of its one pair.
    pairs = list(itertools.combinations(range(len(views)), 2))
    big_bang = -sum(log_dets[u] + log_dets[v] for u, v in pairs) / d / len(pairs)
    attraction = sum(((views[u] - views[v]) ** 2).sum() for u, v in pairs) / (n * d) / len(pairs)
    return alpha * attraction + big_bang, Moments(*map(torch.stack, zip(*new, strict=True)))


@pytest.mark.shared
@pytest.mark.parametrize("name", ["cifar10_small", "correlated", "tiny_lambda"])
def test_reference_values(shared, name):
    reference = {key: torch.from_numpy(value) for key, value in np.load(shared / "reference" / f"{name}.npz").items()}
    steps, _, d = reference["z1"].shape
    assert steps >= 3
    criterion = CorInfoMaxLoss(
        d,
        alpha=float(reference["alpha"]),
        cov_decay=float(reference["la_R"]),
        mean_decay=float(reference["la_mu"]),
        eps=float(reference["eps"]),
        cov_init=float(reference["R_ini"]),
        normalize=False,
    )
    for step in range(steps):
        z1, z2 = (reference[key][step].double().requires_grad_() for key in ("z1", "z2"))
        terms = criterion(z1, z2)
        terms.loss.backward()
        (R1, R2), (mu1, mu2) = criterion.R, criterion.mu
        got = {**terms._asdict(), "grad_z1": z1.grad, "grad_z2": z2.grad, "R1": R1, "R2": R2, "mu1": mu1, "mu2": mu2}
        for key in ("loss", "attraction", "big_bang", "grad_z1", "grad_z2", "R1", "R2", "mu1", "mu2"):
            assert relative(got[key].detach(), reference[key][step].double()) < 1e-6, (step, key)


@pytest.mark.parametrize(("n", "d"), [(7, 3), (3, 7), (1, 5), (16, 1), (2, 2)])
@pytest.mark.parametrize(("cov_decay", "mean_decay", "eps"), [(0.01, 0.01, 1e-8), (0.3, 0.7, 1e-3), (0.5, 0.0, 1e-8)])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_equals_autograd_over_steps(n, d, cov_decay, mean_decay, eps, count):
    knobs = {"alpha": 2.5 * d, "cov_decay": cov_decay, "mean_decay": mean_decay, "eps": eps}
    ours = theirs = Moments.initial(d, views=count, cov_init=0.7)
    for step in range(4):
        a = [unit(n, d, 10 * step + v).requires_grad_() for v in range(count)]
        b = [z.detach().clone().requires_grad_() for z in a]
        terms, ours = corinfomax_loss(a, ours, **knobs)
        loss, theirs = by_autograd(b, theirs, **knobs)
        terms.loss.backward()
        loss.backward()
        # float64 carries 16 digits; with N < D the covariance's condition number, up to 1e4 here, costs some.
        assert relative(terms.loss.detach(), loss.detach()) < 1e-10
        gradients = [(x.grad, y.grad) for x, y in zip(a, b, strict=True)]
        for got, want in (*gradients, *zip(ours, theirs, strict=True)):
            assert relative(got, want) < 1e-8


@pytest.mark.parametrize("count", [2, 4])
def test_the_plain_lines_are_the_papers_pairs_and_the_fast_form(count):
    knobs = {"alpha": 9.0, "cov_decay": 0.2, "mean_decay": 0.4, "eps": 1e-6}
    past = Moments.initial(3, views=count, cov_init=0.7)
    z = torch.stack([unit(7, 3, v) for v in range(count)]).requires_grad_()
    terms, moments = plain_loss(z, past, **knobs)
    (gradient,) = torch.autograd.grad(terms.loss, z)

    views = [view.detach().clone().requires_grad_() for view in z]
    for loss, after in (by_autograd(views, past, **knobs), _fast(views, past, **knobs)):
        torch.testing.assert_close(terms.loss, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, torch.stack(torch.autograd.grad(loss, views)), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(moments, after, rtol=1e-12, atol=1e-15)


def _fast(views, past, **knobs):
    terms, moments = corinfomax_loss(views, past, **knobs)
    return terms.loss, moments


def test_gradcheck():
    mu = torch.zeros(3, 4, dtype=torch.float64)
    mu[0] = 0.1
    moments = Moments.initial(4, views=3)._replace(mu=mu)

    def loss(*views: Tensor) -> tuple[Tensor, ...]:
        return tuple(corinfomax_loss(views, moments, alpha=3.0, cov_decay=0.2, mean_decay=0.4)[0])

    assert torch.autograd.gradcheck(loss, [unit(6, 4, v).requires_grad_() for v in range(3)])


def test_parts_have_their_own_gradients():
    z1, z2 = unit(8, 3, 0).requires_grad_(), unit(8, 3, 1)
    terms = CorInfoMaxLoss(3, alpha=5.0)(z1, z2)
    whole, attraction, big_bang = (torch.autograd.grad(t, z1, retain_graph=True)[0] for t in terms)
    assert attraction.norm() > 0
    assert big_bang.norm() > 0
    torch.testing.assert_close(whole, 5 * attraction + big_bang, rtol=1e-12, atol=0)


def test_alpha_follows_the_rule():
    assert CorInfoMaxLoss(64).alpha == pytest.approx(250, rel=1e-3)
    assert CorInfoMaxLoss(512).alpha == pytest.approx(2000, rel=1e-3)
    assert CorInfoMaxLoss(64, alpha=0.0).alpha == 0


@pytest.mark.parametrize("change", ["rotation", "permutation", "swap"])
def test_invariances_from_the_start(change):
    d = 6
    z1, z2 = unit(40, d, 0), unit(40, d, 1)
    Q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    changed = {"rotation": (z1 @ Q, z2 @ Q), "permutation": (z1[order], z2[order]), "swap": (z2, z1)}[change]
    before, after = (CorInfoMaxLoss(d)(*pair).loss for pair in ((z1, z2), changed))
    assert float(before) == pytest.approx(float(after), rel=1e-12)


def test_a_rotation_of_one_view_alone_is_noticed():
    z1, z2 = unit(40, 6, 0), unit(40, 6, 1)
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]
    assert abs(float(CorInfoMaxLoss(6)(z1, z2 @ Q).loss - CorInfoMaxLoss(6)(z1, z2).loss)) > 1e-3


@pytest.mark.parametrize("d", [1, 2, 64, 512])
def test_big_bang_reaches_its_floor_only_when_isotropic(d):
    # ±e_i: mean 0, covariance I/D. After many steps the start is forgotten.
    z = torch.cat((torch.eye(d), -torch.eye(d))).double()
    criterion = CorInfoMaxLoss(d)
    for _ in range(8):
        terms = criterion(z, z)
    assert criterion.floor == pytest.approx(2 * math.log(d), abs=1e-12)
    assert float(terms.big_bang) == pytest.approx(criterion.floor, abs=1e-4)
    if d > 1:
        tilted = F.normalize(z * torch.linspace(1, 3, d).double() + 0.1, dim=1)
        for _ in range(8):
            terms = criterion(tilted, tilted)
        assert float(terms.big_bang) > criterion.floor + 1e-3


def test_more_views_have_the_same_terms_where_all_are_alike():
    z = unit(40, 6, 0)
    pair, four = CorInfoMaxLoss(6), CorInfoMaxLoss(6, views=4)
    for _ in range(3):
        torch.testing.assert_close(torch.stack(pair(z, z)), torch.stack(four(z, z, z, z)), rtol=1e-12, atol=1e-12)
    assert pair.floor == four.floor


def test_published_floors():
    assert [round(CorInfoMaxLoss(d).floor, 3) for d in (64, 128, 512)] == [8.318, 9.704, 12.477]


def test_complete_collapse_climbs_by_the_decay_until_eps():
    d, decay, eps = 4, 0.1, 1e-6
    # mean_decay 0: identical rows then have no covariance at all, and R_k = decay^k I.
    criterion = CorInfoMaxLoss(d, cov_decay=decay, mean_decay=0.0, eps=eps)
    z = unit(1, d, 0).expand(32, d)
    climb = [float(criterion(z, z).loss) for _ in range(12)]
    assert climb[1] - climb[0] == pytest.approx(-2 * math.log(decay), rel=1e-3)
    assert climb[-1] == pytest.approx(-2 * math.log(eps), rel=1e-4)


def test_attraction_of_unit_rows_is_the_cosine():
    z1, z2 = unit(20, 5, 0), unit(20, 5, 1)
    cosine = (z1 * z2).sum(1).mean()
    assert float(CorInfoMaxLoss(5)(z1, z2).attraction) == pytest.approx(float(2 * (1 - cosine) / 5), rel=1e-12)


def test_normalize_makes_scale_irrelevant():
    z1, z2 = unit(16, 8, 0), unit(16, 8, 1)
    assert float(CorInfoMaxLoss(8)(3 * z1, 0.1 * z2).loss) == pytest.approx(float(CorInfoMaxLoss(8)(z1, z2).loss))
    assert float(CorInfoMaxLoss(8, normalize=False)(3 * z1, z2).loss) != pytest.approx(
        float(CorInfoMaxLoss(8, normalize=False)(z1, z2).loss)
    )


@pytest.mark.parametrize(
    ("n", "d", "kind"),
    [
        (1, 8, "random"),
        (4, 64, "random"),
        (32, 1, "random"),
        (32, 1024, "random"),
        (16, 8, "equal rows"),
        (16, 8, "zero rows"),
        (16, 8, "one zero row"),
        (16, 8, "huge"),
        (16, 8, "tiny"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_degenerate_input_stays_finite(n, d, kind, dtype, autocast):
    z1, z2 = (torch.randn(n, d, generator=torch.Generator().manual_seed(v)) for v in (0, 1))
    if kind == "equal rows":
        z1, z2 = z1[:1].expand(n, d), z1[:1].expand(n, d)
    elif kind == "zero rows":
        z1, z2 = torch.zeros(n, d), torch.zeros(n, d)
    elif kind == "one zero row":
        z1[0] = 0
    elif kind in ("huge", "tiny"):
        z1, z2 = ((1e4 if kind == "huge" else 1e-4) * z for z in (z1, z2))
    z1, z2 = (z.to(dtype, copy=True).requires_grad_() for z in (z1, z2))
    criterion = CorInfoMaxLoss(d)
    for _ in range(3):
        z1.grad = z2.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            terms = criterion(z1, z2)
        terms.loss.backward()
        assert terms.loss.dtype == torch.float64
        assert all(t.isfinite() for t in terms)
        assert all(buffer.isfinite().all() for buffer in criterion.buffers())
        if kind != "zero rows" and kind != "one zero row":  # 1/‖z‖ has no slope there
            assert z1.grad.isfinite().all()
            assert z2.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "scale"), [(16, 8, 1e-4), (16, 8, 3e3), (4, 32, 1.0), (256, 64, 1.0)])
def test_half_precision_input_gives_the_loss_of_the_same_numbers_in_float64(dtype, n, d, scale):
    """Tiny norms, huge norms, D > N: the loss itself is exact, the gradient rounded once, when it comes back."""
    halves = [(scale * torch.randn(n, d, generator=torch.Generator().manual_seed(v))).to(dtype) for v in (0, 1)]
    losses, gradients = [], []
    for kind in (dtype, torch.float64):
        z1, z2 = (z.to(kind, copy=True).requires_grad_() for z in halves)
        loss = CorInfoMaxLoss(d)(z1, z2).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(z1.grad.double())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # rows are normalised in float32
    # float16 has no numbers between 6e-8 and 0: what is smaller is lost, hence the scaler.
    rounding, least = torch.finfo(dtype).eps, 6e-8 if dtype == torch.float16 else 0.0
    assert gradients[0].isfinite().all()
    assert float((gradients[0] - gradients[1]).norm()) <= rounding * float(gradients[1].norm()) + least * (n * d) ** 0.5


def test_autocast_leaves_the_loss_in_float64():
    z1, z2 = unit(64, 16, 0, torch.float32), unit(64, 16, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = CorInfoMaxLoss(16)(z1, z2).loss
    assert float(inside) == float(CorInfoMaxLoss(16)(z1, z2).loss)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("scale", [1e10, 1e150])
def test_a_covariance_beyond_float64_is_not_a_number_and_no_error(scale, device):
    """Rows on one line, so long that eps is lost in rounding: the factor has a zero on its diagonal."""
    torch.manual_seed(0)
    z = (torch.randn(64, 1, dtype=torch.float64) * torch.ones(1, 32) * scale).to(device).requires_grad_()
    terms = CorInfoMaxLoss(32, normalize=False).to(device)(z, z * 1.0)
    assert terms.loss.isnan()
    terms.loss.backward()
    assert not z.grad.isfinite().any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_input_is_an_error_that_says_where(poison):
    z1, z2 = unit(16, 8, 0), unit(16, 8, 1)
    z2[3, 5] = poison
    criterion = CorInfoMaxLoss(8)
    with pytest.raises(ValueError, match=r"z2 has nan or infinity in 1 of 16 rows"):
        criterion(z1, z2)
    assert criterion.R[1].equal(torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 6e4), (torch.float32, 3e38), (torch.float64, 1e308)])
def test_finite_numbers_whose_sum_is_not_are_no_error(dtype, most):
    z = torch.full((16, 8), most, dtype=dtype)
    check_views((z, z))
    z[2, 1], z[5, 6] = math.inf, -math.inf
    with pytest.raises(ValueError, match="z1 has nan or infinity in 2 of 16 rows"):
        check_views((z, z))


@pytest.mark.gpu
def test_non_finite_input_on_cuda_is_no_silent_nan_and_leaves_the_moments():
    z1, z2 = unit(16, 8, 0).cuda(), unit(16, 8, 1).cuda()
    z2[3, 5] = math.nan
    criterion = CorInfoMaxLoss(8).cuda()
    assert not criterion(z1, z2).loss.isfinite()
    assert criterion.R[1].equal(torch.eye(8, dtype=torch.float64, device="cuda"))


@pytest.mark.gpu
def test_cuda_equals_cpu_and_never_waits():
    z1, z2 = unit(64, 16, 0, torch.float32), unit(64, 16, 1, torch.float32)
    on_gpu, on_cpu = CorInfoMaxLoss(16).cuda(), CorInfoMaxLoss(16)
    g1, g2 = z1.cuda().requires_grad_(), z2.cuda()
    c1 = z1.clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = on_gpu(g1, g2).loss
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = on_cpu(c1, z2).loss
    want.backward()
    assert float(loss) == pytest.approx(float(want), rel=1e-10)
    assert relative(g1.grad.cpu(), c1.grad) < 1e-5  # the gradient comes back as float32


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((8, 4), (8, 5)), "same dimension"),
        (((8, 4), (7, 4)), "same rows"),
        (((8, 6), (8, 6)), "loss is of dimension 4, the projections 6"),
        (((0, 4), (0, 4)), "n ≥ 1"),
        (((8, 4), (8, 4), (8, 4)), "moments are those of 2 views; got 3"),
    ],
)
def test_wrong_shapes_are_errors_that_carry_them(shapes, message, without_shape_check):
    with pytest.raises(ValueError, match=message):
        without_shape_check(CorInfoMaxLoss(4, normalize=False), *(torch.ones(s) for s in shapes))


@pytest.mark.parametrize(
    "knobs",
    [
        {"dim": 0},
        {"cov_decay": 1.0},
        {"mean_decay": -0.1},
        {"eps": 0.0},
        {"alpha": -1.0},
        {"cov_init": 0.0},
        {"views": 1},
    ],
)
def test_impossible_knobs_are_errors(knobs):
    name = next(iter(knobs))
    with pytest.raises(ValueError, match=rf"{name} is .*; it must be"):
        CorInfoMaxLoss(**{"dim": 4, **knobs})


def test_state_dict_carries_the_moments():
    criterion = CorInfoMaxLoss(5)
    criterion(unit(9, 5, 0), unit(9, 5, 1))
    state = criterion.state_dict()
    assert {name: value.dtype for name, value in state.items()} == dict.fromkeys(("R", "mu"), torch.float64)
    other = CorInfoMaxLoss(5)
    other.load_state_dict(state)
    z1, z2 = unit(9, 5, 2), unit(9, 5, 3)
    assert float(other(z1, z2).loss) == float(criterion(z1, z2).loss)


def test_eval_mode_leaves_the_moments():
    criterion = CorInfoMaxLoss(5).eval()
    first = criterion(unit(9, 5, 0), unit(9, 5, 1)).loss
    assert criterion.R[0].equal(torch.eye(5, dtype=torch.float64))
    assert float(first) == float(criterion.train()(unit(9, 5, 0), unit(9, 5, 1)).loss)
    assert not criterion.R[0].equal(torch.eye(5, dtype=torch.float64))


def test_casting_a_model_leaves_the_moments_float64():
    criterion = CorInfoMaxLoss(5)
    criterion(unit(9, 5, 0), unit(9, 5, 1))
    before = criterion.R.clone()
    for cast in (criterion.half, criterion.bfloat16, criterion.float, lambda: criterion.to(torch.float16)):
        cast()
        assert criterion.R.dtype == torch.float64
        assert criterion.R.equal(before)


def test_mps_has_float32_moments_and_says_so():
    with pytest.warns(UserWarning, match="MPS has no float64"):
        assert moment_dtype("mps") == torch.float32
    assert moment_dtype("cuda") == moment_dtype(None) == torch.float64


def test_ldmi_is_the_papers_formula():
    z1 = torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z2 = 0.6 * z1.flip(1) + torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    eps = 1e-2
    a, b = z1 - z1.mean(0), z2 - z2.mean(0)
    R1, R2, R12, one = a.T @ a / 200, b.T @ b / 200, a.T @ b / 200, eps * torch.eye(6, dtype=torch.float64)
    Re12 = R1 - R12 @ torch.linalg.inv(R2 + one) @ R12.T
    Re21 = R2 - R12.T @ torch.linalg.inv(R1 + one) @ R12
    want = (torch.logdet(R1 + one) + torch.logdet(R2 + one) - torch.logdet(Re12 + one) - torch.logdet(Re21 + one)) / 6
    assert float(ldmi(z1, z2, eps=eps)) == pytest.approx(float(want), rel=1e-10)


def test_ldmi_can_be_maximised():
    """Another caller of the Cholesky factor than the loss, and one that leaves its gradient to autograd."""
    z1, z2 = (unit(12, 3, v).requires_grad_() for v in (0, 1))
    assert torch.autograd.gradcheck(lambda *z: ldmi(*z, eps=1e-2), (z1, z2))


def test_ldmi_is_the_canonical_correlations():
    z1 = torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z2 = z1 @ torch.diag(torch.tensor([1.0, 2.0, 3.0]).double())
    z2 = z2 + torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b = z1 - z1.mean(0), z2 - z2.mean(0)
    whiten = [torch.linalg.inv(torch.linalg.cholesky(x.T @ x)) for x in (a, b)]
    rho = torch.linalg.svdvals(whiten[0] @ a.T @ b @ whiten[1].T)
    want = -2 / 3 * (1 - rho.square()).log().sum()
    assert float(ldmi(z1, z2, eps=1e-12)) == pytest.approx(float(want), rel=1e-6)


def test_ldmi_of_independent_and_of_equal_views():
    z1, z2 = unit(4000, 8, 0), unit(4000, 8, 1)
    assert 0 <= float(ldmi(z1, z2)) < 0.02  # (D/N) of bias
    assert float(ldmi(z1, z1)) > 10  # only eps keeps it finite
    assert math.isfinite(float(ldmi(z1[:1], z1[:1])))
    assert math.isfinite(float(ldmi(z1[:3], z2[:3])))


def test_ldmi_is_float64_under_autocast_and_checks_its_input():
    z1, z2 = unit(50, 4, 0, torch.float32), unit(50, 4, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ldmi(z1, z2)
    assert inside.dtype == torch.float64
    assert float(inside) == float(ldmi(z1, z2))
    z1[0, 0] = math.nan
    with pytest.raises(ValueError, match="z1 has nan"):
        ldmi(z1, z2)
