"""From what was seen of the images to what is wrong with them, in words, and to the list of those to leave out."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool

from corinfomax.doctor.inspect import Seen
from corinfomax.evaluation.similar import SURE, copies
from corinfomax.images.decode import LONGEST, too_many
from corinfomax.images.files import quoted
from corinfomax.recipes.fields import Recipe

TINY = 8  # pixels of the short side: less is an icon or an accident
LOPSIDED = 10  # times as many images in the largest class as in the smallest, from where on it is said
LARGE = 8  # times the median short side, from where on an image is called large
READ_AS = {
    "16-bit": "levels divided by 257",
    "animated": "only the first picture is taken",
    "with transparency": "laid over white",
    "floating point": "levels from 0 to 1, or to 255 if any is above 1",
}
"""What decoding makes of a kind that is not plain RGB or grey."""
HEADER = "# Images to leave out of "
SHOWN = 5  # examples of a finding


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to know about the images."""

    text: str
    grave: bool = False
    """Whether it has to be mended before training: it would stop it, or make its scores untrue."""
    skip: tuple[str, ...] = ()
    """Paths of the images to leave out for it."""
    perhaps: tuple[str, ...] = ()
    """Paths of images that may be left out, as the person likes."""


class Places:
    """The images of all splits in one row."""

    def __init__(self, parts: Sequence[Seen]) -> None:
        self.parts = parts
        self.paths = [path for part in parts for path in part.paths]
        self.part = [at for at, part in enumerate(parts) for _ in part.paths]
        self.labels = [label for part in parts for label in part.labels or [None] * len(part)]

    def split(self, row: int) -> str:
        return self.parts[self.part[row]].split


class Same(NamedTuple):
    """Which images are one picture, by rows in all splits together."""

    exact: list[list[int]]
    """Groups of two or more with the same pixels, ascending."""
    near: list[tuple[int, int]]
    """Other pairs, first of their exact groups, that are nearly the same, the lower row first."""
    whole: bool
    """Whether all images were compared for nearly the same."""
    members: dict[int, list[int]]
    """The whole group of each row that is the first of one."""


def same(parts: Sequence[Seen]) -> Same:
    """Compare every image with every other one, across splits; but for those of one colour, which show nothing."""
    groups: defaultdict[bytes, list[int]] = defaultdict(list)
    blank = np.concatenate([part.blank for part in parts]).tolist()
    for row, digest in enumerate(digest for part in parts for digest in part.digests):
        if not blank[row]:
            groups[digest].append(row)
    rows = torch.tensor([group[0] for group in groups.values()], dtype=torch.long)
    found = copies(torch.cat([part.squares for part in parts])[rows])
    exact = [group for group in groups.values() if len(group) > 1]
    pairs = sorted((min(a, b), max(a, b)) for a, b in rows[found.pairs].tolist())
    return Same(exact, pairs, found.whole, {group[0]: group for group in exact})


def findings(parts: Sequence[Seen], recipe: Recipe) -> list[Finding]:
    """All that is to be said of the splits of one data set, the first of them `train`; the grave first."""
    at, alike = Places(parts), same(parts)
    every = [
        *_unreadable(parts),
        *_leaks(at, alike),
        *_copies(at, alike),
        *_dull(parts),
        *_kinds(parts),
        *_sizes(parts, recipe),
        *_classes(parts),
    ]
    return sorted(every, key=lambda finding: not finding.grave)


def _unreadable(parts: Sequence[Seen]) -> Iterator[Finding]:
    for part in parts:
        if not part.unreadable:
            continue
        named = [f"{quoted(path)} ({quoted(reason)})" for path, reason in part.unreadable]
        count = len(part) + len(named)
        yield Finding(
            text=f"{_count(len(named), 'image')} of {count:,} in {part.split} cannot be read: {_some(named)}"
            + ("; training refuses more than 1 %" if too_many(len(named), count) else ""),
            grave=True,
            skip=tuple(path for path, _ in part.unreadable),
        )


def _leaks(at: Places, alike: Same) -> Iterator[Finding]:
    """Training images that another split has too; the copy in train is the one to leave out."""
    exact: dict[int, int] = {}  # row of a training image, and of the other
    for group in alike.exact:
        others = [row for row in group if at.part[row] > 0]
        exact |= {row: others[0] for row in group if others and at.part[row] == 0}
    near: dict[int, int] = {}
    for pair in alike.near:
        mine, theirs = (alike.members.get(row, [row]) for row in pair)
        for row, other in (*product(mine, theirs), *product(theirs, mine)):
            if at.part[row] == 0 < at.part[other] and row not in exact:
                near.setdefault(row, other)
    for leaked, how in ((exact, "also"), (near, "nearly")):
        if leaked:
            splits = sorted({at.split(row) for row in leaked.values()})
            yield Finding(
                text=f"{_count(len(leaked), 'training image')} {_are(leaked)} {how} in {' and '.join(splits)}, which "
                f"flatters scores there: {_pairs(at, leaked)}",
                grave=True,
                skip=tuple(at.paths[row] for row in sorted(leaked)),
            )


def _copies(at: Places, alike: Same) -> Iterator[Finding]:
    """Copies within a split, and among those that are not trained on."""
    for part, seen in enumerate(at.parts):
        inside = [[row for row in group if at.part[row] == part] for group in alike.exact]
        again = {row: group[0] for group in inside for row in group[1:]}
        if again:
            torn = sum(at.labels[row] != at.labels[first] for row, first in again.items())
            yield Finding(
                text=f"{_count(len(again), 'image')} of {seen.split} {_are(again)} exactly another one there: "
                f"{_pairs(at, again)}" + (f"; {torn:,} of them under another class" if torn else ""),
                skip=tuple(at.paths[row] for row in sorted(again)) if part == 0 else (),
            )
        close = {b: a for a, b in alike.near if at.part[a] == at.part[b] == part}
        if close:
            yield Finding(
                text=f"{_count(len(close), 'image')} of {seen.split} {_are(close)} nearly another one there (pixels "
                f"correlate by {SURE} or more, mirrored or not): {_pairs(at, close)}",
                perhaps=tuple(at.paths[row] for row in sorted(close)) if part == 0 else (),
            )
    apart = {b: a for a, b in alike.near if 0 < at.part[a] < at.part[b]}
    apart |= {row: group[0] for group in alike.exact for row in group if 0 < at.part[group[0]] < at.part[row]}
    if apart:
        yield Finding(text=f"{_count(len(apart), 'image')} {_are(apart)} in val and in test: {_pairs(at, apart)}")
    if not alike.whole:
        yield Finding(text="so many images resemble each other that not all were compared for near copies")


def _dull(parts: Sequence[Seen]) -> Iterator[Finding]:
    for part in parts:
        tiny = part.sizes.min(1) < TINY if len(part) else part.blank
        for which, what in ((part.blank, "of one colour"), (tiny & ~part.blank, f"less than {TINY} px high or wide")):
            if paths := _chosen(part.paths, which):
                yield Finding(
                    text=f"{_count(len(paths), 'image')} of {part.split} {_are(paths)} {what}: "
                    f"{_some([quoted(path) for path in paths])}",
                    skip=paths,
                )


def _kinds(parts: Sequence[Seen]) -> Iterator[Finding]:
    kinds = Counter(kind for part in parts for kind in part.kinds)
    total = sum(map(len, parts))
    for kind in sorted(kinds.keys() - {"", "grey"}):
        example = next(path for part in parts for path, its in zip(part.paths, part.kinds, strict=True) if its == kind)
        yield Finding(
            text=f"{kinds[kind]:,} of {total:,} images {_are(range(kinds[kind]))} {kind}, such as {quoted(example)}: "
            f"{READ_AS.get(kind, 'read as RGB')}"
        )
    grey = sum(int(part.grey.sum()) for part in parts)
    if 0 < grey == total:
        yield Finding(text="all images are grey: changing their hue and saturation does nothing")
    elif grey:
        example = next(path for part in parts for path in _chosen(part.paths, part.grey))
        files = f" ({kinds['grey']:,} of them in files without colours)" if kinds["grey"] else ""
        yield Finding(
            text=f"{grey:,} of {total:,} images {_are(range(grey))} grey among coloured ones{files}, "
            f"such as {quoted(example)}"
        )


def _sizes(parts: Sequence[Seen], recipe: Recipe) -> Iterator[Finding]:
    sizes = np.concatenate([part.sizes for part in parts])
    paths = [path for part in parts for path in part.paths]
    if not len(sizes):
        return
    short, long = sizes.min(1), sizes.max(1)
    usual = float(np.median(short))
    odd = (
        (long > LONGEST * short, f"over {LONGEST} times as long as wide, and only the middle is kept"),
        (
            (short < min(recipe.size, usual)) & (short >= TINY),
            f"smaller than the {recipe.size} px the network sees, so enlarged",
        ),
        (short > LARGE * usual, f"over {LARGE} times as large as most ({usual:.0f} px)"),
    )
    for which, what in odd:
        if named := _chosen(paths, which):
            yield Finding(text=f"{_count(len(named), 'image')} {_are(named)} {what}: {_some(list(map(quoted, named)))}")


def _classes(parts: Sequence[Seen]) -> Iterator[Finding]:
    train = Counter(parts[0].labels or ())
    if not train:
        return
    for part in parts[1:]:
        if unknown := sorted(set(part.labels or ()) - set(train)):
            yield Finding(
                text=f"{part.split} has {_count(len(unknown), 'class', 'classes')} that train has not: "
                f"{_some(list(map(quoted, unknown)))}; it cannot be scored on",
                grave=True,
            )
    (most, largest), (least, smallest) = train.most_common(1)[0], train.most_common()[-1]
    if largest > LOPSIDED * smallest:
        yield Finding(
            text=f"classes are uneven: {quoted(most)} has {_count(largest, 'training image')}, {quoted(least)} "
            f"{smallest:,}; scores count images, so they are mostly those of the large classes"
        )


class Channels(NamedTuple):
    """What to normalise with, in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def channels(part: Seen) -> Channels | None:
    """Mean and standard deviation of red, green and blue, every image counting the same; None where nothing varies."""
    mean, square = part.moments.mean(0) if len(part) else np.zeros((2, 3))
    red, green, blue = zip(mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0)).tolist(), strict=True)
    found = Channels((red[0], green[0], blue[0]), (red[1], green[1], blue[1]))
    return found if min(found.std) >= 5e-5 else None  # four digits are shown


def overview(part: Seen) -> str:
    """What there is: images, classes and sizes of a split."""
    text = f"{part.split}: {_count(len(part), 'image')}"
    if part.labels is not None:
        text += f" of {_count(len(set(part.labels)), 'class', 'classes')}"
    if not len(part):
        return text
    low, middle, high = np.quantile(part.sizes, (0, 0.5, 1), axis=0, method="nearest").tolist()
    if low == high:
        return f"{text}, {low[0]}×{low[1]} px"
    return f"{text}, {low[0]} to {high[0]} px wide and {low[1]} to {high[1]} high, medians {middle[0]} and {middle[1]}"


def check_out(out: Path, read: Path | None) -> None:
    """ValueError where `out` is a file that is no list of ours and not the list that was `read`."""
    if out.exists() and out != read:
        with out.open("rb") as file:
            if file.readline(len(HEADER)) != HEADER.encode():
                raise ValueError(f"{out} is there already and was not written by doctor; name another file with --out")


def place(out: Path, text: str) -> Path:
    """`out`, or that with a number where it has another text already, which somebody may have changed by hand."""
    for number in itertools.count(2):
        if not out.exists() or out.read_text("utf-8", errors="replace") == text:
            break
        out = out.with_stem(f"{out.stem.rpartition('-')[0] if number > 2 else out.stem}-{number}")
    return out


def skip_list(found: Sequence[Finding], data: str, before: Iterable[str] = ()) -> list[str] | None:
    """The lines of a list of images to leave out; None where there is none.

    `before` are the paths that an earlier list named. Copies that are not exact are in it as comments.
    """
    lines = [f"{HEADER}{quoted(data)}: corinfomax pretrain DATA --skip FILE; a path a line, # is a comment"]
    named: set[str] = set()

    def add(title: str, paths: Iterable[str], sign: str = "") -> None:
        fresh = [path for path in paths if path not in named]
        named.update(fresh)
        if fresh:
            lines.extend(["", f"# {title}", *(sign + quoted(path) for path in fresh)])

    add("from the list before", sorted(before))
    for finding in found:
        add(finding.text, finding.skip)
    for finding in found:
        add(f"{finding.text}; take away the # of those to leave out", finding.perhaps, "#")
    return lines if named else None


def _chosen(paths: Sequence[str], which: Bool[np.ndarray, " n"]) -> tuple[str, ...]:
    return tuple(paths[row] for row in np.flatnonzero(which).tolist())


def _pairs(at: Places, found: Mapping[int, int]) -> str:
    return _some([f"{quoted(at.paths[a])} = {quoted(at.paths[b])}" for a, b in sorted(found.items())])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _are(found: Sized) -> str:
    return "is" if len(found) == 1 else "are"
