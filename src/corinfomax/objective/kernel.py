"""CorInfoMax in the feature space of a kernel: our own extension of the paper.

By Sylvester's identity the log det of a batch's second moments is that of the Gram matrix of its rows,

    log det(ZᵀZ/N + εI_D) = log det(ZZᵀ/N + εI_N) + (D − N) log ε,

and the Gram matrix knows the rows by their inner products only. Replacing z_i·z_j by exp((z_i·z_j − 1)/τ) takes the log
det of features of all orders: it keeps images apart, as many as there are, instead of D dimensions.

    K_ij       = exp((z_i·z_j − 1)/τ)              unit rows; each view has its own K
    big_bang   = −2/V · Σ log det(K_v + εI) / N    at least −2 log(1+ε), when no two images are alike
    attraction = 2/(V−1) · Σ ‖z_v − z̄‖² / (N·D)    as in `covariance`
    loss       = alpha · attraction + big_bang

log det K sums how badly the earlier images predict each: the better one is predicted, the harder it is pushed away.

KerJEPA (arXiv 2512.19605) regularises with kernels too, by the discrepancy of the embeddings from a prior such as a
Gaussian. There is no prior here: the Gram matrix is compared with nothing but its own determinant.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from corinfomax.objective.covariance import Terms, check_views, cholesky_log_det, moment_dtype, require, unit_rows
from corinfomax.recipes.fields import ALPHA_PER_DIM
from corinfomax.runtime import processes


class KernelLoss(nn.Module):
    """The kernel loss as a module; it has no state.

    `terms = criterion(z1, z2)` takes two or more projections of shape (n, dim), in any floating dtype, and gives
    float64 scalars (float32 on MPS). `alpha=None` means 3.906·dim. Holds 2n² numbers per view and takes about n³/2
    multiplications for each. Errors, and batches over several processes, as with `CorInfoMaxLoss`.
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
        require(dim >= 1, f"dim is {dim}; it must be at least 1")
        require(alpha is None or alpha >= 0, f"alpha is {alpha}; it must be at least 0, or None for 3.906·dim")
        require(0 < temperature < math.inf, f"temperature is {temperature}; it must be above 0, and finite")
        require(eps > 0, f"eps is {eps}; it must be above 0")
        self.dim, self.alpha = dim, ALPHA_PER_DIM * dim if alpha is None else alpha
        self.temperature, self.eps, self.normalize = temperature, eps, normalize

    @property
    def floor(self) -> float:
        """Lower bound of the big bang for unit rows: no two images are alike."""
        return -2 * math.log1p(self.eps)

    def forward(self, *views: Float[Tensor, "n d"]) -> Terms:
        """The terms of this batch."""
        require(len(views) >= 2, f"agreement needs at least 2 views; got {len(views)}")
        check_views(views, dim=self.dim)
        if self.normalize:
            views = tuple(unit_rows(z) for z in views)

        # Autocast would run matmul in bfloat16, too coarse for a log det.
        with torch.autocast(views[0].device.type, enabled=False):
            dtype = moment_dtype(views[0].device)
            z = processes.scale_gradient(torch.stack([view.to(dtype) for view in views]))
            log_det = _LogDet.apply(z, self.temperature, self.eps)
            rows = z.shape[1] * processes.size()
            big_bang = -2 / len(z) * log_det.sum() / rows
            local = 2 / (len(z) - 1) * (z - z.mean(0)).square().sum() / (rows * self.dim)
            attraction = local + (processes.total(local.detach()) - local.detach())  # other processes add a constant
            return Terms(self.alpha * attraction + big_bang, attraction, big_bang)

    def extra_repr(self) -> str:
        numbers = ", ".join(f"{name}={getattr(self, name):g}" for name in ("dim", "alpha", "temperature", "eps"))
        return f"{numbers}, normalize={self.normalize}"


class _LogDet(torch.autograd.Function):
    """log det(K+εI) of each view's kernel matrix over the rows of all processes, with its gradient in closed form.

    With G = (K+εI)⁻¹,  ∂ log det / ∂z_i = 2/τ · Σ_j G_ij K_ij z_j, the diagonal included, since K is symmetric.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float, eps: float) -> Tensor:
        Z = processes.gather_rows(z)
        K = (Z @ Z.mT).sub_(1).div_(temperature).exp_()
        log_det, L = cholesky_log_det(K, eps)
        ctx.save_for_backward(Z, K, L)
        ctx.temperature, ctx.rows = temperature, z.shape[1]
        return log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        Z, K, L = ctx.saved_tensors
        mine = slice(processes.rank() * ctx.rows, (processes.rank() + 1) * ctx.rows)
        weights = torch.cholesky_inverse(L)[:, mine] * K[:, mine] * (2 / ctx.temperature * grads[0][:, None, None])
        return weights @ Z, None, None
