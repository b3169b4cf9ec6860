"""Exports load without this package and give the same features."""

import json
import runpy
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import tiny
from corinfomax import network as networks
from corinfomax.cli.main import main
from corinfomax.images import cache
from corinfomax.recipes.fields import Backbone
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Comparison, Facts, Results, Score, Verdict
from corinfomax.views import operations
from corinfomax.weights import checkpoint, export, load

PLAIN = Backbone(layers=(1, 1, 1, 1), channels=(8, 8, 8, 16))
SMALL = tiny.RECIPE.backbone
RESULTS = Results(
    verdict=Verdict("healthy", "Its rank grew to 7.", "Train on.", {}),
    table={"pretrained": {"kNN": Score(61.25, None, 60.0, 62.5)}, "raw pixels": {}},
    comparisons=(Comparison("better", 61.2, "raw pixels", 40.0, 21.2, 18.0, 24.0, 9, 12),),
    sentences=("Pretraining helped: a lot.",),
    train=40,
    test=12,
)
FACTS = Facts(data="/home/someone/photos", images=4000, fingerprint="abc", recipe_name="cpu-small")


def trained(backbone: Backbone, size: int = 16, scale: float = 1.0):
    """A network with BatchNorm statistics and branches far from their initial values, and its checkpoint."""
    torch.manual_seed(2)
    recipe = replace(tiny.RECIPE, backbone=backbone, size=size, test_scale=scale)
    model = networks.build_backbone(backbone, size=size).eval()
    for name, tensor in model.state_dict().items():
        if "bn" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return model, checkpoint.Checkpoint(recipe, 7, FACTS, {}, {}, {})


@pytest.fixture
def in_process(monkeypatch):
    """Run the script of the fresh process in this one: starting Python and importing torch takes seconds."""

    def run(words, cwd, **_):
        ours = sys.modules["corinfomax"]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", words[1:])
            try:
                runpy.run_path(words[1])
            except RuntimeError as error:
                return subprocess.CompletedProcess(words, 1, "", f"RuntimeError: {error}".replace("\n", " "))
            finally:
                assert sys.modules["corinfomax"] is None
                sys.modules["corinfomax"] = ours
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(export.subprocess, "run", run)


def test_a_timm_folder_loads_in_timm_in_a_process_without_us(tmp_path):
    model, saved = trained(PLAIN, 32)
    done = export.export_backbone(model, saved, tmp_path / "out", "timm", results=Results())
    assert done.tensors == len(model.state_dict()) and done.difference <= 1e-6
    assert done.loader == "by timm alone"
    # Once more, in a process that this test starts.
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "x.npy", x.numpy())
    code = """
import sys
sys.modules["corinfomax"] = None
import numpy, timm, torch
model = timm.create_model("local-dir:out", pretrained=True).eval()
x = torch.from_numpy(numpy.load("x.npy"))
with torch.inference_mode():
    numpy.save("y.npy", model(x).numpy())
print(timm.create_model("local-dir:out", pretrained=True, num_classes=5)(x).shape[1])
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "5"  # ready for another classifier
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "y.npy")), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 32), ("vit_tiny_patch16_224", 32), ("test_convnext", 64), ("resnet18.a1_in1k", 32)]
)
def test_any_timm_network_is_a_timm_folder(tmp_path, in_process, name, size):
    model, saved = trained(Backbone(name=name), size)
    done = export.export_backbone(model, saved, tmp_path / "out", "timm", results=Results())
    assert done.tensors == len(model.state_dict()) and done.difference <= 1e-6
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert tiny.equal_states(loaded.state_dict(), model.state_dict())
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1  # the same readers


@pytest.mark.parametrize(
    "backbone",
    [
        replace(SMALL, stem_stride=1),
        SMALL,
        replace(SMALL, channels=(64, 8, 8, 16)),
        Backbone(small_stem=True),
        Backbone(name="resnet26", small_stem=True, channels=(8, 8, 8, 16)),
    ],
    ids=["stride 1", "stride 2", "64 channels", "the paper's", "bottlenecks"],
)
def test_a_small_stem_comes_with_its_loader_and_is_never_loaded_wrongly(tmp_path, in_process, backbone):
    model, saved = trained(backbone)
    done = export.export_backbone(model, saved, tmp_path / "out", "timm", results=Results())
    assert done.loader == "by its load.py and timm alone" and done.difference <= 1e-6
    assert "corinfomax" not in (tmp_path / "out" / "load.py").read_text()
    got = runpy.run_path(str(tmp_path / "out" / "load.py"))["backbone"]()
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(got(x), model(x))
    with pytest.raises(RuntimeError, match=r"conv1\.weight"):
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert "`load.py` builds it" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("size", "scale"), [(32, 1.0), (24, 4 / 3)])
def test_timms_own_preprocessing_of_the_folder_is_ours(tmp_path, in_process, size, scale):
    model, saved = trained(PLAIN, size, scale)
    export.export_backbone(model, saved, tmp_path / "out", "timm", results=Results())
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded))
    picture = tiny.pictures(1, side=50)[0]
    theirs = transform(Image.fromarray(picture))
    ours = operations.centre_view(
        torch.from_numpy(picture).permute(2, 0, 1)[None],
        torch.tensor([[50, 50]]),
        size=32,
        scaling=saved.recipe.scaling,
    )[0]
    # Pillow rounds, and cuts off overshoot, between its two directions; a step is 1/255 over a std of about 0.22.
    steps = (theirs - ours).abs() * 255 * 0.22
    assert steps.mean() < 0.5 and steps.max() < 4


@pytest.mark.parametrize(
    ("backbone", "loader"),
    [(Backbone(name="resnet18"), "by torchvision alone"), (SMALL, "by timm alone"), (PLAIN, "by timm alone")],
)
def test_a_state_dict_is_one_file_that_loads_anywhere(tmp_path, in_process, backbone, loader):
    model, saved = trained(backbone, 32)
    done = export.export_backbone(model, saved, tmp_path / "a.safetensors", "state-dict", results=Results())
    assert (done.loader, done.tensors) == (loader, len(model.state_dict()))
    assert tiny.equal_states(load_file(tmp_path / "a.safetensors"), model.state_dict())
    again = load.load_backbone(str(tmp_path / "a.safetensors"))  # it records its recipe
    assert again.recipe == saved.recipe
    assert tiny.equal_states(again.backbone.state_dict(), model.state_dict())


def test_onnx_takes_any_number_of_images(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, saved = trained(SMALL)
    done = export.export_backbone(model, saved, tmp_path / "a.onnx", "onnx", results=Results())
    assert done.difference <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    for count in (1, 2, 9):
        x = torch.randn(count, 3, 16, 16)
        with torch.inference_mode():
            (got,) = session.run(None, {"images": x.numpy()})
            np.testing.assert_allclose(got, model(x).numpy(), atol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["recipe"])["size"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize("form", ["timm", "state-dict"])
def test_an_export_that_gives_other_features_is_not_kept(tmp_path, in_process, monkeypatch, form):
    model, saved = trained(PLAIN, 32)
    other = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other["layer1.0.conv1.weight"][0, 0, 0, 0] += 1
    save = export.save
    monkeypatch.setattr(export, "save", lambda _, metadata: save(other, metadata))
    with pytest.raises(ValueError, match="was not kept: loaded by timm alone, its features differ by"):
        export.export_backbone(model, saved, tmp_path / "out", form, results=Results())
    other.pop("bn1.weight")
    with pytest.raises(ValueError, match=r"a fresh process cannot load it: .*bn1\.weight"):
        export.export_backbone(model, saved, tmp_path / "out", form, results=Results())
    assert list(tmp_path.iterdir()) == []


def test_the_card_has_data_recipe_verdict_and_scores(tmp_path, in_process):
    model, saved = trained(PLAIN, 32)
    export.export_backbone(model, saved, tmp_path / "out", "timm", results=RESULTS)
    text = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "4,000 from `photos`",
        "recipe cpu-small, 2 epochs in batches of 8, at 32 px; weights after step 7",
        "healthy: Its rank grew to 7. Train on.",
        "| pretrained | 61.2 (60.0–62.5) |",
        "| raw pixels | – |",
        "Pretraining helped: a lot.",
        'timm.create_model("local-dir:',
    ):
        assert words in text
    assert "/home/someone" not in text
    start = text.index("```json") + 7
    assert json.loads(text[start : text.index("```", start)])["size"] == 32
    assert "bfloat16" not in text


def test_the_card_of_a_bfloat16_run_says_so_of_its_scores(tmp_path, in_process):
    model, saved = trained(PLAIN, 32)
    saved = saved._replace(recipe=replace(saved.recipe, precision="bfloat16"))
    done = export.export_backbone(model, saved, tmp_path / "out", "timm", results=RESULTS)
    assert done.difference <= 1e-6  # float32
    assert "of bfloat16 features; this code gives float32" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("job")
    data = tiny.folder(root / "data", {"train": 32, "test": 8})
    knobs = ["--size", "16", "--cache-side", "16", "--batch", "8", "--epochs", "2", "--projector.widths", "32", "8"]
    words = ["pretrain", str(data), "--out", str(root / "run"), "--checkpoint-minutes", "0", *knobs]
    network = ["--backbone.layers", "1", "1", "1", "1", "--backbone.channels", "8", "8", "8", "16"]
    assert main([*words, *network, "--no-report"]) == 0
    return root / "run", data


def test_a_run_is_exported_verified_and_scored_like_the_run(run, tmp_path, capsys, monkeypatch, in_process):
    folder, data = run
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(folder)]) == 0
    assert "run-timm: " in (out := capsys.readouterr().out) and "in a fresh process" in out
    assert "| pretrained |" in (tmp_path / "run-timm" / "README.md").read_text()
    assert main(["export", str(folder)]) == 2
    assert "run-timm already exists" in capsys.readouterr().err
    first, *_, last = run_folder.checkpoints(folder)
    assert main(["export", str(first), "--format", "state-dict"]) == 0
    assert (tmp_path / f"run-step-{run_folder.step_of(first)}.safetensors").is_file()
    scores = []
    for source in (last, "run-timm"):
        assert main(["evaluate", str(source), str(data), "--out", "scores.json"]) == 0
        scores.append(json.loads((tmp_path / "scores.json").read_text()))
    assert scores[0] == scores[1]
    assert cache.load(data, side=16).test is not None


def test_an_earlier_checkpoints_card_has_no_scores_of_the_last(run, tmp_path, in_process, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = run
    first = run_folder.checkpoints(folder)[0]
    assert main(["export", str(first), "--out", "early"]) == 0
    assert "| pretrained |" not in (tmp_path / "early" / "README.md").read_text()


def test_onnx_without_its_extra_is_refused(run, monkeypatch, capsys):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda _: None)
    assert main(["export", str(run[0]), "--format", "onnx"]) == 2
    assert "the extra onnx: uv pip install 'corinfomax[onnx]'" in capsys.readouterr().err
