"""Which images of a set are most like a given picture: exact, one pass, only the best kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from corinfomax.evaluation import features, similar
from corinfomax.images.cache import Images
from corinfomax.images.decode import FORMATS, decode
from corinfomax.images.files import DataError
from corinfomax.recipes.fields import Recipe
from corinfomax.report import page, pictures
from corinfomax.runtime.seeds import generator

CENTRE = 10_000  # images whose mean feature is the origin of the cosines
PICTURE = 160  # pixels of the long side on the page


class Found(NamedTuple):
    """The images most like one picture, most similar first."""

    query: Path
    rows: list[int]
    """Places in the pool of all splits."""
    cosine: list[float]


def search(
    backbone: nn.Module,
    pool: pictures.Pool,
    recipe: Recipe,
    queries: Sequence[Path],
    *,
    k: int = 12,
    device: torch.device | str = "cpu",
    batch: int = 512,
) -> list[Found]:
    """The `k` images of the pool most similar to each picture in `queries`: cosine of backbone features, exact.

    Cosines are about the mean feature of the pool, or of 10,000 of its images drawn evenly where there are more: about
    the origin all images are alike. Beside that only the k best of each query are kept, however many images there are.
    Raises DataError for a picture that cannot be read.
    """
    asked = _query_features(backbone, queries, recipe, device)
    some = pictures.pool(
        dict(zip(pool.splits, pool.parts, strict=True)), most=CENTRE, generator=generator(0, "centre of neighbours")
    )
    centre = torch.cat([features.features(backbone, part, recipe, device=device, batch=batch) for part in some.parts])
    origin = centre.mean(0)
    blocks = (
        F.normalize(block - origin, dim=1)
        for name, part in zip(pool.splits, pool.parts, strict=True)
        for block in features.feature_blocks(
            backbone, part, recipe, device=device, batch=batch, progress=f"looking through {name}"
        )
    )
    near = similar.best_of(F.normalize(asked - origin, dim=1), blocks, k=k)
    return [
        Found(query, rows, cosine)
        for query, rows, cosine in zip(queries, near.rows.tolist(), near.cosine.tolist(), strict=True)
    ]


def _query_features(
    backbone: nn.Module, queries: Sequence[Path], recipe: Recipe, device: torch.device | str
) -> Float[Tensor, "q f"]:
    """One picture at a time, so that sizes may differ; decoded and cut as the images of the set are."""
    rows = []
    for query in queries:
        pixels = torch.from_numpy(_read(query, recipe.cache_side))[None]
        sizes = torch.tensor([pixels.shape[2:]])
        rows.append(features.of_pixels(backbone, pixels, sizes, recipe, torch.device(device)))
    return torch.cat(rows)


def _read(query: Path, side: int) -> np.ndarray:
    try:
        with Image.open(query, formats=FORMATS) as image:
            return np.ascontiguousarray(decode(image, side))
    except FileNotFoundError:
        raise DataError(f"no picture at {query}") from None
    except Exception as error:  # a malformed file makes Pillow's parsers raise nearly anything
        raise DataError(f"{query} cannot be read as an image: {error}") from error


def pool_of(parts: dict[str, Images]) -> pictures.Pool:
    """All images of all splits in one row."""
    return pictures.Pool(tuple(parts), tuple(parts.values()))


def as_text(found: Found, pool: pictures.Pool) -> str:
    """A line an image: cosine, class where there is one, split and path."""
    labelled = any(pool.label(row) is not None for row in found.rows)
    lines = [f"{found.query}"]
    for row, cosine in zip(found.rows, found.cosine, strict=True):
        label = f"  {pool.label(row) or '–':<16}" if labelled else ""
        split = pool.splits[pool.place(row)[0]]
        lines.append(f"  {cosine:6.3f}{label}  {split}: {pool.path(row)}")
    return "\n".join(map(page.visible, lines))


def as_page(found: Sequence[Found], pool: pictures.Pool, *, data: str) -> str:
    """One HTML page with each picture and what is like it; nothing is fetched, every name escaped."""
    rows: list[dict[str, Any]] = []
    for one in found:
        shown = pictures.webp(_read(one.query, PICTURE).transpose(1, 2, 0), PICTURE)
        cards = [
            {
                "image": pictures.webp(pool.pixels(row), PICTURE),
                "path": pool.path(row),
                "label": pool.label(row),
                "cosine": cosine,
            }
            for row, cosine in zip(one.rows, one.cosine, strict=True)
        ]
        rows.append({"query": {"image": shown, "path": str(one.query), "label": None, "cosine": None}, "near": cards})
    return page.render_neighbors(rows, data=data, images=len(pool))
