"""Features, files of them, and the table of scores beside its two baselines."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from corinfomax import network
from corinfomax.evaluation import features, fine_tuning, probes
from corinfomax.evaluation import table as evaluate
from corinfomax.images import cache
from corinfomax.recipes.fields import Probe
from corinfomax.runtime.seeds import key
from corinfomax.views import operations

CPU = {"device": torch.device("cpu")}


@pytest.mark.parametrize(("scale", "side"), [(1.0, 16), (1.5, 24)])
def test_features_are_the_networks_in_eval_mode_and_order(splits, backbone, monkeypatch, scale, side):
    monkeypatch.setattr(features, "BATCH", 7)
    backbone.train()
    got = features.extract_features(backbone, splits.train, replace(tiny.RECIPE, test_scale=scale))
    assert backbone.training
    pixels, sizes = splits.train.batch(torch.arange(60))
    x = operations.centre_view(pixels, sizes, size=side, scaling=tiny.RECIPE.scaling)
    with torch.no_grad():
        want = backbone.eval()(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("ending", [".npz", ".parquet"])
def test_embeddings_are_kept_with_paths_and_labels(splits, backbone, tmp_path, ending):
    if ending == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
    parts = splits._asdict()
    vectors = {name: features.extract_features(backbone, part, tiny.RECIPE) for name, part in parts.items()}
    path = tmp_path / f"out{ending}"
    features.write(path, vectors, parts)
    if ending == ".npz":
        table = dict(np.load(path, allow_pickle=False))
        vectors_read = table["features"]
    else:
        table = parquet.read_table(path).to_pydict()
        vectors_read = np.array(table["features"], np.float32)
    assert vectors_read.shape == (80, 16)
    np.testing.assert_array_equal(vectors_read, torch.cat(list(vectors.values())).numpy())
    centred = vectors_read.astype(np.float64) - vectors_read.mean(0, dtype=np.float64)
    values = np.linalg.svd(centred, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm([table["x"], table["y"]], axis=1), values[:2], rtol=1e-4)
    assert list(table["split"]) == ["train"] * 60 + ["test"] * 20
    assert list(table["path"]) == [*splits.train.paths, *splits.test.paths]
    assert all(label in path for path, label in zip(table["path"], table["label"], strict=True))
    assert list(tmp_path.iterdir()) == [path]


def test_features_that_are_not_finite_have_no_quick_score(splits, backbone):
    assert evaluate.quick_knn(backbone, splits, tiny.RECIPE, device=torch.device("cpu")) > 0
    broken = torch.nn.Sequential(backbone, torch.nn.Threshold(torch.inf, torch.nan))
    assert evaluate.quick_knn(broken, splits, tiny.RECIPE, device=torch.device("cpu")) is None


def test_parquet_has_the_nearest_neighbours(splits, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    features.write(tmp_path / "a.parquet", {"train": x}, {"train": splits.train})
    columns = parquet.read_table(tmp_path / "a.parquet")["neighbors"].to_pylist()
    unit = torch.nn.functional.normalize(x - x.mean(0), dim=1)
    distance = (1 - unit @ unit.T).fill_diagonal_(9)
    for row, column in enumerate(columns):
        nearest = distance[row].sort()
        assert column["ids"] == nearest.indices[:10].tolist()
        torch.testing.assert_close(torch.tensor(column["distances"]), nearest.values[:10], atol=1e-5, rtol=1e-5)

    monkeypatch.setattr(features, "MOST_NEIGHBOURED", 59)
    features.write(tmp_path / "b.parquet", {"train": x}, {"train": splits.train})
    assert "neighbors" not in parquet.read_table(tmp_path / "b.parquet").column_names


def test_embeddings_without_labels_have_no_label_column(splits, backbone, tmp_path):
    unlabelled = replace(splits.train, labels=None, classes=())
    features.write(tmp_path / "a.npz", {"train": torch.zeros(60, 4)}, {"train": unlabelled})
    assert set(np.load(tmp_path / "a.npz").keys()) == {"split", "path", "features", "x", "y"}
    with pytest.raises(ValueError, match=r"a\.csv must end in \.npz or \.parquet"):
        features.write(tmp_path / "a.csv", {"train": torch.zeros(60, 4)}, {"train": unlabelled})


LINES: list[str] = []


@pytest.fixture(scope="module")
def result(splits, backbone):
    recipe = replace(tiny.RECIPE, probe=Probe(epochs=2))
    rival = evaluate.Contender("the same", backbone, recipe, splits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fine_tuning, "FEWEST_STEPS", 20)
        probe = {"published_probe": True, "log": LINES.append}
        return evaluate.evaluate(backbone, splits, recipe, **CPU, rivals=[rival], fine_tune=True, **probe)


def test_the_table_has_every_probe_for_every_kind_of_features(result):
    table = result.table
    assert list(table) == ["pretrained", "the same", "untrained", "raw pixels"]
    probes_of_all = ["kNN", "ridge", "linear", "10 a class", "1 a class", "mAP"]
    for name, scores in table.items():
        published = ["published linear"] * (name not in evaluate.BASELINES)
        assert list(scores) == probes_of_all + published + ["tuned, 1%", "tuned, 10%"] * (name != "raw pixels")
        for probe, score in scores.items():
            if probe == "mAP":
                assert (score.low, score.high) == (None, None), "images are queries and gallery at once"
                assert 0 <= score.mean <= 100
                continue
            assert 0 <= score.low <= score.mean <= score.high <= 100
            assert (score.sd is not None) == ("a class" in probe)
    assert table["pretrained"] == table["the same"]
    # Hue is the class: the pixels alone say it.
    assert table["raw pixels"]["linear"].mean > 90


def test_the_published_probe_says_what_each_epoch_gave(result):
    names = [
        f"{name}, linear probe, epoch {epoch} of 2: loss " for name in ("pretrained", "the same") for epoch in (1, 2)
    ]
    assert [line.partition(": loss ")[0] + ": loss " for line in LINES] == names
    last = f"top-1 {result.table['pretrained']['published linear'].mean:.2f} %"
    assert last in LINES[1]


def test_a_probe_that_diverges_costs_no_other_score(splits, backbone):
    lines: list[str] = []
    recipe = replace(tiny.RECIPE, probe=Probe(epochs=9, batch=16, lr=3e38))
    scores = evaluate.evaluate(backbone, splits, recipe, **CPU, published_probe=True, log=lines.append)
    assert "linear" in scores.table["pretrained"] and "published linear" not in scores.table["pretrained"]
    assert lines == ["pretrained: the linear probe diverged at learning rate 3e+38; try a lower one"]


def test_baselines_have_the_published_probe_on_request(splits, backbone):
    recipe = replace(tiny.RECIPE, probe=Probe(epochs=1))
    scores = evaluate.evaluate(backbone, splits, recipe, **CPU, published_probe=True, probe_baselines=True)
    assert all("published linear" in row for row in scores.table.values())


def test_the_comparisons_name_the_better_baseline_and_every_rival(result):
    first, rival = result.comparisons
    baselines = {name: result.table[name]["linear"].mean for name in evaluate.BASELINES}
    assert first.other == max(baselines, key=baselines.get)
    assert (first.score, first.other_score) == pytest.approx(
        (result.table["pretrained"]["linear"].mean, baselines[first.other]), abs=1e-4
    )
    assert (rival.other, rival.verdict, rival.low, rival.difference, rival.high) == ("the same", "unclear", 0, 0, 0)
    assert "retraining" in result.sentences[0] and "the same" in result.sentences[1]


def test_a_terminal_gets_every_number_within_100_columns(result):
    text = evaluate.as_text(result.table)
    assert max(map(len, text.splitlines())) <= 100
    blocks = text.split("\n\n")
    assert len(blocks) == 2
    for block in blocks:
        assert len({len(line) for line in block.splitlines()}) == 1
        assert [line.split("  ")[0] for line in block.splitlines()[2:]] == list(result.table)
    linear, few = result.table["untrained"]["linear"], result.table["untrained"]["1 a class"]
    assert f"{linear.mean:.1f} ±{(linear.high - linear.low) / 2:.1f}" in text
    assert f"{few.mean:.1f} ±{few.sd:.1f}" in text
    assert blocks[1].splitlines()[-1].endswith("–")  # raw pixels cannot be tuned


def test_json_carries_every_number(result):
    content = json.loads(json.dumps(result.to_json()))
    few = result.table["untrained"]["1 a class"]
    assert content["scores"]["untrained"]["1 a class"] == few._asdict()
    assert set(content["scores"]["untrained"]["kNN"]) == {"mean", "low", "high"}
    assert content["comparisons"][0]["sentence"] == result.sentences[0]
    assert content["comparisons"][0]["verdict"] in ("better", "unclear", "worse")


def test_a_rival_sees_the_same_images(splits, backbone):
    fewer = cache.Splits(splits.train, splits.test.select(torch.arange(19)))
    with pytest.raises(ValueError, match="other has other images"):
        evaluate.evaluate(
            backbone, splits, tiny.RECIPE, **CPU, rivals=[evaluate.Contender("other", backbone, tiny.RECIPE, fewer)]
        )


@pytest.mark.parametrize(
    ("train", "test", "remarks"),
    [
        ([0, 1] * 10, [0, 1] * 10, []),
        ([0, 1] * 10, [0, 1] * 9 + [0], ["19 test images are too few for a score: one image is 5 points."]),
        ([0, 1], [0, 1] * 10, ["Every class has one training image: the scores say little about the features."]),
        (
            [0, 1, 2, 3, 4],
            [0, 1] * 10,
            ["6 classes for 5 training images, fewer than two a class: the scores say little about the features."],
        ),
        (
            [0] * 20,
            [0] * 10 + [1] * 10,
            [
                "All training images belong to one class, so every classifier predicts it.",
                "10 of 20 test images belong to classes without training images: always wrong.",
            ],
        ),
        (
            [0, 1] * 10,
            [1] * 20,
            ["All 20 test images are of one class (dog): always answering it scores 100 %."],
        ),
        ([0, 1] * 10, [1], ["1 test image is too few for a score: one image is 100 points."]),
    ],
)
def test_remarks_say_when_scores_mean_little(train, test, remarks):
    names = ("cat", "dog", "eel", "fox", "gnu", "hen")[: 6 if len(train) == 5 else 2]
    assert list(evaluate.remarks_on(torch.tensor(train), torch.tensor(test), names)) == remarks


def test_results_carry_their_remarks(splits, backbone, result):
    assert result.remarks == ()  # sixty images to train on, twenty to test on
    few = cache.Splits(splits.train, splits.test.select(torch.arange(3)))
    remarks = evaluate.evaluate(backbone, few, tiny.RECIPE, **CPU).to_json()["remarks"]
    assert remarks[0] == "3 test images are too few for a score: one image is 33 points."


def test_names_of_other_weights_are_short_and_distinct():
    given = [
        "timm:resnet18",
        "runs/a/checkpoints/step-9.safetensors",
        "runs/b/checkpoints/step-9.safetensors",
        "x/untrained",
    ]
    assert evaluate.distinct_names(given) == ["timm:resnet18", "step-9", given[2], "x/untrained"]
    assert len(set(evaluate.distinct_names(["a", "a", "a"]))) == 3


def test_baselines_are_a_random_network_and_the_pixels(splits, backbone, result):
    start = evaluate.random_backbone(splits.train, tiny.RECIPE, **CPU)
    for name, model in (("untrained", start), ("raw pixels", nn.Flatten()), ("pretrained", backbone)):
        train, test = (features.extract_features(model, part, tiny.RECIPE) for part in splits)
        predicted = probes.knn(train, splits.train.labels, test)
        assert result.table[name]["kNN"].mean == pytest.approx(probes.accuracy(predicted, splits.test.labels))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_random_network_is_no_straw_man(splits, interpolation):
    recipe = replace(tiny.RECIPE, interpolation=interpolation)
    model = evaluate.random_backbone(splits.train, recipe, **CPU)
    assert not model.training
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() for norm in norms)  # timm starts each block's last one at 0
    seen = []
    model.bn1.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    features.extract_features(model, splits.train, recipe)
    variance, mean = torch.var_mean(seen[-1], (0, 2, 3))  # the 60 images were one batch, after trials of its memory
    torch.testing.assert_close(model.bn1.running_mean, mean)
    torch.testing.assert_close(model.bn1.running_var, variance)
    torch.manual_seed(key(tiny.RECIPE.seed, "weights"))
    start = network.Network(tiny.RECIPE.backbone, tiny.RECIPE.projector).backbone
    assert model.conv1.weight.equal(start.conv1.weight)


def test_scores_need_labels_and_say_so(splits):
    unlabelled = replace(splits.train, labels=None, classes=())
    with pytest.raises(ValueError, match="a score needs labels"):
        evaluate.check_labels(cache.Splits(unlabelled, splits.test))
    with pytest.raises(ValueError, match="a score needs labels"):  # before an advice that would not help
        evaluate.check_labels(cache.Splits(unlabelled, None))
    with pytest.raises(ValueError, match="no images to test on"):
        evaluate.check_labels(cache.Splits(splits.train, None))


@pytest.mark.parametrize(
    ("device", "free", "has"), [("cuda", 100, True), ("cuda", 99, False), ("cpu", 100, False), ("mps", 100, False)]
)
def test_probes_go_to_a_gpu_that_has_room_for_them(monkeypatch, device, free, has):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
    assert evaluate.has_room(torch.device(device), 100) == has


def test_probes_stay_on_the_cpu_where_a_gpu_has_no_room(monkeypatch, splits):
    """Room for the features alone is not enough: the probes need some to work in."""
    train, test = (torch.randn(len(part), 8) for part in (splits.train, splits.test))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (train.nbytes + test.nbytes, 2**36))
    found = evaluate.probe_features(train, test, splits, seed=0, device=torch.device("cuda"))
    assert found["linear"].device.type == "cpu"


@pytest.mark.gpu
def test_probes_on_a_gpu_say_what_they_say_on_a_cpu(splits):
    assert splits.test is not None
    rng = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(len(splits.train.classes), 32, generator=rng)
    train, test = (
        means[part.labels] + torch.randn(len(part), 32, generator=rng) for part in (splits.train, splits.test)
    )
    here, there = (
        evaluate.probe_features(train, test, splits, seed=0, device=torch.device(name)) for name in ("cpu", "cuda")
    )
    assert here.keys() == there.keys()
    for name, outcomes in here.items():
        assert there[name].device.type == "cpu" and there[name].shape == outcomes.shape
        assert (there[name] - outcomes).abs().mean() <= 0.02, name


@pytest.mark.parametrize(
    ("pretrained", "before", "pixels", "said"),
    [
        (0.7, 0.6, 0.9, True),
        (0.7, 0.6, 0.73, False),
        (0.7, 0.6, 0.65, False),
        (0.6, 0.9, 0.8, False),
        (0.7, None, 0.9, False),
    ],
)
def test_a_baseline_clearly_above_start_and_end_is_remarked(pretrained, before, pixels, said):
    rates = {"pretrained": pretrained, "untrained": 0.1, "raw pixels": pixels} | (
        {} if before is None else {"before": before}
    )
    outcomes = {name: {"linear": (torch.arange(100) < 100 * rate).float()[None]} for name, rate in rates.items()}
    remarks = evaluate.remark_on_start(outcomes, seed=0)
    assert bool(remarks) is said
    if said:
        scores = "linear 90.0, clearly more than the 70.0 of these weights"
        assert remarks == (f"Raw pixels reach {scores}: the weights do not suit these images.",)
