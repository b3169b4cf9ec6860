"""Features, files of them, and the table of scores beside its two baselines."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from corinfomax import embed, evaluate, images, networks, probes, views
from corinfomax.knobs import Probe
from corinfomax.seeds import key

CPU = {"device": torch.device("cpu")}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return images.load(tiny.folder(tmp_path_factory.mktemp("data"), {"train": 60, "test": 20}), side=16, progress=False)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(3)
    return networks.build_backbone(tiny.RECIPE.backbone)


def test_features_are_the_networks_in_eval_mode_and_order(splits, backbone):
    backbone.train()
    got = embed.features(backbone, splits.train, tiny.RECIPE, batch=7)
    assert backbone.training
    pixels, sizes = splits.train.batch(torch.arange(60))
    x = views.centre_view(pixels, sizes, size=16, mean=tiny.RECIPE.mean, std=tiny.RECIPE.std)
    with torch.no_grad():
        want = backbone.eval()(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("ending", [".npz", ".parquet"])
def test_embeddings_are_kept_with_paths_and_labels(splits, backbone, tmp_path, ending):
    if ending == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
    parts = splits._asdict()
    vectors = {name: embed.features(backbone, part, tiny.RECIPE) for name, part in parts.items()}
    path = tmp_path / f"out{ending}"
    embed.write(path, vectors, parts)
    if ending == ".npz":
        table = dict(np.load(path, allow_pickle=False))
        features = table["features"]
    else:
        table = parquet.read_table(path).to_pydict()
        features = np.array(table["features"], np.float32)
    assert features.shape == (80, 16)
    np.testing.assert_array_equal(features, torch.cat(list(vectors.values())).numpy())
    assert list(table["split"]) == ["train"] * 60 + ["test"] * 20
    assert list(table["path"]) == [*splits.train.paths, *splits.test.paths]
    assert all(label in path for path, label in zip(table["path"], table["label"], strict=True))
    assert list(tmp_path.iterdir()) == [path]


def test_embeddings_without_labels_have_no_label_column(splits, backbone, tmp_path):
    unlabelled = replace(splits.train, labels=None, classes=())
    embed.write(tmp_path / "a.npz", {"train": torch.zeros(60, 4)}, {"train": unlabelled})
    assert set(np.load(tmp_path / "a.npz").keys()) == {"split", "path", "features"}
    with pytest.raises(ValueError, match=r"a\.csv must end in \.npz or \.parquet"):
        embed.write(tmp_path / "a.csv", {"train": torch.zeros(60, 4)}, {"train": unlabelled})


def test_the_table_has_every_probe_for_three_kinds_of_features(splits, backbone):
    table = evaluate.evaluate(backbone, splits, tiny.RECIPE, **CPU, progress=False)
    assert list(table) == ["pretrained", "untrained", "raw pixels"]
    for scores in table.values():
        assert list(scores) == ["kNN", "ridge", "linear", "10 a class", "1 a class"]
        assert all(0 <= score.mean <= 100 for score in scores.values())
        assert [score.sd is not None for score in scores.values()] == [False, False, False, True, True]
    # Hue is the class: the pixels alone say it.
    assert table["raw pixels"]["linear"].mean > 90
    text = evaluate.as_text(table)
    assert len({len(line) for line in text.splitlines()}) == 1
    assert f"{table['pretrained']['1 a class'].mean:.1f} ± {table['pretrained']['1 a class'].sd:.1f}" in text
    assert evaluate.as_json(table)["untrained"]["kNN"] == {"mean": table["untrained"]["kNN"].mean}


def test_baselines_are_a_random_network_and_the_pixels(splits, backbone):
    table = evaluate.evaluate(backbone, splits, tiny.RECIPE, **CPU, progress=False)
    start = evaluate.random_backbone(splits.train, tiny.RECIPE, **CPU)
    for name, model in (("untrained", start), ("raw pixels", nn.Flatten()), ("pretrained", backbone)):
        train, test = (embed.features(model, part, tiny.RECIPE) for part in splits)
        predicted = probes.knn(train, splits.train.labels, test)
        assert table[name]["kNN"].mean == probes.accuracy(predicted, splits.test.labels)


def test_the_random_network_is_no_straw_man(splits):
    model = evaluate.random_backbone(splits.train, tiny.RECIPE, **CPU, looks=60)
    assert not model.training
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() for norm in norms)  # timm starts each block's last one at 0
    seen = []
    model.bn1.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    embed.features(model, splits.train, tiny.RECIPE)
    variance, mean = torch.var_mean(torch.cat(seen), (0, 2, 3))  # the 60 images were one batch
    torch.testing.assert_close(model.bn1.running_mean, mean)
    torch.testing.assert_close(model.bn1.running_var, variance)
    torch.manual_seed(key(tiny.RECIPE.seed, "weights"))
    start = networks.Network(tiny.RECIPE.backbone, tiny.RECIPE.projector).backbone
    assert model.conv1.weight.equal(start.conv1.weight)


def test_a_linear_probe_that_diverges_is_an_error(splits, backbone):
    recipe = replace(tiny.RECIPE, probe=Probe(epochs=1, batch=16, lr=1e38))
    with pytest.raises(FloatingPointError, match="linear probe diverged"):
        evaluate.linear_probe(backbone, splits, recipe, **CPU, progress=False)


def test_the_published_probe_learns_and_leaves_the_backbone_alone(splits, backbone):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    recipe = replace(tiny.RECIPE, probe=Probe(epochs=15, batch=16))
    score = evaluate.linear_probe(nn.Flatten(), splits, recipe, **CPU, progress=False)
    assert score >= 90
    evaluate.linear_probe(backbone, splits, recipe, **CPU, progress=False)
    assert tiny.equal_states(before, backbone.state_dict())
    assert score == evaluate.linear_probe(nn.Flatten(), splits, recipe, **CPU, progress=False)


@pytest.mark.parametrize("decay_epochs", [None, 2])
def test_the_published_probes_schedule(splits, monkeypatch, decay_epochs):
    rates = []
    monkeypatch.setattr(evaluate.optim, "set_learning_rate", lambda _, lr: rates.append(lr))
    probe = Probe(epochs=4, batch=30, lr=0.2, min_lr=0.002, decay_epochs=decay_epochs)
    evaluate.linear_probe(nn.Flatten(), splits, replace(tiny.RECIPE, probe=probe), **CPU, progress=False)
    cosine = [0.2, 0.002 + 0.198 * (1 + 2**-0.5) / 2, 0.101, 0.002 + 0.198 * (1 - 2**-0.5) / 2]
    each = cosine if decay_epochs is None else [0.2, 0.2, 0.02, 0.02]
    assert rates == pytest.approx([lr for lr in each for _ in range(2)])


def test_scores_need_labels_and_say_so(splits):
    unlabelled = replace(splits.train, labels=None, classes=())
    with pytest.raises(ValueError, match="a score needs labels"):
        evaluate.check_labels(images.Splits(unlabelled, splits.test))
    with pytest.raises(ValueError, match="no images to test on"):
        evaluate.check_labels(images.Splits(splits.train, None))
