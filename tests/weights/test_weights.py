"""Loading weights: any file loads whole, under any prefix, or not at all; a pickle never runs."""

import json
import os
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import tiny
from corinfomax import network as networks
from corinfomax.cli.main import main
from corinfomax.evaluation import features
from corinfomax.images import cache
from corinfomax.recipes.fields import Backbone
from corinfomax.runtime.records import WeightsOptions
from corinfomax.weights import load as weights

NAME = "test_resnet"  # tiny, from timm


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(5)
    model = timm.create_model(NAME, num_classes=0).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_features(model: nn.Module, other: nn.Module) -> bool:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x).equal(other(x))


def load(path, **options) -> weights.LoadedBackbone:
    return weights.load_backbone(str(path), WeightsOptions(**{"architecture": NAME, **options}))


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".pt", ".PTH", ".SafeTensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.encoder_q."])
def test_a_state_dict_loads_whole_from_any_file(model, state, tmp_path, ending, prefix):
    path = tmp_path / f"weights{ending}"
    content = {prefix + name: tensor for name, tensor in state.items()}
    save_file(content, path) if ending.lower() == ".safetensors" else torch.save(content, path)
    loaded = load(path)
    assert same_features(model, loaded.backbone)
    assert not loaded.backbone.training
    assert f"all {len(state)} tensors of {path}, a {NAME} at " in loaded.summary
    assert (f"prefix {prefix} removed" in loaded.summary) == bool(prefix)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_file_of_a_training_script_loads_by_its_architecture(model, state, tmp_path, key):
    path = tmp_path / "last.pth.tar"
    torch.save({"epoch": 3, "arch": NAME, key: state, "optimizer": {"state": {}}}, path)
    loaded = weights.load_backbone(str(path))
    assert same_features(model, loaded.backbone)
    assert loaded.recipe.backbone.name == NAME


def test_the_summary_names_ignored_tensors(model, state, tmp_path):
    whole = timm.create_model(NAME, num_classes=10).state_dict()
    content = {f"backbone.{name}": tensor for name, tensor in (whole | state).items()}
    content = {name: tensor for name, tensor in content.items() if not name.endswith("num_batches_tracked")}
    content |= {"projector.0.weight": torch.zeros(3, 3), "queue": torch.zeros(3)}
    torch.save(content, tmp_path / "a.pth")
    loaded = load(tmp_path / "a.pth")
    assert same_features(model, loaded.backbone)
    counts = sum(name.endswith("num_batches_tracked") for name in state)
    for words in (
        "prefix backbone. removed",
        "classifier backbone.fc.weight and backbone.fc.bias ignored",
        "2 tensors outside the backbone ignored, such as projector.0.weight",
        f"{counts} batch counts set to 0",
    ):
        assert words in loaded.summary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer1.0.bn1.bias"), r"tensors.*: 1 missing \(layer1.0.bn1.bias\)"),
        (lambda s: s.update(extra=torch.zeros(2)), r"tensors.*: 1 unexpected \(extra\)"),
        (lambda s: s.update({"conv1.0.weight": torch.zeros(3, 3)}), r"1 of another shape \(conv1.0.weight: 3×3 for "),
        (lambda s: s["bn1.running_var"].mul_(-1), "a negative variance in bn1.running_var"),
        (lambda s: s["bn1.weight"].fill_(torch.nan), "nan or inf in one tensor, bn1.weight"),
        (lambda s: s.clear(), "missing|no state dict"),
        (
            lambda s: s.update({f"b.{k}": v.clone() for k, v in s.items()}),
            r"holds 2 networks that fit, under (no prefix|backbone\.) and .*: choose one, for example --prefix",
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_weights_that_do_not_fit_are_refused(state, tmp_path, change, message, prefix):
    change(state)
    path = tmp_path / "a.safetensors"
    save_file({prefix + name: tensor for name, tensor in state.items()}, path)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def named(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def moco(first, second):
    return {"epoch": 3, "state_dict": named("module.encoder_q.", first) | named("module.encoder_k.", second)}


def dino(first, second):
    nested = {"student": named("module.backbone.", first), "teacher": named("module.backbone.", second)}
    return {**nested, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "args": None}


def byol(first, second):
    return named("online_encoder.", first) | named("target_encoder.", second)


@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (moco, "module.encoder_q", "module.encoder_k"),
        (dino, "student", "teacher"),
        (dino, "student.module.backbone.", "teacher.module.backbone"),
        (byol, "online_encoder", "target_encoder"),
    ],
)
def test_one_network_of_several_is_chosen_by_its_prefix(model, state, tmp_path, make, first, second):
    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    torch.save(make(other, state), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"2 networks that fit, under .*: choose one, for example --prefix ") as error:
        load(tmp_path / "a.pth")
    assert first.rstrip(".") in str(error.value) and second in str(error.value)
    assert same_features(model, load(tmp_path / "a.pth", prefix=second).backbone)
    assert not same_features(model, load(tmp_path / "a.pth", prefix=first).backbone)
    with pytest.raises(ValueError, match=r"no network under the prefix 'nope'; it has "):
        load(tmp_path / "a.pth", prefix="nope")


@pytest.mark.parametrize("prefix", ["", "backbone.", "module."])
@pytest.mark.parametrize("name", ["resnet34", "vit_tiny_patch16_224"])
def test_weights_of_another_network_are_named(tmp_path, name, prefix):
    tensors = timm.create_model(name).state_dict()  # with its classifier
    torch.save({prefix + key: tensor for key, tensor in tensors.items()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"is no resnet18, so nothing was loaded: its tensors are those of {name}$"):
        load(tmp_path / "a.pth", architecture="resnet18")
    with pytest.raises(ValueError, match=f"does not record its network; add --architecture {name}"):
        load(tmp_path / "a.pth", architecture=None)


def test_a_misfit_is_told_under_the_prefix_where_most_fits(tmp_path):
    tensors = timm.create_model("resnet18", num_classes=0).state_dict()
    tensors["layer1.0.conv1.weight"] = torch.zeros(2, 2)
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"1 of another shape \(layer1\.0\.conv1\.weight: 2×2 for 64×64×3×3\)$"):
        load(tmp_path / "a.pth", architecture="resnet18")


def test_the_input_of_foreign_weights_can_be_typed_and_is_said(state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    assumed = load(tmp_path / "a.safetensors", size=32)
    assert f"mean 0.5 0.5 0.5, std 0.5 0.5 0.5, bilinear; these are timm's values for {NAME}" in assumed.summary
    assert "change them with --mean, --std and --interpolation" in assumed.summary
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    typed = load(tmp_path / "a.safetensors", size=32, mean=mean, std=std, interpolation="bicubic")
    assert (typed.recipe.mean, typed.recipe.std, typed.recipe.interpolation) == (mean, std, "bicubic")
    assert "mean 0.4914 0.4822 0.4465, std 0.247 0.2435 0.2616, bicubic" in typed.summary
    assert "change them" not in typed.summary

    images = cache.load(tiny.folder(tmp_path / "data", {"": 4}, side=48), side=48, progress=False).train
    one, other = (features.extract_features(nn.Flatten(), images, each.recipe) for each in (assumed, typed))
    assert one.shape == other.shape and (one - other).abs().mean() > 0.1


def test_weights_of_ours_know_their_input(tmp_path, capsys):
    data = tiny.folder(tmp_path / "data", {"train": 16, "test": 6})
    assert main(["pretrain", str(data), "--out", str(tmp_path / "run"), *tiny.KNOBS, "--no-report"]) == 0
    for words in (["--size", "64"], ["--mean", "0", "0", "0"], ["--prefix", "module"]):
        assert main(["evaluate", str(tmp_path / "run"), str(data), *words]) == 2
        assert f"records its network and input: {words[0]} is for weights that do not" in capsys.readouterr().err


@pytest.mark.parametrize("option", [{"architecture": "resnet34"}, {"small_stem": True}, {"prefix": "module"}])
def test_a_network_of_timm_is_named_once(option):
    flag = next(iter(option)).replace("_", "-")
    with pytest.raises(ValueError, match=f"^timm:resnet18 records its network: --{flag} is for weights that do not"):
        weights.load_backbone("timm:resnet18", WeightsOptions(**option))


def test_an_input_too_small_for_the_network_names_one_that_is_not(tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="vit_tiny_patch16_224 cannot take images of 20 px: try --size 32"):
        load(tmp_path / "a.pth", architecture="vit_tiny_patch16_224", size=20)
    with pytest.raises(ValueError, match="vit_tiny_patch16_224 cannot take images of 0 px: try --size 16"):
        load(tmp_path / "a.pth", architecture="vit_tiny_patch16_224", size=0)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_bomb_is_refused_and_does_not_run(state, tmp_path, zipped, capsys):
    path, crater = tmp_path / "bomb.pth", tmp_path / "crater"
    torch.save({**state, "conv1.weight": Bomb(str(crater))}, path, _use_new_zipfile_serialization=zipped)
    assert main(["evaluate", str(path), "anything", "--architecture", NAME]) == 2
    err = capsys.readouterr().err
    assert "bomb.pth was refused" in err and "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert not crater.exists()
    torch.load(path, weights_only=False)  # the bomb works
    assert crater.exists()


@pytest.mark.parametrize(
    ("ending", "message"), [(".safetensors", "is not a whole safetensors file"), (".pth", "was refused: it is torn")]
)
@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04" + bytes(40), None])
def test_a_torn_file_is_named(state, tmp_path, ending, message, content):
    path = tmp_path / f"a{ending}"
    save_file(state, path) if ending == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    with pytest.raises(ValueError, match=rf"a\{ending} {message}"):
        load(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.safetensors"], "does not record its network; add --architecture"),
        (["a.safetensors", "--architecture", "resnet19"], "timm knows no network 'resnet19'"),
        (["a.safetensors", "--architecture", "resnet18"], "is no resnet18, so nothing was loaded; tensors: "),
        (["a.onnx"], "a.onnx is not a file of weights"),
        (["list.pth"], "holds a list; want a state dict"),
        (["empty"], "holds no checkpoint"),
        (["nowhere.pth"], "no weights at nowhere.pth"),
        (["timm:resnet19"], "timm knows no network 'resnet19'"),
        (["timm:resnet18.nope"], "timm has no weights 'resnet18.nope'; it has resnet18.a1_in1k"),
        (["timm:resnet18"], "are not on this machine and http"),
        (["timm:hf-hub:me/net"], "timm's weights of me/net are not on this machine and http"),
        (["odd"], "names the architecture 'resnet19', unknown to timm"),
        (["bare"], "no model.safetensors or pytorch_model.bin beside it"),
    ],
)
def test_a_mistake_with_weights_is_one_sentence(state, tmp_path, words, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights.constants, "ENDPOINT", "http://127.0.0.1:9")  # a port without a server
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *_: None)
    save_file(state, "a.safetensors")
    (tmp_path / "a.onnx").write_bytes(b"x")
    torch.save([1, 2], "list.pth")
    (tmp_path / "empty").mkdir()
    for name in ("odd", "bare"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"architecture": "resnet19"}))
    save_file(state, "odd/model.safetensors")
    assert main(["evaluate", words[0], "anything", *words[1:]]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and len(err.strip().splitlines()) == 1


def test_a_folder_in_timms_layout_loads(model, tmp_path):
    timm.models.save_for_hf(model, tmp_path / "hub", safe_serialization=True)
    loaded = weights.load_backbone(str(tmp_path / "hub"))
    assert same_features(model, loaded.backbone)
    assert loaded.recipe.size == model.pretrained_cfg["input_size"][-1]
    assert loaded.recipe.mean == tuple(model.pretrained_cfg["mean"])
    assert weights.load_backbone(str(tmp_path / "hub"), WeightsOptions(size=64)).recipe.size == 64


def test_timms_weights_have_timms_input_size(monkeypatch):
    monkeypatch.setattr(weights, "_check_reachable", lambda *_: None)
    create, arguments = timm.create_model, {}

    def create_untrained(name, pretrained, **options):
        arguments.update(options, pretrained=pretrained)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", create_untrained)
    recipe = weights.load_backbone("timm:vit_tiny_patch16_384").recipe
    assert arguments == {"pretrained": True, "num_classes": 0, "img_size": 384}
    assert (recipe.size, recipe.cache_side, recipe.mean) == (384, 438, (0.5, 0.5, 0.5))


def test_a_repository_of_the_hub_has_its_own_input(monkeypatch):
    described = {"input_size": (3, 96, 96), "mean": (0.1, 0.2, 0.3), "license": "mit", "hf_hub_id": "me/net", "odd": 1}
    monkeypatch.setattr(weights, "_check_reachable", lambda *_: None)
    monkeypatch.setattr(weights, "load_model_config_from_hf", lambda name: (described, "resnet18", {}))
    create, asked = timm.create_model, []

    def create_untrained(name, pretrained, **options):
        asked.append((name, pretrained))
        return create("resnet18", **options)

    monkeypatch.setattr(timm, "create_model", create_untrained)
    loaded = weights.load_backbone("timm:hf-hub:me/net")
    assert asked == [("hf-hub:me/net", True)]
    assert (loaded.recipe.size, loaded.recipe.mean, loaded.recipe.backbone.name) == (96, (0.1, 0.2, 0.3), "resnet18")
    assert loaded.start("timm:hf-hub:me/net").license == "mit"


def test_a_repository_that_is_no_network_is_named(monkeypatch):
    def refuse(name):
        raise FileNotFoundError("404\nmore")

    monkeypatch.setattr(weights, "_check_reachable", lambda *_: None)
    monkeypatch.setattr(weights, "load_model_config_from_hf", refuse)
    with pytest.raises(ValueError, match=r"me/net is no network of timm on the hub: 404$"):
        weights.load_backbone("timm:hf-hub:me/net")


def test_a_small_stem_loads_on_request(tmp_path):
    stem = Backbone(name="resnet18", small_stem=True)
    network = networks.build_backbone(stem).eval()
    save_file(network.state_dict(), tmp_path / "cifar.safetensors")
    with pytest.raises(ValueError, match=r"conv1.weight: 64×3×3×3 for 64×3×7×7"):
        weights.load_backbone(str(tmp_path / "cifar.safetensors"), WeightsOptions(architecture="resnet18"))
    loaded = weights.load_backbone(
        str(tmp_path / "cifar.safetensors"), WeightsOptions(architecture="resnet18", small_stem=True, size=32)
    )
    assert same_features(network, loaded.backbone)
    assert loaded.recipe == replace(loaded.recipe, size=32, backbone=stem)


def test_data_without_labels_is_refused_in_one_sentence(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(model.state_dict(), "a.safetensors")
    tiny.folder(tmp_path / "flat", {"": 12}, labelled=False)
    (tmp_path / "empty").mkdir()
    lines = [f"flat/{i:03}.png,{'red' if i % 4 == 0 else 'green' if i % 4 == 1 else ''}" for i in range(12)]
    (tmp_path / "half.csv").write_text("\n".join(["path,label", *lines]))
    for data, message in (
        ("flat", "a score needs labels"),
        ("empty", "no image found in"),
        ("half.csv", "labels 6 of its 12 train images; the first without a label is flat/002.png in line 4"),
    ):
        assert main(["evaluate", "a.safetensors", data, "--architecture", NAME, "--size", "32"]) == 2
        err = capsys.readouterr().err
        assert message in err and len(err.strip().splitlines()) == 1


def test_evaluate_compares_several_weights(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.folder(tmp_path / "data", {"train": 24, "test": 8})
    save_file(model.state_dict(), "a.safetensors")
    torch.save(model.state_dict(), "b.pth")
    words = ["--architecture", NAME, "--size", "32", "--against", "b.pth", "--against", "a.safetensors"]
    assert main(["evaluate", "a.safetensors", "data", *words, "--out", "scores.json"]) == 0
    out = capsys.readouterr().out
    assert f"all {len(model.state_dict())} tensors of b.pth" in out
    content = json.loads((tmp_path / "scores.json").read_text())
    assert list(content["scores"]) == ["pretrained", "b", "a", "untrained", "raw pixels"]
    assert content["scores"]["b"] == content["scores"]["pretrained"]
    assert [c["other"] for c in content["comparisons"]][1:] == ["b", "a"]
    assert max(map(len, out[out.index("%") :].split("±:")[0].splitlines())) <= 100


def test_integer_tensors_are_refused(tmp_path):
    state = {name: x.long() for name, x in timm.create_model(NAME, num_classes=0).state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"holds integers .*int64.* instead of weights, first in"):
        weights.load_backbone(str(tmp_path / "a.safetensors"), WeightsOptions(architecture=NAME))


@pytest.mark.parametrize("recipe", ["not json", "[]", '{"not": 1}'])
def test_an_invalid_recipe_is_refused_with_its_file(tmp_path, recipe):
    save_file(
        timm.create_model(NAME, num_classes=0).state_dict(), tmp_path / "a.safetensors", metadata={"recipe": recipe}
    )
    with pytest.raises(ValueError, match=r"a\.safetensors records an invalid recipe"):
        weights.load_backbone(str(tmp_path / "a.safetensors"))
