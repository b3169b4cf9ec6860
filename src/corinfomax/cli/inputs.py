"""What commands are given: the images that they name, where those lie, and where to compute."""

from __future__ import annotations

import dataclasses
import platform
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

from corinfomax import __version__
from corinfomax.cli.options import Network, Where
from corinfomax.images import cache as images
from corinfomax.images import files, sources
from corinfomax.images.cache import Images, Splits
from corinfomax.recipes import fields
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import processes
from corinfomax.weights import load as weights
from corinfomax.weights.load import Weights

SKIPPED = "skip.txt"
"""The list of images to leave out: what doctor writes unless told where, and a run's own copy in its folder."""


def device_of(name: str) -> torch.device:
    """Where a command computes; and how: numbers below 1e-38 are 0 from here on, in threads that start later too.

    The momentum of a unit that died shrinks down to there, where a processor is many times slower: steps of Muon took
    up to five times as long. And float32 is float32: cuDNN's convolutions would round to TF32's 10 bits.
    """
    torch.set_flush_denormal(True)
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = processes.own(torch.device(name))
        # A kernel has to run: a driver may know a GPU that torch is not made for.
        torch.ones(1, device=device).add(1).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot compute on device {name!r}: {reason}") from error
    return device


def weights_of(name: str, network: Network, device: torch.device) -> Weights:
    """The backbone that a run, a file of weights or timm holds, on the device, with a word on what it is."""
    given = weights.load(name, **vars(network))
    print(f"loaded {given.said}")
    return given._replace(backbone=given.backbone.to(device).to(memory_format=torch.channels_last))


def load(data: str, where: Where, recipe: Recipe) -> Splits:
    splits = splits_of(data, where, recipe)
    tell_left_out(data, where)
    for name, split in zip(("train", "test"), splits, strict=True):
        if split is not None:
            _tell_skipped(name, split)
    test = f", {len(splits.test):,} to score on" if splits.test is not None else ""
    classes = f", {len(splits.train.classes)} classes (for scoring only)" if splits.train.classes else ""
    print(f"{len(splits.train):,} images to train on{test}{classes}")
    drawn = splits.test is not None and splits.test.pixels is splits.train.pixels
    if drawn and where.holdout is None:
        others = [name for name in sources.find(data, root=where.root, cache=where.cache) if name != "train"]
        if others:
            print(
                f"no labels in {' or '.join(others)}: {len(splits.test or ()):,} training images are scored on instead"
            )
    depths = [path.count("/") for path in splits.train.paths]
    if splits.train.labels is None and (least := min(depths)) < max(depths):
        beside = [path for path, depth in zip(splits.train.paths, depths, strict=True) if depth == least]
        print(
            f"no labels: {len(beside):,} of {len(depths):,} images lie beside the folders, not in one, first "
            f"{files.quoted(beside[0])}"
        )
    if splits.train.labels is not None and splits.test is not None and splits.test.labels is None:
        print("no scores: the images to score on have no labels; --holdout 0.1 scores on some of the training images")
    return splits


def splits_of(data: str, where: Where, recipe: Recipe) -> Splits:
    return images.load(
        data,
        side=recipe.cache_side,
        copies=not recipe.from_files,
        holdout=where.holdout,
        root=where.root,
        download=where.download,
        cache=where.cache,
        test_split=where.test_split,
        skip=left_out(where),
    )


def every(data: str, where: Where, recipe: Recipe) -> dict[str, Images]:
    """Every split, with a word on what was left out."""
    parts = images.load_every(
        data,
        side=recipe.cache_side,
        copies=not recipe.from_files,
        root=where.root,
        download=where.download,
        cache=where.cache,
        skip=left_out(where),
    )
    tell_left_out(data, where)
    for name, part in parts.items():
        _tell_skipped(name, part)
    return parts


def left_out(where: Where) -> frozenset[str]:
    """The paths that --skip names."""
    return frozenset() if where.skip is None else files.read_names(where.skip)


def tell_left_out(data: str, where: Where) -> None:
    """How many images --skip left out, and which of its names are none of the data's."""
    if where.skip is None:
        return
    names = left_out(where)
    there = {
        path for source in sources.find(data, root=where.root, cache=where.cache).values() for path in source.paths
    }
    print(f"{len(names & there):,} images left out, as {where.skip} says")
    if unknown := sorted(names - there):
        print(
            f"{len(unknown):,} of the {len(names):,} names in {where.skip} are of no image in {data}, first "
            f"{files.quoted(unknown[0])}; paths start from the folder that DATA names"
        )


def _tell_skipped(name: str, split: Images) -> None:
    if split.skipped:
        path, reason = split.skipped[0]
        count, which = len(split.skipped), "image" if len(split.skipped) == 1 else "images"
        print(f"{count} unreadable {which} left out of {name}, such as {files.quoted(path)}: {reason}")


def fit_batch(recipe: Recipe, count: int) -> Recipe:
    if count >= recipe.batch:
        return recipe
    if count < 2:
        raise ValueError(f"{count} image is not enough to train on: a batch needs at least 2")
    print(f"batch {recipe.batch} is more than the {count} images: batch {count}")
    return replace(recipe, batch=count)


def fit_copies(recipe: Recipe, data: str, where: Where) -> Recipe:
    """The recipe with cached copies large enough for its views, where the images are."""
    largest = recipe.test_side if recipe.from_files else max(recipe.size, recipe.test_side)
    if largest <= recipe.cache_side:
        return recipe
    survey = sources.survey(data, root=where.root, download=where.download, skip=left_out(where), cache=where.cache)
    side = min(survey.short_side, largest * 8 // 7)
    if side <= recipe.cache_side:
        return recipe
    what = "images to look at" if recipe.from_files else "copies"
    print(f"views of {largest} px need larger {what} than of {recipe.cache_side} px: --cache-side {side}")
    return replace(recipe, cache_side=side)


def chosen(why: str, base: Recipe, recipe: Recipe) -> str:
    """What is said of a recipe that was chosen, with the knobs that were typed over it."""
    words = fields.typed(recipe, base)
    return f"recipe {why}{f', but for {shlex.join(words)}' if words else ''}; --recipe names another"


def where_it_was(where: Where, run: Path, facts: dict[str, Any]) -> Where:
    """Where a run found its images, which it left out and which it tested on; what is typed now comes first."""
    root, cache = (
        given or (None if facts[name] is None else Path(facts[name]))
        for name, given in (("root", where.root), ("cache", where.cache))
    )
    return replace(
        where,
        root=root,
        cache=cache,
        holdout=facts["holdout"] if where.holdout is None else where.holdout,
        test_split=facts["test_split"] if where.test_split is None else where.test_split,
        skip=where.skip or (run / facts["skip"] if facts.get("skip") else None),
    )


def typed_where(where: Where) -> list[str]:
    """What was typed about the images and the device, but for the list to skip, as words of a command."""
    words = []
    for field in dataclasses.fields(where):
        value = getattr(where, field.name)
        if field.name == "skip" or value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        words.append(flag if value is True else f"{flag} {shlex.quote(str(value))}")
    return words


def versions() -> dict[str, str]:
    return {
        "corinfomax": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
