"""The CorInfoMax objective (arXiv 2209.07999): log det spreads the features, attraction makes two views agree.

    μ ← λ_μ μ + (1−λ_μ) mean(z)                     each view has its own moments
    R ← λ_R R + (1−λ_R) (z−μ)ᵀ(z−μ)/N               centred with the new mean
    big_bang   = −( log det(R1+εI) + log det(R2+εI) ) / D
    attraction = ‖z1−z2‖² / (N·D)
    loss       = alpha · attraction + big_bang

λ weighs the past. The gradient flows through the batch's own mean and covariance; the past is a constant.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from corinfomax import distributed
from corinfomax.knobs import ALPHA_PER_DIM


class Moments(NamedTuple):
    """Running covariance and mean of the projections, one pair a view."""

    R1: Float[Tensor, "d d"]
    R2: Float[Tensor, "d d"]
    mu1: Float[Tensor, " d"]
    mu2: Float[Tensor, " d"]

    @classmethod
    def initial(cls, dim: int, *, cov_init: float = 1.0, device: torch.device | str | None = None) -> Moments:
        """The moments before the first step: R = cov_init·I, mu = 0, in `moment_dtype(device)`."""
        dtype = moment_dtype(device)
        R = cov_init * torch.eye(dim, dtype=dtype, device=device)
        mu = torch.zeros(dim, dtype=dtype, device=device)
        return cls(R, R.clone(), mu, mu.clone())


class Terms(NamedTuple):
    """The loss and its two parts, each a differentiable scalar in the moments' dtype."""

    loss: Float[Tensor, ""]
    attraction: Float[Tensor, ""]
    big_bang: Float[Tensor, ""]


def corinfomax_loss(
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n d"],
    moments: Moments,
    *,
    alpha: float,
    cov_decay: float = 0.01,
    mean_decay: float = 0.01,
    eps: float = 1e-8,
) -> tuple[Terms, Moments]:
    """The published loss of two views of a batch and the moments after it.

    Rows of `z1` and `z2` are projections, L2-normalised by the caller; any floating dtype, the arithmetic is that of
    `moments` (float64). `cov_decay` and `mean_decay` weigh the past. The returned moments are detached.

    Where torch.distributed runs, the rows are one process's part of the batch: the terms and moments are those of the
    whole batch, the same in each process, and the gradient is the whole loss's to these rows; 2·D + 1 and then 2·D² + 1
    numbers are summed, and nothing in the backward pass. Sum the parameters' gradients over processes to go on.

    Raises ValueError for a wrong shape or a non-finite value. On CUDA looking at values would make the host wait, and
    of several processes one would stop alone: there a non-finite batch gives a non-finite loss and leaves the moments
    as they were.

    >>> z = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    >>> terms, moments = corinfomax_loss(z, z, Moments.initial(4), alpha=16.0)
    >>> float(terms.attraction)
    0.0
    """
    _check_pair(z1, z2, dim=moments.mu1.shape[0])
    # Under autocast matmul would come down to bfloat16, whose 8 bits leave nothing of a log det.
    with torch.autocast(z1.device.type, enabled=False):
        R_past, mu_past = torch.stack((moments.R1, moments.R2)), torch.stack((moments.mu1, moments.mu2))
        log_det, attraction, R, mu = _Parts.apply(z1, z2, R_past, mu_past, cov_decay, mean_decay, eps)
        big_bang = -log_det.sum() / z1.shape[1]
        loss = alpha * attraction + big_bang
        # One bad batch must not live on in the moments; torch.where, since an `if` would wait for the device.
        good = loss.isfinite()
        R, mu = torch.where(good, R, R_past), torch.where(good, mu, mu_past)
    return Terms(loss, attraction, big_bang), Moments(*R.unbind(), *mu.unbind())


class _Parts(torch.autograd.Function):
    """log det(R+εI) of each view's updated covariance and the views' mean squared distance, gradients in closed form.

    With G = (R+εI)⁻¹, c = 2(1−λ_R)/N and m the batch mean,  ∂ log det / ∂z_i = c · G (z_i − μ − (1−λ_μ)(m − μ)):
    the first part is the derivative of the Gram matrix, the second what the mean passes on. One Cholesky and one Gram
    matrix a view serve forward and backward; autograd would differentiate through both. N, m and R are those of all
    processes, so a row's gradient is a matter of that row alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor,
        R_past: Tensor,
        mu_past: Tensor,
        cov_decay: float,
        mean_decay: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, d = z1.shape
        z = R_past.new_empty(2, rows, d)  # every pass over it takes as long as a fifth of a Gram matrix of 512
        z[0], z[1] = z1, z2
        sums = distributed.total(torch.cat((z.sum(1).flatten(), z.new_full((1,), rows))))
        n = sums[-1]
        m = (sums[:-1] / n).view(2, d)
        mu = torch.lerp(m, mu_past, mean_decay)
        apart = z[0] - z[1]
        centred = z.sub_(mu[:, None])
        sums = distributed.total(
            torch.cat(((centred.mT @ centred).flatten(), torch.linalg.vector_norm(apart)[None] ** 2))
        )
        R = torch.lerp(sums[:-1].view(2, d, d) / n, R_past, cov_decay)
        log_det, L = _cholesky_log_det(R, eps)
        ctx.save_for_backward(centred, (1 - mean_decay) * (m - mu), L, apart, n)
        ctx.cov_decay, ctx.dtypes = cov_decay, (z1.dtype, z2.dtype)
        ctx.mark_non_differentiable(R, mu)
        return log_det, sums[-1] / (n * d), R, mu

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        centred, through_mean, L, apart, n = ctx.saved_tensors
        to_log_det, to_mean_square = grads[0] * (2 * (1 - ctx.cov_decay) / n), grads[1] * (2 / (n * L.shape[-1]))
        G = torch.cholesky_inverse(L) * to_log_det[:, None, None]
        gradient = torch.baddbmm(-through_mean[:, None] @ G, centred, G)
        gradient[0].addcmul_(apart, to_mean_square)
        gradient[1].addcmul_(apart, to_mean_square, value=-1)
        return *(g.to(dtype) for g, dtype in zip(gradient, ctx.dtypes, strict=True)), *[None] * 5


class _Unit(torch.autograd.Function):
    """Rows of length 1, as F.normalize makes them, in float32 or more; its gradient in as few passes as it takes."""

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


class CorInfoMaxLoss(nn.Module):
    """The loss as a module for anyone's loop; its state is the running moments.

    `terms = criterion(z1, z2)` takes two projections of shape (n, dim), any floating dtype, and gives scalars
    `terms.loss`, `terms.attraction` and `terms.big_bang`, differentiable, float64. `alpha=None` means 3.906·dim, the
    rule the published rows obey. In eval mode the moments stay as they are. They are float64 buffers (`R1`, `R2`,
    `mu1`, `mu2`) in `state_dict`, and stay float64 under `.half()`; on MPS, which has no float64, float32 with a
    warning.

    Where torch.distributed runs, the batch is that of all processes (see `corinfomax_loss`), and the gradient is such
    that the mean over processes, which DistributedDataParallel takes, is the gradient of the whole loss.

    Raises ValueError for wrong shapes, and for non-finite input except on CUDA and in several processes (see
    `corinfomax_loss`).

    >>> criterion = CorInfoMaxLoss(64)
    >>> z1, z2 = torch.randn(2, 512, 64)
    >>> bool(criterion(z1, z2).big_bang >= criterion.floor)
    True
    """

    R1: Tensor
    R2: Tensor
    mu1: Tensor
    mu2: Tensor

    def __init__(
        self,
        dim: int,
        *,
        alpha: float | None = None,
        cov_decay: float = 0.01,
        mean_decay: float = 0.01,
        eps: float = 1e-8,
        cov_init: float = 1.0,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        for name, value, fits, wanted in (
            ("dim", dim, dim >= 1, "at least 1"),
            ("alpha", alpha, alpha is None or alpha >= 0, "at least 0, or None for 3.906·dim"),
            ("cov_decay", cov_decay, 0 <= cov_decay < 1, "in [0, 1): the weight of the past"),
            ("mean_decay", mean_decay, 0 <= mean_decay < 1, "in [0, 1): the weight of the past"),
            ("eps", eps, eps > 0, "above 0"),
            ("cov_init", cov_init, cov_init > 0, "above 0"),
        ):
            if not fits:
                raise ValueError(f"{name} is {value}; it must be {wanted}")
        self.alpha = ALPHA_PER_DIM * dim if alpha is None else alpha
        self.cov_decay, self.mean_decay, self.eps, self.normalize = cov_decay, mean_decay, eps, normalize
        for name, moment in Moments.initial(dim, cov_init=cov_init)._asdict().items():
            self.register_buffer(name, moment)

    @property
    def floor(self) -> float:
        """The least big_bang that unit rows can reach, 2·ln D: all directions in equal use."""
        return 2 * math.log(len(self.mu1))

    def forward(self, z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"]) -> Terms:
        """The terms of this batch; in training mode the moments move on."""
        if self.normalize:
            z1, z2 = _Unit.apply(z1), _Unit.apply(z2)
        z1, z2 = distributed.scale_gradient(z1), distributed.scale_gradient(z2)
        terms, moments = corinfomax_loss(
            z1,
            z2,
            Moments(self.R1, self.R2, self.mu1, self.mu2),
            alpha=self.alpha,
            cov_decay=self.cov_decay,
            mean_decay=self.mean_decay,
            eps=self.eps,
        )
        if self.training:
            self.R1, self.R2, self.mu1, self.mu2 = moments
        return terms

    def extra_repr(self) -> str:
        return (
            f"dim={len(self.mu1)}, alpha={self.alpha:g}, cov_decay={self.cov_decay:g}, mean_decay={self.mean_decay:g}, "
            f"eps={self.eps:g}, normalize={self.normalize}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CorInfoMaxLoss:
        # .half() and .to(bfloat16) cast every floating buffer; the moments follow the device alone.
        def move(moment: Tensor) -> Tensor:
            device = fn(moment.new_empty(0, dtype=torch.float32)).device
            dtype = moment_dtype(device)
            if moment.dtype == dtype and (moved := fn(moment)).dtype == dtype:
                return moved
            return moment.to(dtype).to(device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]


def ldmi(z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"], *, eps: float = 1e-8) -> Float[Tensor, ""]:
    """Log-determinant mutual information of two sets of paired vectors, in nats per dimension; needs no labels.

    With Re12 = R1 − R12 (R2+εI)⁻¹ R12ᵀ, the error covariance of the best linear prediction of z1 from z2, it is
    (1/D) [log det(R1+εI) + log det(R2+εI) − log det(Re12+εI) − log det(Re21+εI)]. By Schur complements both error
    terms are the joint covariance's log det less one marginal, so it is 2/D times the sum of the marginal log dets
    less the joint one: three Cholesky factors, each of a matrix that εI keeps positive. With ε → 0 it is
    −(2/D) Σ ln(1−ρ²) over the canonical correlations ρ.

    Rows are paired observations, used as they are (not normalised). Raises ValueError for a wrong shape or a
    non-finite value.
    """
    _check_pair(z1, z2)
    dtype = moment_dtype(z1.device)
    with torch.autocast(z1.device.type, enabled=False):
        joint = torch.cat((z1, z2), 1).to(dtype)
        joint = joint - joint.mean(0)
        R = joint.T @ joint / len(joint)
        d = z1.shape[1]
        log_det1, log_det2, log_det_joint = (_cholesky_log_det(block, eps)[0] for block in (R[:d, :d], R[d:, d:], R))
        return 2 / d * (log_det1 + log_det2 - log_det_joint)


def moment_dtype(device: torch.device | str | None) -> torch.dtype:
    """float64, or float32 on MPS, which has no float64 (said once as a warning)."""
    if device is not None and torch.device(device).type == "mps":
        warnings.warn("MPS has no float64: moments and log det are float32 here, with less room below", stacklevel=2)
        return torch.float32
    return torch.float64


def _cholesky_log_det(R: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """log det(R+εI) of each matrix and its Cholesky factor; both nan where that is not positive definite."""
    shifted = R.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(eps)
    L, info = torch.linalg.cholesky_ex(shifted)  # plain cholesky would synchronise here
    # A factor that failed half-way still looks like numbers, and where one is zero its inverse is an error.
    L = torch.where((info == 0)[..., None, None], L, torch.nan)
    return 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1), L


class NotFiniteInputError(ValueError):
    """Projections that hold nan or infinity."""


def _check_pair(z1: Tensor, z2: Tensor, *, dim: int | None = None) -> None:
    shapes = f"got {tuple(z1.shape)} and {tuple(z2.shape)}"
    if z1.ndim != 2 or z2.ndim != 2 or len(z1) != len(z2) or len(z1) == 0:
        raise ValueError(f"z1 and z2 must be two matrices with the same rows (n, d), n ≥ 1; {shapes}")
    if z1.shape[1] != z2.shape[1]:
        raise ValueError(f"z1 and z2 must have the same dimension; {shapes}")
    if dim is not None and z1.shape[1] != dim:
        raise ValueError(f"the moments have dimension {dim}, the projections {z1.shape[1]}; {shapes}")
    if not (z1.is_floating_point() and z2.is_floating_point()):
        raise ValueError(f"z1 and z2 must be floating-point; got {z1.dtype} and {z2.dtype}")
    if z1.device != z2.device:
        raise ValueError(f"z1 and z2 must be on one device; got {z1.device} and {z2.device}")
    if z1.device.type == "cuda" or distributed.size() > 1:
        return  # reading a value would make the host wait; one process's error would leave the others waiting for it
    for name, z in (("z1", z1), ("z2", z2)):
        bad = int((~z.detach().isfinite()).any(1).sum())
        if bad:
            raise NotFiniteInputError(
                f"{name} has nan or infinity in {bad} of its {len(z)} rows; all values must be finite"
            )
