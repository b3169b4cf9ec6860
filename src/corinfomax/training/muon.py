"""Muon (Jordan et al., 2024): steps of matrices are momentum made orthogonal; vectors have AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
ONE_BY_ONE = ("cpu",)  # where a matrix at a time is faster; a GPU waits longer for an operation than small ones take
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
            moving = [p for p in group["params"] if p.grad is not None]
            if moving:
                torch._foreach_mul_(moving, 1 - group["lr"] * group["weight_decay"])
            alike: dict[tuple[tuple[int, ...], ...], list[Tensor]] = {}
            for p in moving:
                alike.setdefault((tuple(p.shape), p.stride()) if p.ndim > 1 else (), []).append(p)
            for layout, params in alike.items():
                states, gradients = [self.state[p] for p in params], [p.grad for p in params if p.grad is not None]
                if layout:
                    _matrices(params, gradients, states, group["lr"], group["momentum"], self.arithmetic)
                else:
                    _vectors(params, gradients, states, group["lr"], group["momentum"])
        return loss


def _matrices(
    params: Sequence[Tensor],
    gradients: list[Tensor],
    states: Sequence[dict[str, Any]],
    lr: float,
    momentum: float,
    arithmetic: torch.dtype | None,
) -> None:
    """Parameters that lie alike in memory."""
    for p, state in zip(params, states, strict=True):
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
    moments = [state["momentum_buffer"] for state in states]
    torch._foreach_lerp_(moments, gradients, 1 - momentum)
    if moments[0].device.type in ONE_BY_ONE:
        steps = [orthogonal(M.flatten(1), arithmetic).view(M.shape) for M in moments]
    else:
        steps = _orthogonal_stacked(moments, arithmetic)
    longer = max(len(moments[0]), moments[0][0].numel())
    torch._foreach_add_(list(params), steps, alpha=-lr * 0.2 * longer**0.5)


def _orthogonal_stacked(moments: Sequence[Tensor], arithmetic: torch.dtype | None) -> list[Tensor]:
    """Of tensors that lie alike in memory; columns in the order they lie in, so that none is copied for it."""
    strides = moments[0].stride()
    order = [0, *sorted(range(1, len(strides)), key=lambda dim: -strides[dim])]
    stack = torch.stack([M.permute(order) for M in moments])
    found = orthogonal(stack.flatten(2), arithmetic).contiguous().view(stack.shape)
    back = [order.index(dim) for dim in range(len(order))]
    return [step.permute(back) for step in found.unbind()]


def _vectors(
    params: Sequence[Tensor],
    gradients: list[Tensor],
    states: Sequence[dict[str, Any]],
    lr: float,
    momentum: float,
) -> None:
    for p, state in zip(params, states, strict=True):
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state["step"] += 1
    counts = [int(state["step"]) for state in states]  # on the CPU: no device waits
    means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
    torch._foreach_lerp_(means, gradients, 1 - momentum)
    torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - SECOND_BETA)
    mean = torch._foreach_div(means, [1 - momentum**count for count in counts])
    square = torch._foreach_div(squares, [1 - SECOND_BETA**count for count in counts])
    torch._foreach_sqrt_(square)
    torch._foreach_add_(square, EPS)
    torch._foreach_addcdiv_(list(params), mean, square, value=-lr)


def orthogonal(M: Float[Tensor, "*k m n"], arithmetic: torch.dtype | None = None) -> Float[Tensor, "*k m n"]:
    """About UVᵀ of M = USVᵀ, or of each of a stack of them, by Newton and Schulz's iteration in `arithmetic` or else
    M's own type: singular values come to within 0.15 of 1, but for those below 0.002 of M's norm. Zero stays zero."""
    tall = M.shape[-2] > M.shape[-1]
    X = M.mT if tall else M
    X = X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    X = X.to(arithmetic or M.dtype)
    product_and_sum = torch.addmm if X.ndim == 2 else torch.baddbmm
    for a, b, c in NEWTON_SCHULZ:
        A = X @ X.mT
        X = product_and_sum(X, product_and_sum(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(M.dtype)
