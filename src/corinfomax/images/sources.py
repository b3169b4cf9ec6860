"""DATA: images named by one argument, a folder, list, table, archive or named set."""

import difflib
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from corinfomax.images.archives import PACKED, SUFFIXES, from_archives, shards_in
from corinfomax.images.decode import Levels, deep_levels, join_levels, lost_range, try_image
from corinfomax.images.files import DataError, Located, MissingDataError, Source
from corinfomax.images.layout import from_folder
from corinfomax.images.named_sets import NAMED
from corinfomax.images.tables import from_list, from_table

ROOT = Path("data")  # of the named sets


class Survey(NamedTuple):
    images: int
    short_side: int  # median over at most 64 images, in pixels
    lost: str | None = None  # levels of images with more than 8 bits that are not read, as a sentence


@dataclass(frozen=True)
class Data:
    """One set of images: its name, skip list and cache, and the choice of images to test on.

    The name is a set in NAMED, a folder of images or archives, or a .txt list, .csv table, .zip or .tar. A string that
    names a set always means the set; `./cifar10`, or a Path, means the folder. A Source is images in memory.
    """

    name: str | Path | Source
    root: Path | None = None  # folder of the named sets; ROOT by default
    download: bool = False  # let torchvision fetch CIFAR if it is missing
    skip: frozenset[str] = frozenset()  # images to leave out, by `Source.paths`; names of no image are ignored
    cache: Path | None = None  # folder of the cached images; `files.default_cache()` by default
    holdout: float | None = None  # share of the training images to test on instead of another split
    test_split: str | None = None  # split to test on; by default test, else val

    def __post_init__(self) -> None:
        if self.holdout is not None and not 0 <= self.holdout < 1:
            raise ValueError(f"holdout is {self.holdout}; it is a share of the training images, at least 0 and below 1")
        if self.holdout and self.test_split:
            choices = f"holdout {self.holdout} and test_split {self.test_split!r}"
            raise ValueError(f"{choices} exclude each other: give one of them")

    def splits(self) -> dict[str, Source]:
        """Splits by name without the skipped images: train always, val and test if they have images.

        Raises MissingDataError if nothing has this name, DataError if the data cannot be used.
        """
        sources = {name: source.without(self.skip) for name, source in self.whole_splits.items()}
        if sources["train"] is None:
            raise DataError(f"every training image of {self.name} is in the list to leave out; shorten it")
        return {name: source for name, source in sources.items() if source is not None}

    @property
    def whole_splits(self) -> dict[str, Source]:
        """Splits by name with all their images, also those in `skip`."""
        return self._located.splits

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about names that could mean something else, and about files and folders that are not read."""
        return self._located.notes

    @cached_property
    def _located(self) -> Located:
        """The splits, located once."""
        if isinstance(self.name, Source):
            return Located({"train": self.name})
        if isinstance(self.name, str) and self.name in NAMED:
            return Located(NAMED[self.name](self.name, self.root or ROOT, self.download))
        place = Path(self.name).expanduser()
        if place.is_dir():
            return _from_folder(place.resolve())
        if place.is_file():
            return _from_file(place.absolute())
        close = difflib.get_close_matches(str(self.name), NAMED, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        sets = f"it is none of the named sets {', '.join(NAMED)}"
        raise MissingDataError(f"no folder or file {str(self.name)!r} here, and {sets}{hint}")

    @property
    def test_name(self) -> str | None:
        """Split to test on: `test_split`, else test, else val; None if there is none.

        Without `test_split`, labelled training images need a labelled split. With `holdout` above 0 there is none.
        """
        if self.holdout:
            return None
        splits = self.splits()
        train = splits.pop("train")
        if self.test_split is not None and self.test_split not in splits:
            have = f"it has {', '.join(splits)}" if splits else "it has only train; holdout sets a share of it aside"
            raise DataError(f"{self.name} has no split {self.test_split!r} to test on: {have}")
        usable = (name for name, source in splits.items() if train.labels is None or source.labels is not None)
        return self.test_split or min(usable, default=None)  # test comes before val

    def survey(self) -> Survey:
        """Count and median short side of the training images; raises DataError if none opens."""
        train = self.splits()["train"]
        count = len(train.paths)
        rows = range(0, count, max(1, count // 64))[:64]
        results = [try_image(train, row, _side_and_levels) for row in rows]
        opened = [result for result in results if not isinstance(result, str)]
        if not opened:
            raise DataError(f"none of {len(rows)} files in {train.root} opens as an image, first {train.paths[0]}")
        side = int(statistics.median(side for side, _ in opened))
        deep = join_levels([levels for _, levels in opened])
        return Survey(count, side, next(filter(None, map(lost_range, deep)), None))

    @property
    def absolute_name(self) -> str:
        """A name of the same images in any folder: that of the set, an absolute path, or in memory their digest."""
        if isinstance(self.name, Source) or self.name in NAMED:
            return self.title
        return str(Path(self.name).expanduser().absolute())

    @property
    def title(self) -> str:
        """The images in messages: their name as it was given."""
        return self.name.root if isinstance(self.name, Source) else str(self.name)

    @property
    def place(self) -> tuple[str, Path]:
        """The set and its folder, or the resolved path: equal for two Data of the same images."""
        if isinstance(self.name, Source):
            return self.name.root, Path()
        if self.name in NAMED:
            return str(self.name), (self.root or ROOT).resolve()
        return "", Path(self.name).expanduser().resolve()

    @property
    def absolute_root(self) -> Path | None:
        """Absolute folder of a named set; None for a path and for a set that comes with a package."""
        named = isinstance(self.name, str) and self.name in NAMED and self.name != "mnist5k"
        return (self.root or ROOT).absolute() if named else None


def _side_and_levels(image: Image.Image) -> tuple[int, Levels | None]:
    """Short side of an opened image; only those of more than 8 bits are decoded."""
    side = min(image.size)
    if image.mode.startswith(("I", "F")):
        image.load()
    return side, deep_levels(image)


def _from_file(place: Path) -> Located:
    suffix = place.suffix.lower()
    if suffix in SUFFIXES:
        return from_archives(place.parent, [place])
    if suffix in (".txt", ".csv", ".tsv"):
        return from_list(place) if suffix == ".txt" else from_table(place)
    if place.name.lower().endswith(PACKED):
        raise DataError(f"images in {place} cannot be read in place; unpack it, or make it a .tar or .zip")
    kinds = "a list of images (.txt), a table (.csv, .tsv) or an archive (.zip, .tar)"
    raise DataError(f"{place} is not {kinds}: give one of those, or a folder")


def _from_folder(place: Path) -> Located:
    """The images in a folder, or in the archives in it if there are no others."""
    shards = shards_in(place)
    try:
        located = from_folder(place)
    except MissingDataError:
        if shards:
            return from_archives(place, shards)
        folders = sorted(path for path in place.iterdir() if path.is_dir())
        if inner := [path for folder in folders for path in shards_in(folder)]:
            remedy = "put them into one folder, each named by its split (train-0001.tar)"
            raise DataError(f"no image in {place}, but archives in its folders, first {inner[0]}: {remedy}") from None
        raise

    # One archive beside its unpacked content is common; as many archives as images are not clear.
    count = sum(len(source.paths) for source in located.splits.values())
    if len(shards) >= count:
        holds = f"{count:,} images and also {len(shards):,} archives, first {shards[0].name}"
        raise DataError(f"{place} holds {holds}: move the unwanted ones elsewhere, or name the archive")
    return located
