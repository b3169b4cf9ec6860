"""Every knob as frozen data, checked where it is made but for what objectives know, and its way to JSON and back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from math import inf, isfinite
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

ALPHA_PER_DIM = 3.906  # attraction = 2(1−cos)/D, so alpha ∝ D keeps the pull on the cosine: 250 at D = 64 in the paper


@dataclass(frozen=True, kw_only=True)
class View:
    """One random augmentation of an image; operations are applied in the order of the fields."""

    rotate: float = 0.0
    """Largest rotation in degrees; the angle is U(-rotate, rotate). 0 is off."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's share of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width over height, drawn log-uniformly."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter; its four parts come in random order."""
    brightness: float = 0.4
    """The factor is U(1 - brightness, 1 + brightness)."""
    contrast: float = 0.4
    """The factor is U(1 - contrast, 1 + contrast)."""
    saturation: float = 0.2
    """The factor is U(1 - saturation, 1 + saturation)."""
    hue: float = 0.1
    """Largest shift of the hue, in turns (at most 0.5)."""
    grey: float = 0.2
    """Probability of dropping the colour."""
    blur: float = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation in pixels of the view."""
    solarize: float = 0.0
    """Probability of inverting every value at or above 128."""

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grey", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a probability is from 0 to 1")
        for name, most in (("rotate", 180), ("brightness", inf), ("contrast", inf), ("saturation", inf), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to {most:g}")
        # The blur's kernel reaches 6 px, three times a sigma of 2.
        for name, most in (("crop_area", 1.0), ("crop_ratio", inf), ("blur_sigma", 2.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                raise ValueError(f"{name} is {low} {high}; it must be two rising numbers above 0, at most {most:g}")


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A timm network without its classifier."""

    name: str = "resnet18"
    """Any name timm knows."""
    small_stem: bool = False
    """ResNets only: a 3×3 first convolution and no max-pool, for small images; with `channels`, as wide as the first
    of them instead of 64."""
    stem_stride: int = 1
    """Stride of the small stem's convolution; 2 costs a quarter."""
    layers: tuple[int, ...] | None = None
    """ResNets only: blocks in each stage; None is timm's own."""
    channels: tuple[int, ...] | None = None
    """ResNets only: width of each stage; None is timm's own."""
    zero_init_last: bool = True
    """ResNets only: blocks begin as identities, the last norm of each branch at 0. False learns more in short runs."""


@dataclass(frozen=True, kw_only=True)
class Projector:
    """Linear layers with ReLU between them; the last one has no bias."""

    widths: tuple[int, ...] = (2048, 2048, 64)
    """Width of each layer; the last is D, the dimension of the loss."""
    batch_norm: bool = False
    """BatchNorm after every hidden layer."""


Objective = Literal["corinfomax", "kernel", "ldmi", "vicreg", "barlow-twins", "simclr", "sigreg"]
PAIRED: tuple[Objective, ...] = ("ldmi", "vicreg", "barlow-twins", "simclr")
"""Objectives of two views, no more."""


OWN: dict[Objective, tuple[str, ...]] = {
    "corinfomax": ("alpha", "cov_decay", "mean_decay", "eps", "cov_init", "normalize"),
    "kernel": ("alpha", "temperature", "eps", "normalize"),
}
"""What objectives know of a Loss; those that are not here know its weights."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """alpha · attraction + big_bang (arXiv 2209.07999), or another objective to compare it with."""

    name: Objective = "corinfomax"
    """kernel is our own: the log det of a kernel's matrix over the images, with temperature, alpha, eps and normalize
    of the fields below. ldmi and those after it are there to compare with and know `weights` alone: ldmi is the mutual
    information itself, which corinfomax maximises to first order; the rest need the extra `baselines`. Only corinfomax
    and kernel have a verdict."""
    weights: tuple[float, ...] = ()
    """Of ldmi its eps; of vicreg invariance, variance and covariance; of barlow-twins redundancy; of simclr the
    temperature; of sigreg the share of SIGReg. () is 0.001 and what their authors take: 25 25 1, 0.0051, 0.5, 0.05."""
    alpha: float | None = None
    """Weight of the attraction; None is 3.906·D, the rule the published rows obey."""
    temperature: float = 0.25
    """Of kernel: how near two projections must be to count as alike."""
    cov_decay: float = 0.01
    """Weight of the past covariance: 0.01 keeps 1 % of it."""
    mean_decay: float = 0.01
    """Weight of the past mean."""
    eps: float | None = None
    """Added to the diagonal inside log det; None is 1e-8 of a covariance, 1e-3 of a kernel's matrix."""
    cov_init: float = 1.0
    """The covariance starts at cov_init times the identity."""
    normalize: bool = True
    """L2-normalise each projection first."""

    def of(self, name: Objective) -> Loss:
        """Another objective with what both know of these fields; the rest is as usual."""
        if name == self.name:
            return self
        both = set(OWN.get(self.name, ("weights",))) & set(OWN.get(name, ("weights",))) - {"weights"}
        return Loss(name=name, **{field: getattr(self, field) for field in both})

    @property
    def shift(self) -> float:
        """What is added to the diagonal."""
        return (1e-3 if self.name == "kernel" else 1e-8) if self.eps is None else self.eps


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimiser and its learning-rate schedule: linear warm-up, then cosine."""

    name: Literal["sgd", "adamw", "lars", "muon"] = "sgd"
    lr: float = 0.5
    """Peak learning rate."""
    start_lr: float = 3e-3
    """Learning rate of the first epoch."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    warmup_epochs: float = 10
    schedule: Literal["epoch", "step"] = "epoch"
    """How often the learning rate changes: the paper's once an epoch, or smoothly at every step."""
    momentum: float = 0.9
    """Momentum, or AdamW's first beta."""
    weight_decay: float = 1e-4
    decay_norms: bool = True
    """Apply weight decay to norms and biases too, as the paper does."""
    clip: float | None = None
    """Largest norm of the gradient of all weights together; a longer one is scaled down to it. None is no limit."""

    def __post_init__(self) -> None:
        for name in ("lr", "start_lr", "min_lr", "warmup_epochs", "momentum", "weight_decay"):
            if not isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; the gradient's largest norm must be above 0, or None")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The published linear probe: one linear layer on frozen features, SGD with momentum 0.9 and no decay."""

    epochs: int = 100
    batch: int = 256
    lr: float = 0.2
    min_lr: float = 0.002
    """Learning rate at the end of the cosine."""
    decay_epochs: int | None = None
    """Divide the learning rate by ten every so many epochs, instead of the cosine."""


IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PAPER_VIEWS = (View(blur=1.0), View(blur=0.1, solarize=0.2))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the result of a run, data apart."""

    size: int = 32
    """Side S of the square the network sees, in pixels."""
    early_sizes: tuple[int, ...] = ()
    """Sides of the views in the first parts of the run, smaller for speed; none is `size` from the start."""
    early_shares: tuple[float, ...] = ()
    """Share of the steps of each of these parts; what they leave is the last part's, at `size`."""
    test_scale: float = 1.0
    """Side of the views once trained, for features, scores and export, over `size`; unless 1, in fours of pixels.
    Crops show things larger than whole images do, so that larger test views may score better (arXiv 1906.06423)."""
    cache_side: int = 32
    """Short side of the cached images, in pixels; larger ones are reduced to it, smaller ones kept."""
    from_files: bool = False
    """Cache no images: every crop is cut from the file itself, at full resolution, by processes that decode ahead. For
    sets whose copies would not fit on the disk; `cache_side` is then what looks and scores see."""
    mean: tuple[float, float, float] = IMAGENET_STATS[0]
    """Subtracted from red, green and blue in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STATS[1]
    """What red, green and blue are divided by."""
    views: tuple[View, View] = PAPER_VIEWS
    """How an image's crops are made, in turn."""
    crops: int = 2
    """Views of an image in a step, attracted to one another; more of them cost as many more forwards, so that
    it is crops, not epochs, that runs are compared by."""
    backbone: Backbone = field(default_factory=Backbone)
    projector: Projector = field(default_factory=Projector)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    teacher: float | None = None
    """Weight of the past in a teacher, the moving average of the network; step s weighs it (1+s)/(10+s) at most. Views
    are attracted to its projections of the image's other views, at half the pull, for nothing comes to meet them. It is
    the network, not its teacher, that is scored and exported; one more forward a view. None is no teacher."""
    probe: Probe = field(default_factory=Probe)
    epochs: float = 100
    """Times every image is seen; the last one may be a part."""
    batch: int = 512
    """Images a step; the last short batch of an epoch is dropped."""
    micro_batch: int | None = None
    """Images of a view whose activations are held at once, for less memory; None is the whole batch. The gradient stays
    the whole batch's; BatchNorm sees parts."""
    precision: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Arithmetic of the network and of Muon's iterations: auto is bfloat16 where the hardware is faster in it, else
    float32; float16 (CUDA alone, the network's gradient scaled) is for GPUs without bfloat16; float64 is for comparing
    runs, as rounding grows with the steps. The loss is always float64."""
    seed: int = 0
    """Every random number follows from it."""

    def __post_init__(self) -> None:
        if not 0 < self.test_scale < inf:
            raise ValueError(f"test_scale is {self.test_scale}; it must be above 0")
        if min(self.size, self.cache_side) < 1:
            raise ValueError(f"size and cache_side must be at least 1, got {self.size} and {self.cache_side}")
        if not 0 < self.epochs < inf:
            raise ValueError(f"epochs is {self.epochs}; it must be above 0")
        if self.crops < 2:
            raise ValueError(f"crops is {self.crops}; agreement needs at least 2 views of an image")
        if self.teacher is not None and not 0 <= self.teacher < 1:
            raise ValueError(f"teacher is {self.teacher}; the weight of its past is from 0 to below 1")
        if len(self.early_sizes) != len(self.early_shares) or min(self.early_sizes, default=1) < 1:
            raise ValueError(
                f"early_sizes and early_shares are {self.early_sizes} and {self.early_shares}; each part needs a side, "
                "of at least 1 pixel, and a share"
            )
        if min(self.early_shares, default=0.0) < 0 or sum(self.early_shares) > 1 + 1e-9:
            raise ValueError(f"early_shares are {self.early_shares}; they must be at least 0 and at most 1 together")
        if self.from_files and any(view.rotate for view in self.views):
            raise ValueError("from_files cuts crops from files, which cannot be rotated first: --views.0.rotate 0")
        if self.batch < 2:
            raise ValueError(f"batch is {self.batch}; BatchNorm and the covariance need at least 2 images")
        if self.micro_batch is not None and self.micro_batch < 2:
            raise ValueError(f"micro_batch is {self.micro_batch}; BatchNorm needs at least 2 images")
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; each must be above 0")
        if not self.projector.widths or min(self.projector.widths) < 1:
            raise ValueError(f"projector widths must be one or more numbers above 0, got {self.projector.widths}")

    def steps(self, images: int) -> int:
        """Of a run on so many images."""
        return round(self.epochs * (images // self.batch))

    @property
    def test_side(self) -> int:
        """Side of the views once trained, in pixels."""
        return self.size if self.test_scale == 1 else max(1, round(self.test_scale * self.size / 4)) * 4


def check_objective(recipe: Recipe) -> None:
    """ValueError for knobs that the recipe's objective knows nothing of.

    Not where a recipe is made: what is typed is read before the recipe that it changes is chosen.
    """
    loss = recipe.loss
    usual = {field.name: field.default for field in dataclasses.fields(loss) if field.name != "name"}
    own = OWN.get(loss.name, ("weights",))
    if odd := sorted(name for name in usual if name not in own and getattr(loss, name) != usual[name]):
        has, wrong = (", ".join(f"--loss.{name.replace('_', '-')}" for name in names) for names in (own, odd))
        others = [name for name, known in OWN.items() if set(odd) <= set(known)]
        cure = f"; --loss.name {others[0]} knows it" if others else ""
        raise ValueError(f"{loss.name}, this recipe's objective, knows nothing of {wrong}; it has {has}{cure}")
    if recipe.teacher is not None and loss.name != "corinfomax":
        raise ValueError(f"{loss.name}, this recipe's objective, knows no --teacher; --loss.name corinfomax does")
    if recipe.crops != 2 and loss.name in PAIRED:
        raise ValueError(f"crops is {recipe.crops}, and {loss.name} compares two views")


def sides(recipe: Recipe) -> str:
    """The sizes of its views in words."""
    tested = f", tested at {recipe.test_side} px" if recipe.test_side != recipe.size else ""
    return f"at {recipe.size} px{tested}"


LATER: dict[str, dict[str, Any]] = {
    "recipe": {
        "test_scale": 1.0,
        "early_sizes": (),
        "early_shares": (),
        "crops": 2,
        "from_files": False,
        "teacher": None,
    },
    "recipe.loss": {"name": "corinfomax", "weights": (), "temperature": 0.25},
    "recipe.backbone": {"zero_init_last": True},
    "recipe.optim": {"clip": None},
}
"""Knobs that older recipes on disk lack, with what those did."""


def to_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON's types; `from_json` gives it back equal."""
    return dataclasses.asdict(recipe)


def flags(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Every knob of a recipe as the flag that sets it, with its value."""
    if dataclasses.is_dataclass(value):
        fields = [(field.name.replace("_", "-"), getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        fields = [(str(i), item) for i, item in enumerate(value)]
    else:
        return [(prefix, " ".join(map(str, value)) if isinstance(value, tuple) else value)]
    return [row for name, inner in fields for row in flags(inner, f"{prefix}.{name}" if prefix else name)]


def typed(recipe: Recipe, usual: Recipe) -> list[str]:
    """The words of a command that make `usual` into `recipe`."""
    words = []
    for (flag, value), (_, other) in zip(flags(recipe), flags(usual), strict=True):
        if value == other:
            continue
        if isinstance(value, bool):
            head, dot, last = flag.rpartition(".")
            words.append(f"--{flag}" if value else f"--{head}{dot}no-{last}")
        else:
            words += [f"--{flag}", *str(value).split()]
    return words


def from_json(content: Any) -> Recipe:
    """The recipe that `to_json` wrote. ValueError with the field's name for a missing, unknown or ill-typed one."""
    recipe = _from_json(Recipe, content, "recipe")
    assert isinstance(recipe, Recipe)
    return recipe


def _from_json(kind: Any, content: Any, where: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        if isinstance(content, dict):
            content = LATER.get(where, {}) | content
        if not isinstance(content, dict) or set(content) != set(hints):
            odd = sorted(set(content) ^ set(hints)) if isinstance(content, dict) else content
            raise ValueError(f"{where} must have the fields {', '.join(hints)}; missing or unknown: {odd}")
        return kind(**{name: _from_json(hint, content[name], f"{where}.{name}") for name, hint in hints.items()})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(content, (list, tuple)):
        kinds = arguments[:1] * len(content) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(content):
            return tuple(
                _from_json(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, content, strict=True))
            )
    elif origin is UnionType:
        if content is None and NoneType in arguments:
            return None
        return _from_json(arguments[0], content, where)
    elif origin is Literal:
        if content in arguments:
            return content
    elif kind is float and type(content) in (int, float):
        return float(content)
    elif isinstance(kind, type) and type(content) is kind:
        return content
    raise ValueError(f"{where} must be {kind}, got {content!r}")
