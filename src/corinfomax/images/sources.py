"""DATA: images named by one argument, a folder, list, table, archive or named set."""

import difflib
import itertools
import statistics
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from corinfomax.images import files, levels, parquet, readers
from corinfomax.images.archives import PACKED, SUFFIXES, from_archives, shards_in
from corinfomax.images.decode import cores, map_images, too_many, try_image
from corinfomax.images.files import DataError, Located, MissingDataError, Source
from corinfomax.images.layout import from_folder
from corinfomax.images.levels import SetLevels
from corinfomax.images.named_sets import NAMED
from corinfomax.images.readers import Opened, StackAxis
from corinfomax.images.surveys import survey_once
from corinfomax.images.tables import from_list, from_table
from corinfomax.recipes.fields import PixelFormat
from corinfomax.runtime.records import Json

ROOT = Path("data")  # of the named sets


class Survey(NamedTuple):
    images: int
    short_side: int  # median over at most 64 images, in pixels
    levels: SetLevels = SetLevels()


@dataclass(frozen=True)
class Data:
    """One set of images: its name, skip list and cache, and the choice of images to test on.

    The name is a set in NAMED, `hf:` and a data set of the Hugging Face hub, a folder of images or archives, or a .txt
    list, .csv or .parquet table, .zip or .tar. A string that names a set always means the set; `./cifar10`, or a Path,
    means the folder. A Source is images in memory.
    """

    name: str | Path | Source
    root: Path | None = None  # folder of the named sets; ROOT by default
    download: bool = False  # let torchvision fetch CIFAR if it is missing
    skip: frozenset[str] = frozenset()  # images to leave out, by `Source.paths`; names of no image are ignored
    cache: Path | None = None  # folder of the cached images; `files.default_cache()` by default
    holdout: float | None = None  # share of the training images to test on instead of another split
    test_split: str | None = None  # split to test on; by default test, else val
    stack: StackAxis | None = None  # meaning of several planes in a file, where it does not record that
    channels: int | None = None  # of each image, where they can be read in several ways

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
        if isinstance(self.name, str) and self.name.startswith(parquet.HUB):
            located = parquet.from_hub(self.name)
        elif (place := Path(self.name).expanduser()).is_dir():
            located = _from_folder(place.resolve())
        elif place.is_file():
            located = _from_file(place.absolute())
        else:
            raise self._missing()
        splits = {name: with_planes(source, self.stack, self.cache) for name, source in located.splits.items()}
        return located._replace(splits=splits)

    def _missing(self) -> MissingDataError:
        close = difflib.get_close_matches(str(self.name), NAMED, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        sets = f"it is none of the named sets {', '.join(NAMED)}"
        return MissingDataError(f"no folder or file {str(self.name)!r} here, and {sets}{hint}")

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
        """Count, median short side and levels of the training images; raises DataError if none opens."""
        return self._surveyed

    @cached_property
    def _surveyed(self) -> Survey:
        """The survey, made once: where images are more than 8-bit RGB, all of them are read for their levels."""
        splits = self.splits()
        train = splits["train"]
        count = len(train.paths)
        rows = range(0, count, max(1, count // 64))[:64]
        results = [try_image(train, row, _side_and_depth) for row in rows]
        opened = [result for result in results if not isinstance(result, str)]
        if not opened:
            first = f"first {train.paths[0]}: {results[0]}"
            raise DataError(f"none of {files.some(len(rows), 'file')} in {train.root} opens as an image, {first}")
        side = int(statistics.median(side for side, _ in opened))
        if 2 * sum(deep for _, deep in opened) <= len(opened) and self.channels in (None, 3):
            return Survey(count, side)
        return Survey(count, side, self._measure_levels(list(splits.values())))

    def outside(self, pixels: PixelFormat) -> list[str]:
        """Sentences about levels that a format does not have, seen in at most 64 training images.

        Raises DataError if none of these has its channels.
        """
        train = self.splits()["train"]
        count = len(train.paths)
        look = partial(self._levels_of, channels=self.channels or pixels.channels)
        results = [try_image(train, row, look) for row in range(0, count, max(1, count // 64))[:64]]
        seen = [each for each in results if not isinstance(each, str)]
        if seen and not any(levels.fits(each.channels, each.colours, pixels) for each in seen):
            counts = sorted({each.channels for each in seen})
            channels = f"{files.listed(list(map(str, counts)))} channel{'' if counts == [1] else 's'}"
            problem = f"{self.title} has images of {channels}, and these weights read {pixels.channels}"
            raise DataError(f"{problem}: give other images, or pretrain on these")
        return levels.outside(seen, pixels)

    def _levels_of(self, image: Opened, sampled: int = 0, channels: int | None = None) -> levels.ImageLevels:
        channels = channels or self.channels
        if not isinstance(image, levels.Raster):
            image.load()
        return levels.image_levels(levels.as_raster(image, channels), channels, sampled)

    def _measure_levels(self, sources: list[Source]) -> SetLevels:
        """The levels of all images, each read once, at the first command."""

        def look() -> tuple[Json, bool]:
            count = sum(len(source.paths) for source in sources)
            sampled, every = levels.sampling(count)
            work = partial(self._levels_of, sampled=sampled)
            reads = (map_images(source, work, True, label="measuring levels") for source in sources)
            usable, seen = list[levels.ImageLevels](), Counter[int]()
            for image in itertools.chain.from_iterable(reads):
                if not isinstance(image, str):
                    kept = seen[image.channels] % every == 0
                    usable.append(image if kept else image._replace(sample=image.sample[:0].copy()))
                    seen[image.channels] += 1
            whole = not too_many(count - len(usable), count)
            if self.channels is not None:
                usable = [image for image in usable if image.channels == self.channels]
                if not usable:
                    problem = f"no image of {self.title} has {files.some(self.channels, 'channel')}"
                    have = f", but {files.listed(list(map(str, sorted(seen))))}" if seen else ""
                    raise DataError(f"{problem}{have}: leave out --channels")
            return levels.set_levels(usable).to_json(), whole

        question = f"levels {self.channels} {self.stack}"
        return SetLevels.from_json(survey_once(question, sources, self.cache, look))

    @property
    def absolute_name(self) -> str:
        """A name of the same images in any folder: that of the set, an absolute path, or in memory their digest."""
        if isinstance(self.name, Source) or is_name(str(self.name)):
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
        if is_name(str(self.name)):
            return str(self.name), (self.root or ROOT).resolve()
        return "", Path(self.name).expanduser().resolve()

    @property
    def absolute_root(self) -> Path | None:
        """Absolute folder of a named set; None for a path and for a set that comes with a package."""
        named = isinstance(self.name, str) and self.name in NAMED and self.name != "mnist5k"
        return (self.root or ROOT).absolute() if named else None


def is_name(name: str) -> bool:
    """True for the name of a set, which is no path."""
    return name in NAMED or name.startswith(parquet.HUB)


def _side_and_depth(image: Opened) -> tuple[int, bool]:
    """Short side of an opened image, and whether it is more than 8-bit RGB."""
    side = min(image.values.shape[:2]) if isinstance(image, levels.Raster) else min(image.size)
    return side, levels.is_deep(image)


def with_planes(source: Source, stack: StackAxis | None, cache: Path | None = None) -> Source:
    """The source with a row for each image in files that hold several; DataError where that is not clear."""
    source = replace(source, stack=stack)
    named = [row for row, path in enumerate(source.paths) if files.may_hold_several(path)]
    rows = named if source.array is None else list(range(len(source.paths)))
    if not rows:
        return source

    def count(row: int) -> int | DataError:
        try:
            return readers.planes(source.content(row), stack)
        except DataError as error:
            return error
        except Exception:  # unreadable: decoding says why
            return 1

    def is_stack(row: int) -> bool:
        try:
            return readers.may_be_stack(source.content(row))
        except (DataError, OSError):  # unreadable: decoding says why
            return False

    def look() -> tuple[list[int], bool]:
        # in tables, where names do not tell, some cells stand for all; a stack among others is unreadable
        if source.array is not None and not any(map(is_stack, rows[:: max(1, len(rows) // 64)][:64])):
            return [1], True
        with ThreadPoolExecutor(cores()) as pool:
            counts = list(pool.map(count, rows))
        for row, number in zip(rows, counts, strict=True):
            if isinstance(number, readers.UnclearError):
                raise readers.UnclearError(f"{source.paths[row]} in {source.root}: {number}")
        numbers = [1 if isinstance(number, DataError) else number for number in counts]
        return numbers, numbers == counts  # not kept if a library is missing, which may be installed

    found = survey_once(f"planes {stack}", [source], cache, look)
    if max(found) == 1:
        return source
    counts = dict(zip(rows, found, strict=True))

    # one row an image
    numbers = [(row, plane) for row in range(len(source.paths)) for plane in range(counts.get(row, 1))]
    several = {row for row, number in counts.items() if number > 1}
    expanded = source.take([row for row, _ in numbers])
    planes = tuple(plane if row in several else None for row, plane in numbers)
    paths = tuple(source.paths[row] + (f"#{plane}" if row in several else "") for row, plane in numbers)
    return replace(expanded, paths=paths, planes=planes)


def _from_file(place: Path) -> Located:
    suffix = place.suffix.lower()
    if suffix in SUFFIXES:
        return from_archives(place.parent, [place])
    if suffix == parquet.ENDING:
        return parquet.from_parquet(place)
    if suffix in (".txt", ".csv", ".tsv"):
        return from_list(place) if suffix == ".txt" else from_table(place)
    if place.name.lower().endswith(PACKED):
        raise DataError(f"images in {place} cannot be read in place; unpack it, or make it a .tar or .zip")
    kinds = "a list of images (.txt), a table (.csv, .tsv, .parquet) or an archive (.zip, .tar)"
    raise DataError(f"{place} is not {kinds}: give one of those, or a folder")


def _from_folder(place: Path) -> Located:
    """The images in a folder, or in the archives in it if there are no others."""
    if parquet.is_saved(place):
        return parquet.from_saved(place)
    shards = shards_in(place)
    try:
        located = from_folder(place)
    except MissingDataError:
        if shards:
            return from_archives(place, shards)
        if any(place.rglob(f"*{parquet.ENDING}")):
            return parquet.from_parquet(place)
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
