"""Muon (Jordan et al., 2024): steps of matrices are momentum made orthogonal; vectors have AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# (a, b, c) of each step X ← aX + (bA + cA²)X with A = XXᵀ: Cesista's, which take all singular values above 0.002 of
# the matrix's norm to between 0.85 and 1.15.
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
SECOND_BETA, EPS = 0.95, 1e-8  # of AdamW; its first beta is the momentum


class Muon(torch.optim.Optimizer):
    """Parameters of two axes and more move by lr · 0.2 · √(longer side) times the orthogonal factor of their momentum,
    convolutions flattened behind their first axis; others by AdamW. Decay is decoupled, lr · weight_decay.

    The factor 0.2 · √(longer side) makes a step about as long as AdamW's, whose rates then suit both (arXiv
    2502.16982). Orthogonal factors are found in `arithmetic`, None for the parameter's own type.
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
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    if p.ndim > 1:
                        _matrix(p, self.state[p], group["lr"], group["momentum"], self.arithmetic)
                    else:
                        _vector(p, self.state[p], group["lr"], group["momentum"])
        return loss


def _matrix(p: Tensor, state: dict[str, Any], lr: float, momentum: float, arithmetic: torch.dtype | None) -> None:
    if not state:
        state["momentum_buffer"] = torch.zeros_like(p)
    moved = state["momentum_buffer"].lerp_(p.grad, 1 - momentum).flatten(1)
    p.add_(orthogonal(moved, arithmetic).view(p.shape), alpha=-lr * 0.2 * max(moved.shape) ** 0.5)


def _vector(p: Tensor, state: dict[str, Any], lr: float, momentum: float) -> None:
    assert p.grad is not None
    if not state:
        state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    state["step"] += 1
    count = int(state["step"])  # on the CPU: no device waits
    mean = state["exp_avg"].lerp_(p.grad, 1 - momentum) / (1 - momentum**count)
    square = state["exp_avg_sq"].lerp_(p.grad.square(), 1 - SECOND_BETA) / (1 - SECOND_BETA**count)
    p.addcdiv_(mean, square.sqrt_().add_(EPS), value=-lr)


def orthogonal(M: Float[Tensor, "m n"], arithmetic: torch.dtype | None = None) -> Float[Tensor, "m n"]:
    """About UVᵀ of M = USVᵀ, by Newton and Schulz's iteration in `arithmetic` or else M's own type: singular values
    come to within 0.15 of 1, but for those below 0.002 of M's norm. Zero stays zero."""
    X = M if M.shape[0] <= M.shape[1] else M.T
    X = X / torch.linalg.vector_norm(X).clamp_min(1e-12)
    X = X.to(arithmetic or M.dtype)
    for a, b, c in NEWTON_SCHULZ:
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X if M.shape[0] <= M.shape[1] else X.T).to(M.dtype)
