"""Two coordinates for each feature vector: principal components always, a neighbour map where one is installed."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def principal(x: Float[Tensor, "n f"], *, dims: int = 2) -> tuple[Float[Tensor, "n {dims}"], Float[Tensor, " {dims}"]]:
    """Coordinates along the directions of largest variance, and each one's share of all variance.

    Signs are fixed: the entry of a direction that is largest in size is positive. Fewer features than `dims` leave
    zeros.
    """
    centred = x.double() - x.double().mean(0)
    eigenvalues, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    vectors = vectors.flip(1)[:, :dims]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    share = eigenvalues.flip(0)[:dims].clamp_min(0) / eigenvalues.clamp_min(0).sum().clamp_min(1e-300)
    missing = dims - vectors.shape[1]
    coordinates = torch.nn.functional.pad((centred @ vectors).float(), (0, missing))
    return coordinates, torch.nn.functional.pad(share.float(), (0, missing))


def neighbour_maps() -> list[str]:
    """The neighbour maps that are installed."""
    return [name for name, module in (("PaCMAP", "pacmap"), ("UMAP", "umap")) if importlib.util.find_spec(module)]


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def neighbour_map(name: str, x: Float[Tensor, "n f"], *, seed: int) -> Float[Tensor, "n 2"]:
    """A plane in which near rows of `x` stay near: PaCMAP (arXiv 2012.04456) or UMAP (arXiv 1802.03426)."""
    rows = np.ascontiguousarray(x.float().numpy())
    with warnings.catch_warnings(), _quiet("pacmap"):
        warnings.simplefilter("ignore")  # both warn that a seed makes them run on one core
        if name == "PaCMAP":
            import pacmap

            plane = pacmap.PaCMAP(n_components=2, random_state=seed % 2**31).fit_transform(rows, init="pca")
        elif name == "UMAP":
            import umap

            plane = umap.UMAP(random_state=seed % 2**31, metric="cosine").fit_transform(rows)
        else:
            raise ValueError(f"no neighbour map {name!r}; choose from PaCMAP, UMAP")
    return torch.from_numpy(np.asarray(plane, np.float32))
