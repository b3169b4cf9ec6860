"""The CorInfoMax loss (arXiv 2209.07999): the log det spreads the features, the attraction makes the views agree.

`plain_loss` is the equation, `corinfomax_loss` the same with gradients in closed form, `CorInfoMaxLoss` the module for
a training loop. A decay λ weighs the past: 0.01 keeps 1 % of it, as a constant without gradient.

The paper has two views. For V views `plain_loss` is the mean of its loss over all pairs, since
Σ_{u<v} ‖z_u−z_v‖² = V Σ_v ‖z_v−z̄‖². Any number of views has the same bounds and wants the same alpha.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.types import Device

from corinfomax.recipes.fields import ALPHA_PER_DIM
from corinfomax.runtime import processes


class Moments(NamedTuple):
    """Running covariance and mean of each view's projections."""

    R: Float[Tensor, "v d d"]
    mu: Float[Tensor, "v d"]

    @classmethod
    def initial(cls, dim: int, *, views: int = 2, cov_init: float = 1.0, device: Device = None) -> "Moments":
        """The moments before the first step: R = cov_init·I and mu = 0, in `moment_dtype(device)`."""
        dtype = moment_dtype(device)
        R = cov_init * torch.eye(dim, dtype=dtype, device=device)
        return cls(R.repeat(views, 1, 1), torch.zeros(views, dim, dtype=dtype, device=device))


class Terms(NamedTuple):
    """The loss and its two terms: differentiable scalars in the moments' dtype."""

    loss: Float[Tensor, ""]
    attraction: Float[Tensor, ""]
    big_bang: Float[Tensor, ""]


def plain_loss(
    z: Float[Tensor, "v n d"], past: Moments, *, alpha: float, cov_decay: float, mean_decay: float, eps: float
) -> tuple[Terms, Moments]:
    """The loss of unit rows `z` and the moments after it, line by line as in the paper. Slow; a reference."""
    V, N, D = z.shape
    mu = mean_decay * past.mu + (1 - mean_decay) * z.mean(1)  # each view has its own moments
    centred = z - mu[:, None]  # by the new mean
    R = cov_decay * past.R + (1 - cov_decay) * centred.mT @ centred / N
    log_det = torch.logdet(R + eps * torch.eye(D).to(R))
    big_bang = -2 / V * log_det.sum() / D
    attraction = 2 / (V - 1) * (z - z.mean(0)).square().sum() / (N * D)
    loss = alpha * attraction + big_bang
    return Terms(loss, attraction, big_bang), Moments(R.detach(), mu.detach())


def corinfomax_loss(
    views: Sequence[Float[Tensor, "n d"]],
    moments: Moments,
    *,
    alpha: float,
    cov_decay: float = 0.01,
    mean_decay: float = 0.01,
    eps: float = 1e-8,
) -> tuple[Terms, Moments]:
    """The loss of two or more views of a batch, and the moments after it, detached.

    Row i of every view is the projection of image i, L2-normalised by the caller, in any floating dtype; the arithmetic
    is that of `moments` (float64). Under torch.distributed the rows are one process's part of the batch: terms and
    moments are those of the whole batch, and so is the gradient to these rows; sum the parameters' over processes.

    Raises ValueError for a wrong shape or number of views, or a value that is not finite. On a GPU and in one of
    several processes values are not read: the loss becomes nan or infinite there, and the moments do not change.

    >>> z = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    >>> terms, moments = corinfomax_loss((z, z), Moments.initial(4), alpha=16.0)
    >>> float(terms.attraction)
    0.0
    """
    count, dim = moments.mu.shape
    if len(views) != count:
        raise ValueError(f"the moments are those of {count} views; got {len(views)}")
    check_views(views, dim=dim)

    # Autocast would run matmul in bfloat16, whose 8 bits leave nothing of a log det.
    with torch.autocast(views[0].device.type, enabled=False):
        log_det, attraction, R, mu = _Terms.apply(*moments, cov_decay, mean_decay, eps, *views)
        big_bang = -2 / count * log_det.sum() / dim
        loss = alpha * attraction + big_bang
        # One bad batch must not stay in the moments. torch.where, since an `if` would wait for the device.
        finite = loss.isfinite()
        R, mu = torch.where(finite, R, moments.R), torch.where(finite, mu, moments.mu)
    return Terms(loss, attraction, big_bang), Moments(R, mu)


class _Terms(torch.autograd.Function):
    """log det(R+εI) of each view, and the attraction, with gradients in closed form.

    With G = (R+εI)⁻¹, c = 2(1−λ_R)/N and the batch mean m,  ∂ log det / ∂z_i = c · G (z_i − μ − (1−λ_μ)(m − μ)): the
    derivative of the Gram matrix, and what the mean passes on. One Gram matrix and one Cholesky factor per view serve
    forward and backward. N, m and R belong to all processes, so the gradient of a row needs that row only.
    """

    @staticmethod
    def forward(
        ctx: Any, R_past: Tensor, mu_past: Tensor, cov_decay: float, mean_decay: float, eps: float, *views: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Views are copied into place: a further pass over two of them costs a fifth of a Gram matrix.
        rows, d = views[0].shape
        z = R_past.new_empty(len(views), rows, d)
        for z_v, view in zip(z, views, strict=True):
            z_v.copy_(view)

        # Mean of the whole batch, then of the past too.
        sums = processes.total(torch.cat((z.sum(1).flatten(), z.new_full((1,), rows))))
        n = sums[-1]
        m = (sums[:-1] / n).view(-1, d)
        mu = torch.lerp(m, mu_past, mean_decay)

        # Attraction and covariance, summed over processes in one message.
        apart, pull = z - z.mean(0), 2 / (len(z) - 1)
        distance = torch.linalg.vector_norm(apart) ** 2
        centred = z.sub_(mu[:, None])
        sums = processes.total(torch.cat(((centred.mT @ centred).flatten(), distance[None])))
        R = torch.lerp(sums[:-1].view(-1, d, d) / n, R_past, cov_decay)
        log_det, L = cholesky_log_det(R, eps)

        through_mean = centred.sub_((1 - mean_decay) * (m - mu)[:, None])
        ctx.save_for_backward(through_mean, apart, L, n)
        ctx.cov_decay, ctx.pull, ctx.dtypes = cov_decay, pull, [view.dtype for view in views]
        ctx.mark_non_differentiable(R, mu)
        return log_det, pull * sums[-1] / (n * d), R, mu

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        through_mean, apart, L, n = ctx.saved_tensors
        to_log_det = grads[0] * (2 * (1 - ctx.cov_decay) / n)
        to_distance = grads[1] * (2 * ctx.pull / (n * through_mean.shape[-1]))
        G = torch.cholesky_inverse(L) * to_log_det[:, None, None]
        gradient = (through_mean @ G).addcmul_(apart, to_distance)
        return *[None] * 5, *(g.to(dtype) for g, dtype in zip(gradient, ctx.dtypes, strict=True))


class _Unit(torch.autograd.Function):
    """F.normalize in float32 or more, with a gradient in as few passes as possible."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.dtype = z.dtype
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        length = torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min_(1e-12)
        unit = z / length
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        unit, length = ctx.saved_tensors
        along = torch.linalg.vecdot(grads[0], unit)[..., None]
        return torch.addcmul(grads[0], unit, along, value=-1).div_(length).to(ctx.dtype)


def unit_rows(z: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Each row scaled to length 1, in float32 or more; rows shorter than 1e-12 are divided by 1e-12."""
    return _Unit.apply(z)


class CorInfoMaxLoss(nn.Module):
    """The loss as a module; its state is the running moments.

    `terms = criterion(z1, z2)` takes projections of shape (n, dim), one for each of `views`, in any floating dtype, and
    gives float64 scalars. `alpha=None` means 3.906·dim, the rule that the published rows obey. Training mode updates
    the moments, eval mode does not. They are buffers, `R` (views, dim, dim) and `mu` (views, dim), and stay float64
    under `.half()`; MPS has no float64 and gets float32 with a warning.

    Under torch.distributed the batch is that of all processes, and the gradient is scaled so that its mean over
    processes, which DistributedDataParallel takes, is the gradient of the whole loss. Errors as in `corinfomax_loss`.

    >>> criterion = CorInfoMaxLoss(64)
    >>> z1, z2 = torch.randn(2, 512, 64)
    >>> bool(criterion(z1, z2).big_bang >= criterion.floor)
    True
    """

    R: Tensor
    mu: Tensor

    def __init__(
        self,
        dim: int,
        *,
        views: int = 2,
        alpha: float | None = None,
        cov_decay: float = 0.01,
        mean_decay: float = 0.01,
        eps: float = 1e-8,
        cov_init: float = 1.0,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        require(dim >= 1, f"dim is {dim}; it must be at least 1")
        require(views >= 2, f"views is {views}; it must be at least 2")
        require(alpha is None or alpha >= 0, f"alpha is {alpha}; it must be at least 0, or None for 3.906·dim")
        require(0 <= cov_decay < 1, f"cov_decay is {cov_decay}; it must be in [0, 1): the weight of the past")
        require(0 <= mean_decay < 1, f"mean_decay is {mean_decay}; it must be in [0, 1): the weight of the past")
        require(eps > 0, f"eps is {eps}; it must be above 0")
        require(cov_init > 0, f"cov_init is {cov_init}; it must be above 0")

        self.alpha = ALPHA_PER_DIM * dim if alpha is None else alpha
        self.cov_decay, self.mean_decay, self.eps, self.normalize = cov_decay, mean_decay, eps, normalize
        for name, moment in Moments.initial(dim, views=views, cov_init=cov_init)._asdict().items():
            self.register_buffer(name, moment)

    @property
    def floor(self) -> float:
        """Lower bound of the big bang for unit rows, 2·ln D: all dimensions used equally."""
        return 2 * math.log(self.mu.shape[1])

    def forward(self, *views: Float[Tensor, "n d"]) -> Terms:
        """The terms of this batch; updates the moments in training mode."""
        if self.normalize:
            views = tuple(unit_rows(z) for z in views)
        scaled, past = [processes.scale_gradient(z) for z in views], Moments(self.R, self.mu)
        terms, moments = corinfomax_loss(
            scaled, past, alpha=self.alpha, cov_decay=self.cov_decay, mean_decay=self.mean_decay, eps=self.eps
        )
        if self.training:
            self.R, self.mu = moments
        return terms

    def extra_repr(self) -> str:
        numbers = ", ".join(f"{name}={getattr(self, name):g}" for name in ("alpha", "cov_decay", "mean_decay", "eps"))
        return f"dim={self.mu.shape[1]}, views={len(self.mu)}, {numbers}, normalize={self.normalize}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CorInfoMaxLoss":
        # .half() and .to(bfloat16) cast every floating buffer; the moments follow the device only.
        def move(moment: Tensor) -> Tensor:
            device = fn(moment.new_empty(0, dtype=torch.float32)).device
            dtype = moment_dtype(device)
            if moment.dtype == dtype and (moved := fn(moment)).dtype == dtype:
                return moved
            return moment.to(dtype).to(device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]


def ldmi(z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"], *, eps: float = 1e-8) -> Float[Tensor, ""]:
    """Log-determinant mutual information of paired rows, in nats per dimension; needs no labels.

    With Re12 = R1 − R12 (R2+εI)⁻¹ R12ᵀ, the error covariance of the best linear prediction of z1 from z2, it is
    (1/D) [log det(R1+εI) + log det(R2+εI) − log det(Re12+εI) − log det(Re21+εI)]. By Schur complements each error term
    is the joint log det minus a marginal one, so this is 2/D · (both marginal log dets − the joint one). As ε → 0 it
    tends to −(2/D) Σ ln(1−ρ²) over the canonical correlations ρ. Errors as in `corinfomax_loss`.
    """
    check_views((z1, z2))
    dtype = moment_dtype(z1.device)
    with torch.autocast(z1.device.type, enabled=False):
        joint = torch.cat((z1, z2), 1).to(dtype)
        joint = joint - joint.mean(0)
        R = joint.T @ joint / len(joint)
        d = z1.shape[1]
        log_det1, log_det2, log_det_joint = (cholesky_log_det(block, eps)[0] for block in (R[:d, :d], R[d:, d:], R))
        return 2 / d * (log_det1 + log_det2 - log_det_joint)


def moment_dtype(device: Device) -> torch.dtype:
    """float64, or float32 with a warning on MPS, which has no float64."""
    if device is not None and torch.device(device).type == "mps":
        warnings.warn("MPS has no float64: moments and log det are float32 here, with a shorter range", stacklevel=2)
        return torch.float32
    return torch.float64


def cholesky_log_det(R: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """log det(R+εI) of each matrix, and its Cholesky factor; both are nan unless R+εI is positive definite."""
    shifted = R.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(eps)
    L, info = torch.linalg.cholesky_ex(shifted)  # plain cholesky would synchronise here
    # A failed factor still looks like numbers, and inverting one with a zero is an error.
    L = torch.where((info == 0)[..., None, None], L, torch.nan)
    return 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1), L


class NotFiniteInputError(ValueError):
    """Projections with nan or infinity."""


def check_views(views: Sequence[Tensor], *, dim: int | None = None) -> None:
    """Raise ValueError unless the views are matrices of one shape, and finite.

    Values are read on a CPU in a single process only: elsewhere the host, or the other processes, would wait.
    """
    # shapes
    first, names = views[0], [f"z{v}" for v in range(1, len(views) + 1)]
    view_names, got = " and ".join(names), f"got {' and '.join(str(tuple(z.shape)) for z in views)}"
    same_rows = all(z.ndim == 2 and len(z) == len(first) > 0 for z in views)
    require(same_rows, f"{view_names} must be matrices with the same rows (n, d), n ≥ 1; {got}")
    require(all(z.shape == first.shape for z in views), f"{view_names} must have the same dimension; {got}")
    require(dim in (None, first.shape[1]), f"the loss is of dimension {dim}, the projections {first.shape[1]}; {got}")

    # values: a sum costs a tenth of checking each, and is enough unless it overflows
    if first.device.type != "cpu" or processes.size() > 1:
        return
    for name, z in zip(names, views, strict=True):
        if not z.detach().sum().isfinite() and (bad := int((~z.detach().isfinite()).any(1).sum())):
            raise NotFiniteInputError(f"{name} has nan or infinity in {bad} of {len(z)} rows; all must be finite")


def require(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)
