"""The content of a run's page: gathered once, then rendered."""

from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float, Int, UInt8
from torch import Tensor

from corinfomax.images.cache import Splits
from corinfomax.network import Network
from corinfomax.recipes.fields import Recipe
from corinfomax.report.thumbnails import Pool
from corinfomax.runtime.records import Facts, Results, Row


class Subject(NamedTuple):
    """A run to write a page about, and the images of that page."""

    run: Path
    network: Network
    recipe: Recipe
    step: int  # steps that trained the network
    facts: Facts
    splits: Splits
    same_images: bool  # true when the run was trained on `splits`


class Spectrum(NamedTuple):
    """Principal directions of the features or projections of whole images."""

    name: str
    shares: list[float]  # share of the variance along each direction, descending
    rank: float  # effective rank (RankMe)


class Layout(NamedTuple):
    """Places in [0, 1] of images in a map: of these rows of the pool, or of all."""

    name: str
    caption: str
    plane: Float[Tensor, "n 2"]
    rows: Int[Tensor, " n"] | None = None


class Card(NamedTuple):
    """One image in a gallery."""

    path: str
    label: str | None
    webp: str
    cosine: float | None = None  # similarity to the query, or mean similarity to the nearest neighbours


class Neighbourhood(NamedTuple):
    """A query with its nearest neighbours, most similar first."""

    query: Card
    neighbours: list[Card]


class SheetRow(NamedTuple):
    """An image of the contact sheet, with the WebP of each view and its random operations in words."""

    path: str
    webp: str
    views: list[tuple[str, str]]


class Content(NamedTuple):
    """Everything that the page of a run shows."""

    subject: Subject
    results: Results  # with the best checkpoint only while it exists
    rows: list[Row]
    spectra: list[Spectrum]
    sheet: list[SheetRow]  # the contact sheet; empty when the page shows other images than the run's
    pool: Pool  # the images shown, a sample of all splits
    sampled_from: int  # number of images in all splits
    layouts: list[Layout]
    colours: UInt8[Tensor, "n 3"]  # mean colour of each image of the pool
    thumbnails: dict[int, str]  # WebP by row of the pool, for some or all images of the map
    neighbourhoods: list[Neighbourhood]
    outliers: list[Card]
