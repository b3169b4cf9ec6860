"""Options that several commands share. Nothing here imports torch, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from corinfomax.recipes.fields import Recipe

GROUP = arg(name="")  # the flags of a group carry no prefix
PATH = Annotated[Path | None, arg(metavar="PATH")]
_DATA = arg(metavar="DATA", help="Folder, archive, list or name of the images.")
DATA = Annotated[str, Positional, _DATA]
OPTIONAL_DATA = Annotated[str | None, Positional, _DATA]
WEIGHTS = Annotated[str, Positional, arg(metavar="WEIGHTS", help="A run folder, a file of weights, or timm:NETWORK.")]
SETTINGS = Annotated[Recipe, GROUP]
SKIP_LIST = "skip.txt"  # the list of skipped images: doctor's default name, and the run's own copy


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The images, and the device."""

    root: PATH = None
    """Folder of the named sets; default ./data."""
    download: bool = False
    """Download CIFAR if it is not in the root folder."""
    holdout: float | None = None
    """Test on this share of the training images instead of a split."""
    test_split: str | None = None
    """Test on this split; default test, then val, then a tenth of train."""
    cache: PATH = None
    """Folder of decoded images; default $CORINFOMAX_CACHE or ~/.cache."""
    skip: PATH = None
    """List of images to leave out, as doctor writes it."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto takes the fastest."""
    memory: float | None = None
    """Most memory to use on it, in GB; default what is free."""


@dataclass(frozen=True, kw_only=True)
class WeightsOptions:
    """The network of weights whose file does not record it."""

    architecture: str | None = None
    """timm network of a plain state dict, such as resnet18."""
    small_stem: bool = False
    """It has a 3×3 first convolution and no max-pool."""
    prefix: str | None = None
    """Start of its tensors' names in a file of several networks."""
    size: int | None = None
    """Side of its images in pixels; this and the next default to timm's."""
    mean: tuple[float, float, float] | None = None
    """Mean of red, green and blue in [0, 1]."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of red, green and blue."""
    interpolation: Literal["bicubic", "bilinear"] | None = None
    """Filter that resizes its images."""


IMAGES = Annotated[DataOptions, GROUP]
NETWORK = Annotated[WeightsOptions, GROUP]
