"""The command line: `corinfomax pretrain · evaluate · embed · recipes`."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from corinfomax import __version__, recipes, runs
from corinfomax.recipes import RECIPES, Recipe

if TYPE_CHECKING:
    import torch

    from corinfomax.checkpoint import Checkpoint
    from corinfomax.images import Splits

# torch takes seconds to import; every command imports what needs it inside, so that --help and mistakes answer at once.

ABOUT = "Self-supervised pretraining of image backbones that tells you what it gave."


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
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the fastest there is."""


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pretrain a backbone on images without looking at labels; where there are labels, score it at the end.

    DATA is a folder (flat, nested, or split/class/…), a list (.txt, .csv), or a named set: mnist5k, cifar10, cifar100,
    tiny-imagenet, imagenet100, imagenet100-temi, imagenet1k. Without --recipe one is chosen from the images and the
    hardware; every field of a recipe can be overridden, such as --epochs 20 --optim.lr 0.1.
    """

    data: Annotated[str | None, tyro.conf.Positional] = None
    """Folder, list or name of the images."""
    recipe: str | None = None
    """A named recipe; `corinfomax recipes` lists them."""
    out: Path | None = None
    """The run's folder; a new one in ./runs unless given."""
    resume: Path | None = None
    """Go on with the run in this folder, from its last checkpoint."""
    evaluate: bool = True
    """Score the finished backbone where there are labels."""
    log_steps: int = 10
    """Steps between rows of metrics.jsonl."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints."""
    keep: int = 3
    """How many checkpoints stay; older ones are removed."""
    scores: int = 10
    """Quick kNN scores during the run, where there are labels."""
    where: Annotated[Where, tyro.conf.arg(name="")] = Where()
    knobs: Annotated[Recipe, tyro.conf.arg(name="")] = RECIPES["cpu-small"].recipe


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score frozen features: kNN, ridge, logistic and few-label probes, beside an untrained network and raw pixels."""

    weights: Annotated[Path, tyro.conf.Positional]
    """A run folder or one of its checkpoints."""
    data: Annotated[str, tyro.conf.Positional]
    """Folder, list or name of the labelled images."""
    published_probe: bool = False
    """Also the paper's augmented linear probe, 100 epochs; hours without a GPU on large sets."""
    out: Path | None = None
    """Write the scores to this JSON file."""
    where: Annotated[Where, tyro.conf.arg(name="")] = Where()


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Write the feature vectors of the images to train on and of those to score on to a file."""

    weights: Annotated[Path, tyro.conf.Positional]
    """A run folder or one of its checkpoints."""
    data: Annotated[str, tyro.conf.Positional]
    """Folder, list or name of the images."""
    out: Path = Path("embeddings.npz")
    """Ends in .npz, or in .parquet with the parquet extra."""
    where: Annotated[Where, tyro.conf.arg(name="")] = Where()


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the named recipes with the paper's score and ours, or show every knob of one."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """The recipe to show."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 2 a mistake of the person's, said in a sentence, 130 stopped."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        match parse(argv):
            case Pretrain() as command:
                return run_pretrain(command, argv)
            case Evaluate() as command:
                return run_evaluate(command)
            case Embed() as command:
                return run_embed(command)
            case Recipes() as command:
                return show_recipes(command)
    except KeyboardInterrupt:
        print("corinfomax: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("CORINFOMAX_TRACEBACK"):
            raise
        print(f"corinfomax: {error}", file=sys.stderr)
        return 2
    raise AssertionError("every command is handled above")


def parse(argv: list[str], base: Recipe | None = None) -> Pretrain | Evaluate | Embed | Recipes:
    """The command that was typed; the knobs not typed are those of `base`, else of --recipe, else of cpu-small."""
    if base is None:
        name = _typed(argv, "--recipe")
        base = recipes.named(name) if name is not None else RECIPES["cpu-small"].recipe
    subcommand = tyro.conf.subcommand
    commands = (
        Annotated[Pretrain, subcommand("pretrain", default=Pretrain(knobs=base))]
        | Annotated[Evaluate, subcommand("evaluate")]
        | Annotated[Embed, subcommand("embed")]
        | Annotated[Recipes, subcommand("recipes")]
    )
    return tyro.cli(commands, prog="corinfomax", description=ABOUT, args=argv)


def _typed(argv: list[str], flag: str) -> str | None:
    for place, word in enumerate(argv):
        if word == flag:
            return argv[place + 1] if place + 1 < len(argv) else None
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None


def run_pretrain(command: Pretrain, argv: list[str]) -> int:
    """Images, recipe, run folder, training, score: the whole job."""
    from corinfomax import checkpoint, sources, train

    resumed: checkpoint.Checkpoint | None = None
    data, where, knobs, name = command.data, command.where, command.knobs, command.recipe
    if command.resume is not None:
        data, where, resumed = _resumed(command)
        knobs, name = resumed.recipe, resumed.facts["recipe_name"]
    if data is None:
        raise ValueError("name the images: corinfomax pretrain DATA, or --resume RUN to go on with a run")
    device = _device(where.device)
    if command.log_steps < 1 or command.keep < 1 or command.scores < 0:
        raise ValueError("--log-steps and --keep must be at least 1, --scores at least 0")
    if name is None:
        survey = sources.survey(data, root=where.root, download=where.download)
        name, base, why = recipes.choose(data, survey.images, survey.short_side, cuda=device.type == "cuda")
        again = parse(argv, base)  # the same words, now over the chosen recipe
        assert isinstance(again, Pretrain)
        knobs = again.knobs
        print(f"recipe {why}; --recipe names another")
    splits = _load(data, where, knobs.cache_side)
    recipe = _fit_batch(knobs, len(splits.train))
    if recipe.optim.warmup_epochs >= recipe.epochs > 1:
        print(f"the warm-up, {recipe.optim.warmup_epochs:g} epochs, is as long as the run: --optim.warmup-epochs 1")
    facts = {
        "data": data,
        "where": {key: str(value) for key, value in vars(where).items() if value is not None},
        "recipe_name": name,
        "images": len(splits.train),
        "fingerprint": splits.train.fingerprint,
        "versions": _versions(),
    }
    if resumed is None:
        run = _new_run(command.out, f"{Path(data).stem or 'images'}-{name}")
        runs.write_json(run / "recipe.json", {"recipe": recipes.to_json(recipe), "facts": facts, "command": argv})
    else:
        assert command.resume is not None
        run = command.resume
        if resumed.facts["fingerprint"] != facts["fingerprint"]:
            raise ValueError(f"the images of {data} are not those that {run} was trained on; put those back")
        runs.forget_metrics_after(run, resumed.step)
        print(f"going on with {run} after step {resumed.step}")

    pace = train.Pace(command.log_steps, command.checkpoint_minutes, command.keep, command.scores)
    started = time.monotonic()
    try:
        network = train.pretrain(recipe, splits, run, device=device, pace=pace, facts=facts, resume=resumed)
    except train.Interrupted as stop:
        print(f"stopped; {stop.checkpoint} has all that was done\nto go on: corinfomax pretrain --resume {run}")
        return 130
    print(f"trained in {(time.monotonic() - started) / 60:.1f} min: {runs.checkpoints(run)[-1]}")
    if command.evaluate and train.scorable(splits):
        from corinfomax import evaluate

        dtype = train.precision(recipe, device)
        _tell(
            evaluate.evaluate(network.backbone, splits, recipe, device=device, dtype=dtype),
            splits,
            run / "results.json",
        )
    print(f"feature vectors: corinfomax embed {run} {data}")
    return 0


def _new_run(out: Path | None, name: str) -> Path:
    if out is None:
        return runs.fresh_folder(Path("runs"), name)
    if runs.checkpoints(out) or runs.read_metrics(out):
        raise ValueError(f"{out} holds a run already; --resume {out} goes on with it, another --out starts anew")
    out.mkdir(parents=True, exist_ok=True)
    return out


def run_evaluate(command: Evaluate) -> int:
    """Score a checkpoint's backbone on labelled images."""
    from corinfomax import checkpoint, evaluate, train

    device = _device(command.where.device)
    network, saved = checkpoint.load_network(command.weights)
    splits = _load(command.data, command.where, saved.recipe.cache_side)
    evaluate.check_labels(splits)
    import torch

    table = evaluate.evaluate(
        network.backbone.to(device).to(memory_format=torch.channels_last),
        splits,
        saved.recipe,
        device=device,
        dtype=train.precision(saved.recipe, device),
        published_probe=command.published_probe,
    )
    _tell(table, splits, command.out)
    return 0


def run_embed(command: Embed) -> int:
    """Write the features of both splits, the training images first."""
    import torch

    from corinfomax import checkpoint, embed, train

    embed.check_ending(command.out)
    device = _device(command.where.device)
    network, saved = checkpoint.load_network(command.weights)
    backbone = network.backbone.to(device).to(memory_format=torch.channels_last)
    splits = _load(command.data, command.where, saved.recipe.cache_side)
    parts = [part for part in splits if part is not None]
    dtype = train.precision(saved.recipe, device)
    vectors = [
        embed.features(backbone, part, saved.recipe, device=device, dtype=dtype, progress="embedding") for part in parts
    ]
    embed.write(command.out, vectors, parts)
    print(f"{command.out}: {sum(map(len, parts)):,} images × {vectors[0].shape[1]} features")
    return 0


def show_recipes(command: Recipes) -> int:
    """The list of recipes, or one recipe's every knob."""
    if command.name is None:
        print(f"{'recipe':<17}{'paper':>7}{'ours':>14}  what it is")
        for name, entry in RECIPES.items():
            paper = f"{entry.paper:.2f}" if entry.paper is not None else "–"
            ours = entry.measured[0] if entry.measured else None
            shown = "not run yet" if ours is None else f"{ours.value:.1f}" + (f" ± {ours.sd:.1f}" if ours.sd else "")
            print(f"{name:<17}{paper:>7}{shown:>14}  {entry.about}")
        print("\ntop-1 of a linear probe, %; corinfomax recipes NAME shows every knob and what ours was measured on")
        return 0
    recipe, entry = recipes.named(command.name), RECIPES[command.name]
    print(f"{command.name}: {entry.about}\ndata: {entry.data}")
    if entry.paper is not None:
        print(f"the paper's linear probe: {entry.paper:.2f} %")
    for m in entry.measured:
        sd = f" ± {m.sd:.1f}" if m.sd is not None else ""
        print(f"ours: {m.score} {m.value:.1f}{sd} % (n = {m.n}, {m.data}, {m.hardware}, {m.minutes:g} min, {m.commit})")
    print()
    for flag, value in _flat(recipe):
        print(f"  --{flag:<26} {value}")
    return 0


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Every knob of a recipe as the flag that sets it, with its value."""
    if dataclasses.is_dataclass(value):
        fields = [(field.name.replace("_", "-"), getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        fields = [(str(i), item) for i, item in enumerate(value)]
    else:
        return [(prefix, " ".join(map(str, value)) if isinstance(value, tuple) else value)]
    return [row for name, inner in fields for row in _flat(inner, f"{prefix}.{name}" if prefix else name)]


def _resumed(command: Pretrain) -> tuple[str, Where, Checkpoint]:
    """The data, where it lies, and the last checkpoint of the run to go on with."""
    from corinfomax import checkpoint

    run = command.resume
    assert run is not None
    fresh = Pretrain()
    kept = {name: getattr(fresh, name) for name in ("data", "recipe", "out", "knobs")}
    if command != replace(command, **kept, where=Where(device=command.where.device)):
        raise ValueError(
            "a resumed run keeps its data and its recipe: beside --resume only how often it logs, and where"
        )
    loaded = checkpoint.load(checkpoint.last(run))
    saved = loaded.facts["where"]
    where = Where(
        root=Path(saved["root"]) if "root" in saved else None,
        cache=Path(saved["cache"]) if "cache" in saved else None,
        holdout=float(saved["holdout"]) if "holdout" in saved else None,
        test_split=saved.get("test_split"),
        device=command.where.device,
    )
    return loaded.facts["data"], where, loaded


def _load(data: str, where: Where, side: int) -> Splits:
    from corinfomax import images

    splits = images.load(
        data,
        side=side,
        holdout=where.holdout,
        root=where.root,
        download=where.download,
        cache=where.cache,
        test_split=where.test_split,
    )
    for name, split in zip(("train", "test"), splits, strict=True):
        if split is not None and split.skipped:
            print(f"{len(split.skipped)} unreadable images left out of {name}, such as {': '.join(split.skipped[0])}")
    test = f", {len(splits.test):,} to score on" if splits.test is not None else ""
    classes = f", {len(splits.train.classes)} classes (for scoring only)" if splits.train.classes else ""
    print(f"{len(splits.train):,} images to train on{test}{classes}")
    return splits


def _fit_batch(recipe: Recipe, count: int) -> Recipe:
    if count >= recipe.batch:
        return recipe
    if count < 2:
        raise ValueError(f"{count} image is not enough to train on: a batch needs at least 2")
    print(f"batch {recipe.batch} is more than the {count} images: batch {count}")
    return replace(recipe, batch=count)


def _tell(table: Any, splits: Splits, path: Path | None) -> None:
    from corinfomax import evaluate

    assert splits.test is not None
    print(f"\n{evaluate.as_text(table)}\n")
    print(f"{len(splits.train):,} images with labels to fit each probe, {len(splits.test):,} others to score it")
    if path is not None:
        runs.write_json(path, {"scores": evaluate.as_json(table), "train": len(splits.train), "test": len(splits.test)})
        print(f"written to {path}")


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot compute on device {name!r}: {reason}") from error
    return device


def _versions() -> dict[str, str]:
    import timm
    import torch

    return {
        "corinfomax": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
