"""Rival objectives for the training loop; all but the first are lightly's, with their authors' weights.

    ldmi           −LDMI of the unit rows, which CorInfoMax maximises to first order (arXiv 2209.07999); its eps is
                   0.001, because a batch alone, without a past, may have a singular joint covariance
    vicreg         25 · mean square distance + 25 · hinge of standard deviations + 1 · covariances (arXiv 2105.04906)
    barlow-twins   Σ (1−C_ii)² + 0.0051 · Σ C_ij², C the cross-correlation of the views (arXiv 2103.03230)
    simclr         NT-Xent of temperature 0.5, the authors' for CIFAR-10 (arXiv 2002.05709)
    sigreg         0.05 · SIGReg + 0.95 · mean square distance to the views' mean, LeJEPA (arXiv 2511.08544)

Signs and reductions of each are tested against a few plain lines of its definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from corinfomax.objective.covariance import Terms, ldmi
from corinfomax.runtime import extras, processes

AUTHORS: dict[str, tuple[float, ...]] = {
    "ldmi": (1e-3,),
    "vicreg": (25.0, 25.0, 1.0),
    "barlow-twins": (0.0051,),
    "simclr": (0.5,),
    "sigreg": (0.05,),
}
"""Weights of each rival: eps; invariance, variance and covariance; redundancy; temperature; share of SIGReg."""
PAIRED = ("ldmi", "vicreg", "barlow-twins", "simclr")
"""Rivals that compare exactly two views."""
SLICES = 256  # random directions of SIGReg, as in the authors' own small example; 1,024 cost as much as a small network


class Rival(nn.Module):
    """A rival objective as a criterion of the training loop; `terms.loss` is to be minimised.

    `terms.attraction` is CorInfoMax's, the mean square distance between the unit rows over D, as a meter that all
    objectives share; there is no big bang (0, without a floor). float32 (ldmi float64), and no state.

    `weights` are the authors' by default. ValueError for a wrong number of weights or views, without lightly, and in
    several processes.
    """

    floor = None

    def __init__(self, name: str, weights: Sequence[float] = ()) -> None:
        super().__init__()
        usual = AUTHORS[name]
        weights = tuple(weights) or usual
        if len(weights) != len(usual):
            raise ValueError(f"{name} has {len(usual)} weights, such as {usual}; got {weights}")
        if processes.size() > 1:
            raise ValueError(f"{name} sees the batch of one process alone, and here are {processes.size()}")
        self.name = name
        self.objective = _build(name, weights)

    def forward(self, *views: Float[Tensor, "n d"]) -> Terms:
        """The terms of this batch."""
        if self.name in PAIRED and len(views) != 2:
            raise ValueError(f"{self.name} compares two views; got {len(views)}")
        z = torch.stack(views)
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            loss = self.objective(z)
            unit = F.normalize(z.detach(), dim=-1)
            attraction = 2 / (len(z) - 1) * (unit - unit.mean(0)).square().sum() / unit[0].numel()
        return Terms(loss, attraction, torch.zeros_like(loss))


def _build(name: str, weights: tuple[float, ...]) -> Callable[[Float[Tensor, "v n d"]], Tensor]:
    if name == "ldmi":
        (eps,) = weights
        return lambda z: -ldmi(*F.normalize(z, dim=-1), eps=eps)
    try:
        from lightly import loss as lightly
        from lightly.loss.lejepa_loss import lejepa_invariance_loss
    except ImportError as error:
        program = "python -m benchmarks.objectives.frontier"
        needed = extras.missing(name, "lightly", extra="baselines", program=program)
        raise ValueError(f"{needed} ({error})") from None
    if name == "sigreg":
        (share,) = weights
        sigreg = lightly.SIGReg(num_vectors=SLICES)
        return lambda z: (
            share * sigreg.to(z.device)(z) + (1 - share) * lejepa_invariance_loss(all_proj=z, global_proj=z)
        )
    pair = {
        "vicreg": lightly.VICRegLoss,
        "barlow-twins": lightly.BarlowTwinsLoss,
        "simclr": lightly.NTXentLoss,
    }[name](*weights)
    return lambda z: pair(*z)
