"""Search for similar images: exact with any blocks, errors in a sentence, names escaped."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import tiny
from corinfomax.cli.main import main
from corinfomax.evaluation import features, similar
from corinfomax.images import cache
from corinfomax.images.files import DataError
from corinfomax.report import neighbors
from corinfomax.report.thumbnails import Pool

CPU = torch.device("cpu")


def unit(count, seed, dims=8):
    return F.normalize(torch.randn(count, dims, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("block", [1, 7, 50, 1000])
def test_the_best_of_blocks_are_those_of_brute_force(block, monkeypatch):
    monkeypatch.setattr(similar, "COSINES_AT_ONCE", 90)  # 30 rows at once for three queries
    x, queries = unit(300, 0), unit(3, 1)
    near = similar.nearest_in_blocks(queries, iter(x.split(block)), k=20)
    cosine = queries.double() @ x.double().T
    assert near.rows.tolist() == cosine.argsort(dim=1, descending=True)[:, :20].tolist()
    torch.testing.assert_close(near.cosine.double(), cosine.gather(1, near.rows), rtol=0, atol=1e-6)


def test_of_equal_rows_the_earlier_comes_first_and_few_rows_give_few():
    x = unit(1, 0).expand(5, -1)
    near = similar.nearest_in_blocks(unit(1, 0), x.split(2), k=9)
    assert near.rows.tolist() == [[0, 1, 2, 3, 4]]


class Mean(nn.Module):
    """Features that are the mean colour."""

    def forward(self, x):
        return x.mean((2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of one colour each, in two splits, one with a name that is HTML."""
    root = tmp_path_factory.mktemp("colours")
    for split, colours in {
        "train": [(250, 0, 0), (0, 250, 0), (0, 0, 250)],
        "test": [(200, 20, 20), (9, 9, 9)],
    }.items():
        for place, colour in enumerate(colours):
            (root / split / "a<b>").mkdir(parents=True, exist_ok=True)
            name = "<script>alert(1)</script>.png".replace("/", "∕") if place == 0 else f"{place}.png"
            Image.new("RGB", (16, 16), colour).save(root / split / "a<b>" / name)
    return root


def test_the_nearest_are_found_across_splits(folder, tmp_path):
    pool = Pool(cache.load_every(folder, side=16, progress=False))
    query = tmp_path / "query.png"
    Image.new("RGBA", (40, 20), (230, 10, 10, 255)).save(query)  # another size and mode
    (matches,) = neighbors.search(Mean(), pool, tiny.RECIPE, [query], k=3, device=CPU)
    colours = [pool.pixels(row)[0, 0].tolist() for row in matches.rows]
    assert sorted(colours[:2], reverse=True) == [[250, 0, 0], [200, 20, 20]]
    assert matches.cosine == sorted(matches.cosine, reverse=True)


def test_the_centre_is_the_pools_mean(folder, tmp_path):
    pool = Pool(cache.load_every(folder, side=16, progress=False))
    query = tmp_path / "query.png"
    Image.fromarray(pool.pixels(1)).save(query)
    (matches,) = neighbors.search(Mean(), pool, tiny.RECIPE, [query], k=5, device=CPU)
    x = torch.cat([features.extract_features(Mean(), images, tiny.RECIPE) for images in pool.splits.values()])
    x = F.normalize(x - x.mean(0), dim=1)
    assert matches.rows[0] == 1
    np.testing.assert_allclose(matches.cosine, (x @ x[1]).sort(descending=True).values, atol=1e-5)


def test_the_command_prints_and_writes_a_page_with_names_escaped(folder, tmp_path, capsys):
    weights = tmp_path / "weights.safetensors"
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("resnet18", num_classes=0).state_dict(), weights)
    query = folder / "train" / "a<b>" / "1.png"
    out = tmp_path / "page.html"
    words = ["neighbors", str(weights), str(folder), "--query", str(query), "--query", str(query), "--out", str(out)]
    assert main([*words, "--architecture", "resnet18", "--count", "4", "--size", "32"]) == 0
    said = capsys.readouterr().out
    first = [lines.splitlines()[1] for lines in said.split(str(query))[1:]]
    assert len(first) == 2  # the query itself comes first, both times
    assert all(re.match(r" +1\.000 +train: train/a<b>/1\.png", line) for line in first), said
    page = out.read_text()
    assert "a resnet18 at 32 px" in said
    assert "<script" not in page
    assert page.count("data:image/webp") == 2 * (1 + 4)
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("query", "words"), [("missing.png", "no image at"), ("text.png", "cannot be read as an image")]
)
def test_an_unreadable_query_is_named_in_the_error(folder, tmp_path, query, words):
    (tmp_path / "text.png").write_text("no image")
    pool = Pool(cache.load_every(folder, side=16, progress=False))
    with pytest.raises(DataError, match=words):
        neighbors.search(Mean(), pool, tiny.RECIPE, [tmp_path / query], k=1, device=CPU)


def test_a_search_without_a_query_is_an_error(folder, capsys):
    assert main(["neighbors", "timm:resnet18", str(folder)]) == 2
    assert "--query" in capsys.readouterr().err
