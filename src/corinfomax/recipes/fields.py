"""Every setting of a run as frozen data, checked when it is made, and its way to JSON, to flags and back.

The docstring of a field is its line in `corinfomax pretrain --help`, which leaves out `Rare` settings: these have a
comment instead. `corinfomax recipes NAME` lists all of a recipe.
"""

import ast
import dataclasses
import inspect
import itertools
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import inf
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
Rare = Annotated[T, "rare"]  # a setting that --help leaves out
ALPHA_PER_DIM = 3.906  # attraction = 2(1−cos)/D, so alpha ∝ D keeps the pull on the cosine: 250 at D = 64 in the paper
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Scaling(NamedTuple):
    """The way of stored levels to a network: level ÷ steps is in [0, 1], then (x − mean) ÷ std, for each channel."""

    steps: tuple[int, ...]
    colours: int  # channels, the first ones, that are red, green and blue: 3 or 0
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class PixelFormat:
    """The channels and levels of images: a value v of a file is stored as steps · (v − low) / (high − low), rounded.

    Each tuple has a number for each channel, or one for all.
    """

    channels: int = 3
    colours: bool = True  # the first three channels are red, green and blue
    low: tuple[float, ...] = (0.0,)
    high: tuple[float, ...] = (255.0,)
    steps: tuple[int, ...] = (255,)  # highest stored level: above 255 images are stored with 16 bits

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels is {self.channels}; an image has at least 1")
        if self.colours and self.channels < 3:
            raise ValueError(f"{self.channels} channels cannot be red, green and blue: --pixels.no-colours")
        for name in ("low", "high", "steps"):
            if (count := len(getattr(self, name))) not in (1, self.channels):
                raise ValueError(f"{name} has {count} numbers; give 1, or one for each of {self.channels} channels")
        if not all(low < high for low, high in zip(self.each(self.low), self.each(self.high), strict=True)):
            raise ValueError(f"low is {self.low} and high is {self.high}; each low must be below its high")
        if not all(1 <= steps <= 65535 for steps in self.steps):
            raise ValueError(f"steps is {self.steps}; stored levels are from 0 to at most 65535")

    def each(self, values: tuple[T, ...]) -> tuple[T, ...]:
        """One of `values` for each channel."""
        return values * (self.channels // len(values))

    @property
    def is_rgb(self) -> bool:
        """True for red, green and blue alone, of any depth."""
        return self.colours and self.channels == 3

    @property
    def is_bytes(self) -> bool:
        """True for levels as 8-bit files have them."""
        return (set(self.low), set(self.high), set(self.steps)) == ({0.0}, {255.0}, {255})

    @property
    def dtype(self) -> Literal["uint8", "uint16"]:
        """The type of stored levels."""
        return "uint8" if max(self.steps) < 256 else "uint16"

    @property
    def bytes(self) -> int:
        """Bytes of a stored pixel, all channels together."""
        return self.channels * (1 if self.dtype == "uint8" else 2)

    @property
    def colour_channels(self) -> int:
        """The number of channels that are colours: 3 or 0."""
        return 3 if self.colours else 0

    @property
    def other_channels(self) -> int:
        """The number of channels that are no colours."""
        return self.channels - self.colour_channels


RGB = PixelFormat()


@dataclass(frozen=True, kw_only=True)
class View:
    """One random augmentation of an image; its operations come in the order of the fields."""

    rotate: float = 0.0
    """Largest rotation, in degrees."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that the crop covers."""
    crop_ratio: Rare[tuple[float, float]] = (3 / 4, 4 / 3)  # width over height of the crop, log-uniform
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter, its four parts in random order."""
    brightness: Rare[float] = 0.4  # factor U(1 − brightness, 1 + brightness)
    contrast: Rare[float] = 0.4  # factor U(1 − contrast, 1 + contrast)
    saturation: Rare[float] = 0.2  # factor U(1 − saturation, 1 + saturation)
    hue: Rare[float] = 0.1  # largest shift of the hue, in turns (at most 0.5)
    grey: float = 0.2
    """Probability of greyscale."""
    blur: float = 0.0
    """Probability of Gaussian blur."""
    blur_sigma: Rare[tuple[float, float]] = (0.1, 2.0)  # standard deviation of the blur, in pixels of the view
    solarize: float = 0.0
    """Probability of inverting all values from 128 up."""

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


PAPER_VIEWS = (View(blur=1.0), View(blur=0.1, solarize=0.2))


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A timm network without its classifier."""

    name: str = "resnet18"
    """Any network that timm has."""
    small_stem: bool = False
    """ResNet: 3×3 first convolution, no max-pool, for small images."""
    stem_stride: Rare[int] = 1  # ResNet: stride of the small stem; 2 costs a quarter
    layers: Rare[tuple[int, ...] | None] = None  # ResNet: blocks per stage; None is timm's
    channels: Rare[tuple[int, ...] | None] = None  # ResNet: width per stage, and of the small stem; None is timm's
    zero_init_last: Rare[bool] = True  # ResNet: blocks start as identities; False learns more in short runs
    drop_path: Rare[float] = 0.0  # stochastic depth: probability of skipping the last block, less for earlier ones

    def __post_init__(self) -> None:
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}; it is a probability, at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class Projector:
    """Linear layers with ReLU between them; the last one has no bias."""

    widths: tuple[int, ...] = (2048, 2048, 64)
    """Width of each layer; the last is D, the loss's dimension."""
    batch_norm: bool = False
    """BatchNorm after every hidden layer."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """alpha · attraction + big_bang (arXiv 2209.07999).

    Each loss ignores the settings of the other, so `--loss.name` alone switches a recipe.
    """

    name: Literal["corinfomax", "kernel"] = "corinfomax"
    """Log det of the covariance, or of a kernel matrix over images."""
    alpha: float | None = None
    """Weight of the attraction; None is 3.906·D, as published."""
    temperature: Rare[float] = 0.25  # kernel: distance at which two projections count as alike
    cov_decay: float = 0.01
    """Weight of the past covariance; 0.01 keeps 1 % of it."""
    mean_decay: Rare[float] = 0.01  # weight of the past mean
    eps: Rare[float | None] = None  # added to the diagonal inside log det; None is 1e-8, or 1e-3 with a kernel
    cov_init: Rare[float] = 1.0  # the covariance starts at cov_init times the identity
    normalize: Rare[bool] = True  # L2-normalise each projection first

    @property
    def shift(self) -> float:
        """The number added to the diagonal inside log det."""
        return self.eps if self.eps is not None else 1e-3 if self.name == "kernel" else 1e-8


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimiser and its learning rate: linear warm-up, then cosine."""

    name: Literal["sgd", "adamw", "muon"] = "sgd"
    """Optimiser of the matrices; vectors get AdamW under Muon."""
    lr: float = 0.5
    """Peak learning rate."""
    start_lr: Rare[float] = 3e-3  # learning rate of the first epoch
    min_lr: Rare[float] = 1e-6  # learning rate at the end
    warmup_epochs: float = 10
    """Epochs of linear warm-up."""
    schedule: Rare[Literal["epoch", "step"]] = "epoch"  # change of the learning rate: per epoch, as published, or step
    momentum: Rare[float] = 0.9  # momentum, or AdamW's first beta
    weight_decay: float = 1e-4
    """Weight decay; decoupled with AdamW and Muon."""
    decay_norms: Rare[bool] = True  # decay norms and biases too, as published
    clip: Rare[float | None] = None  # largest norm of the whole gradient; None is no limit

    def __post_init__(self) -> None:
        for name in ("lr", "start_lr", "min_lr", "warmup_epochs", "weight_decay"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be at least 0 and below 1")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; the gradient's largest norm must be above 0, or None")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Training of the backbone in runs that start from weights (--init)."""

    blocks: float = 1.0
    """Share of the backbone's blocks to train, the last ones; 1 is all."""
    lr_scale: float = 1.0
    """Learning rate of the backbone ÷ that of the projector."""
    layer_decay: Rare[float] = 1.0  # learning rate of each block ÷ that of the block after it
    projector_share: float = 0.0
    """Share of the steps, the first ones, that train the projector alone."""
    batch_norm: Literal["adapt", "keep"] = "adapt"
    """BatchNorm statistics: adapt to the new images, or keep the weights' own."""
    pull: Rare[float] = 0.0  # weight decay towards the starting weights (L2-SP)
    average: float = 1.0
    """Final weights: start + average · (end − start); 1 is the end."""

    def __post_init__(self) -> None:
        for name in ("blocks", "average"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share, above 0 and at most 1")
        if not 0 < self.lr_scale < inf:
            raise ValueError(f"lr_scale is {self.lr_scale}; it must be above 0")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it must be above 0 and at most 1")
        if not 0 <= self.pull < inf:
            raise ValueError(f"pull is {self.pull}; it must be at least 0")
        if not 0 <= self.projector_share < 1:
            raise ValueError(f"projector_share is {self.projector_share}; it must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The published linear probe: one linear layer on frozen features, SGD with momentum 0.9 and no decay."""

    epochs: int = 100
    batch: int = 256
    lr: float = 0.2
    min_lr: float = 0.002  # learning rate at the end of the cosine
    decay_epochs: int | None = None  # divide the learning rate by ten every so many epochs, instead of the cosine


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the result of a run, except its data."""

    epochs: float = 100
    """Passes over the images; the last may be a part."""
    batch: int = 512
    """Images per step; an epoch's short last batch is dropped."""
    micro_batch: int | None = None
    """Images per forward, for less memory; the gradient stays exact."""
    precision: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Arithmetic of the network; auto is bfloat16 if that is faster here."""
    # float16 needs CUDA and scales the gradient. float64 compares runs, since rounding grows with the steps.
    seed: int = 0
    """Seed of every random number."""
    size: int = 32
    """Side of the training views, in pixels."""
    test_scale: Rare[float] = 1.0  # test resolution ÷ training resolution, rounded to 4 px
    # Crops show objects larger than whole images do, so a larger test resolution may score better (arXiv 1906.06423).
    interpolation: Rare[Literal["bicubic", "bilinear"]] = "bicubic"  # filter of the test views
    cache_side: int = 32
    """Short side of the cached images, in pixels; smaller ones keep their size."""
    from_files: bool = False
    """Crop from the files at full resolution; cache no images."""
    pixels: Rare[PixelFormat] = RGB
    mean: tuple[float, ...] = IMAGENET_STATS[0]
    """Mean of each channel, in [0, 1]."""
    std: tuple[float, ...] = IMAGENET_STATS[1]
    """Standard deviation of each channel."""
    views: tuple[View, View] = PAPER_VIEWS
    """Augmentation of each view, in turn."""
    n_views: int = 2
    """Views of an image per step; each costs one forward."""
    backbone: Backbone = field(default_factory=Backbone)
    projector: Projector = field(default_factory=Projector)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    tuning: Tuning = field(default_factory=Tuning)
    probe: Rare[Probe] = field(default_factory=Probe)

    def __post_init__(self) -> None:
        # Sizes and lengths.
        if not 0 < self.test_scale < inf:
            raise ValueError(f"test_scale is {self.test_scale}; it must be above 0")
        if min(self.size, self.cache_side) < 1:
            raise ValueError(f"size and cache_side must be at least 1, got {self.size} and {self.cache_side}")
        if not 0 < self.epochs < inf:
            raise ValueError(f"epochs is {self.epochs}; it must be above 0")
        if not all(0 <= mean <= 1 for mean in self.mean):
            raise ValueError(f"mean is {self.mean}; each is from 0 to 1: divide means of levels from 0 to 255 by 255")
        if not all(0 < std <= 1 for std in self.std):
            raise ValueError(f"std is {self.std}; each is above 0 and at most 1: divide those of 0 to 255 by 255")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.pixels.channels:
                problem = f"{name} has {len(getattr(self, name))} numbers for {self.pixels.channels} channels"
                raise ValueError(f"{problem}: give one for each")

        # Views and batches.
        if self.n_views < 2:
            raise ValueError(f"n_views is {self.n_views}; agreement needs at least 2 views of an image")
        if self.from_files and any(view.rotate for view in self.views):
            raise ValueError("from_files crops from files and cannot rotate them first: --views.0.rotate 0")
        if self.batch < 2:
            raise ValueError(f"batch is {self.batch}; BatchNorm and the covariance need at least 2 images")
        if self.micro_batch is not None and self.micro_batch < 2:
            raise ValueError(f"micro_batch is {self.micro_batch}; BatchNorm needs at least 2 images")
        if not self.projector.widths or min(self.projector.widths) < 1:
            raise ValueError(f"projector widths must be one or more numbers above 0, got {self.projector.widths}")

    def steps(self, images: int) -> int:
        """The number of steps of a run on so many images."""
        return round(self.epochs * (images // self.batch))

    @property
    def scaling(self) -> Scaling:
        """The numbers by which views scale the images."""
        return Scaling(self.pixels.each(self.pixels.steps), self.pixels.colour_channels, self.mean, self.std)

    @property
    def test_side(self) -> int:
        """Side of the test views, in pixels: for features, scores and export."""
        return self.size if self.test_scale == 1 else max(1, round(self.test_scale * self.size / 4)) * 4

    @property
    def resolution(self) -> str:
        """Training and test resolution in words."""
        tested = f", tested at {self.test_side} px" if self.test_side != self.size else ""
        return f"at {self.size} px{tested}"


def flags(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting of a recipe: its flag without dashes, such as `optim.lr`, and its value."""
    if dataclasses.is_dataclass(settings):
        inner = {field.name.replace("_", "-"): getattr(settings, field.name) for field in dataclasses.fields(settings)}
    elif isinstance(settings, tuple) and settings and dataclasses.is_dataclass(settings[0]):
        inner = {str(i): item for i, item in enumerate(settings)}
    else:
        return {prefix: settings}
    values: dict[str, Any] = {}
    for name, value in inner.items():
        values |= flags(value, f"{prefix}.{name}" if prefix else name)
    return values


def changes(settings: Any, base: Any) -> dict[str, Any]:
    """Flags of a recipe, or of other options, with values unlike those of `base`."""
    before = flags(base)
    return {flag: value for flag, value in flags(settings).items() if value != before[flag]}


def difference(settings: Any, base: Any) -> list[str]:
    """The words of a command that turn `base`, a recipe or other options, into `settings`."""
    words = []
    for flag, value in changes(settings, base).items():
        head, dot, last = flag.rpartition(".")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--{head}{dot}no-{last}")
        else:
            words += [f"--{flag}", *map(_word, value if isinstance(value, tuple) else (value,))]
    return words


def _word(value: Any) -> str:
    """A value as it is typed: 5 for 5.0, but every digit that matters."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def help_lines(recipe: Recipe) -> list[str]:
    """A line for each setting that is not rare: its flag, its value in `recipe`, its docstring."""
    # Docstrings of fields live in the source only.
    meanings: dict[str, str] = {}
    for kind in ast.parse(inspect.getsource(sys.modules[__name__])).body:
        body = kind.body if isinstance(kind, ast.ClassDef) else []
        for line, text in itertools.pairwise(body):
            rare = isinstance(line, ast.AnnAssign) and ast.unparse(line.annotation).startswith("Rare[")
            if isinstance(line, ast.AnnAssign) and isinstance(text, ast.Expr) and not rare:
                meanings[f"{kind.name}.{ast.unparse(line.target)}"] = ast.literal_eval(text.value)  # type: ignore[attr-defined]

    # Groups that are left out: rare ones, and the second view, which has the first one's settings.
    kinds = {"": "Recipe", "views.0": "View"}
    kinds |= {"backbone": "Backbone", "projector": "Projector", "loss": "Loss", "optim": "Optim", "tuning": "Tuning"}
    lines = []
    for flag, value in flags(recipe).items():
        group, _, name = flag.rpartition(".")
        if (meaning := meanings.get(f"{kinds.get(group)}.{name.replace('-', '_')}")) is not None:
            shown = " ".join(map(_word, value if isinstance(value, tuple) else (value,)))
            lines.append(f"  --{flag:<24} {shown:<18} {meaning}")
    return lines


def override(base: Recipe, source: Recipe, names: Collection[str]) -> Recipe:
    """`base` with the settings `names` taken from `source`; names are flags without dashes."""
    values = flags(source)
    return changed(base, {name: values[name] for name in names})


def changed(base: Recipe, values: Mapping[str, Any]) -> Recipe:
    """`base` with these settings, by flags without dashes; ValueError for a value of another type."""
    content = to_json(base)
    for name, value in values.items():
        *path, last = name.replace("-", "_").split(".")
        place: Any = content
        for key in path:
            place = place[int(key) if key.isdigit() else key]
        place[last] = value
    return from_json(content)


def with_views(recipe: Recipe, **values: Any) -> Recipe:
    """The recipe with other values of these fields in both of its views."""
    first, second = (dataclasses.replace(view, **values) for view in recipe.views)
    return dataclasses.replace(recipe, views=(first, second))


def with_probe_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe with a published probe of this length; its learning rate falls at the same shares of it."""
    probe, decay = recipe.probe, recipe.probe.decay_epochs
    decay = None if decay is None else max(1, round(decay * epochs / probe.epochs))
    return dataclasses.replace(recipe, probe=dataclasses.replace(probe, epochs=epochs, decay_epochs=decay))


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON; `from_json` gives it back equal."""
    return dataclasses.asdict(recipe)


def from_json(content: Any) -> Recipe:
    """The inverse of `to_json`; ValueError that names a missing, unknown or ill-typed field."""
    return _from_json(Recipe, content, "recipe")


def _from_json(kind: Any, content: Any, where: str) -> Any:
    """`content` as a value of type `kind`."""
    # a dataclass: every field, no other
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(content, dict) or set(content) != set(hints):
            wrong = sorted(set(content) ^ set(hints)) if isinstance(content, dict) else content
            raise ValueError(f"{where} must have the fields {', '.join(hints)}; missing or unknown: {wrong}")
        return kind(**{name: _from_json(hint, content[name], f"{where}.{name}") for name, hint in hints.items()})

    # tuples, optional values, choices and plain values
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(content, (list, tuple)):
        kinds = arguments[:1] * len(content) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(content):
            pairs = enumerate(zip(kinds, content, strict=True))
            return tuple(_from_json(kind, item, f"{where}[{i}]") for i, (kind, item) in pairs)
    elif origin is UnionType:
        return None if content is None else _from_json(arguments[0], content, where)
    elif kind is float and type(content) in (int, float):
        return float(content)
    elif content in arguments if origin is Literal else type(content) is kind:
        return content
    raise ValueError(f"{where} must be {_in_words(kind)}, got {content!r}")


def _in_words(kind: Any) -> str:
    """The values of a type, such as `a number or None`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is UnionType:
        return f"{_in_words(arguments[0])} or None"
    if origin is tuple:
        items = _in_words(arguments[0])
        return (
            f"a list of values, each {items}" if arguments[-1] is Ellipsis else f"{len(arguments)} values, each {items}"
        )
    return {float: "a number", int: "a whole number", bool: "True or False", str: "text"}.get(kind, str(kind))
