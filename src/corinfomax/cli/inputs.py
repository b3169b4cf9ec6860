"""Steps that the commands share: device, weights, images, and lines about what was read and skipped."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from corinfomax import network
from corinfomax.cli import messages
from corinfomax.cli.arguments import DataOptions
from corinfomax.diagnosis.expected_input import better_input
from corinfomax.evaluation import table
from corinfomax.images import cache, conversions, files, in_memory, tables
from corinfomax.images.cache import Images, Splits
from corinfomax.images.files import Source
from corinfomax.images.sources import Data, is_name
from corinfomax.recipes import fields
from corinfomax.recipes.fields import RGB, PixelFormat, Recipe
from corinfomax.runtime import memory, processes, run_folder
from corinfomax.runtime.records import Facts, Results, WeightsOptions
from corinfomax.weights.load import LoadedBackbone, RecordedError, load_backbone, load_start


def choose_device(name: str, *, gigabytes: float | None = None) -> torch.device:
    """The device of a command, tested; sets its memory limit and flushes numbers below 1e-38 to 0.

    The momentum of dead units shrinks to such numbers, on which processors are many times slower: steps of Muon took
    up to five times as long. TF32 is off, so that float32 means float32.
    """
    memory.set_limit(gigabytes)
    torch.set_flush_denormal(True)
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = processes.own_device(torch.device(name))
        # Run a kernel: the driver may know a GPU that this torch has no code for.
        torch.ones(1, device=device).add(1).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot compute on device {name!r}: {str(error).splitlines()[0]}") from error
    return device


def load_weights(name: str, options: WeightsOptions, device: torch.device, *, last: bool = False) -> LoadedBackbone:
    """The backbone of a run, a file or timm, on the device; prints what was loaded. `last` as in `load_backbone`."""
    loaded = load_backbone(name, options, last=last)
    print(f"loaded {loaded.summary}")
    return loaded._replace(backbone=loaded.backbone.to(device).to(memory_format=torch.channels_last))


def load_several(names: Sequence[str], options: WeightsOptions, device: torch.device) -> list[LoadedBackbone]:
    """Several weights, each with the options of what it does not record; RecordedError if all record one of them.

    A run that continued from weights gives its last checkpoint, even where it gives back the start elsewhere.
    """
    loaded: list[LoadedBackbone] = []
    refused: dict[str, RecordedError] = {}  # by name, the refusal of all options
    of_input = replace(options, architecture=None, small_stem=False, prefix=None)
    for name in names:
        for choice in (options, of_input, WeightsOptions()):
            try:
                loaded.append(load_weights(name, choice, device, last=True))
                break
            except RecordedError as error:
                refused.setdefault(name, error)
    if refused.keys() >= set(names):
        raise refused[names[0]]
    return loaded


def find_data(name: str | Source, options: DataOptions) -> Data:
    """The images of a command, with its options."""
    skip = frozenset() if options.skip is None else tables.read_names(options.skip)
    places = (options.root, options.download, skip, options.cache)
    return Data(name, *places, options.holdout, options.test_split, options.stack, options.channels)


def load_all(
    weights: str, network: WeightsOptions, data: str, options: DataOptions
) -> tuple[torch.device, LoadedBackbone, dict[str, Images]]:
    """Device, backbone on it, and the images of every split; prints what was loaded and skipped."""
    device = choose_device(options.device, gigabytes=options.memory)
    loaded = load_weights(weights, network, device)
    options = options_of_own_images(options, data, loaded)
    source = find_data(data, options)
    print(*source.notes, sep="\n", end="\n" if source.notes else "")
    loaded = loaded._replace(recipe=fit_pixels(loaded.recipe, source))
    splits = load_every(source, loaded.recipe)
    print_skipped(source, options.skip, splits)
    warn_of_input(loaded, next(iter(splits.values())), loaded.recipe, device)
    return device, loaded, splits


def fit_pixels(recipe: Recipe, data: Data) -> Recipe:
    """The recipe of weights for 8-bit RGB with the range of these images; DataError for images of other channels.

    Weights that were trained on other levels keep theirs.
    """
    if recipe.pixels != RGB:
        for note in data.outside(recipe.pixels):
            print(note)
        return recipe
    levels = data.survey().levels
    if levels.pixels == RGB:
        return recipe
    pixels = levels.pixels
    if pixels.channels != 1 and not pixels.colours:
        problem = f"{data.title} has images of {pixels.channels} channels, and these weights read red, green and blue"
        raise files.DataError(f"{problem}: adapt them with pretrain --init")
    each = {name: getattr(pixels, name)[:3] for name in ("low", "high", "steps")}
    low, high = min(each["low"]), max(each["high"])
    fitted = replace(recipe, pixels=PixelFormat(**each))
    if fitted.pixels != RGB:
        print(f"levels from {low:,.7g} to {high:,.7g} are read as 0 to 1, the range that these weights expect")
    return fitted


def load_images(data: Data, recipe: Recipe, *, progress: bool = True) -> Splits:
    """Training and test images in the size and the levels of a recipe."""
    side, pixels = recipe.cache_side, recipe.pixels
    return cache.load(data, side=side, pixels=pixels, from_files=recipe.from_files, progress=progress)


def load_every(data: Data, recipe: Recipe) -> dict[str, Images]:
    """Every split in the size and the levels of a recipe."""
    return cache.load_every(data, side=recipe.cache_side, pixels=recipe.pixels, from_files=recipe.from_files)


def load_splits(data: Data, recipe: Recipe, options: DataOptions) -> Splits:
    """Training and test images; prints their numbers, what was skipped, and why labels or scores are missing."""
    print(*data.notes, sep="\n", end="\n" if data.notes else "")
    train, test = splits = load_images(data, recipe)
    print_skipped(data, options.skip, {"train": train} if test is None else {"train": train, "test": test})
    scored = f", {len(test):,} to score on" if test is not None else ""
    classes = f", {len(train.classes)} classes (for scoring only)" if train.classes else ""
    print(f"{files.some(len(train), 'image')} to train on{scored}{classes}")

    # training images stand in for a test split without labels
    others = [name for name in data.splits() if name != "train"]
    if test is not None and test.pixels is train.pixels and data.holdout is None and others:
        print(f"no labels in {' or '.join(others)}: scoring on {files.some(len(test), 'training image')} instead")

    # why there will be no scores
    if train.unlabelled:
        print(f"no scores: {train.unlabelled}")
    if train.labels is not None and test is not None and test.labels is None:
        remedy = "--holdout 0.1 scores on some of the training images"
        print(f"no scores: {test.unlabelled or f'the test images have no labels; {remedy}'}")
    return splits


def warn_of_input(loaded: LoadedBackbone, images: Images, recipe: Recipe, device: torch.device) -> None:
    """Print a warning if weights that do not record mean and standard deviation seem to expect others."""
    if loaded.assumed_input and (flags := better_input(loaded.backbone.to(device), images, recipe, device=device)):
        reason = "the statistics of their first BatchNorm fit another mean or standard deviation"
        print(f"warning: these weights probably expect another normalisation ({reason}): try {flags}")


def print_skipped(data: Data, skip_list: Path | None, splits: Mapping[str, Images]) -> None:
    """Print how many images the list left out, its names that match no image, unreadable images and converted ones."""
    if skip_list is not None:
        names = {name for source in data.whole_splits.values() for name in source.paths}
        print(f"{files.some(len(data.skip & names), 'image')} skipped, as listed in {skip_list}")
        if unknown := sorted(data.skip - names):
            count, first = f"{len(unknown):,} of {len(data.skip):,}", files.quoted(unknown[0])
            print(f"{count} names in {skip_list} match no image in {data.title}, first {first}")
    for split, images in splits.items():
        for path, reason in images.skipped[:1]:
            count = f"{len(images.skipped):,} unreadable image{'s' if len(images.skipped) > 1 else ''}"
            example = f"first {files.quoted(path)}" if len(images.skipped) > 1 else files.quoted(path)
            print(f"left out {count} of {split}, {example}: {reason}")
    converted = sum((Counter(images.converted) for images in splits.values()), Counter[str]())
    print_conversions(converted, next((images.format for images in splits.values()), RGB))


def print_conversions(counts: Mapping[str, int], pixels: PixelFormat) -> None:
    """Print a sentence about each form of images that are not read as they are."""
    for sentence in conversions.sentences(counts, pixels):
        print(sentence)


def images_of_run(facts: Facts, *words: str) -> str:
    """The place of a run's images; MissingDataError if they moved, with `words`, the command to type."""
    if facts.data.startswith(in_memory.NAME):
        raise files.MissingDataError(f"the run was trained on {in_memory.NAME}: hand them over again, as data")
    if not is_name(facts.data) and not Path(facts.data).exists():
        raise files.MissingDataError(f"the run's images are not at {facts.data} any more: {messages.command(*words)}")
    return facts.data


def options_of_run(options: DataOptions, run: Path, facts: Facts) -> DataOptions:
    """The data options of a run; typed ones win."""
    recorded: dict[str, Any] = {"holdout": facts.holdout, "test_split": facts.test_split}
    recorded |= {"stack": facts.stack, "channels": facts.channels}
    recorded |= {"root": facts.root and Path(facts.root), "cache": facts.cache and Path(facts.cache)}
    recorded["skip"] = facts.skip and run / facts.skip
    if options.holdout is not None or options.test_split is not None:  # these two exclude each other
        recorded |= {"holdout": None, "test_split": None}
    return replace(options, **{name: value for name, value in recorded.items() if getattr(options, name) is None})


def options_of_own_images(options: DataOptions, name: str | Source, loaded: LoadedBackbone) -> DataOptions:
    """The data options of the weights' run, if DATA are its own images; typed ones win."""
    if loaded.run is None or loaded.facts is None or not are_own_images(name, options, loaded):
        return options
    recorded = options_of_run(options, loaded.run, loaded.facts)
    if changes := fields.difference(recorded, options):
        print(f"as in the run: {shlex.join(changes)}")
    return recorded


def are_own_images(name: str | Source, options: DataOptions, loaded: LoadedBackbone) -> bool:
    """True if DATA have the place that the weights' run recorded, or are its images moved.

    Moved ones have every name of the run's skip list and the same pixels: names alone say little, 000.png is
    everywhere. Without a skip list nothing depends on them.
    """
    run, facts = loaded.run, loaded.facts
    if run is None or facts is None:
        return False
    data = find_data(name, options)
    if data.place == Data(facts.data, Path(facts.root) if facts.root else None).place:
        return True
    listed = tables.read_names(run / facts.skip) if facts.skip is not None else frozenset()
    if not listed or not listed <= {path for source in data.whole_splits.values() for path in source.paths}:
        return False
    untyped = replace(options, holdout=None, test_split=None, skip=None)
    data, recipe = find_data(name, options_of_run(untyped, run, facts)), loaded.recipe
    train = load_images(data, recipe, progress=False).train
    return train.fingerprint == facts.fingerprint


def before(
    run: Path, splits: Splits, recipe: Recipe, facts: Facts, device: torch.device
) -> tuple[list[table.Contender], tuple[str, ...]]:
    """Starting weights of a run as a contender, and a remark if they are made for larger images; none if missing."""
    try:
        start = load_start(run)
    except (OSError, ValueError) as error:
        print(f"no scores of the weights before: {error}")
        return [], ()
    backbone = network.resized(start.backbone, recipe).to(device).to(memory_format=torch.channels_last)
    remarks: tuple[str, ...] = ()
    if facts.start is not None and start.recipe.test_side > recipe.test_side:
        words = [word.replace("--backbone.name", "--architecture") for word in facts.start.words]
        words = [word.replace("--backbone.small-stem", "--small-stem") for word in words]
        data = messages.from_here(facts.data)
        compare = messages.command("evaluate", str(run), data, "--against", facts.start.name, *words)
        sizes = f"at {recipe.test_side} px; the weights before are made for {start.recipe.test_side} px"
        remarks = (f"All scores are {sizes} and may score higher there: {compare}",)
    return [table.Contender(table.BEFORE, backbone, recipe, splits)], remarks


def print_scores(results: Results, out: Path | None) -> None:
    """Add the scores to the JSON file `out`, then print the table, its remarks and sentences."""
    if out is not None:
        run_folder.add_json(out, results.to_json())
    print(f"{table.as_text(results.table)}\n{table.LEGEND}\n")
    print(f"probes fitted on {results.train:,} labelled images, scored on {results.test:,} others")
    print("\n".join((*results.remarks, *results.sentences)))
    if out is not None:
        if results.keep_start and run_folder.start_path(out.parent).exists():
            print("export, embed and neighbors of this run use the weights of the start")
        print(f"scores: {out}")
