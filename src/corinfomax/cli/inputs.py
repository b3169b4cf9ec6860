"""Steps that the commands share: device, weights, images, and lines about what was read and skipped."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from corinfomax.cli.arguments import DataOptions, WeightsOptions
from corinfomax.evaluation import table
from corinfomax.images import cache, files
from corinfomax.images.cache import Images, Splits
from corinfomax.images.sources import Data
from corinfomax.recipes import fields, published
from corinfomax.recipes.fields import Recipe
from corinfomax.recipes.published import RECIPES
from corinfomax.runtime import memory, processes, run_folder
from corinfomax.runtime.records import Facts, Results
from corinfomax.weights.load import LoadedBackbone, load_backbone


def choose_device(name: str, *, gigabytes: float | None = None) -> torch.device:
    """The device of a command, tried out, and its limit of memory; numbers below 1e-38 are flushed to 0 from here on.

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


def load_weights(name: str, options: WeightsOptions, device: torch.device) -> LoadedBackbone:
    """The backbone of a run, a file or timm, on the device; prints what was loaded."""
    loaded = load_backbone(name, **vars(options))
    print(f"loaded {loaded.summary}")
    return loaded._replace(backbone=loaded.backbone.to(device).to(memory_format=torch.channels_last))


def find_data(name: str, options: DataOptions) -> Data:
    """The images of a command, with its options."""
    skip = frozenset() if options.skip is None else files.read_names(options.skip)
    return Data(name, options.root, options.download, skip, options.cache, options.holdout, options.test_split)


def load_all(
    weights: str, network: WeightsOptions, data: str, options: DataOptions
) -> tuple[torch.device, LoadedBackbone, dict[str, Images]]:
    """Device, backbone on it, and the images of every split; prints what was loaded and skipped."""
    device = choose_device(options.device, gigabytes=options.memory)
    loaded, source = load_weights(weights, network, device), find_data(data, options)
    splits = cache.load_every(source, side=loaded.recipe.cache_side, from_files=loaded.recipe.from_files)
    print_skipped(source, options.skip, splits)
    return device, loaded, splits


def load_splits(data: Data, recipe: Recipe, options: DataOptions) -> Splits:
    """Training and test images; prints their numbers, what was skipped, and why labels or scores are missing."""
    train, test = splits = cache.load(data, side=recipe.cache_side, from_files=recipe.from_files)
    print_skipped(data, options.skip, {"train": train} if test is None else {"train": train, "test": test})
    scored = f", {len(test):,} to score on" if test is not None else ""
    classes = f", {len(train.classes)} classes (for scoring only)" if train.classes else ""
    print(f"{len(train):,} images to train on{scored}{classes}")

    # training images stand in for a test split without labels
    others = [name for name in data.splits() if name != "train"]
    if test is not None and test.pixels is train.pixels and data.holdout is None and others:
        print(f"no labels in {' or '.join(others)}: scoring on {len(test):,} training images instead")

    # no labels, or no scores
    depths = [path.count("/") for path in train.paths]
    if train.labels is None and min(depths) < max(depths):
        loose = [path for path, depth in zip(train.paths, depths, strict=True) if depth == min(depths)]
        first = files.quoted(loose[0])
        print(f"no labels: {len(loose):,} of {len(depths):,} images lie beside the class folders, first {first}")
    if train.labels is not None and test is not None and test.labels is None:
        print("no scores: the test images have no labels; --holdout 0.1 scores on some of the training images")
    return splits


def print_skipped(data: Data, skip_list: Path | None, splits: Mapping[str, Images]) -> None:
    """Print how many images the list left out, its names that match no image, and unreadable images."""
    if skip_list is not None:
        names = {name for source in data.whole_splits.values() for name in source.paths}
        print(f"{len(data.skip & names):,} images skipped, as listed in {skip_list}")
        if unknown := sorted(data.skip - names):
            count, first = f"{len(unknown):,} of {len(data.skip):,}", files.quoted(unknown[0])
            print(f"{count} names in {skip_list} match no image in {data.name}, first {first}")
    for split, images in splits.items():
        for path, reason in images.skipped[:1]:
            count = f"{len(images.skipped):,} unreadable image{'s' if len(images.skipped) > 1 else ''}"
            print(f"left out {count} of {split}, first {files.quoted(path)}: {reason}")


def choose_recipe(
    name: str | None, data: Data | None, typed: Recipe, flags: Collection[str], device: torch.device
) -> tuple[str, Recipe]:
    """Name and recipe with the typed settings: the named one, or one for images and device, printed."""
    cuda, reason = device.type == "cuda", None
    if name is not None:
        base = published.find_recipe(name)
    elif data is not None:
        survey = data.survey()
        name, base, reason = published.choose(str(data.name), survey.images, survey.short_side, cuda=cuda)
    else:
        name = "cifar10" if cuda else "cpu-small"
        base, reason = RECIPES[name].recipe, f"{name}: {RECIPES[name].about}"

    recipe = fields.override(base, typed, flags & fields.flags(base).keys())
    if reason is not None:
        changes = fields.difference(recipe, base)
        print(f"recipe {reason}{f', with {shlex.join(changes)}' if changes else ''}; --recipe names another")
    return name, recipe


def fit_batch(recipe: Recipe, count: int) -> Recipe:
    """The recipe with a batch of at most all images."""
    if count >= recipe.batch:
        return recipe
    if count < 2:
        raise ValueError(f"{count} image is not enough to train on: a batch needs at least 2")
    print(f"batch {recipe.batch} is more than the {count} images: using batch {count}")
    return replace(recipe, batch=count)


def fit_cache(recipe: Recipe, data: Data) -> Recipe:
    """The recipe with cached images large enough for its views, as far as the files are."""
    largest = recipe.test_side if recipe.from_files else max(recipe.size, recipe.test_side)
    side = min(data.survey().short_side, largest * 8 // 7) if largest > recipe.cache_side else 0
    if side <= recipe.cache_side:
        return recipe
    print(f"views of {largest} px need cached images above {recipe.cache_side} px: using --cache-side {side}")
    return replace(recipe, cache_side=side)


def options_of_run(options: DataOptions, run: Path, facts: Facts) -> DataOptions:
    """The data options of a run; typed ones win."""
    recorded: dict[str, Any] = {"holdout": facts.holdout, "test_split": facts.test_split}
    recorded |= {"root": facts.root and Path(facts.root), "cache": facts.cache and Path(facts.cache)}
    recorded["skip"] = facts.skip and run / facts.skip
    if options.holdout is not None or options.test_split is not None:  # these two exclude each other
        recorded |= {"holdout": None, "test_split": None}
    return replace(options, **{name: value for name, value in recorded.items() if getattr(options, name) is None})


def print_scores(results: Results, out: Path | None) -> None:
    """Print the table and its sentences; add them to the JSON file `out`."""
    print(f"{table.as_text(results.table)}\n{table.LEGEND}\n")
    print(f"probes fitted on {results.train:,} labelled images, scored on {results.test:,} others")
    print("\n".join(results.sentences))
    if out is not None:
        run_folder.add_json(out, results.to_json())
        print(f"scores: {out}")
