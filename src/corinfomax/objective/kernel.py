"""CorInfoMax in the feature space of a kernel: our own step beyond the paper.

The log det of a batch's second moments is one of the Gram matrix of its rows (Sylvester's identity),

    log det(ZᵀZ/N + εI_D) = log det(ZZᵀ/N + εI_N) + (D − N) log ε,

and that knows the rows by their inner products alone. With exp((z_i·z_j − 1)/τ) in place of z_i·z_j it is the log det
of features of all orders: not D directions are kept from collapsing but as many as there are images.

    K_ij       = exp((z_i·z_j − 1)/τ)              unit rows; each view has its own K
    big_bang   = −2/V · Σ log det(K_v + εI) / N    at least −2 log(1+ε), where no image is like another
    attraction = 2/(V−1) · Σ ‖z_v − z̄‖² / (N·D)    as in `objective`
    loss       = alpha · attraction + big_bang

log det K is a sum over images of how badly each is foretold by those before it, log(K_ii − k_i K⁻¹ k_iᵀ): an image that
is like others is pushed away the more the better they foretell it. There is no past.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from corinfomax.objective.covariance import Terms, check_views, cholesky_log_det, moment_dtype, unit_rows
from corinfomax.recipes.fields import ALPHA_PER_DIM
from corinfomax.runtime import processes


class KernelLoss(nn.Module):
    """The loss as a module for anyone's loop; it has no state.

    `terms = criterion(z1, z2)` takes two projections of shape (n, dim) or more, any floating dtype, and gives scalars
    `terms.loss`, `terms.attraction` and `terms.big_bang`, differentiable, float64 (float32 on MPS, which has no other).
    `alpha=None` means 3.906·dim. 2n² numbers a view are held, and about n³/2 multiplications are made for each.

    Where torch.distributed runs, every process gives equally many rows of one batch; terms are those of the whole
    batch, and the gradient is such that the mean over processes is the whole loss's.

    Raises ValueError for wrong shapes, and for non-finite input except on CUDA and in several processes, as
    `corinfomax_loss` does.

    >>> criterion = KernelLoss(64)
    >>> z1, z2 = torch.randn(2, 256, 64)
    >>> bool(criterion(z1, z2).big_bang >= criterion.floor)
    True
    """

    def __init__(
        self,
        dim: int,
        *,
        alpha: float | None = None,
        temperature: float = 0.25,
        eps: float = 1e-3,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        for name, value, fits, wanted in (
            ("dim", dim, dim >= 1, "at least 1"),
            ("alpha", alpha, alpha is None or alpha >= 0, "at least 0, or None for 3.906·dim"),
            ("temperature", temperature, 0 < temperature < math.inf, "above 0, and finite"),
            ("eps", eps, eps > 0, "above 0"),
        ):
            if not fits:
                raise ValueError(f"{name} is {value}; it must be {wanted}")
        self.dim, self.alpha = dim, ALPHA_PER_DIM * dim if alpha is None else alpha
        self.temperature, self.eps, self.normalize = temperature, eps, normalize

    @property
    def floor(self) -> float:
        """The least big_bang that unit rows can reach: no image is like another."""
        return -2 * math.log1p(self.eps)

    def forward(self, *views: Float[Tensor, "n d"]) -> Terms:
        """The terms of this batch."""
        if len(views) < 2:
            raise ValueError(f"agreement needs at least 2 views; got {len(views)}")
        check_views(views, dim=self.dim)
        if self.normalize:
            views = tuple(unit_rows(z) for z in views)
        with torch.autocast(views[0].device.type, enabled=False):
            dtype = moment_dtype(views[0].device)
            z = processes.scale_gradient(torch.stack([view.to(dtype) for view in views]))
            log_det = _LogDet.apply(z, self.temperature, self.eps)
            rows = z.shape[1] * processes.size()
            big_bang = -2 / len(z) * log_det.sum() / rows
            own = 2 / (len(z) - 1) * (z - z.mean(0)).square().sum() / (rows * self.dim)
            attraction = own + (processes.total(own.detach()) - own.detach())  # the rest is a constant to these rows
            return Terms(self.alpha * attraction + big_bang, attraction, big_bang)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, alpha={self.alpha:g}, temperature={self.temperature:g}, eps={self.eps:g}, "
            f"normalize={self.normalize}"
        )


class _LogDet(torch.autograd.Function):
    """log det(K+εI) of each view's kernel matrix over the rows of all processes, its gradient in closed form.

    With G = (K+εI)⁻¹,  ∂ log det / ∂z_i = 2/τ · Σ_j G_ij K_ij z_j,  the diagonal included, for K is symmetric. One
    Cholesky factor serves forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float, eps: float) -> Tensor:
        every = processes.gather(z)
        K = (every @ every.mT).sub_(1).div_(temperature).exp_()
        log_det, L = cholesky_log_det(K, eps)
        ctx.save_for_backward(every, K, L)
        ctx.temperature, ctx.rows = temperature, z.shape[1]
        return log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        every, K, L = ctx.saved_tensors
        here = slice(processes.rank() * ctx.rows, (processes.rank() + 1) * ctx.rows)
        weights = torch.cholesky_inverse(L)[:, here] * K[:, here] * (2 / ctx.temperature * grads[0][:, None, None])
        return weights @ every, None, None
