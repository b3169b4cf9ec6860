"""Exact search for the images most similar to a query, in one pass over a set of any size."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Num
from torch import nn

from corinfomax.evaluation import features, similar
from corinfomax.images.decode import decode, reason
from corinfomax.images.files import DataError
from corinfomax.images.levels import as_rgb
from corinfomax.images.readers import opened
from corinfomax.recipes.fields import PixelFormat, Recipe
from corinfomax.report import page
from corinfomax.report.content import Card, Neighbourhood
from corinfomax.report.thumbnails import Pool, webp_text
from corinfomax.runtime.seeds import generator

CARD_SIDE = 160  # pixels of the long side on the page


class Matches(NamedTuple):
    """The images most similar to a query, best first, as rows of the pool."""

    query: Path
    rows: list[int]
    cosine: list[float]


def search(
    backbone: nn.Module, pool: Pool, recipe: Recipe, queries: Sequence[Path], *, k: int, device: torch.device
) -> list[Matches]:
    """The k images of the pool most similar to each query, by cosine of backbone features; exact.

    The origin of the cosines is the mean feature of the pool, or of 10,000 images drawn evenly from a larger one:
    about zero all images are alike. Only the k best per query stay in memory. DataError when a query is unreadable.
    """
    # the queries, decoded like the images of the pool; one at a time, as sizes may differ
    vectors = []
    for query in queries:
        pixels = torch.from_numpy(_read_query(query, recipe.cache_side, recipe.pixels))[None]
        vectors.append(features.features_of_pixels(backbone, pixels, torch.tensor([pixels.shape[2:]]), recipe, device))

    # the mean feature of the pool or of a part of it, as the origin of the cosines
    sample = pool.sample(10_000, generator(0, "centre of neighbours")).splits.values()
    origin = torch.cat([features.extract_features(backbone, x, recipe, device=device) for x in sample]).mean(0)

    # the images of the pool, a batch at a time
    unit = (
        F.normalize(block - origin, dim=1)
        for name, images in pool.splits.items()
        for block in features.feature_blocks(backbone, images, recipe, device=device, progress=f"searching {name}")
    )
    nearest = similar.nearest_in_blocks(F.normalize(torch.cat(vectors) - origin, dim=1), unit, k=k)
    return list(map(Matches, queries, nearest.rows.tolist(), nearest.cosine.tolist()))


def _read_query(query: Path, side: int, pixels: PixelFormat) -> Num[np.ndarray, "c h w"]:
    try:
        with opened(query) as image:
            return decode(image, side, pixels)
    except FileNotFoundError:
        raise DataError(f"no image at {query}") from None
    except Exception as error:  # a malformed file makes Pillow's parsers raise nearly anything
        raise DataError(f"{query} cannot be read as an image: {reason(error)}") from error


def matches_as_text(matches: Matches, pool: Pool) -> str:
    """One line per image: cosine, class if it has one, split and path."""
    labels = [pool.label(row) for row in matches.rows]
    lines = [str(matches.query)]
    for row, label, cosine in zip(matches.rows, labels, matches.cosine, strict=True):
        column = f"  {label or '–':<16}" if any(labels) else ""
        lines.append(f"  {cosine:6.3f}{column}  {pool.place(row)[0]}: {pool.path(row)}")
    return "\n".join(map(page.visible, lines))


def matches_as_page(results: Sequence[Matches], pool: Pool, *, data: str) -> str:
    """One HTML page with every query and its matches."""
    neighbourhoods, pixels = [], next(iter(pool.splits.values())).format
    for query, rows, cosines in results:
        picture = as_rgb(_read_query(query, CARD_SIDE, pixels), pixels).transpose(1, 2, 0)
        cards = []
        for row, cosine in zip(rows, cosines, strict=True):
            cards.append(Card(pool.path(row), pool.label(row), webp_text(pool.pixels(row), CARD_SIDE), cosine))
        neighbourhoods.append(Neighbourhood(Card(str(query), None, webp_text(picture, CARD_SIDE)), cards))
    return page.render_neighbours(neighbourhoods, data=data, images=len(pool), pixels=pixels)
