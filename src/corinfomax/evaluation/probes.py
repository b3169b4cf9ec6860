"""Probes of frozen features: nearest neighbours, ridge, logistic regression, and classification from a few labels.

Class ids count from 0 and may have gaps: an id without a training row is never predicted. Features may have any float
type. Nearest neighbours run in float32, fits in float64.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from corinfomax.runtime.seeds import generator

RIDGE_PENALTIES = tuple(10 ** (e / 2) for e in range(-12, 5))
LOGISTIC_PENALTIES = tuple(10 ** (e / 2) for e in range(-12, 3))
FOLDS = 5  # parts of the rows, of which some or all are held out to choose a penalty
HELD_OUT = 5000  # rows that are enough to choose it on: 50,000 images take one part, 5,000 all five
MAX_ITER = 1000  # of a logistic regression
MAX_GRADIENT = 1e-6  # at the end of a logistic regression, preconditioned: about 1e-12 nats per parameter
COSINES = 2**24  # held at once by nearest neighbours: 64 MiB
PROBE_BLOCK = {"cpu": 2**20, "cuda": 2**22}  # numbers in a temporary block of rows: 8 MiB of float64, or a full GPU

Train = Float[Tensor, "n d"]  # features with labels
Labels = Int[Tensor, " n"]
Test = Float[Tensor, "m d"]  # features to predict
Eigenpairs = tuple[Float[Tensor, "d r"], Float[Tensor, " r"]]


class LinearClassifier(NamedTuple):
    """The classifier `classes[argmax(x @ weight + bias)]` of the ids with a training row, and its predictions."""

    predicted: Int[Tensor, " m"]
    classes: Int[Tensor, " c"]
    weight: Float[Tensor, "d c"]
    bias: Float[Tensor, " c"]
    penalty: float


def accuracy(predicted: Int[Tensor, " m"], labels: Int[Tensor, " m"]) -> float:
    """Share of rows predicted correctly, in percent."""
    return 100 * int((predicted == labels).sum()) / len(labels)


@torch.no_grad()
def knn(train: Train, labels: Labels, test: Test, *, k: int = 20, temperature: float = 0.07) -> Int[Tensor, " m"]:
    """Weighted vote of the k training rows with the highest cosine, each weighted by exp(cosine / temperature).

    Exact; k above n means n. Weighted kNN of Wu et al. 2018, arXiv 1805.01978, section 3.4.
    """
    _check_finite(train, test)
    labels, classes = labels.long(), int(labels.max()) + 1
    train = train.float()
    length = train.norm(dim=1).clamp_min(1e-12)  # divides cosines, as normalised rows would be a copy of them all

    # A block of test rows at a time, in one buffer: a new one for each would fragment the heap.
    predicted, size = [], max(1, COSINES // len(train))
    cosines = train.new_empty(min(size, len(test)), len(train))
    for rows in test.split(size):
        block = torch.mm(normalize(rows.float()), train.T, out=cosines[: len(rows)]).div_(length)
        cosine, index = block.topk(min(k, len(train)))
        # Relative to the nearest row, for the same vote: exp(1 / temperature) overflows float32 below 0.0113.
        weight = ((cosine - cosine[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(weight), classes).scatter_add_(1, labels[index], weight)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def out_of_fold(x: Train, labels: Labels, fold: Int[Tensor, " n"]) -> Labels:
    """Classes predicted by cross-validation: the ridge probe of a row is fitted on the other folds."""
    predicted = torch.empty_like(labels)
    for number in fold.unique().tolist():
        held = fold == number
        predicted[held] = ridge(x[~held], labels[~held], x[held]).predicted
    return predicted


@torch.no_grad()
def ridge(
    train: Train, labels: Labels, test: Test, *, penalties: Sequence[float] = RIDGE_PENALTIES
) -> LinearClassifier:
    """Least squares on one-hot labels with a free intercept; exact leave-one-out error chooses the penalty.

    One eigendecomposition serves every penalty: each is a diagonal rescaling. A penalty is in units of the features'
    mean variance v = trace(covariance) / d: scikit-learn's Ridge(alpha=penalty * n * v). Costs n·d·min(n, d) once and
    n·d·c per penalty, in float64 because weak penalties divide by eigenvalues too small for float32.
    """
    _check_finite(train, test)
    n, mean = len(train), _column_means(train)
    classes, codes = torch.unique(labels, return_inverse=True)
    prior = codes.bincount().to(mean) / n

    # Eigenpairs V, s of the covariance, and (s + λ)⁻¹ for each penalty.
    basis, spectrum = _eigenpairs(train, mean)
    inverse = 1 / (spectrum[:, None] + spectrum.new_tensor(penalties) * spectrum.sum() / train.shape[1])

    # ZᵀY/n, with Z = (X − mean) V and Y the centred one-hot labels, from the sum of each class's rows.
    sums, blocks = mean.new_zeros(len(classes), len(mean)), codes.split(_rows(train))
    for ids, x in zip(blocks, _blocks(train, mean), strict=True):
        sums.index_add_(0, ids, x)
    cross = basis.T @ sums.T / n

    # Leave-one-out errors. The fit predicts prior + zᵢᵀ(s+λ)⁻¹ZᵀY/n for row i, and its leverage is
    # hᵢ = 1/n + zᵢᵀ(s+λ)⁻¹zᵢ/n: without row i, its residual would be the fitted one divided by 1 − hᵢ.
    errors = mean.new_zeros(len(penalties))
    for ids, x in zip(blocks, _blocks(train, mean), strict=True):
        z, y = x @ basis, one_hot(ids, len(classes)) - prior
        # A row that alone decides its fit has 0/0 up to rounding; the clamp stops it from deciding the choice too.
        remainder = (1 - 1 / n - z.square() @ inverse / n).clamp_min(1e-12)
        for j in range(len(penalties)):
            errors[j] += ((y - z @ (inverse[:, j, None] * cross)) / remainder[:, j, None]).square().sum()

    best = int(errors.argmin())
    return _classifier(test, classes, mean, basis @ (inverse[:, best, None] * cross), prior, penalties[best])


@torch.no_grad()
def logistic(
    train: Train, labels: Labels, test: Test, *, penalties: Sequence[float] = LOGISTIC_PENALTIES, seed: int = 0
) -> LinearClassifier:
    """Multinomial logistic regression on standardised features: mean cross-entropy + penalty/2 · |weight|².

    Equals scikit-learn's LogisticRegression(C=1/(penalty * n)) after StandardScaler for three or more classes; its form
    for two classes penalises half as much. The returned weights are for features that are not standardised. Several
    penalties compete by log-loss on rows held out in fifths, drawn by `seed`: all five below 6,250 rows, one above
    25,000. The winner is fitted to all rows; if no class has two, it is 1/n, scikit-learn's default. Warns if MAX_ITER
    was not enough.
    """
    _check_finite(train, test)
    classes, codes = torch.unique(labels, return_inverse=True)

    # Standardise. A column that varies by less than float32 resolves counts as constant and gets no weight.
    mean = _column_means(train)
    variance = sum((x.square().sum(0) for x in _blocks(train, mean)), torch.zeros_like(mean)) / len(train)
    scale = torch.where(variance.sqrt() > 1e-6 * mean.abs(), variance.rsqrt(), 0)
    x = train.new_empty(train.shape, dtype=torch.float32)
    for block, rows in zip(_blocks(train, mean), x.split(_rows(train)), strict=True):
        rows.copy_(block * scale)

    # Rotate to the eigenvectors of all rows, held out or not: no label enters, and their span holds every fit.
    basis, z, spectrum = _rotate(x)
    del x

    # Choose the penalty and fit it to all rows.
    best, start = penalties[0], None
    if len(penalties) > 1:
        best, start = _choose_penalty(z, codes, spectrum, penalties, generator(seed, "validation"))
    theta, gradient = _softmax_regression(z, codes, spectrum, best, start)
    if gradient > 10 * MAX_GRADIENT:
        stop = f"logistic regression at penalty {best:g} stopped at a gradient of {gradient:.1e}, want {MAX_GRADIENT:g}"
        warnings.warn(f"{stop}; raise the penalty", stacklevel=2)
    return _classifier(test, classes, mean, scale[:, None] * (basis @ theta[:-1]), theta[-1], best)


@torch.no_grad()
def few_label(
    train: Train, labels: Labels, test: Test, *, per_class: int, draws: int = 5, seed: int = 0
) -> Int[Tensor, "{draws} m"]:
    """Predictions from `per_class` labels of each class, for several draws of these labels.

    A smaller class gives all its labels; the draws of a seed are nested. Logistic regression on unit-length features,
    first centred by all training rows, labelled or not (the CL2N of SimpleShot, arXiv 1911.04623). The penalty is fixed
    because ten labels cannot choose one; on raw digits all from 1e-6 to 1e-3 agree within a point.
    """
    _check_finite(train, test)
    classes, codes = torch.unique(labels, return_inverse=True)
    mean = _column_means(train)
    x_test = torch.cat([normalize(block).float() for block in _blocks(test, mean)])

    # One regression per draw.
    zero, predicted = torch.zeros_like(mean), []
    for draw in range(draws):
        labelled = rank_in_class(codes, generator(seed, "few labels", draw)) < per_class
        basis, z, spectrum = _rotate(normalize(train[labelled].to(mean) - mean).float())
        theta, _ = _softmax_regression(z, codes[labelled], spectrum, 1e-3, None)
        predicted.append(classes[_most_likely(x_test, zero, basis @ theta[:-1], theta[-1])])
    return torch.stack(predicted)


def _rotate(x: Train) -> tuple[Float[Tensor, "d r"], Float[Tensor, "n r"], Float[Tensor, " r"]]:
    """Eigenvectors of xᵀx / n, the rows in their basis, and the mean squares of its columns; writes over x."""
    zero = x.new_zeros(x.shape[1], dtype=torch.float64)
    basis, spectrum = _eigenpairs(x, zero)
    z = x[:, : basis.shape[1]]
    for block, rows in zip(_blocks(x, zero), z.split(_rows(x)), strict=True):
        rows.copy_(block @ basis)
    return basis, z, spectrum


def _choose_penalty(
    z: Train, codes: Labels, spectrum: Float[Tensor, " d"], penalties: Sequence[float], rng: torch.Generator
) -> tuple[float, Float[Tensor, "d+1 c"] | None]:
    """The penalty with the lowest log-loss on held-out rows, and a start for its fit to all rows.

    Log-loss changes smoothly with the penalty, while accuracy on few rows jumps. Without rows to hold out it is 1/n.
    """
    folds = _held_out_folds(codes, rng)
    if not folds:
        return 1 / len(z), None

    # Weak penalties are slow: go from strong to weak, each from the fits before it, until two in a row are no better.
    splits = [((~fold).nonzero()[:, 0], fold.nonzero()[:, 0]) for fold in folds]
    thetas: list[Tensor | None] = [None] * len(folds)
    best, start, lowest, behind = max(penalties), None, math.inf, 0
    for penalty in sorted(penalties, reverse=True):
        losses = []
        for i, (fit, held_out) in enumerate(splits):
            theta, _ = _softmax_regression(z, codes[fit], spectrum, penalty, thetas[i], rows=fit, rough=True)
            losses.append(_log_loss(z, codes, held_out, theta))
            thetas[i] = theta
        behind += 1
        if (mean := float(torch.cat(losses).mean())) < lowest:
            best, start, lowest, behind = penalty, thetas[0], mean, 0
        if behind == 2:
            break
    return best, start


def _held_out_folds(codes: Labels, rng: torch.Generator) -> list[Bool[Tensor, " n"]]:
    """Disjoint fifths of each class, as many as hold HELD_OUT rows; the only row of a class is never held out."""
    count = codes.bincount()
    # Fifths of a class of few rows begin at different folds, so that all folds have as many rows.
    place = (count.cumsum(0) - count)[codes] + rank_in_class(codes, rng)
    folds = [(place % FOLDS == i) & (count[codes] > 1) for i in range(FOLDS)]
    enough = math.ceil(HELD_OUT * FOLDS / len(codes))
    return [fold for fold in folds[:enough] if fold.any()]


def _log_loss(z: Train, y: Labels, rows: Int[Tensor, " m"], theta: Float[Tensor, "d+1 c"]) -> Float[Tensor, " m"]:
    """Cross-entropy of each of the rows in nats."""
    losses = []
    for chosen in rows.split(_rows(theta, max(theta.shape))):
        logits = z[chosen].to(theta) @ theta[:-1] + theta[-1]
        losses.append(cross_entropy(logits, y[chosen], reduction="none"))
    return torch.cat(losses)


def _softmax_regression(
    z: Float[Tensor, "_ d"],
    y: Labels,
    spectrum: Float[Tensor, " d"],
    penalty: float,
    start: Float[Tensor, "d+1 c"] | None,
    *,
    rows: Int[Tensor, " n"] | None = None,
    rough: bool = False,
) -> tuple[Float[Tensor, "d+1 c"], float]:
    """Weight, with the intercept as its last row, and the largest remaining gradient; fits `rows` of z.

    `spectrum` is that of `_rotate`.

    L-BFGS on u = theta / scale with scale⁻² = spectrum · share of the class + penalty, close to the curvature:
    ill-conditioned features take tens of iterations instead of thousands, and a gradient g costs about g²/2 nats of
    loss. Stops when no |g| exceeds MAX_GRADIENT, or 1e-3 if `rough`: products in float32 are too coarse for less.
    """
    # The intercept is one more direction: its feature is the constant 1, of mean square 1, without a penalty.
    share = y.bincount().to(spectrum) / len(y)
    decay = torch.cat([torch.full_like(spectrum, penalty), spectrum.new_zeros(1)])[:, None]
    scale = (torch.cat([spectrum, spectrum.new_ones(1)])[:, None] * share + decay).rsqrt()
    if start is None:  # the solution for an infinite penalty
        start = torch.cat([spectrum.new_zeros(len(spectrum), len(share)), share.log()[None]])
    u = start / scale

    def loss() -> Tensor:
        theta = u * scale
        value, to_weight, to_bias = _cross_entropy(z, y, theta[:-1], theta[-1], rows=rows, rough=rough)
        u.grad = scale * (torch.cat([to_weight, to_bias[None]]) + decay * theta)
        return value + (decay * theta.square()).sum() / 2

    # Stop as well once the loss changes by less than its rounding.
    gradient, change = (1e-3, 1e-8) if rough else (MAX_GRADIENT, 1e-15)
    lbfgs = torch.optim.LBFGS([u], 1, MAX_ITER, None, gradient, change, history_size=20, line_search_fn="strong_wolfe")
    lbfgs.step(loss)
    loss()  # the line search may have left the gradient of another point
    assert u.grad is not None
    return u * scale, float(u.grad.abs().max())


def _cross_entropy(
    x: Float[Tensor, "_ d"],
    y: Int[Tensor, " n"],
    w: Float[Tensor, "d c"],
    b: Float[Tensor, " c"],
    *,
    rows: Int[Tensor, " n"] | None = None,
    rough: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, "d c"], Float[Tensor, " c"]]:
    """Mean cross-entropy in nats and its gradients, in float64; products in float32 if `rough`."""
    value, to_w, to_b = w.new_zeros(()), torch.zeros_like(w), torch.zeros_like(b)
    like, size = x if rough else w, _rows(w, max(w.shape))
    w, b = w.to(like), b.to(like)
    # Chosen rows are gathered a block at a time: a copy of them would be as large as x.
    blocks = x.split(size) if rows is None else (x[chosen] for chosen in rows.split(size))
    for block, target in zip(blocks, y[:, None].split(size), strict=True):
        block = block.to(like)
        log_p = torch.addmm(b, block, w).log_softmax(1)
        value -= log_p.gather(1, target).to(value).sum()

        # The gradient to the logits is p − one_hot(y).
        to_logits = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1))
        to_w += (block.T @ to_logits).to(to_w)
        to_b += to_logits.sum(0).to(to_b)
    return value / len(y), to_w / len(y), to_b / len(y)


def _eigenpairs(x: Float[Tensor, "n d"], mean: Float[Tensor, " d"]) -> Eigenpairs:
    """Eigenvectors and eigenvalues of (x − mean)ᵀ(x − mean) / n in float64, without eigenvalues lost in rounding.

    Decomposes the smaller of the d×d and the n×n product: they share their r ≤ min(n, d) eigenvalues above 0.
    """
    n, d = x.shape
    products = _between_rows(x, mean) if n < d else sum((b.T @ b for b in _blocks(x, mean)), mean.new_zeros(d, d))
    spectrum, vectors = torch.linalg.eigh(products.div_(n))
    del products  # as large as the vectors, which for raw pixels are 75 MB
    above = spectrum > max(n, d) * torch.finfo(spectrum.dtype).eps * spectrum[-1].clamp_min(0)
    spectrum, vectors = spectrum[above], vectors[:, above]
    if n >= d:
        return vectors, spectrum
    basis = mean.new_zeros(d, len(spectrum))
    for block, rows in zip(_blocks(x, mean), vectors.split(_rows(x)), strict=True):
        basis.addmm_(block.T, rows)
    return basis.div_((n * spectrum).sqrt()), spectrum


def _between_rows(x: Float[Tensor, "n d"], mean: Float[Tensor, " d"]) -> Float[Tensor, "n n"]:
    """Products (x − mean)(x − mean)ᵀ."""
    centred = mean.new_empty(x.shape)
    for block, rows in zip(_blocks(x, mean), centred.split(_rows(x)), strict=True):
        rows.copy_(block)
    return centred @ centred.T


def rank_in_class(codes: Int[Tensor, " n"], rng: torch.Generator) -> Int[Tensor, " n"]:
    """Position of each row, from 0, among the shuffled rows of its class."""
    order = torch.randperm(len(codes), generator=rng).to(codes.device)
    order = order[codes[order].argsort(stable=True)]
    count = codes.bincount()
    first = (count.cumsum(0) - count)[codes[order]]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(codes), device=codes.device) - first)


def _classifier(
    test: Tensor, classes: Tensor, mean: Tensor, weight: Float[Tensor, "d c"], bias: Float[Tensor, " c"], penalty: float
) -> LinearClassifier:
    """The fit (x − mean) @ weight + bias as a classifier of uncentred rows."""
    predicted = classes[_most_likely(test, mean, weight, bias)]
    return LinearClassifier(predicted, classes, weight.float(), (bias - mean @ weight).float(), float(penalty))


def _most_likely(
    x: Float[Tensor, "n d"], mean: Float[Tensor, " d"], weight: Float[Tensor, "d c"], bias: Float[Tensor, " c"]
) -> Int[Tensor, " n"]:
    """Column of the largest logit in each row, from float64 products: features may lie far from 0."""
    return torch.cat([(block @ weight + bias).argmax(1) for block in _blocks(x, mean)])


def _column_means(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    zero = x.new_zeros(x.shape[1], dtype=torch.float64)
    return sum((block.sum(0) for block in _blocks(x, zero)), zero) / len(x)


def _blocks(x: Float[Tensor, "n d"], mean: Float[Tensor, " d"]) -> Iterator[Float[Tensor, "b d"]]:
    """x − mean in blocks of rows, so that x is never copied whole; in the float64 of the mean."""
    return (rows.to(mean) - mean for rows in x.split(_rows(x)))


def _rows(x: Float[Tensor, "n d"], width: int | None = None) -> int:
    """Rows of a block of x, or of another width on its device."""
    return max(1, PROBE_BLOCK.get(x.device.type, PROBE_BLOCK["cpu"]) // (width or x.shape[1]))


def _check_finite(train: Tensor, test: Tensor) -> None:
    """Raise ValueError for features that no probe can use."""
    for name, x in (("training", train), ("test", test)):
        if bad := sum(int((~rows.isfinite()).any(1).sum()) for rows in x.split(_rows(x))):
            raise ValueError(f"{bad} of {len(x)} {name} rows hold nan or inf; leave them out, or repair their features")
