"""Similar images: nearest neighbours and near-duplicates against brute force, groups by example."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from corinfomax.evaluation import similar


def rows(n, f, seed=0):
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("at_once", [1, 300, 1 << 24])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_nearest_neighbours_are_those_of_brute_force(monkeypatch, at_once, k):
    monkeypatch.setattr(similar, "COSINES_AT_ONCE", at_once)
    x = similar.centred(rows(50, 8))
    x[7] = x[3]  # a duplicate is a neighbour like any other
    cosine = (x @ x.T).fill_diagonal_(-torch.inf)
    expected = cosine.sort(1, descending=True).values[:, : min(k, 49)]

    neighbours = similar.nearest_neighbours(x, k=k)
    torch.testing.assert_close(neighbours.cosine, expected)
    assert neighbours.rows[7, 0] == 3
    assert not (neighbours.rows == torch.arange(50)[:, None]).any()

    queries = torch.tensor([4, 40])
    assert similar.nearest_neighbours(x, k=k, queries=queries).rows.equal(neighbours.rows[queries])


def test_centred_rows_have_unit_length_and_no_common_part():
    x = rows(30, 5)
    torch.testing.assert_close(similar.centred(x + 1000), similar.centred(x), atol=1e-3, rtol=0)  # float32 at 1000
    torch.testing.assert_close(similar.centred(x).norm(dim=1), torch.ones(30))
    assert similar.centred(torch.ones(4, 3)).equal(torch.zeros(4, 3))


def test_correlation_is_high_for_duplicates_and_mirrors_only():
    a = rows(6, 3 * 16).sigmoid().view(6, 3, 4, 4)
    for duplicate in (a, a.flip(3), 0.5 * a + 0.2):  # equal, mirrored, paler
        torch.testing.assert_close(similar.pixel_correlation(a, duplicate), torch.ones(6))
    different = rows(6, 3 * 16, seed=1).sigmoid().view(6, 3, 4, 4)
    assert (similar.pixel_correlation(a, different) < 0.7).all()
    assert (similar.pixel_correlation(a, a.flip(2)) < 0.7).all()  # upside down is a different image

    black, grey = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
    assert similar.pixel_correlation(black, black) == 1
    assert similar.pixel_correlation(black, grey) == 0


@pytest.mark.parametrize("tile", [7, 2048])
@pytest.mark.parametrize("threshold", [0.9, 0.99])
def test_near_duplicates_are_those_of_brute_force(monkeypatch, tile, threshold):
    monkeypatch.setattr(similar, "TILE", tile)
    monkeypatch.setattr(similar, "MIN_CORRELATION", threshold)
    rng = torch.Generator().manual_seed(0)
    originals = F.interpolate(torch.rand(40, 3, 5, 5, generator=rng), 24, mode="bilinear")
    noise = torch.rand(40, 3, 24, 24, generator=rng) * torch.linspace(0, 0.4, 40)[:, None, None, None]
    noisy = (0.7 * originals + noise).clamp(0, 1)
    thumbnails = (255 * torch.cat((originals, noisy[:20], noisy[20:].flip(3)))).round().byte()

    a, b = torch.triu_indices(len(thumbnails), len(thumbnails), 1)
    correlations = similar.pixel_correlation(thumbnails[a].float() / 255, thumbnails[b].float() / 255)
    expected = torch.stack((a, b), 1)[correlations >= threshold].tolist()
    assert 5 < len(expected) < 45

    duplicates = similar.near_duplicates(thumbnails)
    assert duplicates.complete
    assert sorted(duplicates.pairs.tolist()) == expected


def test_the_search_stops_when_too_many_images_look_alike(monkeypatch):
    monkeypatch.setattr(similar, "TILE", 16)
    thumbnails = torch.arange(24, dtype=torch.uint8).expand(60, 3, 24, 24).contiguous()
    assert len(similar.near_duplicates(thumbnails).pairs) == 60 * 59 // 2
    monkeypatch.setattr(similar, "MAX_PAIRS", 100)
    assert not similar.near_duplicates(thumbnails).complete


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_have_no_duplicates(count):
    duplicates = similar.near_duplicates(torch.zeros(count, 3, 24, 24, dtype=torch.uint8))
    assert duplicates.pairs.shape == (0, 2)
    assert duplicates.complete


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is in KiB on Linux alone")
def test_nearest_neighbours_and_knn_take_one_block_of_memory_at_a_time():
    """Blocks made anew fragmented the heap that a command keeps: 100,000 images took up to 8 GB."""
    code = """
import resource, torch
from corinfomax.cli.process import keep_freed_memory
from corinfomax.evaluation import probes, similar
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
keep_freed_memory()
x = similar.centred(torch.randn(20_000, 16))
similar.nearest_neighbours(x[:100], k=8)
before = peak()
similar.nearest_neighbours(x, k=8, queries=torch.arange(10_000))
probes.knn(x, torch.arange(len(x)) % 10, x[:10_000])
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 67 + 30  # a block of cosines, in MB, and the rest
