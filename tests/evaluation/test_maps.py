"""Principal components against scikit-learn, rows reduced to the leading ones, and PaCMAP where it is installed."""

from importlib.util import find_spec

import pytest
import torch
from sklearn.decomposition import PCA

from corinfomax.evaluation import maps


def rows(n, f, seed=0):
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed))


def test_principal_coordinates_are_scikit_learns():
    x = rows(60, 7) * torch.tensor([5.0, 3, 2, 1, 1, 1, 1])
    reference = PCA(2, svd_solver="full")
    expected = torch.from_numpy(reference.fit_transform(x.double().numpy())).float()
    got, share = maps.principal(x)
    assert torch.allclose(got.abs(), expected.abs(), atol=1e-4)  # a direction has no sign of its own
    assert share.tolist() == pytest.approx(reference.explained_variance_ratio_.tolist(), rel=1e-5)
    assert maps.principal(x)[0].equal(got)


def test_principal_coordinates_of_next_to_nothing():
    flat, share = maps.principal(torch.ones(5, 3))
    assert flat.equal(torch.zeros(5, 2))
    assert share.equal(torch.zeros(2))
    thin, _ = maps.principal(torch.arange(4.0)[:, None])
    assert thin.tolist() == [[-1.5, 0], [-0.5, 0], [0.5, 0], [1.5, 0]]


def test_leading_directions_keep_cosines():
    # four of nine directions carry all but 1e-4 of the variance
    x = rows(50, 9) * torch.tensor([4.0, 3, 2, 1, *[0.01] * 5])
    x = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    got = maps.leading(x, dims=4)
    assert got.shape == (50, 4)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(50))
    centred = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    torch.testing.assert_close(got @ got.T, centred @ centred.T, atol=0.01, rtol=0)
    assert maps.leading(x, dims=9) is x


@pytest.mark.skipif(find_spec("pacmap") is None, reason="PaCMAP is not installed: the extra map")
def test_a_neighbour_map_keeps_clusters_together():
    clusters = torch.arange(90) % 3
    x = torch.randn(90, 10, generator=torch.Generator().manual_seed(0)) * 0.1 + 4 * torch.eye(10)[clusters]
    plane = maps.neighbour_map(x, seed=5)
    nearest = torch.cdist(plane, plane).fill_diagonal_(torch.inf).argmin(1)
    assert plane.shape == (90, 2)
    assert (clusters[nearest] == clusters).float().mean() > 0.95
