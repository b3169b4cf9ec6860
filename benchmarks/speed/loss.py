"""The loss, forward and backward, against autograd through torch.logdet in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.clock import Effort, alternate
from benchmarks.speed.metrics import Metric, metric
from corinfomax import CorInfoMaxLoss

SHAPES = ((1536, 512), (1024, 128), (512, 64), (128, 64))


def run(effort: Effort) -> Iterator[Metric]:
    """One figure a shape; the first is that of the paper's largest recipe."""
    for n, d in ((64, 16),) if effort.quick else SHAPES:
        rows = torch.randn(2, n, d, generator=torch.Generator().manual_seed(0))
        ours, plain = CorInfoMaxLoss(d), Plain(d)
        seconds = alternate({"ours": pull(ours_of(ours), rows), "plain": pull(plain, rows)}, effort)
        goal = {"at_least": 3.0, "aim": 5.0} if (n, d) == SHAPES[0] else {}
        ms = {name: [1e3 * s for s in samples] for name, samples in seconds.items()}
        yield metric(
            "loss",
            f"loss forward+backward, N={n}, D={d}",
            "float64 autograd through torch.logdet",
            ms["ours"],
            ms["plain"],
            unit="ms",
            **goal,
        )


def ours_of(criterion: CorInfoMaxLoss) -> Callable[[Tensor, Tensor], Tensor]:
    """The module as a function of two views to the loss."""
    return lambda z1, z2: criterion(z1, z2).loss


def pull(loss: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> Callable[[], object]:
    """One call is the loss of `rows` and its gradient."""

    def call() -> tuple[Tensor, ...]:
        z1, z2 = (row.clone().requires_grad_() for row in rows)
        return torch.autograd.grad(loss(z1, z2), (z1, z2))

    return call


class Plain:
    """The method's equations written down and left to autograd."""

    def __init__(self, d: int, *, alpha: float | None = None, decay: float = 0.01, eps: float = 1e-8) -> None:
        self.alpha, self.decay, self.eps = 3.906 * d if alpha is None else alpha, decay, eps
        self.R = [torch.eye(d, dtype=torch.float64) for _ in range(2)]
        self.mu = [torch.zeros(d, dtype=torch.float64) for _ in range(2)]

    def __call__(self, z1: Tensor, z2: Tensor) -> Tensor:
        views = [F.normalize(z, dim=1).double() for z in (z1, z2)]
        n, d = z1.shape
        log_dets = []
        for v, z in enumerate(views):
            mu = self.decay * self.mu[v] + (1 - self.decay) * z.mean(0)
            R = self.decay * self.R[v] + (1 - self.decay) * (z - mu).T @ (z - mu) / n
            log_dets.append(torch.logdet(R + self.eps * torch.eye(d, dtype=R.dtype)))
            self.mu[v], self.R[v] = mu.detach(), R.detach()
        attraction = (views[0] - views[1]).square().sum() / (n * d)
        return self.alpha * attraction - (log_dets[0] + log_dets[1]) / d
