"""Findings: problems in the inspected images, as sentences, and the list of images to skip."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from corinfomax.checkup import symmetry
from corinfomax.checkup.inspect import Inspection
from corinfomax.evaluation.similar import MIN_CORRELATION, near_duplicates
from corinfomax.images import conversions
from corinfomax.images.decode import LONGEST, too_many
from corinfomax.images.files import quoted
from corinfomax.recipes.fields import RGB, Recipe

TINY = 8  # pixels of the short side: anything smaller is an icon or an accident
IMBALANCE = 10  # largest class ÷ smallest class
OVERSIZED = 8  # short side ÷ median short side
EXAMPLES = 5  # names in a finding
HEADER = "# Images to leave out of "  # marks a list that doctor may overwrite
IMAGE_OF = {"train": "training image", "val": "validation image", "test": "test image"}


class Finding(NamedTuple):
    """One fact to know about the images before training."""

    kind: str  # short name for code, such as `leak` or `near-duplicate`
    text: str
    must_fix: bool = False  # it would stop training or falsify scores
    skip: tuple[str, ...] = ()  # paths of images to leave out
    may_skip: tuple[str, ...] = ()  # paths that the user may want to leave out


class Catalogue:
    """All images of all splits, numbered from 0; the splits are `train`, `val` and `test`, as far as they exist."""

    def __init__(self, inspections: Sequence[Inspection]) -> None:
        self.split = [inspection.split for inspection in inspections for _ in inspection.paths]
        self.paths = [path for inspection in inspections for path in inspection.paths]
        self.labels = [label for split in inspections for label in split.labels or [None] * len(split.paths)]
        self.formats = [file_format for inspection in inspections for file_format in inspection.formats]
        self.sizes = np.concatenate([inspection.sizes for inspection in inspections])
        self.grey = np.concatenate([inspection.grey for inspection in inspections])

    def matches(self, groups: Iterable[Sequence[int]], split: str, targets: Sequence[str]) -> dict[int, int]:
        """Each row of `split` in a group -> the first row of that group in the splits `targets`, unless the same."""
        matches: dict[int, int] = {}
        for group in groups:
            first = next((row for row in group if self.split[row] in targets), None)
            if first is not None:
                matches |= {row: first for row in group if self.split[row] == split and row != first}
        return matches

    def list_pairs(self, pairs: Mapping[int, int], sign: str) -> str:
        return _list(f"{quoted(self.paths[a])} {sign} {quoted(self.paths[b])}" for a, b in sorted(pairs.items()))

    def training_paths(self, rows: Iterable[int]) -> tuple[str, ...]:
        return tuple(self.paths[row] for row in sorted(rows) if self.split[row] == "train")


def find_duplicates(inspections: Sequence[Inspection]) -> tuple[list[list[int]], list[tuple[int, int]], bool]:
    """Rows of images that occur more than once, in one or several splits; blank images are left out.

    First groups with the same pixels, ascending; then other similar pairs, lower row first, in which one row of each
    exact group stands for all; then False if the search for such pairs stopped early.
    """
    # exact: equal digests
    groups: dict[bytes, list[int]] = {}
    blank = np.concatenate([inspection.blank for inspection in inspections])
    for row, digest in enumerate(chain.from_iterable(inspection.digests for inspection in inspections)):
        if not blank[row]:
            groups.setdefault(digest, []).append(row)

    # near: similar thumbnails, one per exact group
    rows = torch.tensor([group[0] for group in groups.values()], dtype=torch.long)
    near = near_duplicates(_thumbnails(inspections, rows))
    pairs = sorted((min(a, b), max(a, b)) for a, b in rows[near.pairs].tolist())
    return [group for group in groups.values() if len(group) > 1], pairs, near.complete


def _thumbnails(inspections: Sequence[Inspection], rows: Int[Tensor, " n"]) -> UInt8[Tensor, "n 3 s s"]:
    """The thumbnails of ascending rows over all inspections, without a copy of all of them on the way."""
    thumbnails, start = torch.empty(len(rows), *inspections[0].thumbnails.shape[1:], dtype=torch.uint8), 0
    for inspection in inspections:
        stop = start + len(inspection.paths)
        low, high = torch.searchsorted(rows, torch.tensor([start, stop])).tolist()
        torch.index_select(inspection.thumbnails, 0, rows[low:high] - start, out=thumbnails[low:high])
        start = stop
    return thumbnails


def collect_findings(inspections: Sequence[Inspection], recipe: Recipe) -> list[Finding]:
    """All findings about the splits of one data set, `train` first; must-fix findings lead."""
    images = Catalogue(inspections)
    groups, pairs, complete = find_duplicates(inspections)
    findings = [*_unreadable(inspections), *_leaks(images, groups, pairs), *_repeats(images, groups, pairs)]
    if not complete:
        text = "too many images look alike to compare all pairs, so the list of near-duplicates is incomplete"
        findings.append(Finding("incomplete", text))
    findings += _without_content(inspections)
    findings += [*_odd_images(images, recipe), *_classes(inspections), *_symmetry(inspections[0], recipe)]
    return sorted(findings, key=lambda finding: not finding.must_fix)


def _unreadable(inspections: Sequence[Inspection]) -> Iterator[Finding]:
    for inspection in inspections:
        if unreadable := inspection.unreadable:
            count, total = len(unreadable), len(unreadable) + len(inspection.paths)
            effect = ", which stops training (limit 1 %)" if too_many(count, total) else " and will be ignored"
            subject = _count(count, IMAGE_OF[inspection.split], "cannot be read", of=total)
            reasons = _list(f"{quoted(path)} ({quoted(reason)})" for path, reason in unreadable)
            skip = tuple(path for path, _ in unreadable)
            yield Finding("unreadable", f"{subject}{effect}: {reasons}", must_fix=True, skip=skip)


def _leaks(images: Catalogue, groups: list[list[int]], pairs: list[tuple[int, int]]) -> Iterator[Finding]:
    """Training images that are also in another split; the training copy is the one to skip."""
    exact = images.matches(groups, "train", ("val", "test"))

    # exact copies of either near-duplicate leak too; of several matches the first counts
    group_of = {group[0]: group for group in groups}
    wider = (group_of.get(a, [a]) + group_of.get(b, [b]) for a, b in reversed(pairs))
    near = {row: match for row, match in images.matches(wider, "train", ("val", "test")).items() if row not in exact}

    relations = ("leak", exact, "is also in", "="), ("near-leak", near, "has a near-duplicate in", "≈")
    for kind, leaks, relation, sign in relations:
        if leaks:
            splits = sorted({images.split[row] for row in leaks.values()})
            subject = _count(len(leaks), "training image", f"{relation} {' and '.join(splits)}")
            scores = "its scores" if len(splits) == 1 else "their scores"
            text = f"{subject}, which inflates {scores}: {images.list_pairs(leaks, sign)}"
            yield Finding(kind, text, must_fix=True, skip=images.training_paths(leaks))


def _repeats(images: Catalogue, groups: list[list[int]], pairs: list[tuple[int, int]]) -> Iterator[Finding]:
    """Duplicates inside a split, or shared by val and test; only training images are worth skipping."""
    for split in dict.fromkeys(images.split):
        if exact := images.matches(groups, split, (split,)):
            conflicts = sum(images.labels[a] != images.labels[b] for a, b in exact.items())
            effect = "giving it extra weight" + (f" ({conflicts:,} under another class)" if conflicts else "")
            subject = _count(len(exact), IMAGE_OF[split], "exactly duplicates another one")
            text = f"{subject}, {effect}: {images.list_pairs(exact, '=')}"
            yield Finding("duplicate", text, skip=images.training_paths(exact))

        if near := images.matches(pairs, split, (split,)):
            subject = _count(len(near), IMAGE_OF[split], "nearly duplicates another one")
            measured = f"(pixel correlation of {MIN_CORRELATION} or more, mirrored or not)"
            text = f"{subject} {measured}; check if you need both: {images.list_pairs(near, '≈')}"
            yield Finding("near-duplicate", text, may_skip=images.training_paths(near))

    # images that are in train as well are leaks
    held_out = [group for group in groups if images.split[group[0]] != "train"]
    if shared := images.matches([*pairs, *held_out], "test", ("val",)):
        subject = _count(len(shared), "test image", "is also in val")
        text = f"{subject}, exactly or nearly, so the two scores are not independent: {images.list_pairs(shared, '≈')}"
        yield Finding("val-in-test", text)


def _without_content(inspections: Sequence[Inspection]) -> Iterator[Finding]:
    for inspection in inspections:
        paths, image = inspection.paths, IMAGE_OF[inspection.split]
        single_colour = "is blank (a single colour), with nothing to learn from"
        yield from _about("blank", image, single_colour, compress(paths, inspection.blank), skip=True)
        tiny = (inspection.sizes < TINY).any(1) & ~inspection.blank
        too_small = f"is under {TINY} px high or wide, too small to show anything"
        yield from _about("tiny", image, too_small, compress(paths, tiny), skip=True)


def _odd_images(images: Catalogue, recipe: Recipe) -> Iterator[Finding]:
    """Unusual formats, each with the effect of decoding and an example; grey images; unusual sizes."""
    total = len(images.paths)
    for file_format in sorted(set(images.formats) - {"", "grey"}):
        paths = list(compress(images.paths, [value == file_format for value in images.formats]))
        subject = _count(len(paths), "image", f"is {file_format}", of=total)
        effect = conversions.effect(file_format, recipe.pixels) or "converted to RGB"
        yield Finding("format", f"{subject}: {effect}, e.g. {quoted(paths[0])}")

    # grey, in any format
    paths = list(compress(images.paths, images.grey))
    if paths and len(paths) == total:
        yield Finding("grey", f"all {total:,} images are grey, so changes of hue and saturation do nothing")
    elif paths:
        files = images.formats.count("grey")
        stored = f" ({files:,} stored without colour)" if files else ""
        effect = f"so colour alone tells grey images from the rest, e.g. {quoted(paths[0])}"
        yield Finding("grey", f"{_count(len(paths), 'image', 'is grey', of=total)}{stored}, {effect}")

    # long, small for the network, large beside the rest
    short, long = images.sizes.min(1), images.sizes.max(1)
    median = float(np.median(short)) if total else 0.0
    stripe = f"is over {LONGEST} times as long as wide; only the middle is kept"
    yield from _about("long", "image", stripe, compress(images.paths, long > LONGEST * short))
    small = (short < min(recipe.size, median)) & (short >= TINY)
    enlarged = f"is smaller than the {recipe.size} px that the network sees; enlarging adds no detail"
    yield from _about("small", "image", enlarged, compress(images.paths, small))
    oversized = f"is over {OVERSIZED} times the usual size ({median:.0f} px), perhaps from another source"
    yield from _about("large", "image", oversized, compress(images.paths, short > OVERSIZED * median))


def _symmetry(train: Inspection, recipe: Recipe) -> Iterator[Finding]:
    parts = symmetry.adjustable(recipe)
    found = symmetry.of_thumbnails(train.thumbnails, recipe) if parts else None
    if found is not None and "flip" in parts and not found.mirrors:
        yield Finding("mirror", f"{found.mirror_seen}: pretrain will not mirror them")
    if found is not None and "rotate" in parts and found.turns:
        yield Finding("angle", f"{found.turn_seen}: pretrain will turn them")


def _classes(inspections: Sequence[Inspection]) -> Iterator[Finding]:
    train = Counter(inspections[0].labels or ())
    if not train:
        return

    # classes that no probe can learn
    for inspection in inspections[1:]:
        if unknown := sorted(set(inspection.labels or ()) - set(train)):
            subject = _count(len(unknown), f"{inspection.split} class", "has no training images")
            effect = f"so {inspection.split} cannot be scored; check the spelling"
            yield Finding("unknown-class", f"{subject}, {effect}: {_list(map(quoted, unknown))}", must_fix=True)

    # classes of very unequal size
    (most, largest), (least, smallest) = train.most_common(1)[0], train.most_common()[-1]
    if largest > IMBALANCE * smallest:
        sizes = f"{quoted(most)} has {_count(largest, 'training image')}, {quoted(least)} has {smallest:,}"
        yield Finding("uneven", f"classes are uneven: {sizes}; scores count images, so large classes dominate them")


def _about(kind: str, noun: str, predicate: str, paths: Iterable[str], *, skip: bool = False) -> Iterator[Finding]:
    """A finding about these images, if there are any."""
    if names := tuple(paths):
        text = f"{_count(len(names), noun, predicate)}: {_list(map(quoted, names))}"
        yield Finding(kind, text, skip=names if skip else ())


def colour_statistics(inspection: Inspection) -> dict[str, list[float]] | None:
    """The `mean` and `std` of red, green and blue, to normalise with; None if one does not vary.

    None too for other levels, of which a run measures them itself.
    """
    if inspection.pixels != RGB or not inspection.paths:
        return None
    mean, square = inspection.moments.mean(0)  # equal weight for each image
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return {"mean": mean.tolist(), "std": std.tolist()} if std.min() >= 5e-5 else None  # four digits are printed


def overview(inspection: Inspection) -> str:
    """Number of images, classes and sizes of a split, in one line."""
    text = f"{inspection.split}: {_count(len(inspection.paths), 'image')}"
    if inspection.labels is not None:
        text += f" in {_count(len(set(inspection.labels)), 'class')}"
    if not inspection.paths:
        return text

    low, median, high = np.quantile(inspection.sizes, (0, 0.5, 1), axis=0, method="nearest").tolist()
    if low == high:
        return f"{text}, {low[0]}×{low[1]} px"
    width, height = (f"{low[axis]} to {high[axis]} px" for axis in (0, 1))
    return f"{text}, {width} wide (median {median[0]}), {height} high (median {median[1]})"


def check_overwrite(path: Path, previous: Path | None) -> None:
    """Raise ValueError if `path` exists, was not written by doctor and is not the `previous` list to extend."""
    if path.exists() and path != previous and not path.read_bytes().startswith(HEADER.encode()):
        raise ValueError(f"{path} exists and was not written by doctor; choose another file with --out")


def unused_path(path: Path, text: str) -> Path:
    """`path`, or a numbered sibling if it holds another text, perhaps edited by hand."""
    stem, number = path.stem, 2
    while path.exists() and path.read_text("utf-8", errors="replace") != text:
        path, number = path.with_stem(f"{stem}-{number}"), number + 1
    return path


def skip_list(findings: Sequence[Finding], data: str, previous: Iterable[str] = ()) -> list[str] | None:
    """Lines of a list for `pretrain --skip`, the `previous` list first; None if there is nothing to skip."""
    # near-duplicates, for the user to decide, after all others: a path is listed once
    sections = [("from the previous list", sorted(previous), "")]
    sections += [(finding.text, list(finding.skip), "") for finding in findings]
    hint = "; delete the # before each image to skip"
    sections += [(finding.text + hint, list(finding.may_skip), "#") for finding in findings]

    usage = f"{HEADER}{quoted(data)}. Use it with: corinfomax pretrain DATA --skip FILE"
    lines = [usage, "# One path per line; lines that start with # are comments."]
    listed: set[str] = set()
    for title, paths, prefix in sections:
        if fresh := [path for path in paths if path not in listed]:
            listed.update(fresh)
            lines += ["", f"# {title}", *(prefix + quoted(path) for path in fresh)]
    return lines if listed else None


def _list(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:EXAMPLES]) + (f" and {len(names) - EXAMPLES:,} more" if len(names) > EXAMPLES else "")


def _count(number: int, noun: str, predicate: str = "", *, of: int | None = None) -> str:
    """Number, noun and predicate that agree: `1 class is new`, `2 classes are new`, `1 of 9 classes is new`."""
    if number != 1 or of is not None:
        noun += "es" if noun.endswith("s") else "s"
    if number != 1:
        plurals = {"is": "are", "has": "have", "duplicates": "duplicate"}
        predicate = re.sub(r"\b(is|has|duplicates)\b", lambda verb: plurals[verb[0]], predicate, count=1)
    return f"{number:,} {'' if of is None else f'of {of:,} '}{noun} {predicate}".rstrip()
