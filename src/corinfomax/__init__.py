"""Self-supervised pretraining by maximising a log-determinant mutual information (CorInfoMax, arXiv 2209.07999)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corinfomax.objective.covariance import CorInfoMaxLoss, Moments, corinfomax_loss, ldmi
    from corinfomax.objective.kernel import KernelLoss

__version__ = "0.1.0"
__all__ = ["CorInfoMaxLoss", "KernelLoss", "Moments", "corinfomax_loss", "ldmi"]


def __getattr__(name: str) -> Any:
    # Lazy, since torch takes seconds to import and `corinfomax --help` needs none of it.
    if name in __all__:
        from corinfomax.objective import covariance, kernel

        return getattr(kernel if name == "KernelLoss" else covariance, name)
    raise AttributeError(f"module 'corinfomax' has no attribute {name!r}")
