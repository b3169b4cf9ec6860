"""Label-free measures of a network, on a fixed sample of images, each seen in several views.

Features and projections are (images, views, dimensions) tensors, or (rows, dimensions) once views are flattened.
Everything is float64: the measures take logarithms of small eigenvalues.
"""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from corinfomax.diagnosis.expected_input import CERTAIN, better_input
from corinfomax.images.cache import Images, Splits
from corinfomax.network import Network, autocast, evaluating, images_at_once, match_dtype
from corinfomax.objective.covariance import ldmi
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime.records import DataMeasures, Look, Measures
from corinfomax.runtime.seeds import generator
from corinfomax.views import operations

VIEWS = 4  # per image: two pairs for LDMI, and enough variation within an image for LiDAR
LEAST_IMAGES = 256
IMAGES_PER_DIM = 4  # two views have 2·D columns; with fewer rows than twice that, LDMI measures the sample size
REQ_RANKS = (3, 50)  # counted from 1: the first few directions are atypical, the last are sampling noise
DEAD = 0.01  # standard deviation of a dimension, relative to the root mean square over dimensions
DUPLICATE = 0.95  # |correlation| of two dimensions
TWIN = 0.02  # squared distance between two images, relative to the mean over pairs
COST = 0.02  # share of a run's time for all looks together
VIEW_COST = 0.25  # time of one view in a look, relative to one training image (two views, forward and backward)
LEAST_LOOKS = 10  # even in runs so short that they cost more; three fall into the first fifth


class Sample(NamedTuple):
    """Fixed sample of images, measured at every look."""

    images: Images
    held_out: bool  # training never uses them
    data: DataMeasures
    start: Float[Tensor, "n q f"] | None = None
    """Features of the weights that the run starts from."""


def choose_sample(
    splits: Splits,
    recipe: Recipe,
    *,
    device: torch.device,
    start: nn.Module | None = None,
    assumed_input: bool = False,
) -> Sample:
    """A fixed sample of the test split, or of the training images when there are fewer than 2·D test images.

    `start` is the backbone that the run continues from; its normalisation is checked if it is assumed.
    """
    dim = recipe.projector.widths[-1]
    held_out = splits.test is not None and len(splits.test) >= 2 * dim
    images = splits.test if held_out else splits.train
    assert images is not None
    order = torch.randperm(len(images), generator=generator(0, "diagnosis"))
    sample = images.select(order[: max(LEAST_IMAGES, IMAGES_PER_DIM * dim)])
    data = measure_images(sample, recipe, device=device)
    if start is None:
        return Sample(sample, held_out, data)
    if assumed_input:
        data = data._replace(better_input=better_input(start, sample, recipe, device=device, far=CERTAIN))
    return Sample(sample, held_out, data, features_of_views(start, sample, recipe, device=device))


def look_steps(steps: int, batch: int, most: int, sample: Sample) -> set[int]:
    """The steps to look after: at most `most`, within COST of the run's time, densest at the start.

    The i-th of n looks comes after (i/n)^1.5 of the run, so a third of them fall into its first fifth. The cost is
    counted, not timed, so that a resumed run looks after the same steps.
    """
    affordable = COST * steps * batch / (VIEW_COST * VIEWS * len(sample.images))
    looks = min(most, max(LEAST_LOOKS, int(affordable)), steps)
    return {max(1, round(steps * ((i + 1) / looks) ** 1.5)) for i in range(looks)}


def look(network: Network, sample: Sample, recipe: Recipe, *, device: torch.device) -> Look:
    """The measures of the network in eval mode at this moment, for a row of metrics.

    The views are the recipe's, the same at every look, and no random number of the training is drawn.
    """
    h, z = _outputs(network.backbone, network.projector, sample.images, recipe, device)
    z = F.normalize(z, dim=-1) if recipe.loss.normalize else z
    if not (h.isfinite().all() and z.isfinite().all()):
        return Look(sample.held_out, sample.data, None)
    measures = measure(h, z)
    if sample.start is not None:
        measures = measures._replace(cka=float(cka(h.flatten(0, 1), sample.start.flatten(0, 1))))
    return Look(sample.held_out, sample.data, measures)


def features_of_views(
    backbone: nn.Module, images: Images, recipe: Recipe, *, device: torch.device
) -> Float[Tensor, "n q f"]:
    """Features of VIEWS fixed views of each image, in eval mode, float64 on the CPU."""
    return _outputs(backbone, nn.Identity(), images, recipe, device)[0]


@torch.no_grad()
def _outputs(
    backbone: nn.Module, projector: nn.Module, images: Images, recipe: Recipe, device: torch.device
) -> tuple[Float[Tensor, "n q f"], Float[Tensor, "n q d"]]:
    """Features and projections of VIEWS views of each image, in eval mode."""
    batches = torch.arange(len(images)).split(recipe.micro_batch or max(recipe.batch, LEAST_IMAGES))
    features, projections = [], []
    with evaluating(backbone, projector):
        model = nn.Sequential(backbone, projector).eval()  # as written, if the network is compiled
        at_once = images_at_once(model, recipe, device, side=recipe.size, most=len(batches[0]))
        for view, rows in itertools.product(range(VIEWS), batches):
            for x in _view(images, recipe, view, rows, device, at_once):
                with autocast(recipe, device):
                    h = backbone(match_dtype(x, backbone))
                    z = projector(h)
                features.append(_float64(h))
                projections.append(_float64(z))

    # One chunk per view, side by side.
    h, z = (torch.stack(torch.cat(outputs).chunk(VIEWS), 1) for outputs in (features, projections))
    return h, z


def _view(
    images: Images, recipe: Recipe, view: int, rows: Int[Tensor, " b"], device: torch.device, at_once: int
) -> Iterator[Float[Tensor, "_ 3 s s"]]:
    """A view of the images, a few at a time; its random numbers belong to the whole batch."""
    pixels, sizes = images.batch(rows)
    rng = generator(0, f"diagnosis view {view}", int(rows[0]))
    parameters = operations.draw(recipe.views[view % 2], sizes, rng, recipe.pixels)
    for start in range(0, len(rows), at_once):
        chunk = slice(start, start + at_once)
        x, chosen = pixels[chunk].to(device), parameters.take(chunk)
        yield operations.apply(x, sizes[chunk], chosen, size=recipe.size, scaling=recipe.scaling)


def _float64(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()  # MPS has no float64


def measure(features: Float[Tensor, "n q f"], projections: Float[Tensor, "n q d"]) -> Measures:
    """Every measure of n images in an even number q of views; views 0 and 1, 2 and 3, … are the pairs."""
    # Flatten views into rows: z and h hold all of them, z1 and z2 the two sides of the pairs.
    z, h = projections.flatten(0, 1), features.flatten(0, 1)
    z1, z2 = projections[:, 0::2].flatten(0, 1), projections[:, 1::2].flatten(0, 1)

    spectrum, spectrum_features = covariance_spectrum(z), covariance_spectrum(h)
    return Measures(
        ldmi=float(ldmi(z1, z2)) if len(z1) >= 2 * z1.shape[1] else None,
        spread_gap=float(spread_gap(z)),
        spread=float(z.square().sum(1).mean() - z.mean(0).square().sum()),
        agreement=float(agreement(projections)),
        rank=float(effective_rank(z)),
        rank_features=float(effective_rank(h)),
        lidar=float(lidar(projections)),
        lidar_features=float(lidar(features)),
        req=power_law(spectrum_features),
        alignment=float((z1 - z2).square().sum(1).mean()),
        uniformity=float(uniformity(projections[:, 0])),
        dead=dead(z),
        dead_features=dead(h),
        duplicate=duplicate(z),
        duplicate_features=duplicate(h),
        spectrum=_rounded(spectrum),
        spectrum_features=_rounded(spectrum_features),
    )


def _rounded(spectrum: Tensor) -> list[float]:
    return [float(f"{share:.3g}") for share in spectrum[:256].tolist()]


def covariance_spectrum(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """Eigenvalues of the covariance, descending, as shares of their sum; all 0 when nothing varies."""
    eigenvalues = torch.linalg.eigvalsh(_covariance(x)).flip(0).clamp_min(0)
    total = eigenvalues.sum()
    return torch.where(total > 0, eigenvalues / total, 0.0)


def effective_rank(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """RankMe (arXiv 2210.02885): exp of the entropy of the singular values of x, uncentred, as shares of their sum."""
    # The smaller Gram matrix loses singular values below 1e-8 of the largest; they add nothing to the entropy.
    gram = x.T @ x if x.shape[1] <= len(x) else x @ x.T
    return _exp_entropy(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt())


def lidar(x: Float[Tensor, "n q d"], *, delta: float = 1e-4) -> Float[Tensor, ""]:
    """LiDAR (arXiv 2312.04000): effective rank of W^(−1/2) B W^(−1/2), variance between images over within.

    B is the covariance of the n images' means; W is the covariance of the q views around their image's mean, plus δI.
    """
    means = x.mean(1)
    within = (x - means[:, None]).flatten(0, 1)
    W = within.T @ within / (len(within) - len(means))
    L = torch.linalg.cholesky(W + delta * torch.eye(x.shape[2], dtype=x.dtype, device=x.device))

    # L⁻¹BL⁻ᵀ has the eigenvalues of W^(−1/2) B W^(−1/2).
    B = _covariance(means) * len(means) / (len(means) - 1)
    half = torch.linalg.solve_triangular(L, B, upper=False)
    matrix = torch.linalg.solve_triangular(L, half.mT, upper=False)
    return _exp_entropy(torch.linalg.eigvalsh(matrix).clamp_min(0))


def _exp_entropy(values: Tensor) -> Tensor:
    """exp of the entropy of values as shares of their sum; 1 when all are 0."""
    total = values.sum()
    p = values / torch.where(total > 0, total, 1.0) + 1e-7  # as in both papers
    return torch.where(total > 0, -(p * p.log()).sum(), 0.0).exp()


def power_law(spectrum: Float[Tensor, " d"]) -> float | None:
    """Exponent a of eigenvalue ∝ rank^−a, by least squares on logarithms (α-ReQ, arXiv 2202.05808).

    Eigenvalues that are rounding are left out; None with fewer than three others.
    """
    first, last = REQ_RANKS
    chosen = spectrum[first - 1 : last]
    chosen = chosen[chosen > 1e-12]
    if len(chosen) < 3:
        return None
    x = torch.arange(first, first + len(chosen), dtype=spectrum.dtype, device=spectrum.device).log()
    x, y = x - x.mean(), chosen.log()
    return -float((x * y).sum() / x.square().sum())


def spread_gap(z: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """−2/D · log det of the rows' covariance minus its lower bound for unit rows, 2·ln D."""
    d = z.shape[1]
    eigenvalues = torch.linalg.eigvalsh(_covariance(z)).clamp_min(0)
    return -2 / d * (eigenvalues + 1e-8).log().sum() - 2 * math.log(d)


def agreement(x: Float[Tensor, "n q d"]) -> Float[Tensor, ""]:
    """Share of the variance between images, corrected for what the views add to the variance of their means."""
    n, q, _ = x.shape
    means = x.mean(1)
    within = (x - means[:, None]).square().sum() / (n * (q - 1))
    between = (means - means.mean(0)).square().sum() / (n - 1) - within / q
    total = between + within
    return torch.where(total > 0, between.clamp_min(0) / total, 0.0)


def cka(x: Float[Tensor, "n d"], y: Float[Tensor, "n e"]) -> Float[Tensor, ""]:
    """Linear CKA of two sets of features of the same rows (arXiv 1905.00414): 1 if they are equal up to rotation and
    scale, 0 if no direction of one can be predicted from the other.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return torch.where(scale > 0, (x.T @ y).square().sum() / scale, 0.0)


def uniformity(z: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Log of the mean of exp(−2·squared distance) over pairs of rows (arXiv 2005.10242)."""
    return torch.pdist(z).square().mul(-2).exp().mean().log()


def dead(x: Float[Tensor, "n d"]) -> float:
    """Share of dimensions with a deviation below DEAD times the root mean square one; 1 when none varies."""
    deviation = x.std(0, correction=0)
    return float((deviation <= DEAD * deviation.square().mean().sqrt()).double().mean())


def duplicate(x: Float[Tensor, "n d"]) -> float:
    """Share of dimensions with |correlation| above DUPLICATE to an earlier one; constant ones do not count."""
    C = _covariance(x)
    scale = C.diagonal().sqrt()
    scale = torch.where(scale > DEAD * scale.square().mean().sqrt(), 1 / scale, 0.0)
    correlation = (scale[:, None] * C * scale).abs().triu(1)
    return float((correlation > DUPLICATE).any(0).double().mean())


def _covariance(x: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    centred = x - x.mean(0)
    return centred.T @ centred / len(x)


def measure_images(images: Images, recipe: Recipe, *, device: torch.device) -> DataMeasures:
    """The measures of the images and their views before any network sees them."""
    rows = torch.arange(min(len(images), LEAST_IMAGES))
    x1, x2 = (next(_view(images, recipe, view, rows, device, len(rows))).flatten(1) for view in range(2))

    pixels, sizes = images.batch(rows)
    plain = operations.centre_view(pixels.to(device), sizes, size=recipe.size, scaling=recipe.scaling)
    return measure_pixels(_float64(x1), _float64(x2), _float64(plain.flatten(1)))


def measure_pixels(x1: Float[Tensor, "n p"], x2: Float[Tensor, "n p"], plain: Float[Tensor, "n p"]) -> DataMeasures:
    """The measures of n images: `x1` and `x2` are two views of each, `plain` its centre view, one row per image."""
    exact = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")

    # Views of one image against views of two images.
    between = exact(x1, x2).square().fill_diagonal_(0).sum() / (len(x1) * (len(x1) - 1))
    within = (x1 - x2).square().sum(1).mean()

    # Twins are measured by the images' own contrast: equal images have no distance to measure them by.
    variance = plain.var(correction=0)
    nearest = exact(plain, plain).square().fill_diagonal_(math.inf).amin(1)
    return DataMeasures(
        views_differ=float(within / between) if between > 0 else 1.0,
        images_differ=float(plain.var(0, correction=0).mean() / variance) if variance > 0 else 0.0,
        twins=float((nearest < TWIN * (plain.shape[1] * variance)).double().mean()),
    )
