"""The CorInfoMax objective (arXiv 2209.07999): log det spreads the features, attraction makes the views agree.

    μ ← λ_μ μ + (1−λ_μ) mean(z)                     each view has its own moments
    R ← λ_R R + (1−λ_R) (z−μ)ᵀ(z−μ)/N               centred with the new mean
    big_bang   = −( log det(R1+εI) + log det(R2+εI) ) / D
    attraction = ‖z1−z2‖² / (N·D)
    loss       = alpha · attraction + big_bang

λ weighs the past. The gradient flows through the batch's own mean and covariance; the past is a constant.

Of V views, z̄ their mean, the first is −(2/V) Σ log det(R_v+εI) / D and the second 2/(V−1) · Σ ‖z_v−z̄‖² / (N·D), which
is the mean of ‖z_u−z_v‖² / (N·D) over all pairs, since Σ_{u<v} ‖z_u−z_v‖² = V Σ ‖z_v−z̄‖². Two views give the lines
above, and any number has the same bounds and wants the same alpha.

With a teacher, whose projections t of the same views are constants, the second is the mean of ‖z_v−t_u‖² / (N·D) over
all u ≠ v: where the teacher is the network itself the same number, and half the gradient, for nothing comes to meet it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from corinfomax.recipes.fields import ALPHA_PER_DIM
from corinfomax.runtime import processes


class Moments(NamedTuple):
    """Running covariance and mean of each view's projections."""

    R: Float[Tensor, "v d d"]
    mu: Float[Tensor, "v d"]

    @classmethod
    def initial(
        cls, dim: int, *, views: int = 2, cov_init: float = 1.0, device: torch.device | str | None = None
    ) -> Moments:
        """The moments before the first step: R = cov_init·I, mu = 0, in `moment_dtype(device)`."""
        dtype = moment_dtype(device)
        R = cov_init * torch.eye(dim, dtype=dtype, device=device)
        return cls(R.repeat(views, 1, 1), torch.zeros(views, dim, dtype=dtype, device=device))


class Terms(NamedTuple):
    """The loss and its two parts, each a differentiable scalar in the moments' dtype (other objectives' in theirs)."""

    loss: Float[Tensor, ""]
    attraction: Float[Tensor, ""]
    big_bang: Float[Tensor, ""]


def corinfomax_loss(
    views: Sequence[Float[Tensor, "n d"]],
    moments: Moments,
    *,
    alpha: float,
    cov_decay: float = 0.01,
    mean_decay: float = 0.01,
    eps: float = 1e-8,
    teacher: Sequence[Float[Tensor, "n d"]] = (),
) -> tuple[Terms, Moments]:
    """The loss of two or more views of a batch, of two the published one, and the moments after it.

    Rows of each view are projections, L2-normalised by the caller, the same row in all for one image; any floating
    dtype, the arithmetic is that of `moments` (float64). `cov_decay` and `mean_decay` weigh the past. `teacher` are
    another network's projections of the same views, unit rows as well, which these are attracted to; no gradient goes
    there. The returned moments are detached.

    Where torch.distributed runs, the rows are one process's part of the batch: the terms and moments are those of the
    whole batch, the same in each process, and the gradient is the whole loss's to these rows; V·D + 1 and then
    V·D² + 1 numbers are summed, none in the backward pass. Sum the parameters' gradients over processes to go on.

    Raises ValueError for a wrong shape or number of views, or a non-finite value. On CUDA looking at values would make
    the host wait, and of several processes one would stop alone: there a non-finite batch gives a non-finite loss and
    leaves the moments as they were.

    >>> z = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    >>> terms, moments = corinfomax_loss((z, z), Moments.initial(4), alpha=16.0)
    >>> float(terms.attraction)
    0.0
    """
    count, dim = moments.mu.shape
    if len(views) != count:
        raise ValueError(f"the moments are those of {count} views; got {len(views)}")
    check_views(views, dim=dim)
    if teacher:
        if len(teacher) != count:
            raise ValueError(f"a teacher has as many views; got {count} and {len(teacher)} of the teacher")
        check_views((views[0], *teacher), dim=dim, names=("z1", *(f"t{v}" for v in range(1, count + 1))))
    # Under autocast matmul would come down to bfloat16, whose 8 bits leave nothing of a log det.
    with torch.autocast(views[0].device.type, enabled=False):
        log_det, attraction, R, mu = _Parts.apply(*moments, cov_decay, mean_decay, eps, teacher, *views)
        big_bang = -2 / count * log_det.sum() / dim
        loss = alpha * attraction + big_bang
        # One bad batch must not live on in the moments; torch.where, since an `if` would wait for the device.
        good = loss.isfinite()
        R, mu = torch.where(good, R, moments.R), torch.where(good, mu, moments.mu)
    return Terms(loss, attraction, big_bang), Moments(R, mu)


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
        R_past: Tensor,
        mu_past: Tensor,
        cov_decay: float,
        mean_decay: float,
        eps: float,
        teacher: Sequence[Tensor],
        *views: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, d = views[0].shape
        z = R_past.new_empty(len(views), rows, d)  # every pass over two takes a fifth of a Gram matrix of 512
        for z_v, view in zip(z, views, strict=True):
            z_v.copy_(view)
        sums = processes.total(torch.cat((z.sum(1).flatten(), z.new_full((1,), rows))))
        n = sums[-1]
        m = (sums[:-1] / n).view(-1, d)
        mu = torch.lerp(m, mu_past, mean_decay)
        if teacher:
            t = torch.stack([view.detach().to(z) for view in teacher])
            others = (t.sum(0) - t) / (len(z) - 1)
            apart, pull, rest = z - others, 1 / len(z), t.square().sum() - others.square().sum()
        else:
            apart, pull, rest = z - z.mean(0), 2 / (len(z) - 1), z.new_zeros(())
        centred = z.sub_(mu[:, None])
        sums = processes.total(
            torch.cat(((centred.mT @ centred).flatten(), (torch.linalg.vector_norm(apart) ** 2 + rest)[None]))
        )
        R = torch.lerp(sums[:-1].view(-1, d, d) / n, R_past, cov_decay)
        log_det, L = cholesky_log_det(R, eps)
        pulled = centred.sub_((1 - mean_decay) * (m - mu)[:, None])
        ctx.save_for_backward(pulled, apart, L, n)
        ctx.cov_decay, ctx.pull, ctx.dtypes = cov_decay, pull, [view.dtype for view in views]
        ctx.mark_non_differentiable(R, mu)
        return log_det, pull * sums[-1] / (n * d), R, mu

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pulled, apart, L, n = ctx.saved_tensors
        to_log_det = grads[0] * (2 * (1 - ctx.cov_decay) / n)
        to_distance = grads[1] * (2 * ctx.pull / (n * pulled.shape[-1]))
        G = torch.cholesky_inverse(L) * to_log_det[:, None, None]
        gradient = (pulled @ G).addcmul_(apart, to_distance)
        return *[None] * 6, *(g.to(dtype) for g, dtype in zip(gradient, ctx.dtypes, strict=True))


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


def unit_rows(z: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Each row at length 1, in float32 or more; rows shorter than 1e-12 are divided by that."""
    unit: Tensor = _Unit.apply(z)
    return unit


class CorInfoMaxLoss(nn.Module):
    """The loss as a module for anyone's loop; its state is the running moments.

    `terms = criterion(z1, z2)` takes two projections of shape (n, dim), or as many as `views`, any floating dtype, and
    gives scalars `terms.loss`, `terms.attraction` and `terms.big_bang`, differentiable, float64. `alpha=None` means
    3.906·dim, the rule the published rows obey. In eval mode the moments stay as they are. They are float64 buffers
    in `state_dict`, `R` (views, dim, dim) and `mu` (views, dim), and stay float64 under `.half()`; on MPS, which has
    no float64, float32 with a warning.

    Where torch.distributed runs, the batch is that of all processes (see `corinfomax_loss`), and the gradient is such
    that the mean over processes, which DistributedDataParallel takes, is the gradient of the whole loss.

    Raises ValueError for wrong shapes, and for non-finite input except on CUDA and in several processes (see
    `corinfomax_loss`).

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
        for name, value, fits, wanted in (
            ("dim", dim, dim >= 1, "at least 1"),
            ("views", views, views >= 2, "at least 2"),
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
        for name, moment in Moments.initial(dim, views=views, cov_init=cov_init)._asdict().items():
            self.register_buffer(name, moment)

    @property
    def floor(self) -> float:
        """The least big_bang that unit rows can reach, 2·ln D: all directions in equal use."""
        return 2 * math.log(self.mu.shape[1])

    def forward(self, *views: Float[Tensor, "n d"], teacher: Sequence[Float[Tensor, "n d"]] = ()) -> Terms:
        """The terms of this batch, `teacher` as in `corinfomax_loss`; in training mode the moments move on."""
        if self.normalize:
            views, teacher = (tuple(unit_rows(z) for z in given) for given in (views, teacher))
        terms, moments = corinfomax_loss(
            [processes.scale_gradient(z) for z in views],
            Moments(self.R, self.mu),
            alpha=self.alpha,
            cov_decay=self.cov_decay,
            mean_decay=self.mean_decay,
            eps=self.eps,
            teacher=teacher,
        )
        if self.training:
            self.R, self.mu = moments
        return terms

    def extra_repr(self) -> str:
        return (
            f"dim={self.mu.shape[1]}, views={len(self.mu)}, alpha={self.alpha:g}, cov_decay={self.cov_decay:g}, "
            f"mean_decay={self.mean_decay:g}, eps={self.eps:g}, normalize={self.normalize}"
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
    check_views((z1, z2))
    dtype = moment_dtype(z1.device)
    with torch.autocast(z1.device.type, enabled=False):
        joint = torch.cat((z1, z2), 1).to(dtype)
        joint = joint - joint.mean(0)
        R = joint.T @ joint / len(joint)
        d = z1.shape[1]
        log_det1, log_det2, log_det_joint = (cholesky_log_det(block, eps)[0] for block in (R[:d, :d], R[d:, d:], R))
        return 2 / d * (log_det1 + log_det2 - log_det_joint)


def moment_dtype(device: torch.device | str | None) -> torch.dtype:
    """float64, or float32 on MPS, which has no float64 (said once as a warning)."""
    if device is not None and torch.device(device).type == "mps":
        warnings.warn("MPS has no float64: moments and log det are float32 here, with less room below", stacklevel=2)
        return torch.float32
    return torch.float64


def cholesky_log_det(R: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """log det(R+εI) of each matrix and its Cholesky factor; both nan where that is not positive definite."""
    shifted = R.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(eps)
    L, info = torch.linalg.cholesky_ex(shifted)  # plain cholesky would synchronise here
    # A factor that failed half-way still looks like numbers, and where one is zero its inverse is an error.
    L = torch.where((info == 0)[..., None, None], L, torch.nan)
    return 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1), L


class NotFiniteInputError(ValueError):
    """Projections that hold nan or infinity."""


def check_views(views: Sequence[Tensor], *, dim: int | None = None, names: Sequence[str] = ()) -> None:
    first, *others = views
    each = names or [f"z{v}" for v in range(1, len(views) + 1)]
    both = " and ".join(each)
    shapes = f"got {' and '.join(str(tuple(z.shape)) for z in views)}"
    if first.ndim != 2 or len(first) == 0 or any(z.ndim != 2 or len(z) != len(first) for z in others):
        raise ValueError(f"{both} must be matrices with the same rows (n, d), n ≥ 1; {shapes}")
    if any(z.shape[1] != first.shape[1] for z in others):
        raise ValueError(f"{both} must have the same dimension; {shapes}")
    if dim is not None and first.shape[1] != dim:
        raise ValueError(f"the loss is of dimension {dim}, the projections {first.shape[1]}; {shapes}")
    if not all(z.is_floating_point() for z in views):
        raise ValueError(f"{both} must be floating-point; got {' and '.join(str(z.dtype) for z in views)}")
    if any(z.device != first.device for z in others):
        raise ValueError(f"{both} must be on one device; got {' and '.join(str(z.device) for z in views)}")
    if first.device.type == "cuda" or processes.size() > 1:
        return  # reading a value would make the host wait; one process's error would leave the others waiting for it
    for name, z in zip(each, views, strict=True):
        if z.detach().sum().isfinite():  # a tenth of looking at each number, and says the same unless it overflows
            continue
        bad = int((~z.detach().isfinite()).any(1).sum())
        if bad:
            raise NotFiniteInputError(
                f"{name} has nan or infinity in {bad} of its {len(z)} rows; all values must be finite"
            )
