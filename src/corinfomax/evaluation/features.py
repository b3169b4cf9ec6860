"""Feature vectors of images from a trained backbone, and their files."""

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from corinfomax.evaluation import maps, similar
from corinfomax.images.cache import Images
from corinfomax.images.conversions import conversion
from corinfomax.images.decode import decode, map_images, padded
from corinfomax.images.files import DataError, Source
from corinfomax.images.readers import Opened
from corinfomax.network import autocast, evaluating, images_at_once, match_dtype
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import bars, extras, memory, run_folder
from corinfomax.views import operations
from corinfomax.views.cpu import Levels

BATCH = 512  # at most
MOST_NEIGHBOURED = 60_000  # images whose nearest neighbours are written: a minute on two cores
NEIGHBOURS, DIRECTIONS = 10, 128  # of each image; leading directions of the features that decide on them


def extract_features(
    model: nn.Module, images: Images, recipe: Recipe, *, device: torch.device | str = "cpu", progress: str | None = None
) -> Float[Tensor, "n f"]:
    """The output of `model` in eval mode for each image's centre view: float32 on the CPU, one row per image.

    `recipe` gives test size, mean, std and precision; `progress` names a progress bar. The model's mode is restored.
    """
    rows, filled = torch.empty(0, 0), 0
    for block in feature_blocks(model, images, recipe, device=device, progress=progress):
        if not filled:  # one tensor from the start: joining blocks would take twice the memory
            rows = block.new_empty(len(images), block.shape[1])
        rows[filled : filled + len(block)] = block
        filled += len(block)
    memory.give_back()
    return rows


def feature_blocks(
    model: nn.Module, images: Images, recipe: Recipe, *, device: torch.device | str = "cpu", progress: str | None = None
) -> Iterator[Float[Tensor, "_ f"]]:
    """The rows of `extract_features` a batch at a time, for sets larger than memory."""
    size = images_at_once(model, recipe, torch.device(device), side=recipe.test_side, most=BATCH)
    batches = torch.arange(len(images)).split(size)
    hidden = not (progress and bars.shown())
    for rows in bars.tqdm(batches, progress, unit="batch", leave=False, delay=1, disable=hidden):  # after a second
        pixels, sizes = images.batch(rows)
        yield features_of_pixels(model, pixels, sizes, recipe, torch.device(device))


def features_of_source(
    model: nn.Module, source: Source, recipe: Recipe, *, device: torch.device | str = "cpu"
) -> tuple[Float[Tensor, "n f"], Counter[str]]:
    """The rows of `extract_features` for images decoded on the way, without a cache, and their `conversion`s.

    Raises DataError for an unreadable image.
    """
    device, blocks, waiting = torch.device(device), list[Tensor](), list[np.ndarray]()
    converted = Counter[str]()

    def work(image: Opened) -> tuple[str, np.ndarray]:
        return conversion(image, recipe.pixels), decode(image, side=recipe.cache_side, pixels=recipe.pixels)

    size = images_at_once(model, recipe, device, side=recipe.test_side, most=BATCH)
    decoded = map_images(source, work, len(source.paths) > BATCH)
    with closing(decoded):
        for row, image in enumerate(decoded):
            if isinstance(image, str):
                raise DataError(f"{source.paths[row]} cannot be read: {image}")
            waiting.append(image[1])
            converted[image[0]] += 1
            if len(waiting) == size or row == len(source.paths) - 1:
                pixels, sizes = map(torch.from_numpy, padded(waiting))
                blocks.append(features_of_pixels(model, pixels, sizes, recipe, device))
                waiting = []
    memory.give_back()
    return torch.cat(blocks), converted


def features_of_pixels(
    model: nn.Module, pixels: Levels, sizes: Int[Tensor, "n 2"], recipe: Recipe, device: torch.device
) -> Float[Tensor, "n f"]:
    """The rows of `extract_features` for padded images of these heights and widths."""
    with evaluating(model), torch.inference_mode(), autocast(recipe, device):
        x = operations.test_view(pixels, sizes, recipe, device)
        return model(match_dtype(x, model)).float().cpu()


def as_utf8(name: str) -> str:
    """A file's name for Parquet, which takes UTF-8 alone: other bytes are spelt out, as \\xfc."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _class_of_each(images: Images) -> np.ndarray:
    """Name of each image's class; empty without labels."""
    if images.labels is None:
        return np.full(len(images), "")
    return np.array(images.classes)[images.labels.numpy()]


def check_ending(path: Path) -> None:
    """ValueError unless `write` can write a file with this ending."""
    if path.suffix not in (".npz", ".parquet"):
        raise ValueError(f"{path.name} must end in .npz or .parquet")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(extras.missing("Parquet", "pyarrow", extra="parquet"))


def write(
    path: Path,
    vectors: Mapping[str, Float[Tensor, "_ f"]],
    splits: Mapping[str, Images],
    thumbnails: Iterable[bytes] | None = None,
) -> None:
    """Write the vectors of one or more splits with their images' paths and labels.

    Columns are `split`, `path`, `features`, `x` and `y` (the first two principal components) and, if any split has
    labels, `label` (the name of the class, empty without one), as .npz without pickle or as .parquet. Parquet also has
    `neighbors`, rows and distances (1 − cosine) of the most similar images, for at most MOST_NEIGHBOURED images, and
    `thumbnail`: these files, one an image. Raises ValueError as `check_ending` does.
    """
    check_ending(path)
    features = next(iter(vectors.values())) if len(splits) == 1 else torch.cat([vectors[name] for name in splits])
    x, y = maps.principal(features)[0].T.numpy()
    split = np.repeat(list(splits), [len(images) for images in splits.values()])
    paths = np.array([name for images in splits.values() for name in images.paths])
    columns = {"split": split, "path": paths, "x": x, "y": y}
    if any(images.labels is not None for images in splits.values()):
        columns["label"] = np.concatenate([_class_of_each(images) for images in splits.values()])
    save = partial(_save_parquet, thumbnails=thumbnails) if path.suffix == ".parquet" else _save_npz
    run_folder.write_whole(path, lambda temporary: save(temporary, features, columns))


def _save_npz(path: Path, features: Float[Tensor, "n f"], columns: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # savez appends .npz to a name
        np.savez(file, allow_pickle=False, features=features.numpy(), **columns)


def _save_parquet(
    path: Path, features: Float[Tensor, "n f"], columns: Mapping[str, np.ndarray], thumbnails: Iterable[bytes] | None
) -> None:
    """A table as embedding-atlas and the `datasets` library read it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table: dict[str, Any] = dict(columns)
    for name in ("split", "path", "label"):
        if name in columns:
            table[name] = [*map(as_utf8, columns[name])]
    numbers = pa.array(features.numpy().reshape(-1))
    table["features"] = pa.FixedSizeListArray.from_arrays(numbers, features.shape[1])

    # the most similar images, by the leading directions
    if 1 < len(features) <= MOST_NEIGHBOURED:
        unit = maps.leading(similar.centred(features), dims=DIRECTIONS)
        nearest = similar.nearest_neighbours(unit, k=NEIGHBOURS)
        width = nearest.rows.shape[1]
        ids = pa.FixedSizeListArray.from_arrays(pa.array(nearest.rows.numpy().reshape(-1)), width)
        distances = pa.FixedSizeListArray.from_arrays(pa.array((1 - nearest.cosine).numpy().reshape(-1)), width)
        table["neighbors"] = pa.StructArray.from_arrays([ids, distances], ["ids", "distances"])

    # images as the hub has them: a file with its name
    metadata = {}
    if thumbnails is not None:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        files = zip(thumbnails, table["path"], strict=True)
        table["thumbnail"] = pa.array([{"bytes": file, "path": name} for file, name in files], kind)
        metadata["huggingface"] = json.dumps({"info": {"features": {"thumbnail": {"_type": "Image"}}}})
    pq.write_table(pa.table(table).replace_schema_metadata(metadata or None), path)
