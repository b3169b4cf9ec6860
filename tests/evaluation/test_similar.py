"""Alike images: nearest rows against brute force, copies told from likenesses, maps against scikit-learn."""

import pytest
import torch
from sklearn.decomposition import PCA

from corinfomax.evaluation import maps, similar


def rows(n, f, seed=0):
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [1, 300, 1 << 24])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_nearest_is_brute_force_without_oneself(monkeypatch, block, k):
    monkeypatch.setattr(similar, "BLOCK", block)
    x = similar.centred(rows(50, 8))
    x[7] = x[3]  # a copy is a neighbour like any other
    cosine = (x @ x.T).fill_diagonal_(-torch.inf)
    expected = cosine.sort(1, descending=True)
    k_there = min(k, 49)
    near = similar.nearest(x, k=k)
    torch.testing.assert_close(near.cosine, expected.values[:, :k_there])
    assert near.rows[7, 0] == 3
    assert not (near.rows == torch.arange(50)[:, None]).any()
    some = torch.tensor([4, 40])
    again = similar.nearest(x, k=k, queries=some)
    assert again.rows.equal(near.rows[some])


def test_centred_rows_have_length_one_and_forget_what_all_share():
    x = rows(30, 5)
    torch.testing.assert_close(similar.centred(x + 1000), similar.centred(x), atol=1e-3, rtol=0)  # float32 at 1000
    torch.testing.assert_close(similar.centred(x).norm(dim=1), torch.ones(30))
    assert similar.centred(torch.ones(4, 3)).equal(torch.zeros(4, 3))


def test_correlation_knows_copies_and_mirrors_and_nothing_else():
    a = rows(6, 3 * 16).sigmoid().view(6, 3, 4, 4)
    for copy in (a, a.flip(3), 0.5 * a + 0.2):  # the same, mirrored, paler
        torch.testing.assert_close(similar.correlation(a, copy), torch.ones(6))
    other = rows(6, 3 * 16, seed=1).sigmoid().view(6, 3, 4, 4)
    assert (similar.correlation(a, other) < 0.7).all()
    assert (similar.correlation(a, a.flip(2)) < 0.7).all()  # upside down is another picture
    blank, grey = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
    assert similar.correlation(blank, blank) == 1
    assert similar.correlation(blank, grey) == 0


def test_groups_are_what_pairs_connect():
    pairs = torch.tensor([[5, 9], [1, 2], [2, 3], [8, 9], [3, 1]])
    found = similar.grouped(pairs, torch.tensor([0.999, 0.995, 0.992, 1.0, 0.998]))
    assert found.groups == [[5, 8, 9], [1, 2, 3]]  # most alike first
    assert found.alike == pytest.approx([0.999, 0.992])
    assert similar.grouped(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0)) == ([], [])


def test_the_stranger_is_found():
    x = rows(40, 6) * 0.05 + torch.eye(6)[torch.arange(40) % 3]
    x[11] = -torch.ones(6)
    near = similar.nearest(torch.nn.functional.normalize(x, dim=1), k=5)
    assert similar.strangers(near, most=3)[0] == 11


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


@pytest.mark.parametrize("name", ["PaCMAP", "UMAP"])
def test_a_neighbour_map_keeps_clusters_together(name):
    if name not in maps.neighbour_maps():
        pytest.skip(f"{name} is not installed: the map extra")
    x = rows(90, 10) * 0.1 + 4 * torch.eye(10)[torch.arange(90) % 3]
    plane = maps.neighbour_map(name, x, seed=5)
    near = similar.nearest(similar.centred(plane), k=1).rows[:, 0]
    assert plane.shape == (90, 2)
    assert (near % 3 == torch.arange(90) % 3).float().mean() > 0.95


def test_an_unknown_neighbour_map_is_an_error():
    with pytest.raises(ValueError, match="no neighbour map 'tsne'"):
        maps.neighbour_map("tsne", rows(9, 3), seed=0)
