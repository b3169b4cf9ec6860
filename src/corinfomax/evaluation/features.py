"""Images to feature vectors with a trained backbone, and the files they are kept in."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from corinfomax.evaluation import maps
from corinfomax.images.cache import Images
from corinfomax.network import arithmetic, ready
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import run_folder
from corinfomax.runtime.seeds import generator
from corinfomax.views import operations
from corinfomax.views.operations import Parameters


def features(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    crops: int = 0,
    batch: int = 512,
    progress: str | None = None,
) -> Float[Tensor, "n f"]:
    """What `model` makes of each image's centre view, in eval mode: float32 on the CPU, one row an image.

    `recipe` gives test size, mean, std and precision; `progress` names a progress bar. With `crops` a row is the mean
    over so many random crops instead, those of the recipe's first view, upright and in their own colours, at training's
    size; they follow from the recipe's seed and from `batch`. The model's mode is put back afterwards.
    """
    blocks = feature_blocks(model, images, recipe, device=device, crops=crops, batch=batch, progress=progress)
    return torch.cat(list(blocks))


def feature_blocks(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    crops: int = 0,
    batch: int = 512,
    progress: str | None = None,
) -> Iterator[Float[Tensor, "_ f"]]:
    """The rows of `features`, a batch at a time, so that they need never be in memory together."""
    device = torch.device(device)
    starts = tqdm(
        range(0, len(images), batch),
        desc=progress,
        unit="batch",
        leave=False,
        disable=True if progress is None else None,
    )
    for start in starts:
        indices = torch.arange(start, min(start + batch, len(images)))
        pixels, sizes = images.batch(indices)
        rng = generator(recipe.seed, "test crops", start)
        yield of_pixels(model, pixels, sizes, recipe, device, [_draw(recipe, sizes, rng) for _ in range(crops)])


def of_pixels(
    model: nn.Module,
    pixels: UInt8[Tensor, "n 3 h w"],
    sizes: Int[Tensor, "n 2"],
    recipe: Recipe,
    device: torch.device,
    crops: Sequence[Parameters] = (),
) -> Float[Tensor, "n f"]:
    """What `model` makes of the centre views of these images, or its mean over these crops, as `features` gives it."""
    was_training, norm = model.training, {"mean": recipe.mean, "std": recipe.std}
    pixels = pixels.to(device)
    model.eval()
    try:
        with torch.inference_mode(), arithmetic(recipe, device):
            if crops:
                seen = (operations.apply(pixels, sizes, crop, size=recipe.size, **norm) for crop in crops)
                return (sum(model(ready(x, model)).float() for x in seen) / len(crops)).cpu()
            x = operations.centre_view(pixels, sizes, size=recipe.test_side, **norm)
            return model(ready(x, model)).float().cpu()
    finally:
        model.train(was_training)


def _draw(recipe: Recipe, sizes: Int[Tensor, "n 2"], rng: torch.Generator) -> Parameters:
    """A crop as training's, without what it does to colours and edges, and upright."""
    plain = replace(recipe.views[0], rotate=0.0, jitter=0.0, grey=0.0, blur=0.0, solarize=0.0)
    return operations.draw(plain, sizes, rng)


ENDINGS = (".npz", ".parquet")


def check_ending(path: Path) -> None:
    """ValueError unless `write` can write to a file of that ending here."""
    if path.suffix not in ENDINGS:
        raise ValueError(f"{path.name} must end in {' or '.join(ENDINGS)}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError("Parquet needs pyarrow, the extra parquet: uv run --extra parquet corinfomax …")


def write(path: Path, vectors: Mapping[str, Float[Tensor, "_ f"]], parts: Mapping[str, Images]) -> None:
    """The vectors of one or more splits, by name, with their images' paths, and labels where all have them.

    Columns `split`, `path`, `features`, `x` and `y` (their first two principal components) and `label` (the class's
    name), as .npz without pickle, or as .parquet. Raises ValueError as `check_ending` does.
    """
    check_ending(path)
    features = torch.cat([vectors[name] for name in parts])
    x, y = maps.principal(features)[0].T.numpy()
    columns = {
        "split": np.repeat(list(parts), [len(part) for part in parts.values()]),
        "path": np.array([name for part in parts.values() for name in part.paths]),
        "x": x,
        "y": y,
    }
    if all(part.labels is not None for part in parts.values()):
        columns["label"] = np.concatenate(
            [np.array(part.classes)[part.labels.numpy()] for part in parts.values() if part.labels is not None]
        )
    run_folder.write_whole(path, lambda temporary: WRITERS[path.suffix](temporary, columns, features.numpy()))


def _write_npz(path: Path, columns: dict[str, np.ndarray], features: np.ndarray) -> None:
    with path.open("wb") as file:  # given a name, savez would append .npz to it
        np.savez(file, allow_pickle=False, features=features, **columns)


def _write_parquet(path: Path, columns: dict[str, np.ndarray], features: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    pq.write_table(
        pa.table({**{name: pa.array(column) for name, column in columns.items()}, "features": vectors}), path
    )


WRITERS = {".npz": _write_npz, ".parquet": _write_parquet}
