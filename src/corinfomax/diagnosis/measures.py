"""What features say about their training without labels: measures of a few fixed images, each seen in several views.

Features are (rows, dimensions); views of one image are a further axis, (images, views, dimensions). Everything is
float64, since logarithms of small eigenvalues are what is asked for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from corinfomax.images.cache import Images, Splits
from corinfomax.network import Network, arithmetic, ready
from corinfomax.objective.covariance import ldmi
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime.seeds import generator
from corinfomax.views import operations

VIEWS = 4  # of each image: two pairs for LDMI, and enough to know what varies within an image for LiDAR
LEAST_IMAGES = 256
IMAGES_PER_DIM = 4  # two views have 2·D columns; with fewer rows than twice that LDMI measures the sample's size
REQ_RANKS = (3, 50)  # the first directions are few and special, the last are noise of a finite sample
DEAD = 0.01  # standard deviation of a dimension, relative to the root mean square of all
DUPLICATE = 0.95  # |correlation| of two dimensions
TWIN = 0.02  # squared distance of two images, relative to the mean over pairs
COST = 0.02  # share of a run's time that all looks together may take
VIEW_COST = 0.25  # time of one view in a look, relative to a training image with its two views there and back
LEAST_LOOKS = 10  # also in runs so short that these cost more: three of them lie in the first fifth


class Measures(NamedTuple):
    """One look at the network: projections are unit rows as the loss sees them, features are those of the backbone."""

    ldmi: float | None
    """Mutual information of two views in nats a dimension; None with fewer than 2·D rows, where it has no meaning."""
    spread_gap: float
    """The big bang of these projections above its least value 2·ln D, in nats a dimension; 0 is isotropic."""
    spread: float
    """1 − |mean projection|²: 0 where all images are at one point, 1 where they surround the origin."""
    agreement: float
    """Share of the projections' variance that is between images, the rest between views: 1 is no trace of a view."""
    rank: float
    """Effective rank of the projections (RankMe)."""
    rank_features: float
    """Effective rank of the features (RankMe)."""
    lidar: float
    """Effective rank of what tells images apart in the projections (LiDAR)."""
    lidar_features: float
    """The same in the features."""
    req: float | None
    """Exponent of the power law that the features' spectrum follows (α-ReQ); None without three ranks to fit."""
    alignment: float
    """Mean squared distance between projections of two views of an image."""
    uniformity: float
    """Log of the mean Gaussian potential between projections of two images; −4 + … is spread out, 0 is one point."""
    dead: float
    """Share of the projections' dimensions that hardly vary."""
    dead_features: float
    duplicate: float
    """Share of the projections' dimensions that nearly repeat an earlier one."""
    duplicate_features: float
    spectrum: list[float]
    """Share of the variance along each principal direction of the projections, descending."""
    spectrum_features: list[float]


class Data(NamedTuple):
    """What the network is given, measured on pixels once at the start."""

    views_differ: float
    """Mean squared distance of two views of one image, relative to that of views of two images."""
    images_differ: float
    """Mean variance of a pixel over the images, relative to the variance of all pixels in all images."""
    twins: float
    """Share of the images that have a nearly equal one among the others."""


class Slice(NamedTuple):
    """The images that are looked at, always the same ones."""

    images: Images
    held_out: bool
    """Whether training never sees them."""
    data: Data


def choose(splits: Splits, recipe: Recipe, *, device: torch.device) -> Slice:
    """A fixed slice of the test split, or of the training images where there is none or it is too small."""
    dim = recipe.projector.widths[-1]
    held_out = splits.test is not None and len(splits.test) >= 2 * dim
    images = splits.test if held_out else splits.train
    assert images is not None
    order = torch.randperm(len(images), generator=generator(0, "diagnosis"))
    chosen = images.select(order[: max(LEAST_IMAGES, IMAGES_PER_DIM * dim)])
    return Slice(chosen, held_out, look_at_data(chosen, recipe, device=device))


def schedule(steps: int, batch: int, most: int, part: Slice) -> set[int]:
    """After which steps to look: at most `most` times and within COST of the run's time, densest at the start.

    The i-th of n looks comes after (i/n)^1.5 of the run, so a third of them in its first fifth. Counted, not timed,
    so that a resumed run looks where the whole one did.
    """
    affordable = COST * steps * batch / (VIEW_COST * VIEWS * len(part.images))
    looks = min(most, max(LEAST_LOOKS, int(affordable)), steps)
    return {max(1, round(steps * ((i + 1) / looks) ** 1.5)) for i in range(looks)}


@torch.no_grad()
def look(network: Network, images: Images, recipe: Recipe, *, device: torch.device) -> Measures | None:
    """The measures of the network as it is, in eval mode; None where its output is not finite.

    Views are those of the recipe, the same at every look. The network's mode is put back; no random number of the
    training is drawn.
    """
    training = network.training
    network.eval()
    try:
        outputs = [_forward(network, images, recipe, view, device) for view in range(VIEWS)]
    finally:
        network.train(training)
    features, projections = (torch.stack(each, 1) for each in zip(*outputs, strict=True))
    if recipe.loss.normalize:
        projections = F.normalize(projections, dim=-1)
    if not bool(features.isfinite().all() & projections.isfinite().all()):
        return None
    return measure(features, projections)


def row(network: Network, part: Slice, recipe: Recipe, *, device: torch.device) -> dict[str, Any]:
    """What a row of metrics.jsonl gets: every measure by name; None where the network's output is not finite."""
    measures = look(network, part.images, recipe, device=device)
    shown = dict.fromkeys(Measures._fields) if measures is None else measures._asdict()
    return {"held_out": part.held_out, **part.data._asdict(), **shown}


def _forward(
    network: Network, images: Images, recipe: Recipe, view: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    features, projections = [], []
    size = recipe.micro_batch or max(recipe.batch, LEAST_IMAGES)
    for start in range(0, len(images), size):
        rows = torch.arange(start, min(start + size, len(images)))
        x = ready(_view(images, recipe, view, rows, device), network)
        with arithmetic(recipe, device):
            h = network.backbone(x)
            z = network.projector(h)
        features.append(_float64(h))
        projections.append(_float64(z))
    return torch.cat(features), torch.cat(projections)


def _view(images: Images, recipe: Recipe, view: int, rows: Tensor, device: torch.device) -> Tensor:
    pixels, sizes = images.batch(rows)
    drawn = operations.draw(recipe.views[view % 2], sizes, generator(0, f"diagnosis view {view}", int(rows[0])))
    return operations.apply(pixels.to(device), sizes, drawn, size=recipe.size, mean=recipe.mean, std=recipe.std)


def _float64(x: Tensor) -> Tensor:
    return x.to("cpu" if x.device.type == "mps" else x.device).double()  # MPS has no float64


def measure(features: Float[Tensor, "n q f"], projections: Float[Tensor, "n q d"]) -> Measures:
    """Every measure of n images in an even number q of views: views 0 and 1, 2 and 3, … are the pairs."""
    d = projections.shape[2]
    z, h = projections.flatten(0, 1), features.flatten(0, 1)
    z1, z2 = projections[:, 0::2].flatten(0, 1), projections[:, 1::2].flatten(0, 1)
    spectrum, spectrum_features = covariance_spectrum(z), covariance_spectrum(h)
    return Measures(
        ldmi=float(ldmi(z1, z2)) if len(z1) >= 2 * d else None,
        spread_gap=float(spread_gap(z)),
        spread=float(z.square().sum(1).mean() - z.mean(0).square().sum()),
        agreement=float(agreement(projections)),
        rank=float(effective_rank(z)),
        rank_features=float(effective_rank(h)),
        lidar=float(lidar(projections)),
        lidar_features=float(lidar(features)),
        req=power_law(spectrum_features),
        alignment=float(alignment(z1, z2)),
        uniformity=float(uniformity(projections[:, 0])),
        dead=dead(z),
        dead_features=dead(h),
        duplicate=duplicate(z),
        duplicate_features=duplicate(h),
        spectrum=_short(spectrum),
        spectrum_features=_short(spectrum_features),
    )


def _short(spectrum: Tensor, most: int = 256) -> list[float]:
    return [float(f"{share:.3g}") for share in spectrum[:most].tolist()]


def covariance_spectrum(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Eigenvalues of the covariance, descending, as shares of their sum; all 0 where nothing varies."""
    eigenvalues = torch.linalg.eigvalsh(_covariance(x)).flip(0).clamp_min(0)
    total = eigenvalues.sum()
    return torch.where(total > 0, eigenvalues / total, torch.zeros_like(eigenvalues))


def effective_rank(x: Float[Tensor, "n d"], *, eps: float = 1e-7) -> Float[Tensor, ""]:
    """RankMe (arXiv 2210.02885): exp of the entropy of the singular values of x, uncentred, as shares of their sum."""
    # Through the smaller Gram matrix: it loses singular values below 1e-8 of the largest, which add nothing here.
    gram = x.T @ x if x.shape[1] <= len(x) else x @ x.T
    return _exp_entropy(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt(), eps)


def lidar(x: Float[Tensor, "n q d"], *, delta: float = 1e-4, eps: float = 1e-7) -> Float[Tensor, ""]:
    """LiDAR (arXiv 2312.04000): effective rank of W^(−1/2) B W^(−1/2), between images over within.

    B is the covariance of the n images' means, W that of the q views about their image's mean, plus δI. Each image is a
    class of its own, so no label is needed.
    """
    means = x.mean(1)
    within = (x - means[:, None]).flatten(0, 1)
    W = within.T @ within / (len(within) - len(means))
    L = torch.linalg.cholesky(W + delta * torch.eye(x.shape[2], dtype=x.dtype, device=x.device))
    B = _covariance(means) * len(means) / (len(means) - 1)
    half = torch.linalg.solve_triangular(L, B, upper=False)
    # L⁻¹BL⁻ᵀ has the eigenvalues of W^(−1/2) B W^(−1/2).
    matrix = torch.linalg.solve_triangular(L, half.mT, upper=False)
    return _exp_entropy(torch.linalg.eigvalsh(matrix).clamp_min(0), eps)


def _exp_entropy(values: Tensor, eps: float) -> Tensor:
    """exp of the entropy of values as shares of their sum, eps added as both papers do; 1 where all are 0."""
    total = values.sum()
    p = values / torch.where(total > 0, total, 1.0) + eps
    return torch.where(total > 0, -(p * p.log()).sum(), 0.0).exp()


def power_law(spectrum: Float[Tensor, " d"], *, ranks: tuple[int, int] = REQ_RANKS) -> float | None:
    """The a of eigenvalue ∝ rank^−a by least squares on logarithms over `ranks` (α-ReQ, arXiv 2202.05808).

    Ranks count from 1, both ends included; those whose eigenvalue is rounding are left out.
    """
    first, last = ranks
    chosen = spectrum[first - 1 : last]
    chosen = chosen[chosen > 1e-12]
    if len(chosen) < 3:
        return None
    x = torch.arange(first, first + len(chosen), dtype=spectrum.dtype, device=spectrum.device).log()
    x, y = x - x.mean(), chosen.log()
    return -float((x * y).sum() / x.square().sum())


def spread_gap(z: Float[Tensor, "n d"], *, eps: float = 1e-8) -> Float[Tensor, ""]:
    """How far −2/D · log det of the rows' covariance is above 2·ln D, the least that unit rows reach."""
    d = z.shape[1]
    eigenvalues = torch.linalg.eigvalsh(_covariance(z)).clamp_min(0)
    return -2 / d * (eigenvalues + eps).log().sum() - 2 * math.log(d)


def agreement(x: Float[Tensor, "n q d"]) -> Float[Tensor, ""]:
    """The share of the variance that lies between images: their means' variance freed of what views add to it."""
    n, q, _ = x.shape
    means = x.mean(1)
    within = (x - means[:, None]).square().sum() / (n * (q - 1))
    between = (means - means.mean(0)).square().sum() / (n - 1) - within / q
    total = between + within
    return torch.where(total > 0, between.clamp_min(0) / total, 0.0)


def alignment(z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean squared distance of positive pairs (arXiv 2005.10242)."""
    return (z1 - z2).square().sum(1).mean()


def uniformity(z: Float[Tensor, "n d"], *, t: float = 2.0) -> Float[Tensor, ""]:
    """Log of the mean of exp(−t·squared distance) over pairs of rows (arXiv 2005.10242)."""
    return torch.pdist(z).square().mul(-t).exp().mean().log()


def dead(x: Float[Tensor, "n d"], *, level: float = DEAD) -> float:
    """The share of dimensions with a deviation below `level` of the root mean square one; all if none varies."""
    deviation = x.std(0, correction=0)
    return float((deviation <= level * deviation.square().mean().sqrt()).double().mean())


def duplicate(x: Float[Tensor, "n d"], *, level: float = DUPLICATE) -> float:
    """The share of dimensions with a |correlation| above `level` to an earlier one; those that do not vary are none."""
    C = _covariance(x)
    scale = C.diagonal().sqrt()
    scale = torch.where(scale > DEAD * scale.square().mean().sqrt(), 1 / scale, 0.0)
    correlation = (scale[:, None] * C * scale).abs().triu(1)
    return float((correlation > level).any(0).double().mean())


def _covariance(x: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    centred = x - x.mean(0)
    return centred.T @ centred / len(x)


def look_at_data(images: Images, recipe: Recipe, *, device: torch.device) -> Data:
    """What can be wrong with the images or their views before any network sees them."""
    rows = torch.arange(min(len(images), LEAST_IMAGES))
    x1, x2 = (_view(images, recipe, view, rows, device).flatten(1) for view in range(2))
    pixels, sizes = images.batch(rows)
    plain = operations.centre_view(
        pixels.to(device), sizes, size=recipe.size, mean=recipe.mean, std=recipe.std
    ).flatten(1)
    return measure_data(*map(_float64, (x1, x2, plain)))


def measure_data(
    x1: Float[Tensor, "n p"], x2: Float[Tensor, "n p"], plain: Float[Tensor, "n p"], *, twin: float = TWIN
) -> Data:
    """The measures of two views and the plain pixels of n images, one row each."""
    others = _squared_distances(x1, x2)
    between = others.fill_diagonal_(0).sum() / (len(x1) * (len(x1) - 1))
    own = (x1 - x2).square().sum(1).mean()
    everything = plain.var(correction=0)
    distances = _squared_distances(plain, plain)
    typical = plain.shape[1] * everything  # twins are judged on the images' own contrast: equal images have no distance
    nearest = distances.fill_diagonal_(math.inf).amin(1)
    return Data(
        views_differ=float(own / between) if between > 0 else 1.0,
        images_differ=float(plain.var(0, correction=0).mean() / everything) if everything > 0 else 0.0,
        twins=float((nearest < twin * typical).double().mean()),
    )


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
