"""Records of a run: its facts, rows of metrics, verdict and scores, and their JSON.

Each is made once and handed to the terminal, the page, the model card and the tests. JSON appears at the disk alone.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf, nan
from typing import Any, Literal, NamedTuple

Json = dict[str, Any]  # a JSON object


@dataclass(frozen=True, kw_only=True)
class Options:
    """Intervals of logging, saving and measuring; none of them changes the result. A resumed run keeps them."""

    log_steps: int = 10
    """Steps between rows of metrics.jsonl."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints."""
    keep: int = 3
    """Checkpoints to keep, beside the best; older ones are removed."""
    scores: int = 10
    """Quick kNN scores during the run, with labels; 0 is none."""
    diagnoses: int = 25
    """Label-free looks, the basis of the verdict; 0 is none."""
    # Fewer when they would take 2 % of the run's time.
    evaluate: bool = True
    """Score the backbone at the end, with labels."""
    report: bool = True
    """Write report.html into the run folder at the end."""
    track: Literal["tensorboard", "trackio", "wandb", "mlflow"] | None = None
    """Send the metrics to this tracker too."""
    compile: bool = False
    """Compile the network: half a minute first, then faster steps."""
    # On a CPU this needs a C++ compiler; sums are rounded differently.

    def __post_init__(self) -> None:
        if self.log_steps < 1 or self.keep < 1 or min(self.scores, self.diagnoses) < 0:
            raise ValueError("--log-steps and --keep must be at least 1, --scores and --diagnoses at least 0")
        if not 0 <= self.checkpoint_minutes < inf:
            raise ValueError(f"--checkpoint-minutes is {self.checkpoint_minutes:g}; it must be at least 0, and finite")


@dataclass(frozen=True, kw_only=True)
class WeightsOptions:
    """The network and the input of weights that do not record them; None is timm's own."""

    architecture: str | None = None
    """timm network of a plain state dict, such as resnet18."""
    small_stem: bool = False
    """It has a 3×3 first convolution and no max-pool."""
    prefix: str | None = None
    """Prefix of its tensor names, in a file with several networks."""
    size: int | None = None
    """Side of its images in pixels; this and the options below default to timm's."""
    mean: tuple[float, float, float] | None = None
    """Mean of red, green and blue in [0, 1]."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of red, green and blue."""
    interpolation: Literal["bicubic", "bilinear"] | None = None
    """Filter that resizes its images."""


class Start(NamedTuple):
    """The starting weights of a run; the run folder holds a copy of them."""

    name: str  # as typed, a path made absolute
    digest: str  # of the tensors
    license: str | None = None  # where timm or the file records it
    source: str | None = None  # address of their makers
    paper: str | None = None
    words: tuple[str, ...] = ()  # typed to load them, beside the name
    assumed_input: bool = False  # mean and std of their input were typed, or are not recorded with them


class Facts(NamedTuple):
    """Facts that resume a run from any folder, and tell it apart from other runs."""

    data: str = ""  # absolute path of its images, or the name of a named set
    recipe_name: str = ""
    images: int = 0  # number of training images
    fingerprint: str = ""  # changes when a training image does
    versions: Mapping[str, str] = {}  # version of each package that the numbers depend on
    options: Options = Options()
    root: str | None = None  # folder of the named sets
    cache: str | None = None
    holdout: float | None = None
    test_split: str | None = None
    stack: Literal["channels", "images"] | None = None  # meaning of several planes in a file
    channels: int | None = None
    skip: str | None = None  # name of the list of skipped images in the run folder
    scored: str | None = None  # changes when a test image or a label does
    start: Start | None = None  # None for random weights
    failure: str | None = None  # why the run broke off, in the file of a failed step

    def to_json(self) -> Json:
        start = None if self.start is None else self.start._asdict()
        return {**self._asdict(), "options": asdict(self.options), "start": start}

    @classmethod
    def from_json(cls, content: Json) -> "Facts":
        """The inverse of `to_json`; ValueError that names a missing one."""
        for name in ("data", "recipe_name", "images", "fingerprint", "options"):
            if name not in content:
                raise ValueError(f"the facts of the run lack {name!r}: it was not started by corinfomax, or is damaged")
        facts = cls(**{name: content[name] for name in cls._fields if name in content})
        if (start := content.get("start")) is not None:
            facts = facts._replace(start=Start(**start | {"words": tuple(start["words"])}))
        return facts._replace(options=Options(**content["options"]))


class DataMeasures(NamedTuple):
    """Three measures of the images and their views, taken on pixels once, before training."""

    views_differ: float  # mean squared distance between two views of an image, relative to views of two images
    images_differ: float  # mean variance of a pixel over the images, relative to the variance of all pixels
    twins: float  # share of the images that nearly equal another one
    better_input: str | None = None  # flags for the normalisation that the starting weights expect, if it differs


class Measures(NamedTuple):
    """Label-free measures of the network. Projections are unit rows as in the loss; features are the backbone's."""

    ldmi: float | None  # mutual information of two views, nats per dimension; None with fewer than 2·D rows
    spread_gap: float  # big bang of these projections above its lower bound 2·ln D, nats per dimension; 0 is isotropic
    spread: float  # 1 − |mean projection|²: 0 when all images project to one point, 1 when they surround the origin
    agreement: float  # share of the projections' variance between images; the rest is between views of one image
    rank: float  # effective rank of the projections (RankMe)
    rank_features: float
    lidar: float  # effective rank of the directions that separate images in the projections (LiDAR)
    lidar_features: float
    req: float | None  # exponent of the power law of the features' spectrum (α-ReQ); None with too few ranks to fit
    alignment: float  # mean squared distance between projections of two views of an image (arXiv 2005.10242)
    uniformity: float  # log of the mean Gaussian potential between projections of two images; lower is more even
    dead: float  # share of the projections' dimensions that hardly vary
    dead_features: float
    duplicate: float  # share of the projections' dimensions that nearly repeat an earlier one
    duplicate_features: float
    spectrum: list[float]  # share of the variance along each principal direction of the projections, descending
    spectrum_features: list[float]
    cka: float | None = None  # linear CKA of the features with those of the start (arXiv 1905.00414); 1 is no change


class Look(NamedTuple):
    """The label-free measures of one moment of a run."""

    held_out: bool  # training never uses the images that were measured
    data: DataMeasures
    measures: Measures | None  # None when the network's output was not finite

    def to_json(self) -> Json:
        measures = dict.fromkeys(Measures._fields) if self.measures is None else self.measures._asdict()
        return {"held_out": self.held_out, **self.data._asdict(), **measures}

    @classmethod
    def from_json(cls, content: Json) -> "Look":
        data = DataMeasures(*(content[name] for name in DataMeasures._fields))
        finite = content["spread"] is not None
        measures = Measures(*(content[name] for name in Measures._fields)) if finite else None
        return cls(content["held_out"], data, measures)


class Row(NamedTuple):
    """One row of metrics.jsonl: means over the steps since the row before, nan in the row of step 0."""

    step: int  # steps done
    loss: float
    attraction: float
    gradient_norm: float | None  # None when float16 skipped every update of the row
    lr: float
    seconds: float  # training time so far, earlier parts of a resumed run included
    big_bang: float | None = None  # None for a criterion without one
    gap: float | None = None  # big bang above its lower bound 2·ln D, nats per dimension
    scale: float | None = None  # gradient scale of a float16 run
    knn: float | None = None  # kNN top-1 on a sample of the labelled images, in percent
    look: Look | None = None

    def numbers(self) -> dict[str, float]:
        """Every number of the row by name, the measures included; without the step and the spectra."""
        return {name: value for name, value in self.to_json().items() if name != "step" and _is_number(value)}

    def to_json(self) -> Json:
        flat = {name: value for name, value in self._asdict().items() if name != "look" and value is not None}
        if self.step == 0:
            del flat["loss"], flat["attraction"]
        flat["gradient_norm"] = self.gradient_norm
        return flat if self.look is None else flat | self.look.to_json()

    @classmethod
    def from_json(cls, content: Json) -> "Row":
        """The inverse of `to_json`; ValueError when a field is missing or is not a number."""
        if content.get("step") == 0:
            content = {"loss": nan, "attraction": nan, **content}
        for name in ("step", "loss", "attraction", "lr", "seconds"):
            if not _is_number(content.get(name)):
                raise ValueError(f"a row of metrics needs the number {name!r}, got {content.get(name)!r}")
        fields = {name: content.get(name) for name in cls._fields}
        look = Look.from_json(content) if "views_differ" in content else None
        return cls(**fields | {"look": look})  # type: ignore[arg-type]


class Trial(NamedTuple):
    """A short run of a search over views, and its score."""

    round: int  # of the search, from 0
    options: tuple[str, ...]  # names of the changes of the recipe's views; () is the recipe as it is
    epochs: float
    score: float  # higher is better
    error: float  # standard error of the score
    training: float  # seconds
    seconds: float  # of training and scoring


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


SoundKind = Literal["too few to say", "still warming up", "improving", "healthy", "saturated"]
Unsound = Literal["complete collapse", "dimensional collapse", "over-invariant", "under-invariant", "diverging"]
Kind = Literal[SoundKind, "recovered", "unchanged", "features lost", Unsound, "data problem"]


class Verdict(NamedTuple):
    """The state of a run after its last look."""

    kind: Kind
    evidence: str  # a sentence: the finding, with its numbers
    advice: str  # a sentence: the likely cause and its cure, or the next step after a good run
    measures: dict[str, float]  # the numbers behind the sentences

    @property
    def text(self) -> str:
        return f"{self.kind}: {self.evidence} {self.advice}"

    def __str__(self) -> str:
        return self.text


class Score(NamedTuple):
    """A mean over test images, in percent."""

    mean: float
    sd: float | None = None  # standard deviation over draws of the labels, when there are several
    low: float | None = None  # bounds of the 95 % bootstrap interval over test images; the fitted probe stays fixed
    high: float | None = None

    def to_json(self) -> Json:
        return {name: value for name, value in self._asdict().items() if value is not None}


Table = dict[str, dict[str, Score]]  # by features, then by probe


class Comparison(NamedTuple):
    """Two kinds of features on the same test images."""

    verdict: Literal["better", "unclear", "worse"]
    score: float  # accuracy in percent, as `other_score`
    other: str  # name of the other features
    other_score: float
    difference: float  # in points, with its paired 95 % interval
    low: float
    high: float
    decided: int  # images that exactly one of the two classifies correctly
    images: int


class Results(NamedTuple):
    """The outcome of a run, as results.json keeps it."""

    verdict: Verdict | None = None
    best_checkpoint: str | None = None  # path in the run folder
    beside: str | None = None  # a sentence: the features, beside raw pixels and the untrained network
    keep_start: bool = False  # True if continuing did not help: the run gives back the weights of its start
    table: Table = {}  # noqa: RUF012 (never written to)
    comparisons: tuple[Comparison, ...] = ()  # first pretrained against the better baseline, then against each rival
    sentences: tuple[str, ...] = ()  # the comparisons in words
    remarks: tuple[str, ...] = ()  # why the scores mean little, for images too few or labels too uneven
    train: int = 0  # labelled images that fitted the probes
    test: int = 0  # images that scored them

    def to_json(self) -> Json:
        content: Json = {} if self.verdict is None else {"verdict": self.verdict._asdict()}
        if self.best_checkpoint is not None:
            content["best_checkpoint"] = self.best_checkpoint
        if self.beside is not None:
            content["beside"] = self.beside
        if self.table:
            content["scores"] = {
                name: {probe: score.to_json() for probe, score in scores.items()} for name, scores in self.table.items()
            }
            content["comparisons"] = [
                {"probe": "linear", **comparison._asdict(), "sentence": sentence}
                for comparison, sentence in zip(self.comparisons, self.sentences, strict=True)
            ]
            content |= {"remarks": self.remarks, "train": self.train, "test": self.test}
            if "before" in self.table:  # scores without that row decide nothing
                content["keep_start"] = self.keep_start
        return content

    @classmethod
    def from_json(cls, content: Json) -> "Results":
        rows, table = content.get("comparisons", []), content.get("scores", {})
        return cls(
            verdict=Verdict(**content["verdict"]) if "verdict" in content else None,
            best_checkpoint=content.get("best_checkpoint"),
            beside=content.get("beside"),
            keep_start=content.get("keep_start", False),
            table={name: {probe: Score(**x) for probe, x in scores.items()} for name, scores in table.items()},
            comparisons=tuple(Comparison(*(row[name] for name in Comparison._fields)) for row in rows),
            sentences=tuple(row["sentence"] for row in rows),
            remarks=tuple(content.get("remarks", ())),
            train=content.get("train", 0),
            test=content.get("test", 0),
        )
