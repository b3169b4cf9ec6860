"""The meaning of folder names: splits, classes, and folders that are not read."""

import itertools
import posixpath
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from corinfomax.images.files import DataError, Located, Unread, from_files, listed, no_images, quoted, scan, some

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
SPLIT_NAMES = {name: split for split, names in SPLITS.items() for name in names}
CONTENT = frozenset("set data dataset split image images imgs img photos pictures files folder jpeg jpg png".split())
"""Words that a split's name may hold beside the split, in one word or in several: trainset, test_images."""
BESIDE = frozenset(
    "dev eval extra gallery holdout inference mask masks annotation annotations labels pred predict prediction "
    "predictions query segmentation segmentations segmented thumbnails thumbs truth unlabeled unlabelled".split()
)
"""Words of folders that lie beside splits, and are neither splits nor classes."""

MOST_COMPARED = 50  # folders that are compared with each other
MOST_FILES = 1000  # of each, by their names


def from_folder(root: Path) -> Located:
    """Splits of an image folder: flat, nested, `<class>/…`, or `<split>/…` around any of these.

    Raises DataError when splits are not clear, MissingDataError without a training image.
    """
    unread = Unread()
    stamps = scan(root, unread=unread)
    layout = arrange(list(stamps), root)
    inside = {split: layout.start + (folder and f"{folder}/") for split, folder in layout.folders.items()}
    files = {split: [path for path in stamps if path.startswith(top)] for split, top in inside.items()}
    if not files["train"]:
        raise no_images(f"{root} or its folders", unread)

    # labels, and notes on ambiguous names
    empty = list(_empty_splits(root / layout.start, layout.start, list(stamps)))
    if layout.folders["train"] == "" and (trains := [place for place in empty if split_in(place.name) == "train"]):
        raise no_images(trains[0], unread)
    labels, notes = class_labels({split: [path[len(inside[split]) :] for path in files[split]] for split in files})
    sources = {
        split: from_files(root, {path: stamps[path] for path in paths}, labels[split]) for split, paths in files.items()
    }
    nothing = [f"{place.name} holds no images" for place in empty]
    return Located(sources, (*layout.notes, *notes, *nothing, *unread.notes()))


def _empty_splits(top: Path, start: str, paths: Sequence[str]) -> Iterator[Path]:
    """Folders called train, val or test, of any spelling, that hold no images."""
    for entry in sorted(top.iterdir()):
        inside = f"{start}{entry.name}/"
        if entry.name.lower() in SPLIT_NAMES and entry.is_dir() and not any(path.startswith(inside) for path in paths):
            yield entry


class Layout(NamedTuple):
    start: str  # the folders around all images, ending in a slash; empty without any
    folders: Mapping[str, str]  # folder of each split below `start`; {"train": ""} if all images are training images
    notes: tuple[str, ...]  # sentences about names that could mean something else, and about images that are left out


def split_in(name: str) -> str | None:
    """Split in the name of a folder or archive, such as train2017, seg_test or valImages; None without one.

    Raises DataError for a name with two.
    """
    splits = {split for word in _words(name) if (split := _split_of_word(word)) is not None}
    if len(splits) > 1:
        raise DataError(f"{name} names the splits {' and '.join(sorted(splits))}: rename it by its split alone")
    return next(iter(splits), None)


def _words(name: str) -> list[str]:
    """Words of a name in lower case: digits, punctuation and capitals part them."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def _split_of_word(word: str) -> str | None:
    for ending in ("", *CONTENT):
        if word.endswith(ending) and (split := SPLIT_NAMES.get(word[: len(word) - len(ending)])) is not None:
            return split
    return None


def rest_of(name: str) -> tuple[str, ...]:
    """Words of a split's name that say neither split nor content: those of seg_train are `seg`."""
    return tuple(word for word in _words(name) if _split_of_word(word) is None and word not in CONTENT)


def common_folder(paths: Sequence[str]) -> str:
    """The folders around all of the sorted paths, ending in a slash; empty without any."""
    if not paths:
        return ""
    # of sorted paths, what the first and the last share is shared by all
    folder = posixpath.commonpath([posixpath.dirname(path) for path in (paths[0], paths[-1])])
    return f"{folder}/" if folder else ""


def arrange(paths: Sequence[str], place: object) -> Layout:
    """The layout of images at the sorted `paths`, with forward slashes, in the folder or archive `place`.

    Splits are folders below the folders around all images. Raises DataError for splits that are not clear.
    """
    # down to a folder that is a split
    around = common_folder(paths).rstrip("/").split("/")
    outer = list(itertools.takewhile(lambda folder: folder and folder.lower() not in SPLIT_NAMES, around))
    start = "".join(f"{folder}/" for folder in outer)
    counts = Counter(path[len(start) :].partition("/")[0] if "/" in path[len(start) :] else "" for path in paths)
    loose = counts.pop("", 0)
    tops = sorted(counts)

    # which of the folders are splits
    named = {name: split for name in tops if (split := _split_or_none(name)) is not None}
    aside = [name for name in tops if name not in named and not BESIDE.isdisjoint(_words(name))]
    class_folders = [name for name in tops if name not in named and name not in aside]
    chosen = _choose_splits(named, class_folders, [path[len(start) :] for path in paths], place)
    if chosen is None:
        inside = [path[len(start) :] for path in paths]
        notes = [*_class_notes(named, aside, class_folders), *_nested_split_notes(inside), *_alike_notes(inside)]
        return Layout(start, {"train": ""}, tuple(notes))

    # what is said of them
    notes = []
    if renamed := [f"{name} as {split}" for split, name in chosen.items() if name.lower() not in SPLIT_NAMES]:
        notes.append(f"folders read as splits: {listed(renamed)}")
    unread = [name for name in tops if name not in chosen.values()]
    if unread or loose:
        images = sum(counts[name] for name in unread) + loose
        beside = [f"{loose:,} loose"] if loose else []
        names = listed([*unread, *beside], most=6)
        notes.append(f"not read: {names} ({some(images, 'image')}), beside {listed(sorted(chosen.values()))}")
    return Layout(start, chosen, tuple(notes))


def _split_or_none(name: str) -> str | None:
    try:
        return split_in(name)
    except DataError:  # a class may be called train-test
        return None


def _choose_splits(
    named: Mapping[str, str], class_folders: Sequence[str], paths: Sequence[str], place: object
) -> dict[str, str] | None:
    """Folder of each split; None if no folder is a split. `named` are folders with a split in their names."""
    plain = {name: split for name, split in named.items() if name.lower() in SPLIT_NAMES}
    trains = [name for name, split in plain.items() if split == "train"]
    if trains and (len(set(plain.values())) > 1 or _train_is_split(trains[0], class_folders, paths)):
        # plain names win over others: train/ over train_old/
        additional = {name: split for name, split in named.items() if split not in plain.values()}
        return _by_split(plain | additional, place)
    if trains or class_folders or not named:
        return None

    # every folder has a split in its name
    if "train" not in named.values():
        if len(named) == 1:
            return None  # one folder around everything
        advice = f"name one of them ({place}/{next(iter(named))}), or rename one to train"
        raise DataError(f"{place} has {listed(list(named))} and no training images: {advice}")
    if len({rest_of(name) for name in named}) > 1:
        names = listed(list(named))
        raise DataError(f"it is not clear which images of {place} to train on: {names}; name one, or rename them")
    return _by_split(named, place)


def _train_is_split(train: str, class_folders: Sequence[str], paths: Sequence[str]) -> bool:
    """True unless the folder `train`, without val or test beside it, looks like the `class_folders`: a class."""
    if not class_folders:
        return True
    inner = _inner_folders(paths)
    own, around = inner.get(train, set()), [inner[name] for name in class_folders if name in inner]
    return len(own) > 1 and (not around or any(own & folders for folders in around))


def _inner_folders(paths: Sequence[str]) -> dict[str, set[str]]:
    """The folders inside each top folder that has any."""
    inner: dict[str, set[str]] = {}
    for path in paths:
        top, _, below = path.partition("/")
        if "/" in below:
            inner.setdefault(top, set()).add(below.partition("/")[0])
    return inner


def _by_split(named: Mapping[str, str], place: object) -> dict[str, str]:
    folders: dict[str, str] = {}
    for name, split in sorted(named.items()):
        if split in folders:
            raise DataError(f"{place} has two folders for {split}: {folders[split]} and {name}; keep one")
        folders[split] = name
    return folders


def _class_notes(named: Mapping[str, str], aside: Sequence[str], class_folders: Sequence[str]) -> Iterator[str]:
    """Notes on folders whose names suggest that they are not classes."""
    doubtful, tops = sorted({*named, *aside}), sorted({*named, *aside, *class_folders})
    if not doubtful:
        return
    if len(tops) == 1:
        yield f"{tops[0]} is the only folder: its images are training images"
        return
    like = f", like {listed([name for name in tops if name not in doubtful], most=3)}" if class_folders else ""
    classes = "is read as a class" if len(doubtful) == 1 else "are read as classes"
    remedy = "if wrong, put the training images into a folder train, or name their folder"
    yield f"{listed(doubtful)} {classes}{like} ({remedy})"


def class_labels(splits: Mapping[str, Sequence[str]]) -> tuple[dict[str, tuple[str, ...] | None], list[str]]:
    """Class of each image from its sorted path below its split, for each split, and notes about missing ones.

    The class is the first folder below the folders around all training images, or around those of the split if training
    has no classes. A split has labels if each image has a class; a single class counts only if training has more.
    """
    training = _folders(splits["train"], common_folder(splits["train"]).count("/"))
    trained = len({*training} - {""}) > 1
    labels: dict[str, tuple[str, ...] | None] = {}
    notes: list[str] = []
    for split, paths in splits.items():
        depth = common_folder(splits["train"] if trained else paths).count("/")
        names = training if split == "train" else _folders(paths, depth)
        if trained and split != "train" and not {*names} <= {*training} - {""}:
            # its classes may lie at another depth than those of training
            nested = _folders(paths, common_folder(paths).count("/"))
            names = nested if {*nested} <= {*training} - {""} else names
        bare, classes = names.count(""), len({*names} - {""})
        several = classes > 1 or (trained and classes == 1 and split != "train")
        labels[split] = tuple(names) if several and not bare else None
        if classes and bare:
            lie, first = "lies" if bare == 1 else "lie", quoted(paths[names.index("")])
            place = f"{bare:,} of {len(names):,} images {lie} beside the class folders, first {first}"
            notes.append(f"no labels in {split}: {place}")
    return labels, notes


def _folders(paths: Sequence[str], depth: int) -> list[str]:
    """Folder of each path at this depth, empty for a path that ends above it."""
    parted = (path.split("/", depth + 1) for path in paths)
    return [sys.intern(names[depth]) if len(names) > depth + 1 else "" for names in parted]


def _alike_notes(paths: Sequence[str]) -> Iterator[str]:
    """A sentence about folders that are read as classes but look like several views of the same images."""
    folders = _inner_folders(paths)
    endings: dict[str, dict[str, str]] = {}  # of the files in each top folder, by their names without them
    for path in paths:
        top, _, below = path.partition("/")
        if below and "/" not in below and len(files := endings.setdefault(top, {})) < MOST_FILES:
            stem, ending = posixpath.splitext(below)
            files[stem] = ending.lower()
    tops = sorted({*folders, *endings})
    for a, b in itertools.combinations(tops[:MOST_COMPARED], 2):
        pair, common = f"{quoted(a)} and {quoted(b)}", folders.get(a, set()) & folders.get(b, set())
        stems = endings.get(a, {}).keys() & endings.get(b, {}).keys()
        if len(common) > 1:
            likeness = f"hold folders of the same names, such as {listed(sorted(common)[:2])}"
        elif len(stems) > 1 and all(endings[a][stem] != endings[b][stem] for stem in stems):
            likeness = f"hold files of the same names with other endings, such as {quoted(min(stems))}"
        else:
            continue
        yield f"{pair} {likeness}, but are read as classes: if wrong, name the folder to train on"
        return
    for top in sorted(folders):
        if len(copied := folders[top] & {*tops} - {top}) > 1:
            likeness = f"{quoted(top)} holds folders called like those beside it ({listed(sorted(copied)[:2])})"
            yield f"{likeness}, but is read as a class: if it is a copy, leave it out"
            return


def _nested_split_notes(paths: Sequence[str]) -> Iterator[str]:
    """A sentence about splits inside classes, <class>/<split>/…, which are not told apart."""
    for name, folders in sorted(_inner_folders(paths).items()):
        splits = sorted(folder for folder in folders if _split_or_none(folder))
        if len({_split_or_none(folder) for folder in splits}) > 1:
            meant = "all their images are used for training (put the split first: train/<class>/…)"
            yield f"{listed(splits)} in {quoted(name)} are not read as splits: {meant}"
            return  # one example tells all
