"""`pretrain --init`: from anyone's weights to better ones, or back to those it started from."""

import contextlib
import io
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import tiny
from corinfomax.cli import fit, train
from corinfomax.cli.main import main
from corinfomax.diagnosis import measures
from corinfomax.evaluation import table
from corinfomax.images import cache
from corinfomax.images.sources import Data
from corinfomax.recipes import fields
from corinfomax.report import page
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Comparison
from corinfomax.weights import card, checkpoint, export, load

NAME = "test_resnet"
SHORT = ["--size", "32", "--batch", "8", "--epochs", "2", "--projector.widths", "32", "8", "--no-report"]
SHORT += ["--tuning.projector-share", "0.2", "--diagnoses", "2", "--scores", "1"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(4)
    model = timm.create_model(NAME, num_classes=0).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """A folder with images, weights and a run that continued from them, and what it printed."""
    folder = tmp_path_factory.mktemp("made")
    tiny.folder(folder / "data", {"train": 40, "test": 24})
    save_file(model.state_dict(), folder / "weights.safetensors")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        assert pretrain("data", "weights.safetensors") == 0
    return folder, out.getvalue()


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """The current folder: a copy of it."""
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def unverified(monkeypatch):
    """Exports without the fresh process that loads them, which takes seconds and has tests of its own."""
    monkeypatch.setattr(export, "_feature_difference", lambda *_: 0.0)


def read(path):
    return Path(path).read_text()


def pretrain(data, weights, *words, out="run", name=True):
    given = ["--backbone.name", NAME] if name else []
    return main(["pretrain", str(data), "--init", str(weights), "--out", out, *SHORT, *given, *map(str, words)])


def test_a_run_starts_from_the_weights_and_keeps_a_copy(made, place, model):
    out = made[1]
    count = len(model.state_dict())
    assert f"starting from all {count} tensors of weights.safetensors, a {NAME} at 160 px" in out
    assert "recipe adapt at 32 px, 2 epochs, for 40 images of 16 px" in out
    assert tiny.equal_states(load_file("run/start.safetensors"), model.state_dict())
    start = json.loads(read("run/recipe.json"))["facts"]["start"]
    assert start["name"] == str(made[0] / "weights.safetensors")

    # the scores: the weights of the start are a row, and the first sentence is about them
    results = json.loads(read("run/results.json"))
    assert list(results["scores"]) == ["pretrained", "before", "untrained", "raw pixels"]
    assert results["comparisons"][0]["other"] == "before"
    assert results["comparisons"][0]["sentence"].startswith("Continuing ")
    assert "linear " in results["comparisons"][0]["sentence"] and "95 % interval" in out


def test_the_row_before_is_that_of_the_weights_themselves(place):
    words = ["--architecture", NAME, "--size", "32", "--out", "alone.json"]
    assert main(["evaluate", "weights.safetensors", "data", *words]) == 0
    alone = json.loads(read("alone.json"))["scores"]["pretrained"]
    assert json.loads(read("run/results.json"))["scores"]["before"] == alone


@pytest.mark.parametrize(("verdict", "kept"), [("worse", True), ("unclear", True), ("better", False)])
def test_only_a_clear_gain_takes_the_place_of_the_start(made, place, monkeypatch, capsys, verdict, kept):
    real = table.compare_all

    def compared(outcomes, *, seed):
        (_, *others), sentences = real(outcomes, seed=seed)
        return (Comparison(verdict, 70.0, table.BEFORE, 60.0, 10.0, 5.0, 15.0, 9, 24), *others), sentences

    monkeypatch.setattr(table, "compare_all", compared)
    run_folder.add_json(Path("run/results.json"), {"keep_start": not kept})
    assert main(["evaluate", "run", str(made[0] / "data"), "--out", "run/results.json"]) == 0
    assert run_folder.read_results(Path("run")).keep_start is kept
    assert ("use the weights of the start" in capsys.readouterr().out) is kept


def test_weights_that_were_not_improved_are_given_back(place, model, capsys, monkeypatch):
    run_folder.add_json(Path("run/results.json"), {"keep_start": True})
    last = run_folder.checkpoints(Path("run"))[-1]

    # export gives the start bit for bit, and says so; a checkpoint gives its own
    assert main(["export", "run", "--out", "kept"]) == 0
    out = capsys.readouterr().out
    assert "exporting the weights of the start; the others are in run/checkpoints" in out
    assert tiny.equal_states(load_file("kept/model.safetensors"), model.state_dict())
    card = read("kept/README.md")
    assert f"# {NAME}, as it was before training" in card and "as they were loaded" in card
    assert "did not help" in card and "Training" not in card
    assert json.loads(read("kept/config.json"))["pretrained_cfg"]["input_size"] == [3, 160, 160]  # as it was made
    assert "`weights.safetensors`" in card and "licence not recorded" in card
    monkeypatch.setattr(export, "_feature_difference", lambda *_: 0.0)
    assert main(["export", str(last), "--out", "others.safetensors", "--format", "state-dict"]) == 0
    assert not tiny.equal_states(load_file("others.safetensors"), model.state_dict())

    # so does loading
    assert tiny.equal_states(load.load_backbone("run").backbone.state_dict(), model.state_dict())
    assert "the weights before run" in load.load_backbone("run").summary
    assert not tiny.equal_states(load.load_backbone("run", last=True).backbone.state_dict(), model.state_dict())

    # evaluating compares both
    capsys.readouterr()
    assert main(["evaluate", "run", "data"]) == 0
    out = capsys.readouterr().out
    assert "step 10 of run" in out and "\npretrained" in out and "\nbefore" in out


def test_weights_that_were_improved_are_kept(place, model):
    run_folder.add_json(Path("run/results.json"), {"keep_start": False})
    trained = checkpoint.load_network(Path("run"))[0].backbone.state_dict()
    assert tiny.equal_states(load.load_backbone("run").backbone.state_dict(), trained)
    assert not tiny.equal_states(trained, model.state_dict())


def test_a_run_killed_before_its_first_checkpoint_starts_from_its_copy(place):
    whole = checkpoint.load_last(Path("run"))[1].network
    for path in run_folder.checkpoints(Path("run")):
        path.unlink()
    Path("weights.safetensors").unlink()
    assert main(["pretrain", "--resume", "run", "data", "--no-evaluate"]) == 0
    assert tiny.equal_states(checkpoint.load_last(Path("run"))[1].network, whole)


def test_runs_exports_and_folders_of_timm_are_starts(place, model, unverified):
    run_folder.add_json(Path("run/results.json"), {"keep_start": False})
    first = load.load_backbone("run").backbone.state_dict()
    assert main(["export", "run", "--out", "exported"]) == 0
    assert "continued without labels" in read("exported/README.md")
    timm.models.save_for_hf(model, "hub", safe_serialization=True, model_args={})
    about = json.loads(read("hub/config.json"))
    about["pretrained_cfg"] |= {"license": "apache-2.0", "origin_url": "https://example.org/net"}
    Path("hub/config.json").write_text(json.dumps(about))
    for i, (source, state) in enumerate((("run", first), ("exported", first), ("hub", model.state_dict()))):
        assert pretrain("data", source, "--no-evaluate", "--epochs", "0.4", out=f"next-{i}", name=False) == 0
        assert tiny.equal_states(load_file(f"next-{i}/start.safetensors"), state)

    # the card passes on what is known of the source
    assert main(["export", "next-2", "--out", "card"]) == 0
    card = read("card/README.md")
    assert card.startswith("---\nlibrary_name: timm\nlicense: apache-2.0\n")
    assert "licence apache-2.0, https://example.org/net" in card


def test_a_vit_continues_at_another_size(place, capsys):
    torch.manual_seed(2)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), "vit.safetensors")  # of 160 px
    assert main(["pretrain", "data", "--init", "vit.safetensors", "--out", "vit", *SHORT]) == 2
    assert "does not record its network; add --backbone.name" in capsys.readouterr().err
    words = [*SHORT, "--backbone.name", "test_vit"]
    assert main(["pretrain", "data", "--init", "vit.safetensors", "--out", "vit", *words]) == 0
    out = capsys.readouterr().out
    assert "resized by timm: pos_embed" in out and "recipe adapt-vit at 32 px" in out and "\nbefore" in out

    # a run of ours at another size
    words = [*SHORT[2:], "--size", "48", "--no-evaluate"]
    assert main(["pretrain", "data", "--init", "vit", "--out", "larger", *words]) == 0
    assert "position embeddings resized from 32 to 48 px" in capsys.readouterr().out
    trained = checkpoint.load_network(Path("larger"))[0].backbone.state_dict()
    assert trained["pos_embed"].shape[1] == 1 + (48 // 16) ** 2

    # the copy of the start is not resized, so that it is given back as it was
    before = load.load_backbone("vit")
    assert tiny.equal_states(load_file("larger/start.safetensors"), before.backbone.state_dict())
    run_folder.add_json(Path("larger/results.json"), {"keep_start": True})
    assert load.load_backbone("larger").recipe.size == 32
    assert main(["export", "larger", "--out", "kept"]) == 0
    assert tiny.equal_states(load_file("kept/model.safetensors"), before.backbone.state_dict())
    assert json.loads(read("kept/config.json"))["pretrained_cfg"]["input_size"] == [3, 32, 32]


@pytest.mark.parametrize("arguments", [{"channels": (8, 8, 8, 8)}, {"act_layer": "gelu"}, {"global_pool": "max"}])
def test_a_network_that_no_recipe_describes_is_refused(place, capsys, arguments):
    changed = timm.create_model("resnet18", num_classes=0, **arguments)
    timm.models.save_for_hf(changed, "hub", safe_serialization=True, model_args=arguments)
    assert main(["pretrain", "data", "--init", "hub"]) == 2
    assert "hub is a changed resnet18 (model_args in its config.json): only timm's own form" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init", "nowhere.pth"], "no weights at nowhere.pth"),
        (["--init", "weights.safetensors"], "add --backbone.name"),
        (["--init", "weights.safetensors", "--backbone.name", "resnet18"], "is no resnet18, so nothing was loaded"),
        (
            ["--init", "weights.safetensors", "--backbone.name", NAME, "--prefix", "a"],
            "weights.safetensors has no prefix: leave out --prefix",
        ),
        (["--init", "timm:resnet19"], "timm knows no network 'resnet19'"),
        (["--init", "timm:resnet18"], "are not on this machine and http"),
        (
            ["--init", "hub", "--backbone.name", "resnet18"],
            f"the weights fix the network ({NAME}): leave out --backbone.name",
        ),
        (
            ["--init", "weights.safetensors", "--backbone.name", "resnet18.none"],
            "timm has no weights 'resnet18.none'; it",
        ),
        (["--backbone.name", "resnet18.none"], "timm has no weights 'resnet18.none'; it has resnet18.a1_in1k"),
        (["--recipe", "adapt"], "recipe adapt continues from weights: name them with --init"),
        (["--tuning.blocks", "0.5"], "--tuning.blocks is for runs that continue from weights: name them with --init"),
        (["--prefix", "a"], "--prefix needs --init: it chooses one of several networks"),
        (["--resume", "run", "--init", "weights.safetensors"], "--init cannot go with --resume"),
    ],
)
def test_a_mistake_with_the_start_is_one_sentence(place, model, capsys, monkeypatch, words, message):
    timm.models.save_for_hf(model, "hub", safe_serialization=True)
    monkeypatch.setattr(load.constants, "ENDPOINT", "http://127.0.0.1:9")  # a port without a server
    monkeypatch.setattr(load, "try_to_load_from_cache", lambda *_: None)
    assert main(["pretrain", "data", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert not Path("runs").exists()


def test_without_labels_the_run_keeps_its_own_weights(place, capsys):
    tiny.folder(place / "flat", {"": 40}, labelled=False)
    assert pretrain("flat", "weights.safetensors", out="unlabelled") == 0
    assert (
        "There are no labels, so it is unknown whether continuing helped. The weights before it are kept in "
        in capsys.readouterr().out
    )
    results = run_folder.read_results(Path("unlabelled"))
    assert results.table == {} and not results.keep_start


def test_without_labels_a_run_that_went_wrong_gives_back_the_start(place, model, unverified, capsys):
    tiny.folder(place / "flat", {"": 40}, labelled=False)
    assert pretrain("flat", "weights.safetensors", "--tuning.lr-scale", "1e-9", out="wrong") == 0
    out = capsys.readouterr().out
    assert "verdict: unchanged: " in out
    assert "The run went wrong: export, embed and neighbors use the weights it started from." in out
    assert main(["export", "wrong", "--out", "kept"]) == 0
    assert tiny.equal_states(load_file("kept/model.safetensors"), model.state_dict())


def test_a_shorter_run_trains_the_backbone_too(place):
    """The projector's share and the warm-up follow --epochs."""
    words = ["--size", "32", "--batch", "8", "--epochs", "2", "--projector.widths", "32", "8", "--no-report"]
    words += ["--backbone.name", NAME, "--no-evaluate", "--diagnoses", "0", "--scores", "0"]
    assert main(["pretrain", "data", "--init", "weights.safetensors", "--out", "short", *words]) == 0
    recipe = checkpoint.load_resumable(Path("short")).recipe
    assert recipe.optim.warmup_epochs == pytest.approx(0.2) and recipe.tuning.projector_share == pytest.approx(1 / 6)
    network, _ = checkpoint.load_network(Path("short"))
    assert not tiny.equal_states(network.backbone.state_dict(), load_file("short/start.safetensors"))


def test_the_page_repeats_the_command(place):
    saved = checkpoint.load_resumable(Path("run"))
    command = page.repeat_command(Path("run"), saved.facts, saved.recipe)
    assert f"--init {saved.facts.start.name} --backbone.name {NAME} " in command
    assert main([*shlex.split(command)[1:], "--out", "again", "--no-evaluate", "--no-report"]) == 0
    ours, theirs = (checkpoint.load_last(Path(name))[1] for name in ("run", "again"))
    assert ours.recipe == theirs.recipe and tiny.equal_states(ours.network, theirs.network)

    # weights that record their network are not told it again
    run_folder.add_json(Path("run/results.json"), {"keep_start": False})
    assert pretrain("data", "run", "--no-evaluate", "--epochs", "0.4", out="next", name=False) == 0
    saved = checkpoint.load_resumable(Path("next"))
    assert "--backbone" not in page.repeat_command(Path("next"), saved.facts, saved.recipe)


def test_a_start_that_was_changed_or_lost_is_named(made, place, capsys):
    run_folder.add_json(Path("run/results.json"), {"keep_start": True})
    state = load_file("run/start.safetensors")
    about = json.dumps(fields.to_json(checkpoint.load_resumable(Path("run")).recipe))
    state["conv1.0.weight"] += 1
    save_file(state, "run/start.safetensors", metadata={"recipe": about})
    assert main(["export", "run", "--out", "kept"]) == 2
    assert "start.safetensors was changed: it is not what the run started from" in capsys.readouterr().err
    assert main(["evaluate", "run", "data"]) == 0
    out = capsys.readouterr().out
    assert "no scores of the weights before: " in out and "\nbefore" not in out and "export, embed" not in out
    assert main(["evaluate", "run", str(made[0] / "data"), "--out", "run/results.json"]) == 0
    assert run_folder.read_results(Path("run")).keep_start  # scores without the start do not undo the choice

    Path("run/start.safetensors").unlink()
    assert main(["export", "run", "--out", "kept"]) == 2
    err = capsys.readouterr().err
    assert (
        "start.safetensors, the weights that the run started from, is missing: put it back, or name a checkpoint" in err
    )


def test_a_card_of_the_start_is_about_the_start(place):
    saved, results = checkpoint.load_last(Path("run"))[1], run_folder.read_results(Path("run"))
    text = card.markdown(saved._replace(step=0), results, plain=True)
    assert "| **these weights** |" in text and "| continued (not in this folder) |" in text
    assert "## Verdict" not in text and "Keep the weights" not in text
    assert f'interpolation="{saved.recipe.interpolation}"' in text and saved.recipe.interpolation == "bilinear"


def test_what_is_known_of_the_source_survives_exports(place, model, unverified):
    timm.models.save_for_hf(model, "hub", safe_serialization=True)
    about = json.loads(read("hub/config.json"))
    about["pretrained_cfg"] |= {"license": "apache-2.0", "paper_ids": "arXiv:1"}
    Path("hub/config.json").write_text(json.dumps(about))
    source = "hub"
    for name in ("first", "second"):
        assert pretrain("data", source, "--no-evaluate", "--epochs", "0.4", out=name, name=False) == 0
        start = checkpoint.load_resumable(Path(name)).facts.start
        assert (start.license, start.paper) == ("apache-2.0", "arXiv:1")
        source = f"{name}-exported"
        assert main(["export", name, "--out", source]) == 0
    assert json.loads(read("second-exported/config.json"))["pretrained_cfg"]["interpolation"] == "bilinear"


def test_a_vit_in_a_folder_of_timm_is_resized(place):
    torch.manual_seed(2)
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=0), "hub")  # pytorch_model.bin, of 160 px
    assert pretrain("data", "hub", "--no-evaluate", name=False, out="vit") == 0
    trained = checkpoint.load_network(Path("vit"))[0].backbone.state_dict()
    assert trained["pos_embed"].shape[1] == 1 + (32 // 16) ** 2


def test_the_verdict_is_about_the_weights_that_are_saved(made):
    """The last look, of features and projections, is of the averaged weights."""
    run = made[0] / "run"
    network, saved = checkpoint.load_network(run)
    splits = cache.load(made[0] / "data", side=saved.recipe.cache_side, progress=False)
    device = torch.device("cpu")
    sample = measures.choose_sample(splits, saved.recipe, device=device, start=load.load_start(run).backbone)
    last = run_folder.read_metrics(run)[-1].look
    assert saved.recipe.tuning.average == 0.5
    assert last == measures.look(network, sample, saved.recipe, device=device)


def test_the_best_checkpoint_of_averaged_weights_is_the_last(place, capsys):
    """Those before it are not averaged, so that their measures cannot be compared."""
    run, (recipe, facts) = Path("run"), checkpoint.recorded(Path("run"))
    last = run_folder.checkpoints(run)[-1]
    shutil.copy(last, run_folder.checkpoint_path(run, 5))
    rows = run_folder.read_metrics(run)
    look = rows[-1].look
    for step, ldmi in ((5, 0.9), (10, 0.1)):
        measured = look._replace(measures=look.measures._replace(ldmi=ldmi))
        rows.append(rows[-1]._replace(step=step, look=measured))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row.to_json()) + "\n" for row in (rows[0], *rows[-2:])))
    for average, best in ((0.5, 10), (1.0, 5)):
        train._judge(run, replace(recipe, tuning=replace(recipe.tuning, average=average)), facts)
        assert run_folder.read_results(run).best_checkpoint == f"checkpoints/step-{best:08d}.safetensors"


def test_a_run_that_broke_off_before_its_first_checkpoint_gives_the_start(place, model, capsys):
    assert pretrain("data", "weights.safetensors", "--optim.lr", "1e30", "--optim.start-lr", "1e30", out="broken") == 2
    assert "The run went wrong: export, embed and neighbors use the weights it started from." in capsys.readouterr().out
    for path in run_folder.checkpoints(Path("broken")):
        path.unlink()
    assert main(["export", "broken", "--out", "kept"]) == 0
    assert "the run went wrong: exporting the weights of the start" in capsys.readouterr().out
    assert tiny.equal_states(load_file("kept/model.safetensors"), model.state_dict())
    assert "went wrong (diverging), so these are the weights of the start" in read("kept/README.md")


def test_scores_at_a_smaller_size_than_the_weights_are_made_for_say_so(made):
    out = made[1]
    command = f"--against {made[0] / 'weights.safetensors'} --architecture {NAME}"
    line = next(line for line in out.splitlines() if line.startswith("All scores are at 32 px"))
    assert "the weights before are made for 160 px and may score higher there: corinfomax evaluate run" in line
    assert line.endswith(command)


def test_a_network_that_cannot_be_resized_keeps_its_size(place):
    save_file(timm.create_model("mixer_s32_224", num_classes=0).state_dict(), "mixer.safetensors")
    typed = fields.changed(fields.Recipe(), {"backbone.name": "mixer_s32_224", "size": 64})
    for flags, size in (({"backbone.name"}, 224), ({"backbone.name", "size"}, None)):
        start = fit.load_init("mixer.safetensors", None, typed, flags)
        assert start.recipe.size == 224
        arguments = (None, start, Data("data"), typed, flags, torch.device("cpu"))
        if size is None:
            with pytest.raises(ValueError, match="mixer_s32_224 takes images of 224 px alone: --size 224"):
                fit.adapt_recipe(*arguments)
        else:
            assert fit.adapt_recipe(*arguments)[1].size == size


def test_the_licence_of_the_start_stays_with_its_copy(place, unverified):
    timm.models.save_for_hf(timm.create_model(NAME, num_classes=0), "hub", safe_serialization=True)
    config = json.loads(read("hub/config.json"))
    config["pretrained_cfg"]["license"] = "apache-2.0"
    Path("hub/config.json").write_text(json.dumps(config))
    short = ["--no-evaluate", "--epochs", "0.4"]
    assert pretrain("data", "hub", *short, name=False, out="a") == 0
    assert pretrain("data", "a/start.safetensors", *short, name=False, out="b") == 0
    assert main(["export", "b", "--out", "exported.safetensors", "--format", "state-dict"]) == 0
    assert load.load_backbone("exported.safetensors").config.license == "apache-2.0"


def test_labels_without_scores_name_the_command(place, capsys):
    assert pretrain("data", "weights.safetensors", "--no-evaluate", "--epochs", "0.4", out="later") == 0
    out = capsys.readouterr().out
    command = next(line for line in out.splitlines() if line.startswith("To see whether continuing helped: "))
    assert main(shlex.split(command.partition(": ")[2])[1:]) == 0
    assert run_folder.read_results(Path("later")).comparisons[0].other == "before"
