"""The words of the command line as frozen data: each command with its options, and the reading of what was typed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from corinfomax.recipes import published
from corinfomax.recipes.fields import Objective, Recipe
from corinfomax.recipes.published import RECIPES

ABOUT = "Self-supervised pretraining of image backbones that tells you what it gave."
DATA, WEIGHTS = tyro.conf.arg(metavar="DATA"), tyro.conf.arg(metavar="WEIGHTS")


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which images, where they lie, and where to compute."""

    root: Path | None = None
    """Folder that holds the named sets; ./data unless given."""
    download: bool = False
    """Let torchvision fetch CIFAR if it is not in root."""
    holdout: float | None = None
    """Score on this share of the training images, set aside from training, instead of on the test split."""
    test_split: str | None = None
    """Score on this split; else test, else val, else a tenth of the labelled training images."""
    cache: Path | None = None
    """Folder of the decoded images; else $CORINFOMAX_CACHE, else ~/.cache/corinfomax."""
    skip: Path | None = None
    """Leave out the images that this list names, a path a line, as if they were not there; doctor writes one."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the fastest there is."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Of what network weights are that do not tell it."""

    architecture: str | None = None
    """The timm network of state dicts that do not tell theirs, such as resnet18."""
    small_stem: bool = False
    """Such a network has a 3×3 first convolution and no max-pool."""
    size: int | None = None
    """Side in pixels of the images that other weights than ours see; timm's own for the network unless given."""


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pretrain a backbone on images without looking at labels; where there are labels, score it at the end.

    DATA is a folder (flat, nested, or split/class/…), an archive of one (.zip, .tar), a folder of such shards, a list
    (.txt, .csv), or a named set: mnist5k, cifar10, cifar100, tiny-imagenet, imagenet100, imagenet100-temi, imagenet1k.
    Without --recipe one is chosen from the images and the hardware; every field of a recipe can be overridden, such as
    --epochs 20 --optim.lr 0.1.
    """

    data: Annotated[str | None, tyro.conf.Positional, DATA] = None
    """Folder, list or name of the images."""
    recipe: str | None = None
    """A named recipe; `corinfomax recipes` lists them."""
    out: Path | None = None
    """The run's folder; a new one in ./runs unless given."""
    resume: Path | None = None
    """Go on with the run in this folder, from its last checkpoint; DATA says where its images are if they moved."""
    replay: Path | None = None
    """Do nothing but the step in this file, failed-step-N.safetensors of a run that broke off, and show its layers."""
    evaluate: bool = True
    """Score the finished backbone where there are labels."""
    report: bool = True
    """Write report.html into the run's folder at the end."""
    log_steps: int = 10
    """Steps between rows of metrics.jsonl."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints."""
    keep: int = 3
    """How many checkpoints stay, and the best beside them; other ones are removed."""
    scores: int = 10
    """Quick kNN scores during the run, where there are labels."""
    diagnoses: int = 25
    """Label-free looks at the network during the run, which the verdict rests on; 0 is none."""
    compile: bool = False
    """Let torch compile the network: half a minute for each size of views at first, then faster steps. Needs a C++
    compiler on the CPU; sums are rounded otherwise."""
    sbatch: tuple[int, int] | None = None
    """Train nothing: print a SLURM script for so many nodes with so many GPUs each, to give to sbatch."""
    track: Literal["tensorboard", "trackio", "wandb", "mlflow"] | None = None
    """Send the metrics to this tracker as well, which must be installed; nothing leaves the machine without it."""
    where: Annotated[Where, tyro.conf.arg(name="")] = Where()
    knobs: Annotated[Recipe, tyro.conf.arg(name="")] = RECIPES["cpu-small"].recipe


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score frozen features of any weights, beside an untrained network and raw pixels, and say if they are better.

    kNN, ridge and logistic regression, few labels, retrieval. WEIGHTS and --against are a run folder or checkpoint, an
    exported folder, a state dict (.safetensors; .pth and the like, read without running what is in them), or
    timm:NETWORK for timm's pretrained weights, which are fetched if they are not on this machine.
    """

    weights: Annotated[str, tyro.conf.Positional, WEIGHTS]
    """A run folder, a file of weights, or timm:NETWORK."""
    data: Annotated[str, tyro.conf.Positional, DATA]
    """Folder, list or name of the labelled images."""
    against: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Other weights to compare with; may be given several times."""
    network: Annotated[Network, tyro.conf.arg(name="")] = Network()
    fine_tune: bool = False
    """Also the whole network trained on 1 % and on 10 % of the labels; minutes to hours without a GPU."""
    published_probe: bool = False
    """Also the paper's augmented linear probe, 100 epochs on each of them; hours without a GPU."""
    test_crops: int = 0
    """Also the same weights with features averaged over so many random crops of each image, seen at training's size and
    not at the recipe's test size: a row of its own."""
    out: Path | None = None
    """Write the scores to this JSON file."""
    where: Annotated[Where, tyro.conf.arg(name="")] = Where()


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Write the feature vectors of every image of every split to a file.

    WEIGHTS are whatever evaluate takes: a run, a file of weights, or timm:NETWORK.
    """

    weights: Annotated[str, tyro.conf.Positional, WEIGHTS]
    """A run folder, a file of weights, or timm:NETWORK."""
    data: Annotated[str, tyro.conf.Positional, DATA]
    """Folder, list or name of the images."""
    out: Path = Path("embeddings.npz")
    """Ends in .npz, or in .parquet with the parquet extra."""
    network: Annotated[Network, tyro.conf.arg(name="")] = Network()
    where: Annotated[Where, tyro.conf.arg(name="")] = Where()


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """Show the images of DATA that are most like given pictures, in the terminal and as an HTML page.

    WEIGHTS are whatever evaluate takes: a run, a file of weights, or timm:NETWORK. Every image is looked at, and no
    more is kept than the best.
    """

    weights: Annotated[str, tyro.conf.Positional, WEIGHTS]
    """A run folder, a file of weights, or timm:NETWORK."""
    data: Annotated[str, tyro.conf.Positional, DATA]
    """Folder, list or name of the images to look through."""
    query: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A picture; may be given several times."""
    count: int = 12
    """How many images to show for each."""
    network: Annotated[Network, tyro.conf.arg(name="")] = Network()
    out: Path = Path("neighbors.html")
    """The page."""
    where: Annotated[Where, tyro.conf.arg(name="")] = Where()


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the trained backbone for others to load without this package, and verify it in a fresh process.

    timm is a folder with a model card, for timm.create_model("local-dir:…", pretrained=True) or, where timm has no such
    network, for the load.py in it; state-dict one .safetensors file with timm's names, which are torchvision's for its
    ResNets; onnx needs the onnx extra.
    """

    weights: Annotated[Path, tyro.conf.Positional, WEIGHTS]
    """A run folder or one of its checkpoints."""
    format: Literal["timm", "onnx", "state-dict"] = "timm"
    """What to write."""
    out: Path | None = None
    """The folder or file; named after the run, here, unless given."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML page about a run, to open anywhere and offline: verdict, curves, spectrum, views, map, neighbours.

    A neighbour map beside the principal components needs the extra map: uv run --extra map corinfomax …
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder."""
    data: Annotated[str | None, tyro.conf.Positional, DATA] = None
    """Folder, list or name of its images where they moved, or of others to show it on."""
    out: Path | None = None
    """The page; report.html in the run's folder unless given."""
    where: Annotated[Where, tyro.conf.arg(name="")] = Where()


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the named recipes with the paper's score and ours, or show every knob of one."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None
    """The recipe to show."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time a training step on this machine: its parts, what the bound is, and what to change.

    Without DATA on made-up images of the recipe's size. Takes the knobs that pretrain takes.
    """

    data: Annotated[str | None, tyro.conf.Positional, DATA] = None
    """Folder, list or name of the images; made-up ones without it."""
    recipe: str | None = None
    """A named recipe; `corinfomax recipes` lists them."""
    seconds: float = 30.0
    """About how long to measure; at least nine steps."""
    out: Path | None = None
    """Write what was measured to this JSON file."""
    where: Annotated[Where, tyro.conf.arg(name="")] = Where()
    knobs: Annotated[Recipe, tyro.conf.arg(name="")] = RECIPES["cpu-small"].recipe


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Look at every image before training: what cannot be read, copies, leaks between splits, odd ones, time needed.

    Says it in words, and writes a list of the images to leave out, for --skip. The exit code is 1 if something would
    stop training or make its scores untrue: unreadable images, training images that are also in val or test, classes
    that only those have. All else is a remark, and the exit code 0.
    """

    data: Annotated[str, tyro.conf.Positional, DATA]
    """Folder, list or name of the images."""
    out: Path | None = None
    """The list; skip.txt here unless given. Not written where there is nothing to leave out."""
    seconds: float = 5.0
    """About how long to time training steps for the estimate; 0 is no estimate."""
    where: Annotated[Where, tyro.conf.arg(name="")] = Where()


def parse(
    argv: list[str], base: Recipe | None = None
) -> Pretrain | Evaluate | Embed | Neighbors | Export | Report | Recipes | Bench | Doctor:
    """The command that was typed; the knobs not typed are those of `base`, else of --recipe, else of cpu-small, of
    another objective's loss those that it knows as well."""
    if base is None:
        name = _typed(argv, "--recipe")
        base = published.named(name) if name is not None else RECIPES["cpu-small"].recipe
    for objective in get_args(Objective):
        if objective == _typed(argv, "--loss.name"):
            base = replace(base, loss=base.loss.of(objective))
    subcommand = tyro.conf.subcommand
    commands = (
        Annotated[Pretrain, subcommand("pretrain", default=Pretrain(knobs=base))]
        | Annotated[Evaluate, subcommand("evaluate")]
        | Annotated[Embed, subcommand("embed")]
        | Annotated[Neighbors, subcommand("neighbors")]
        | Annotated[Export, subcommand("export")]
        | Annotated[Report, subcommand("report")]
        | Annotated[Recipes, subcommand("recipes")]
        | Annotated[Bench, subcommand("bench", default=Bench(knobs=base))]
        | Annotated[Doctor, subcommand("doctor")]
    )
    return tyro.cli(commands, prog="corinfomax", description=ABOUT, args=argv)


def _typed(argv: list[str], flag: str) -> str | None:
    for place, word in enumerate(argv):
        if word == flag:
            return argv[place + 1] if place + 1 < len(argv) else None
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None
