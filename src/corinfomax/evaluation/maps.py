"""Feature vectors in fewer dimensions: principal components, and PaCMAP with the extra `map`."""

import logging

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize, pad

ROWS = 4096  # of a block


def principal(x: Float[Tensor, "n f"], *, dims: int = 2) -> tuple[Float[Tensor, "n {dims}"], Float[Tensor, " {dims}"]]:
    """Coordinates along the directions of largest variance, and each direction's share of the variance.

    The largest entry of a direction, in size, is positive. With fewer features than `dims` the last columns are zero.
    """
    # in blocks of rows, so that x is never copied whole into float64
    mean = sum((rows.double().sum(0) for rows in x.split(ROWS)), x.new_zeros(x.shape[1]).double()) / len(x)
    gram = sum(((rows - mean).T @ (rows - mean) for rows in x.split(ROWS)), mean.new_zeros(len(mean), len(mean)))
    eigenvalues, vectors = torch.linalg.eigh(gram / len(x))
    vectors = vectors.flip(1)[:, :dims]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    share = eigenvalues.flip(0)[:dims].clamp_min(0) / eigenvalues.clamp_min(0).sum().clamp_min(1e-300)
    missing = dims - vectors.shape[1]
    plane = torch.cat([((rows - mean) @ vectors).float() for rows in x.split(ROWS)])
    return pad(plane, (0, missing)), pad(share.float(), (0, missing))


def leading(x: Float[Tensor, "n f"], *, dims: int) -> Float[Tensor, "n g"]:
    """Unit rows reduced to at most `dims` principal directions: nearly the same cosines at a fraction of the cost."""
    return x if x.shape[1] <= dims else normalize(principal(x, dims=dims)[0], dim=1)


def neighbour_map(x: Float[Tensor, "n f"], *, seed: int) -> Float[Tensor, "n 2"]:
    """Plane in which near rows of `x` stay near: PaCMAP, arXiv 2012.04456."""
    from pacmap import PaCMAP

    logging.getLogger("pacmap").setLevel(logging.ERROR)  # it warns that a seed is set
    rows = np.ascontiguousarray(x.float().numpy())
    plane = PaCMAP(n_components=2, random_state=seed % 2**31).fit_transform(rows, init="pca")
    return torch.from_numpy(np.asarray(plane, np.float32))
