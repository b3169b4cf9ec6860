"""`pretrain --init`: from anyone's weights to better ones, or back to those it started from."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import tiny
from corinfomax.cli.main import main
from corinfomax.evaluation import table
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Comparison, Results
from corinfomax.weights import checkpoint, load

NAME = "test_resnet"
SHORT = ["--size", "32", "--batch", "8", "--epochs", "2", "--projector.widths", "32", "8", "--no-report"]
SHORT += ["--tuning.projector-epochs", "0.4", "--diagnoses", "2", "--scores", "1"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.folder(tmp_path / "data", {"train": 40, "test": 24})


@pytest.fixture
def model():
    torch.manual_seed(4)
    model = timm.create_model(NAME, num_classes=0).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def weights(model, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    return path


def read(path):
    return Path(path).read_text()


def pretrain(data, weights, *words, out="run", name=True):
    given = ["--backbone.name", NAME] if name else []
    return main(["pretrain", str(data), "--init", str(weights), "--out", out, *SHORT, *given, *map(str, words)])


def said(monkeypatch, verdict):
    """Let the comparison with the start end like this."""
    comparison = Comparison(verdict, 70.0, "before", 60.0, 10.0, 5.0, 15.0, 9, 24)
    real = table.compare_all

    def compared(outcomes, *, seed):
        assert table.BEFORE in outcomes
        comparisons, sentences = real(outcomes, seed=seed)
        return (comparison, *comparisons[1:]), sentences

    monkeypatch.setattr(table, "compare_all", compared)


def test_a_run_starts_from_the_weights_and_keeps_a_copy(data, model, weights, capsys):
    assert pretrain(data, weights) == 0
    out = capsys.readouterr().out
    count = len(model.state_dict())
    assert f"starting from all {count} tensors of {weights}, a {NAME} at 32 px" in out
    assert "recipe adapt at 32 px, 2 epochs, for 40 images of 16 px" in out
    assert tiny.equal_states(load_file("run/start.safetensors"), model.state_dict())
    facts = json.loads(read("run/recipe.json"))["facts"]
    assert facts["start"]["name"] == str(weights)

    # the scores: the weights of the start are a row, and the first sentence is about them
    results = json.loads(read("run/results.json"))
    assert list(results["scores"]) == ["pretrained", "before", "untrained", "raw pixels"]
    assert results["comparisons"][0]["other"] == "before"
    assert results["comparisons"][0]["sentence"].startswith("Continuing ")
    assert "linear " in results["comparisons"][0]["sentence"] and "95 % interval" in out


def test_the_row_before_is_that_of_the_weights_themselves(data, weights, capsys):
    assert pretrain(data, weights) == 0
    mean = " ".join(map(str, timm.get_pretrained_cfg(NAME).mean))
    words = ["--architecture", NAME, "--size", "32", "--mean", *mean.split(), "--out", "alone.json"]
    assert main(["evaluate", str(weights), str(data), *words]) == 0
    alone = json.loads(read("alone.json"))["scores"]["pretrained"]
    assert json.loads(read("run/results.json"))["scores"]["before"] == alone


@pytest.mark.parametrize("verdict", ["worse", "unclear"])
def test_weights_that_were_not_bettered_are_given_back(data, model, weights, capsys, monkeypatch, verdict):
    said(monkeypatch, verdict)
    assert pretrain(data, weights) == 0
    last = run_folder.checkpoints(Path("run"))[-1]
    assert json.loads(read("run/results.json"))["keep_start"] is True

    # export gives the start bit for bit, and says so; a checkpoint gives its own
    assert main(["export", "run", "--out", "kept"]) == 0
    out = capsys.readouterr().out
    assert f"continuing did not help: exporting the weights of the start; the others are in {last.absolute()}" in out
    assert tiny.equal_states(load_file("kept/model.safetensors"), model.state_dict())
    card = read("kept/README.md")
    assert f"# {NAME}, as it was before training" in card and "weights after step 0" in card
    assert "`weights.safetensors`" in card and "licence not recorded" in card
    assert main(["export", str(last), "--out", "others"]) == 0
    assert not tiny.equal_states(load_file("others/model.safetensors"), model.state_dict())
    assert "continued without labels" in read("others/README.md")

    # so does loading
    assert tiny.equal_states(load.load_backbone("run").backbone.state_dict(), model.state_dict())
    assert "the weights before run" in load.load_backbone("run").summary
    assert not tiny.equal_states(load.load_backbone("run", last=True).backbone.state_dict(), model.state_dict())

    # evaluating compares both
    capsys.readouterr()
    assert main(["evaluate", "run", str(data)]) == 0
    out = capsys.readouterr().out
    assert "step 10 of run" in out and "\npretrained" in out and "\nbefore" in out


def test_weights_that_were_bettered_are_kept(data, model, weights, monkeypatch):
    said(monkeypatch, "better")
    assert pretrain(data, weights) == 0
    assert json.loads(read("run/results.json"))["keep_start"] is False
    trained = checkpoint.load_network(Path("run"))[0].backbone.state_dict()
    assert tiny.equal_states(load.load_backbone("run").backbone.state_dict(), trained)
    assert not tiny.equal_states(trained, model.state_dict())


def test_a_later_better_score_takes_the_start_back(data, weights, monkeypatch, tmp_path):
    said(monkeypatch, "worse")
    assert pretrain(data, weights) == 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    said(monkeypatch, "better")
    assert main(["evaluate", "run", str(data), "--out", "run/results.json"]) == 0
    assert run_folder.read_results(Path("run")).keep_start is False


def test_a_run_killed_before_its_first_checkpoint_starts_from_its_copy(data, model, weights, monkeypatch):
    assert pretrain(data, weights, "--no-evaluate") == 0
    whole = checkpoint.load_last(Path("run"))[1].network
    for path in run_folder.checkpoints(Path("run")):
        path.unlink()
    weights.unlink()
    assert main(["pretrain", "--resume", "run"]) == 0
    assert tiny.equal_states(checkpoint.load_last(Path("run"))[1].network, whole)


def test_runs_exports_and_folders_of_timm_are_starts(data, model, weights, capsys, tmp_path):
    assert pretrain(data, weights, "--no-evaluate") == 0
    first = load.load_backbone("run").backbone.state_dict()
    assert main(["export", "run", "--out", "exported"]) == 0
    timm.models.save_for_hf(model, tmp_path / "hub", safe_serialization=True, model_args={})
    about = json.loads((tmp_path / "hub/config.json").read_text())
    about["pretrained_cfg"] |= {"license": "apache-2.0", "origin_url": "https://example.org/net"}
    (tmp_path / "hub/config.json").write_text(json.dumps(about))
    for i, (source, state) in enumerate((("run", first), ("exported", first), ("hub", model.state_dict()))):
        assert pretrain(data, source, "--no-evaluate", out=f"next-{i}", name=False) == 0
        assert tiny.equal_states(load_file(f"next-{i}/start.safetensors"), state)

    # the card passes on what is known of the source
    assert main(["export", "next-2", "--out", "card"]) == 0
    card = read("card/README.md")
    assert card.startswith("---\nlibrary_name: timm\nlicense: apache-2.0\n")
    assert "licence apache-2.0, https://example.org/net" in card


def test_a_vit_continues_at_another_size(data, capsys, tmp_path):
    torch.manual_seed(2)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "vit.safetensors")  # of 160 px
    assert main(["pretrain", str(data), "--init", "vit.safetensors", "--out", "run", *SHORT]) == 2
    assert "does not record its network; add --backbone.name" in capsys.readouterr().err
    words = [*SHORT, "--backbone.name", "test_vit"]
    assert main(["pretrain", str(data), "--init", "vit.safetensors", "--out", "run", *words]) == 0
    out = capsys.readouterr().out
    assert "resized by timm: pos_embed" in out and "recipe adapt-vit at 32 px" in out and "\nbefore" in out

    # a run of ours at another size
    words = [*SHORT[2:], "--size", "48", "--no-evaluate"]
    assert main(["pretrain", str(data), "--init", "run", "--out", "larger", *words]) == 0
    assert "position embeddings resized from 32 to 48 px" in capsys.readouterr().out
    assert load_file("larger/start.safetensors")["pos_embed"].shape[1] == 1 + (48 // 16) ** 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init", "nowhere.pth"], "no weights at nowhere.pth"),
        (["--init", "weights.safetensors"], "add --backbone.name"),
        (["--init", "weights.safetensors", "--backbone.name", "resnet18"], "is no resnet18, so nothing was loaded"),
        (
            ["--init", "weights.safetensors", "--backbone.name", NAME, "--prefix", "a"],
            "no network under the prefix 'a'",
        ),
        (["--init", "timm:resnet19"], "timm knows no network 'resnet19'"),
        (["--init", "timm:resnet18"], "are not on this machine and http"),
        (["--init", "timm:resnet18", "--backbone.name", "resnet18"], "timm:resnet18 records its network"),
        (["--prefix", "a"], "--prefix chooses a network of --init"),
        (["--resume", "run", "--init", "weights.safetensors"], "--init cannot go with --resume"),
    ],
)
def test_a_mistake_with_the_start_is_one_sentence(data, weights, capsys, monkeypatch, words, message):
    monkeypatch.setattr(load.constants, "ENDPOINT", "http://127.0.0.1:9")  # a port without a server
    monkeypatch.setattr(load, "try_to_load_from_cache", lambda *_: None)
    assert main(["pretrain", str(data), *words]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert not (data.parent / "run").exists() and not (data.parent / "runs").exists()


def test_without_labels_nothing_is_given_back(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tiny.folder(tmp_path / "flat", {"": 40}, labelled=False)
    assert pretrain(data, weights) == 0
    assert run_folder.read_results(Path("run")) == Results(
        verdict=run_folder.read_results(Path("run")).verdict,
        best_checkpoint=run_folder.read_results(Path("run")).best_checkpoint,
    )
