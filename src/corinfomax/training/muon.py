"""Muon (Jordan et al., 2024): the step of a matrix is its momentum made orthogonal; vectors get AdamW."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Cesista's coefficients (a, b, c) of each iteration X ← aX + (bA + cA²)X with A = XXᵀ. They bring every singular value
# above 0.002 of the matrix's norm to between 0.85 and 1.15.
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
ONE_BY_ONE = ("cpu",)  # devices on which one matrix at a time is faster; on a GPU launching small ones takes longer
SECOND_BETA, EPS = 0.95, 1e-8  # AdamW; its first beta is the momentum


class Muon(torch.optim.Optimizer):
    """Muon for parameters with two or more axes, AdamW for the others; weight decay is decoupled, lr · weight_decay.

    A matrix moves by lr · 0.2 · √(longer side) times the orthogonal factor of its momentum; a convolution is flattened
    behind its first axis. The factor 0.2 · √(longer side) makes steps about as long as AdamW's, so one learning rate
    suits both (arXiv 2502.16982). Orthogonal factors are computed in `arithmetic`, None for the parameter's dtype.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]] | Iterable[Tensor],
        *,
        lr: float = 0.02,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        arithmetic: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.arithmetic = arithmetic

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            # weight decay
            moving = [p for p in group["params"] if p.grad is not None]
            if moving:
                torch._foreach_mul_(moving, 1 - group["lr"] * group["weight_decay"])

            # parameters with one layout move together: matrices of one shape, and all vectors
            by_layout: dict[tuple[tuple[int, ...], ...], list[Tensor]] = {}
            for p in moving:
                by_layout.setdefault((tuple(p.shape), p.stride()) if p.ndim > 1 else (), []).append(p)
            for layout, params in by_layout.items():
                states, gradients = [self.state[p] for p in params], [p.grad for p in params if p.grad is not None]
                if layout:
                    _move_matrices(params, gradients, states, group["lr"], group["momentum"], self.arithmetic)
                else:
                    _move_vectors(params, gradients, states, group["lr"], group["momentum"])
        return loss


def _move_matrices(
    params: Sequence[Tensor],
    gradients: list[Tensor],
    states: Sequence[dict[str, Any]],
    lr: float,
    momentum: float,
    arithmetic: torch.dtype | None,
) -> None:
    """Muon's step for matrices of one shape and memory layout."""
    # momentum
    for p, state in zip(params, states, strict=True):
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
    moments = [state["momentum_buffer"] for state in states]
    torch._foreach_lerp_(moments, gradients, 1 - momentum)

    # orthogonal factors, then the step
    if moments[0].device.type in ONE_BY_ONE:
        steps = [orthogonal(M.flatten(1), arithmetic).view(M.shape) for M in moments]
    else:
        steps = _orthogonal_stacked(moments, arithmetic)
    longer = max(len(moments[0]), moments[0][0].numel())
    torch._foreach_add_(list(params), steps, alpha=-lr * 0.2 * longer**0.5)


def _orthogonal_stacked(moments: Sequence[Tensor], arithmetic: torch.dtype | None) -> list[Tensor]:
    """Orthogonal factors of tensors of one layout, all at once; columns keep their memory order, to avoid copies."""
    strides = moments[0].stride()
    order = [0, *sorted(range(1, len(strides)), key=lambda dim: -strides[dim])]
    stack = torch.stack([M.permute(order) for M in moments])
    factors = orthogonal(stack.flatten(2), arithmetic).contiguous().view(stack.shape)
    back = [order.index(dim) for dim in range(len(order))]
    return [step.permute(back) for step in factors.unbind()]


def _move_vectors(
    params: Sequence[Tensor], gradients: list[Tensor], states: Sequence[dict[str, Any]], lr: float, momentum: float
) -> None:
    """AdamW's step for vectors."""
    for p, state in zip(params, states, strict=True):
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state["step"] += 1
    counts = [int(state["step"]) for state in states]  # on the CPU, so no device waits

    # moving means, without their bias towards zero
    means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
    torch._foreach_lerp_(means, gradients, 1 - momentum)
    torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - SECOND_BETA)
    mean = torch._foreach_div(means, [1 - momentum**count for count in counts])
    square = torch._foreach_div(squares, [1 - SECOND_BETA**count for count in counts])
    torch._foreach_sqrt_(square)
    torch._foreach_add_(square, EPS)
    torch._foreach_addcdiv_(list(params), mean, square, value=-lr)


def orthogonal(M: Float[Tensor, "*k m n"], arithmetic: torch.dtype | None = None) -> Float[Tensor, "*k m n"]:
    """About UVᵀ for M = USVᵀ, or for each of a stack of matrices, by Newton–Schulz iterations.

    They run in `arithmetic` or M's own dtype. Singular values come to within 0.15 of 1, apart from those below 0.002
    of M's norm; a zero matrix stays zero.
    """
    tall = M.shape[-2] > M.shape[-1]
    X = M.mT if tall else M
    X = X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    X = X.to(arithmetic or M.dtype)
    product_and_sum = torch.addmm if X.ndim == 2 else torch.baddbmm
    for a, b, c in NEWTON_SCHULZ:
        A = X @ X.mT
        X = product_and_sum(X, product_and_sum(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(M.dtype)
