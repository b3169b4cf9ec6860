"""What frozen features tell about labels: probes as functions of tensors.

Class ids count from 0; an id without a training row is fine everywhere and never predicted. Features of any float type
are taken as float32; what needs more is float64, on the CPU where the device has none (MPS).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from corinfomax.runtime.seeds import generator

RIDGE_PENALTIES = tuple(10 ** (e / 2) for e in range(-12, 5))
LOGISTIC_PENALTIES = tuple(10.0**e for e in range(0, -7, -1))
TOLERANCE = 1e-6  # largest gradient left in a logistic regression, preconditioned: about 1e-12 nats a parameter
BLOCK = 2**22  # numbers in a temporary block of rows: 32 MiB of float64 on a CPU, and enough to fill a GPU


class Linear(NamedTuple):
    """A linear classifier and what it said of the test rows: x is of class `classes[argmax(x @ weight + bias)]`."""

    predicted: Int[Tensor, " m"]
    classes: Int[Tensor, " c"]
    """The ids that have a training row, ascending."""
    weight: Float[Tensor, "d c"]
    bias: Float[Tensor, " c"]
    penalty: float
    """The one given, or the one chosen of several."""


def accuracy(predicted: Int[Tensor, " m"], labels: Int[Tensor, " m"]) -> float:
    """The share of rows whose class was predicted, in percent."""
    if predicted.shape != labels.shape or not len(labels):
        raise ValueError(f"got {len(predicted)} predictions for {len(labels)} labels; want as many, and at least one")
    return 100 * int((predicted == labels).sum()) / len(labels)


@torch.no_grad()
def knn(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 2**26,
) -> Int[Tensor, " m"]:
    """The class with most weight among the k training rows of highest cosine, each weighing exp(cosine / temperature).

    Exact; k above n means n. Holds `chunk` cosines at once (256 MiB), or those of one test row if that is more.
    Weighted kNN of Wu et al. 2018, arXiv 1805.01978, section 3.4.
    """
    _check(train, labels, test)
    if k < 1 or not temperature > 0:
        raise ValueError(f"got k = {k} and temperature = {temperature}; want at least 1, and above 0")
    labels, classes, size = labels.long(), int(labels.max()) + 1, max(1, chunk // len(train))
    keys = normalize(train.float()).T
    predicted = []
    for first in range(0, len(test), size):
        cosine, index = (normalize(test[first : first + size].float()) @ keys).topk(min(k, len(train)))
        # Relative to the nearest, which leaves the vote as it is: exp(1 / temperature) overflows float32 below 0.0113.
        weight = ((cosine - cosine[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(weight), classes).scatter_add_(1, labels[index], weight)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


@torch.no_grad()
def ridge(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    *,
    penalties: Sequence[float] = RIDGE_PENALTIES,
) -> Linear:
    """Least squares on one-hot labels with a free intercept, its penalty chosen by exact leave-one-out squared error.

    One eigendecomposition serves every penalty: each is a diagonal rescaling. A penalty is in units of the features'
    mean variance v = trace(covariance) / d, so scaling the features changes nothing: scikit-learn's
    Ridge(alpha=penalty * n * v). Costs n·d·min(n, d) once and n·d·c a penalty, in float64 because the weak penalties
    divide by eigenvalues that float32 does not resolve.
    """
    _check(train, labels, test, penalties)
    mean, n = _mean(train), len(train)
    classes, codes = (ids.to(mean.device) for ids in torch.unique(labels, return_inverse=True))
    prior = codes.bincount().to(mean) / n
    basis, spectrum = _principal(train, mean)
    shrink = 1 / (spectrum[:, None] + spectrum.new_tensor(penalties) * spectrum.sum() / train.shape[1])
    # With Z = (X − mean) V, V and s the eigenpairs of the covariance, row i is predicted as prior + zᵢᵀ(s+λ)⁻¹ZᵀY/n and
    # has the leverage hᵢ = 1/n + zᵢᵀ(s+λ)⁻¹zᵢ/n; had it been left out, its residual were the fitted one over 1 − hᵢ.
    sums = mean.new_zeros(len(classes), len(mean))
    for rows, x in _blocks(train, mean):
        sums.index_add_(0, codes[rows], x)
    cross = basis.T @ sums.T / n
    error = mean.new_zeros(len(penalties))
    for rows, x in _blocks(train, mean):
        z, y = x @ basis, one_hot(codes[rows], len(classes)) - prior
        # One that alone decides its fit has residual 0 over 1 − h = 0, up to rounding; it must not decide the choice.
        kept = (1 - 1 / n - z.square() @ shrink / n).clamp_min(1e-12)
        for j in range(len(penalties)):
            error[j] += ((y - z @ (shrink[:, j, None] * cross)) / kept[:, j, None]).square().sum()
    best = int(error.argmin())
    return _linear(test, classes, mean, basis @ (shrink[:, best, None] * cross), prior, penalties[best])


@torch.no_grad()
def logistic(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    *,
    penalties: Sequence[float] = LOGISTIC_PENALTIES,
    seed: int = 0,
    max_iter: int = 1000,
) -> Linear:
    """Multinomial logistic regression on standardised features: mean cross-entropy + penalty/2 · |weight|².

    The intercept is free: scikit-learn's LogisticRegression(C=1/(penalty * n)) after StandardScaler, for three classes
    or more; its form for two penalises half as much. Of several penalties the one most accurate on a fifth of each
    class, drawn by `seed`, is fitted to all rows (the stronger of equals). They are tried from strong to weak, each
    from the one before, until two in a row fall behind the best: the weak ones are slow. Where no class has the five
    rows that this takes, the penalty is 1/n, scikit-learn's default. The penalty acts on weights
    of standardised features; the returned ones are for features as they came. Warns when `max_iter` was not enough.
    """
    _check(train, labels, test, penalties)
    classes, codes = torch.unique(labels, return_inverse=True)
    mean = _mean(train)
    variance = sum((x.square().sum(0) for _, x in _blocks(train, mean)), torch.zeros_like(mean)) / len(train)
    # A column that varies by less than float32 resolves is constant: it gets no weight rather than amplified rounding.
    scale = torch.where(variance.sqrt() > 1e-6 * mean.abs(), variance.rsqrt(), 0)
    x = torch.cat([(block * scale).to(train.device, torch.float32) for _, block in _blocks(train, mean)])
    # Of all rows, the held-out ones too: this uses no label, and a fit to some of the rows lies in the span of all.
    basis, spectrum = _principal(x, zero := torch.zeros_like(mean))
    path, start = sorted(penalties, reverse=True), None
    best = path[0]
    held = rank_in_class(codes, generator(seed, "validation")) < codes.bincount()[codes] // 5
    if len(path) > 1 and not held.any():
        best = 1 / len(train)
    elif len(path) > 1:
        x_kept, y_kept, theta, top, behind = x[~held], codes[~held], None, -1.0, 0
        for penalty in path:
            theta, _ = _softmax_regression(x_kept, y_kept, basis, spectrum, penalty, theta, max_iter, rough=True)
            coded = _linear(x[held], classes, zero, basis @ theta[:-1], theta[-1], penalty).predicted
            score = accuracy(coded, classes[codes[held]])
            if score > top:
                best, start, top, behind = penalty, theta, score, 0
            else:
                behind += score < top
            if behind == 2:
                break
    theta, gradient = _softmax_regression(x, codes, basis, spectrum, best, start, max_iter)
    if gradient > 10 * TOLERANCE:
        what = f"logistic regression at penalty {best:g} stopped at a gradient of {gradient:.1e}, wanted {TOLERANCE:g}"
        warnings.warn(f"{what}; raise max_iter from {max_iter}, or the penalty", stacklevel=2)
    return _linear(test, classes, mean, scale[:, None] * (basis @ theta[:-1]), theta[-1], best)


@torch.no_grad()
def few_label(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    *,
    per_class: int,
    draws: int = 5,
    seed: int = 0,
    penalty: float = 1e-3,
) -> Int[Tensor, "{draws} m"]:
    """The classes predicted with `per_class` labels of each class, for several draws of them.

    A class that has fewer gives all it has. The draws of a seed are nested: those with 10 labels contain those with 1.
    The probe is logistic regression on features centred by all training rows, which needs no label, and then of unit
    length (the CL2N of SimpleShot, arXiv 1911.04623). Its penalty is fixed because ten labels cannot choose one; on raw
    digits every penalty from 1e-6 to 1e-3 is within a point, and standardised or whitened columns do worse.
    """
    _check(train, labels, test, (penalty,))
    if per_class < 1 or draws < 1:
        raise ValueError(f"got {per_class} labels a class and {draws} draws; want at least 1 of each")
    classes, codes = torch.unique(labels, return_inverse=True)
    mean = _mean(train)
    x, x_test = (
        torch.cat([normalize(b).to(f.device, torch.float32) for _, b in _blocks(f, mean)]) for f in (train, test)
    )
    zero, predicted = torch.zeros_like(mean), []
    for draw in range(draws):
        few = rank_in_class(codes, generator(seed, "few labels", draw)) < per_class
        basis, spectrum = _principal(x[few], zero)
        theta, _ = _softmax_regression(x[few], codes[few], basis, spectrum, penalty, None, 1000)
        predicted.append(_linear(x_test, classes, zero, basis @ theta[:-1], theta[-1], penalty).predicted)
    return torch.stack(predicted)


def _softmax_regression(
    x: Float[Tensor, "n d"],
    y: Int[Tensor, " n"],
    basis: Float[Tensor, "d r"],
    spectrum: Float[Tensor, " r"],
    penalty: float,
    start: Float[Tensor, "r+1 c"] | None,
    max_iter: int,
    *,
    rough: bool = False,
) -> tuple[Float[Tensor, "r+1 c"], float]:
    """The weight in the basis, below it the intercept, and the largest gradient left; every class must have a row.

    L-BFGS on u = theta / scale with scale⁻² = spectrum · share of the class + penalty, which is near the curvature: so
    ill-conditioned features take tens of iterations and not thousands, and a gradient g costs about g²/2 nats of loss.
    It stops where no |g| is above TOLERANCE; `rough` is 1e-3 and float32 products with x, which cannot resolve less.
    """
    share = y.bincount().to(spectrum) / len(y)
    # The intercept is one more direction: its feature is the constant 1, of mean square 1, and is not penalised.
    decay = torch.cat([torch.full_like(spectrum, penalty), spectrum.new_zeros(1)])[:, None]
    scale = (torch.cat([spectrum, spectrum.new_ones(1)])[:, None] * share + decay).rsqrt()
    if start is None:  # the solution for an infinite penalty
        start = torch.cat([spectrum.new_zeros(len(spectrum), len(share)), share.log()[None]])
    u = start / scale

    def loss() -> Tensor:
        theta = u * scale
        value, to_weight, to_bias = _cross_entropy(x, y, basis @ theta[:-1], theta[-1], rough=rough)
        u.grad = scale * (torch.cat([basis.T @ to_weight, to_bias[None]]) + decay * theta)
        return value + (decay * theta.square()).sum() / 2

    # A change of the loss below its rounding is the end as well.
    gradient, change = (1e-3, 1e-8) if rough else (TOLERANCE, 1e-15)
    lbfgs = torch.optim.LBFGS([u], 1, max_iter, None, gradient, change, history_size=20, line_search_fn="strong_wolfe")
    lbfgs.step(loss)
    loss()  # the line search may have left the gradient of another point than it took
    assert u.grad is not None
    return u * scale, float(u.grad.abs().max())


def _cross_entropy(
    x: Float[Tensor, "n d"],
    y: Int[Tensor, " n"],
    weight: Float[Tensor, "d c"],
    bias: Float[Tensor, " c"],
    *,
    rough: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, "d c"], Float[Tensor, " c"]]:
    """Mean cross-entropy in nats and its gradient to weight and bias, float64; holds one block of logits at a time.

    Products are those of the weight's float64, and if `rough` those of x's float32, which take half the time or less.
    """
    value, to_weight, to_bias = weight.new_zeros(()), torch.zeros_like(weight), torch.zeros_like(bias)
    size, like = max(1, BLOCK // max(weight.shape)), x if rough else weight
    w, b = weight.to(like), bias.to(like)
    for first in range(0, len(x), size):
        rows, target = x[first : first + size].to(like), y[first : first + size, None].to(like.device)
        log_p = torch.addmm(b, rows, w).log_softmax(1)
        value -= log_p.gather(1, target).to(value).sum()
        to_logits = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1))
        to_weight += (rows.T @ to_logits).to(to_weight)
        to_bias += to_logits.sum(0).to(to_bias)
    return value / len(x), to_weight / len(x), to_bias / len(x)


def _principal(x: Float[Tensor, "n d"], mean: Float[Tensor, " d"]) -> tuple[Float[Tensor, "d r"], Float[Tensor, " r"]]:
    """The eigenvectors of (x − mean)ᵀ(x − mean) / n whose eigenvalues are above rounding, and these, in float64.

    From the smaller of the d×d and the n×n product, which share their r ≤ min(n, d) eigenvalues above 0.
    """
    n, d = x.shape
    wide = torch.cat([block for _, block in _blocks(x, mean)]).T if n < d else None
    blocks = (block.T @ block for _, block in _blocks(x, mean))
    spectrum, vectors = torch.linalg.eigh((sum(blocks, mean.new_zeros(d, d)) if wide is None else wide.T @ wide) / n)
    above = spectrum > max(n, d) * torch.finfo(spectrum.dtype).eps * spectrum[-1].clamp_min(0)
    spectrum, vectors = spectrum[above], vectors[:, above]
    return vectors if wide is None else wide @ vectors / (n * spectrum).sqrt(), spectrum


def rank_in_class(codes: Int[Tensor, " n"], rng: torch.Generator) -> Int[Tensor, " n"]:
    """The place of each row, from 0, among the shuffled rows of its class."""
    order = torch.randperm(len(codes), generator=rng).to(codes.device)
    order = order[codes[order].argsort(stable=True)]
    count = codes.bincount()
    first = (count.cumsum(0) - count)[codes[order]]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(codes), device=codes.device) - first)


def _linear(
    test: Tensor, classes: Tensor, mean: Tensor, weight: Float[Tensor, "d c"], bias: Float[Tensor, " c"], penalty: float
) -> Linear:
    """The result of the fit (x − mean) @ weight + bias, which is taken in float64: features may lie far from 0."""
    best = torch.cat([(x @ weight + bias).argmax(1) for _, x in _blocks(test, mean)]).to(test.device)
    classes, like = classes.to(test.device), torch.empty(0, device=test.device)
    return Linear(classes[best], classes, weight.to(like), (bias - mean @ weight).to(like), float(penalty))


def _mean(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Column means in float64, on the device where all float64 work on x is done."""
    zero = torch.zeros(x.shape[1], dtype=torch.float64, device="cpu" if x.device.type == "mps" else x.device)
    return sum((block.sum(0) for _, block in _blocks(x, zero)), zero) / len(x)


def _blocks(x: Float[Tensor, "n d"], mean: Float[Tensor, " d"]) -> Iterator[tuple[slice, Float[Tensor, "b d"]]]:
    """x − mean, a block of rows at a time so that x is never copied whole; type and device are those of the mean."""
    size = max(1, BLOCK // x.shape[1])
    for first in range(0, len(x), size):
        rows = slice(first, first + size)
        yield rows, x[rows].to(mean) - mean


def _check(train: Tensor, labels: Tensor, test: Tensor, penalties: Sequence[float] = (1.0,)) -> None:
    """Raise ValueError for what no probe can use."""
    shapes = f"{tuple(train.shape)} to train and {tuple(test.shape)} to test"
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1] or 0 in (*train.shape, *test.shape):
        raise ValueError(f"got features of shape {shapes}; want (n, d) and (m, d), none of them 0")
    if labels.shape != train.shape[:1]:
        raise ValueError(f"got labels of shape {tuple(labels.shape)} for {len(train)} training rows; want one a row")
    if negative := int((labels < 0).sum()):
        raise ValueError(f"{negative} of {len(labels)} training labels are negative; want class ids from 0 up")
    for name, x in (("training", train), ("test", test)):
        if bad := int((~x.isfinite()).any(1).sum()):
            raise ValueError(f"{bad} of {len(x)} {name} rows hold nan or inf; leave them out or find what made them")
    if not penalties or not all(0 < penalty < float("inf") for penalty in penalties):
        raise ValueError(f"got penalties {tuple(penalties)}; want at least one, all above 0 and finite")
