"""Checkpoints and run folders: written whole or not at all, read strictly, never unpickled."""

import json
import pickle
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from corinfomax.network import Network
from corinfomax.objective.covariance import CorInfoMaxLoss
from corinfomax.recipes.fields import Optim
from corinfomax.recipes.published import RECIPES
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Facts, Row
from corinfomax.training import optimizer as optim
from corinfomax.weights import checkpoint

FACTS = Facts(data="é", recipe_name="tiny", images=40, fingerprint="abc")


def state(name="sgd", steps=2):
    torch.manual_seed(0)
    network = Network(tiny.RECIPE.backbone, tiny.RECIPE.projector).to(memory_format=torch.channels_last)
    criterion = CorInfoMaxLoss(8)
    optimizer = optim.build(network, Optim(name=name, lr=0.01))
    for _ in range(steps):
        x = torch.randn(2, 6, 3, 16, 16)
        loss = criterion(network(x[0]), network(x[1])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network, criterion, optimizer


def save(path, name="sgd", **changes):
    network, criterion, optimizer = state(name)
    states = network.state_dict(), criterion.state_dict(), checkpoint.optimizer_tensors(optimizer, network)
    saved = checkpoint.Checkpoint(tiny.RECIPE, 2, FACTS, *states)
    checkpoint.save_checkpoint(path, saved._replace(**changes))
    return network, criterion, optimizer


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_a_checkpoint_restores_the_whole_state(tmp_path, name):
    network, criterion, optimizer = save(tmp_path / "a.safetensors", name)
    loaded = checkpoint.load_checkpoint(tmp_path / "a.safetensors")
    assert (loaded.step, loaded.recipe, loaded.facts) == (2, tiny.RECIPE, FACTS)
    assert tiny.equal_states(loaded.network, network.state_dict())
    assert tiny.equal_states(loaded.criterion, criterion.state_dict())
    other, _, fresh = state(name, steps=0)
    checkpoint.restore_optimizer(fresh, loaded.optimizer, other)
    ours, theirs = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    assert ours
    assert all(tiny.equal_states(ours[i], theirs[i]) for i in ours)
    for p in other.parameters():
        for key, value in fresh.state[p].items():
            assert key == "step" or value.stride() == p.stride()


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    run_folder.write_whole(path, lambda temporary: temporary.write_text("good"))
    path.with_name(f".{path.name}.99999999.part").write_text("left by a killed process")
    run_folder.write_whole(path, lambda temporary: temporary.write_text("good"))
    assert list(path.parent.iterdir()) == [path]

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        run_folder.write_whole(path, fail)
    assert path.read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_another_version_is_not_damaged(tmp_path, monkeypatch):
    save(run_folder.checkpoint_path(tmp_path, 1))
    monkeypatch.setattr(checkpoint, "CHECKPOINT_FORMAT", "corinfomax-later")
    save(run_folder.checkpoint_path(tmp_path, 2))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is of format corinfomax-later") as caught:
        checkpoint.load_last(tmp_path)
    assert not isinstance(caught.value, checkpoint.DamagedError)


@pytest.mark.parametrize("where", ["weights", "facts"])
def test_a_flipped_bit_is_detected_and_the_checkpoint_before_is_used(tmp_path, capsys, where):
    for step in (1, 2):
        save(run_folder.checkpoint_path(tmp_path, step))
    path = run_folder.checkpoint_path(tmp_path, 2)
    content = bytearray(path.read_bytes())
    place = len(content) - 100 if where == "weights" else content.index(b"facts") + 1
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-00000002\.safetensors is damaged"):
        checkpoint.load_checkpoint(path)
    used, _ = checkpoint.load_last(tmp_path)
    assert used == run_folder.checkpoint_path(tmp_path, 1)
    assert "is damaged: its checksum" in capsys.readouterr().err
    used.write_bytes(b"torn")
    with pytest.raises(ValueError, match="step-00000002"):
        checkpoint.load_network(tmp_path)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_torn_checkpoint_is_an_error_with_its_name(tmp_path, length):
    path = tmp_path / "a.safetensors"
    save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"a\.safetensors is not a whole safetensors file"):
        checkpoint.load_checkpoint(path)


def test_other_files_are_errors_and_pickles_are_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("exploded").touch, ())

    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"bomb\.pt is not a whole safetensors file"):
        checkpoint.load_network(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a checkpoint of this package"):
        checkpoint.load_network(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        checkpoint.load_network(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoint.load_network(tmp_path)


def test_a_folder_inside_a_run_names_the_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    save(tmp_path / "checkpoints" / "step-00000001.safetensors")
    with pytest.raises(FileNotFoundError, match=rf"is a folder inside a run; name the run: {tmp_path}$"):
        checkpoint.load_network(tmp_path / "checkpoints")


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_a_network_that_does_not_fit_its_recipe_is_refused(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    save(path)
    with checkpoint.safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    name = "network/backbone.conv1.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors["network/extra.weight"] = torch.zeros(1)
    else:
        tensors[name] = tensors[name][:4].clone()
    about["digest"] = checkpoint.digest(tensors, about["corinfomax"])
    save_file(tensors, path, metadata=about)
    with pytest.raises(ValueError, match=r"a\.safetensors does not fit its own recipe"):
        checkpoint.load_network(path)


def test_optimiser_state_of_another_network_is_an_error(tmp_path):
    save(tmp_path / "a.safetensors")
    loaded = checkpoint.load_checkpoint(tmp_path / "a.safetensors")
    other = Network(replace(tiny.RECIPE.backbone, channels=(8, 8, 8, 8)), tiny.RECIPE.projector)
    with pytest.raises(ValueError, match="fits no parameter"):
        checkpoint.restore_optimizer(optim.build(other, Optim()), loaded.optimizer, other)


def test_the_last_checkpoint_of_a_run_is_the_one_with_most_steps(tmp_path):
    for step in (9, 10, 2):
        save(run_folder.checkpoint_path(tmp_path, step), step=step)
    (tmp_path / "checkpoints" / ".step-00000099.safetensors.x1").write_text("left over by a crash")
    assert checkpoint.load_network(tmp_path)[1].step == 10


def test_metrics_survive_a_torn_last_line(tmp_path):
    rows = [Row(step=step, loss=-1.0, attraction=1.0, gradient_norm=None, lr=0.1, seconds=1.0) for step in (1, 2, 3)]
    for row in rows:
        run_folder.append_metrics(tmp_path, row)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert run_folder.read_metrics(tmp_path) == rows
    run_folder.forget_after(tmp_path, 2)
    run_folder.append_metrics(tmp_path, rows[2])
    assert run_folder.read_metrics(tmp_path) == rows
    assert run_folder.read_metrics(tmp_path / "none") == []


def test_new_folders_have_unique_names(tmp_path):
    assert [run_folder.fresh_folder(tmp_path / "runs", "a").name for _ in range(3)] == ["a", "a-2", "a-3"]


def test_json_is_read_back_or_refused_by_name(tmp_path):
    run_folder.write_json(tmp_path / "a.json", {"x": [1, "é"]})
    assert run_folder.read_json(tmp_path / "a.json") == {"x": [1, "é"]}
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, "é"]}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json is not readable JSON"):
        run_folder.read_json(tmp_path / "b.json")


@pytest.mark.parametrize("name", ["imagenet100-r50", "cpu-small"])
def test_a_checkpoints_backbone_loads_strictly_into_timm_in_a_fresh_process(tmp_path, name):
    """With timm, torch and safetensors alone: every tensor, and the same features."""
    recipe = RECIPES[name].recipe
    torch.manual_seed(1)
    network = Network(recipe.backbone, recipe.projector).eval()
    path = tmp_path / "a.safetensors"
    checkpoint.save_checkpoint(path, checkpoint.Checkpoint(recipe, 0, FACTS, network.state_dict(), {}, {}))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        save_file({"x": x, "y": network.backbone(x)}, tmp_path / "features.safetensors")
    code = f"""
import sys, timm, torch
from safetensors.torch import load_file
settings = {asdict(recipe.backbone)!r}
prefix = "network/backbone."
weights = {{k.removeprefix(prefix): v for k, v in load_file({str(path)!r}).items() if k.startswith(prefix)}}
options = {{key: settings[key] for key in ("layers", "channels") if settings[key] is not None}}
model = timm.create_model(settings["name"], num_classes=0, **options)
if settings["small_stem"]:
    width = settings["channels"][0] if settings["channels"] else 64
    model.conv1 = torch.nn.Conv2d(3, width, 3, stride=settings["stem_stride"], padding=1, bias=False)
    if width != 64:
        model.bn1 = torch.nn.BatchNorm2d(width)
        model.layer1[0].conv1 = torch.nn.Conv2d(width, width, 3, padding=1, bias=False)
        model.layer1[0].downsample = None
    model.maxpool = torch.nn.Identity()
print(model.load_state_dict(weights, strict=True))
saved = load_file({str(tmp_path / "features.safetensors")!r})
with torch.no_grad():
    assert torch.equal(model.eval()(saved["x"]), saved["y"])
assert not any(name.startswith("corinfomax") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "All keys matched" in done.stdout
