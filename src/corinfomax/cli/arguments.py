"""Options that several commands share. Nothing here imports torch, so that --help answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from corinfomax.recipes.fields import Recipe
from corinfomax.runtime.records import WeightsOptions

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
    stack: Literal["channels", "images"] | None = None
    """Planes of a file that does not say what they are."""
    channels: int | None = None
    """Channels to read: 4 takes transparency for one, 3 leaves it out."""
    cache: PATH = None
    """Folder of decoded images; default $CORINFOMAX_CACHE or ~/.cache."""
    skip: PATH = None
    """List of images to leave out, as doctor writes it."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto takes the fastest."""
    memory: float | None = None
    """Most memory to use on it, in GB; default what is free."""


IMAGES = Annotated[DataOptions, GROUP]
NETWORK = Annotated[WeightsOptions, GROUP]
