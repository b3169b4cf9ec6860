"""The command line as a person meets it: help at once, one sentence for a mistake, the whole job in one command."""

import ctypes
import io
import itertools
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import corinfomax
import tiny
from corinfomax.cli import fit, inputs, messages, pretrain, process
from corinfomax.cli import main as cli
from corinfomax.cli.arguments import DataOptions
from corinfomax.cli.parse import parse
from corinfomax.images import named_sets
from corinfomax.images.sources import Data
from corinfomax.recipes import fields
from corinfomax.recipes.fields import Loss
from corinfomax.recipes.published import RECIPES
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Facts, Options
from corinfomax.training import batches
from corinfomax.weights import checkpoint

KNOBS = tiny.KNOBS
KERNEL = ["--loss.name", "kernel"]


def test_help_answers_in_a_second():
    for words, expected in ((["--help"], "pretrain"), (["pretrain", "--help"], "--optim.lr"), (["recipes"], "93.18")):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "corinfomax", *words], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0
        assert expected in done.stdout
        # processor time: on an idle machine wall time is the same, on a busy one it says nothing of the program
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_shows_every_knob_with_its_value(name, capsys):
    assert cli.main(["recipes", name]) == 0
    out = capsys.readouterr().out
    lines = [line.strip() for line in out.splitlines() if line.startswith("  --")]
    shown = {flag: value.strip() for flag, _, value in (line.partition(" ") for line in lines)}
    r = RECIPES[name].recipe
    assert shown["--loss.alpha"] == str(r.loss.alpha)
    assert shown["--projector.widths"].split() == [str(w) for w in r.projector.widths]
    assert shown["--views.1.solarize"] == str(r.views[1].solarize)
    assert shown["--optim.lr"] == str(r.optim.lr)
    # What is shown is what sets it: every flag typed back gives the recipe again.
    words = [word for flag, value in shown.items() for word in typed(flag, value)]
    command, flags = parse(["pretrain", "x", *words])
    assert fields.override(fields.Recipe(), command.settings, flags & fields.flags(r).keys()) == r


def typed(flag, value):
    if value in ("True", "False"):
        head, _, last = flag.rpartition(".")
        return [flag if value == "True" else f"{head}.no-{last}" if head else f"--no-{last.removeprefix('--')}"]
    return [flag, *value.split()]


def test_the_recipe_is_the_default_and_flags_override_it():
    recipe = planned("--recipe", "cifar100", "--optim.lr", "0.25", "--views.0.blur", "0.5")
    assert recipe.loss.alpha == 1000
    assert recipe.optim.lr == 0.25
    assert recipe.views[0].blur == 0.5
    assert recipe.views[1] == RECIPES["cifar100"].recipe.views[1]


def planned(*words):
    """The recipe of `pretrain DATA words`; with --recipe no image is looked at."""
    command, flags = parse(["pretrain", "mnist5k", *words])
    return pretrain.plan_run(command, flags, torch.device("cpu")).recipe


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["--optim.lr=0.3", "--no_report"], {"optim.lr", "report"}),
        (["--backbone.no-small-stem", "--n-views", "4"], {"backbone.small-stem", "n-views"}),
        ([], set()),
    ],
)
def test_typed_flags_are_read_in_every_spelling(words, flags):
    assert parse(["pretrain", "x", *words])[1] == flags


def test_help_lists_at_most_sixty_flags_and_hidden_ones_work(capsys):
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--help"])
    shown = re.findall(r"^(?:│ |  )(--?[a-z][\w.-]*)", capsys.readouterr().out, re.M)
    assert 40 < len(shown) <= 60
    assert shown.index("--recipe") < shown.index("--epochs") < shown.index("--views.0.blur") < shown.index("--optim.lr")
    assert "--loss.eps" not in shown
    assert planned("--recipe", "cifar10", "--loss.eps", "0.5").loss.eps == 0.5


@pytest.mark.parametrize("name", RECIPES)
def test_the_words_of_a_difference_make_the_recipe(name):
    """From any recipe to any other, switches and tuples included: the page prints these words."""
    for base, entry in RECIPES.items():
        words = fields.difference(RECIPES[name].recipe, entry.recipe)
        command, typed = parse(["pretrain", "x", "--recipe", base, *words])
        assert (
            fields.override(entry.recipe, command.settings, typed & {*fields.flags(entry.recipe)})
            == RECIPES[name].recipe
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain"], "name the images"),
        (["pretrain", "nowhere"], "no folder or file 'nowhere'"),
        (["pretrain", "minst5k"], "did you mean 'mnist5k'"),
        (["pretrain", "x", "--recipe", "cifar11"], "did you mean cifar10"),
        (["pretrain", "DATA", "--device", "abacus", *KNOBS], "cannot compute on device 'abacus'"),
        (["pretrain", "DATA", "--batch", "1"], "batch is 1"),
        (["pretrain", "DATA", "--backbone.name", "resnet19", *KNOBS], "timm knows no network 'resnet19'"),
        (["pretrain", "DATA", "--holdout", "1.5", *KNOBS], "holdout is 1.5"),
        (["pretrain", "DATA", "--test-split", "tset", *KNOBS], "no split 'tset'"),
        (["pretrain", "--resume", "nowhere"], "holds no checkpoint"),
        (
            ["pretrain", "--resume", "nowhere", "--epochs", "3"],
            "a resumed run keeps its recipe and its splits: --epochs",
        ),
        (["pretrain", "--resume", "nowhere", "--loss.name", "kernel"], "a resumed run keeps its recipe"),
        (["pretrain", "--resume", "nowhere", "--no-from-files"], "a resumed run keeps its recipe"),
        (["pretrain", "DATA", "--loss.cov-decay", "1"], "cov_decay is 1.0; it must be in [0, 1)"),
        (["pretrain", "DATA", *KERNEL, "--loss.temperature", "0"], "temperature is 0.0; it must be above 0"),
        (["evaluate", "nowhere", "DATA"], "no weights at nowhere"),
        (["evaluate", "nowhere", "DATA", "--probe-epochs", "3"], "--probe-epochs is for the paper's probe: add"),
        (["evaluate", "nowhere", "DATA", "--published-probe", "--probe-epochs", "0"], "it must be at least 1"),
        (["embed", "nowhere", "DATA", "--out", "x.csv"], "x.csv must end in"),
        (["recipes", "cifar"], "unknown recipe 'cifar'"),
        (["pretrain", "EMPTY"], "no image"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(words, message, tmp_path, capsys, monkeypatch):
    data = tiny.folder(tmp_path / "data", {"train": 16, "test": 4})
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    places = {"DATA": str(data), "EMPTY": str(tmp_path / "empty")}
    assert cli.main([places.get(word, word) for word in words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("corinfomax: ")
    assert not [*tmp_path.glob("runs/*")]


@pytest.mark.parametrize(
    "words", [["pretrain", "x", "--epohcs", "3"], ["pretrain", "x", "--epochs", "three"], ["train"], []]
)
def test_a_wrong_word_exits_with_2_and_no_traceback(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def whole_job(tmp_path_factory):
    root = tmp_path_factory.mktemp("job")
    data = tiny.folder(root / "data", {"train": 40, "test": 12})
    words = ["pretrain", str(data), "--out", str(root / "run"), *KNOBS]
    done = subprocess.run([sys.executable, "-m", "corinfomax", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return data, root / "run", done


def test_one_command_does_the_whole_job(whole_job):
    _, run, done = whole_job
    for expected in (
        "recipe cpu-small",
        "40 images to train on, 12 to score on, 2 classes",
        "raw pixels",
        "untrained",
        "corinfomax embed",
    ):
        assert expected in done.stdout
    assert {path.name for path in run.iterdir()} - {".lock"} == {
        "recipe.json",
        "metrics.jsonl",
        "results.json",
        "report.html",
        "checkpoints",
    }
    about = run_folder.read_json(run / "recipe.json")
    assert fields.from_json(about["recipe"]).projector.widths == (32, 8)
    assert about["facts"]["recipe_name"] == "cpu-small"
    assert set(run_folder.read_json(run / "results.json")["scores"]) == {"pretrained", "untrained", "raw pixels"}


def test_evaluate_gives_the_runs_scores_again(whole_job, tmp_path, capsys):
    data, run, _ = whole_job
    assert cli.main(["evaluate", str(run), str(data), "--out", str(tmp_path / "again.json")]) == 0
    assert "pretrained" in capsys.readouterr().out
    again, first = run_folder.read_json(tmp_path / "again.json"), run_folder.read_json(run / "results.json")
    assert again == {name: first[name] for name in again}


def test_the_verdict_is_said_and_kept(whole_job):
    _, run, done = whole_job
    results = run_folder.read_json(run / "results.json")
    found = results["verdict"]
    assert f"verdict: {found['kind']}: {found['evidence']} {found['advice']}" in done.stdout
    assert "scores" in results
    assert (run / results["best_checkpoint"]).is_file()


def test_a_run_that_breaks_off_has_a_verdict_too(tmp_path, capsys):
    data = tiny.folder(tmp_path / "flat", {"": 24}, labelled=False)
    words = ["pretrain", str(data), "--out", str(tmp_path / "run"), *KNOBS, "--optim.lr", "1e30"]
    assert cli.main([*words, "--optim.start-lr", "1e30"]) == 2
    assert "verdict: diverging: The run broke off: " in capsys.readouterr().out
    assert run_folder.read_json(tmp_path / "run" / "results.json")["verdict"]["kind"] == "diverging"


def test_embed_writes_every_image(whole_job, tmp_path, capsys):
    data, run, _ = whole_job
    assert cli.main(["embed", str(run), str(data), "--out", str(tmp_path / "a b.parquet")]) == 0
    assert "uvx embedding-atlas '" in capsys.readouterr().out
    assert cli.main(["embed", str(run), str(data), "--out", str(tmp_path / "a.npz")]) == 0
    table = np.load(tmp_path / "a.npz", allow_pickle=False)
    assert table["features"].shape == (52, 16)
    assert np.isfinite(table["features"]).all()


def test_thumbnails_are_images_in_parquet(whole_job, tmp_path, capsys):
    data, run, _ = whole_job
    parquet, path = pytest.importorskip("pyarrow.parquet"), tmp_path / "v.parquet"
    assert cli.main(["embed", str(run), str(data), "--out", str(path), "--thumbnails"]) == 0
    assert "--x x --y y --neighbors neighbors --image thumbnail\n" in capsys.readouterr().out
    table = parquet.read_table(path)
    kind = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert kind == {"thumbnail": {"_type": "Image"}}  # the `datasets` library opens them
    for row in (0, 30, 51):
        cell = table["thumbnail"][row].as_py()
        shown = np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"), np.float32)
        original = np.asarray(Image.open(data / cell["path"]), np.float32)
        assert shown.shape == (16, 16, 3) and np.abs(shown - original).mean() < 25  # WebP, lossy
        assert cell["path"] == table["path"][row].as_py()
    assert cli.main(["embed", str(run), str(data), "--out", str(tmp_path / "v.npz"), "--thumbnails"]) == 2
    assert "--thumbnails are for Parquet" in capsys.readouterr().err


def test_embed_takes_any_weights(whole_job, tmp_path, capsys):
    data, run, _ = whole_job
    assert cli.main(["export", str(run), "--format", "state-dict", "--out", str(tmp_path / "a.safetensors")]) == 0
    for weights, name in ((run, "ours"), (tmp_path / "a.safetensors", "exported")):
        assert cli.main(["embed", str(weights), str(data), "--out", str(tmp_path / f"{name}.npz")]) == 0
    ours, exported = (np.load(tmp_path / f"{name}.npz")["features"] for name in ("ours", "exported"))
    np.testing.assert_allclose(exported, ours, atol=1e-5)
    assert cli.main(["embed", "timm:no-such", str(data), "--out", str(tmp_path / "x.npz")]) == 2
    assert "no-such" in capsys.readouterr().err


def test_a_run_folder_in_use_is_not_written_over(whole_job, capsys):
    data, run, _ = whole_job
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert cli.main(["pretrain", str(data), "--out", str(run), *KNOBS]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_a_run_goes_on_where_its_images_moved_to(tmp_path, capsys, monkeypatch):
    data = tiny.folder(tmp_path / "data", {"train": 16, "test": 4})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", "data", "--out", "run", "--cache", "cache", *KNOBS]) == 0
    before = run_folder.read_metrics(tmp_path / "run")
    saved = checkpoint.load_last(tmp_path / "run")[1]
    assert saved.recipe.precision in ("float32", "bfloat16")  # what "auto" came to is what goes on elsewhere
    assert saved.facts.data == str(data)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before[-1] = before[-1]._replace(seconds=600.0)
    lines = (json.dumps(row.to_json()) + "\n" for row in before)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    assert cli.main(["pretrain", "--resume", "../run"]) == 0
    assert run_folder.read_metrics(tmp_path / "run") == before
    assert "trained in 10.0 min" in capsys.readouterr().out  # with what was done before it was stopped
    shutil.move(data, tmp_path / "moved")
    assert cli.main(["pretrain", "--resume", "../run"]) == 2
    told = f"the run's images are not at {data} any more: corinfomax pretrain FOLDER --resume ../run\n"
    assert told in capsys.readouterr().err
    assert cli.main(["report", "../run"]) == 2
    assert "any more: corinfomax report ../run FOLDER\n" in capsys.readouterr().err
    words = told.split("corinfomax ")[1].replace("FOLDER", "../moved").split()  # typed as told
    assert cli.main([*words, "--cache", "other"]) == 0
    assert (tmp_path / "elsewhere" / "other").is_dir()


def test_the_version_is_said(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"corinfomax {corinfomax.__version__}\n"


def test_numpy_does_not_remark_on_the_flushed_numbers():
    code = """if True:
        import sys, warnings
        from corinfomax.cli.main import main
        sys.argv[1:] = ["--version"]
        main()
        text = "The value of the smallest subnormal for <class 'numpy.float32'> type is zero."
        warnings.warn_explicit(text, UserWarning, "getlimits.py", 89, module="numpy._core.getlimits")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_folder_in_use_is_refused(whole_job, capsys):
    _, run, _ = whole_job
    with run_folder.locked(run):
        assert cli.main(["pretrain", "--resume", str(run)]) == 2
    assert "is in use by another process" in capsys.readouterr().err
    assert cli.main(["pretrain", "--resume", str(run), "--no-evaluate"]) == 0


def test_other_images_do_not_resume_a_run(whole_job, tmp_path, capsys):
    data, run, _ = whole_job
    extra = data / "train" / "red" / "999.png"
    extra.write_bytes((data / "train" / "red" / "000.png").read_bytes())
    try:
        assert cli.main(["pretrain", "--resume", str(run)]) == 2
    finally:
        extra.unlink()
    assert "are not the ones that" in capsys.readouterr().err


def test_a_folder_without_labels_needs_not_one_word_about_them(tmp_path, capsys, monkeypatch):
    data = tiny.folder(tmp_path / "flat", {"": 24}, labelled=False)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", str(data), *KNOBS]) == 0
    said = capsys.readouterr()
    text = (said.out + said.err).replace(str(tmp_path), "").lower()
    assert "label" not in text
    assert "class" not in text
    assert (tmp_path / "runs" / "flat-cpu-small").is_dir()


def test_a_folder_smaller_than_the_batch_still_trains(tmp_path, capsys):
    data = tiny.folder(tmp_path / "few", {"": 5}, labelled=False)
    assert cli.main(["pretrain", str(data), "--out", str(tmp_path / "run"), *KNOBS]) == 0
    assert "batch 8 is more than the 5 images: using batch 5" in capsys.readouterr().out
    one = tiny.folder(tmp_path / "one", {"": 1}, labelled=False)
    assert cli.main(["pretrain", str(one), "--out", str(tmp_path / "run1"), *KNOBS]) == 2
    assert "1 image is not enough" in capsys.readouterr().err


def test_an_unreadable_image_is_named_and_left_out(tmp_path, capsys):
    data = tiny.folder(tmp_path / "data", {"": 30}, labelled=False)
    (data / "bad.png").write_bytes(b"no image")
    assert cli.main(["pretrain", str(data), "--out", str(tmp_path / "run"), *KNOBS]) == 0
    assert "left out 1 unreadable image of train" in (out := capsys.readouterr().out)
    assert "bad.png" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet100", "imagenet100-temi"])
def test_a_published_recipe_starts_on_a_folder_in_imagenets_layout(tmp_path, capsys, name):
    for wnid in {*named_sets.class_list("imagenet100"), *named_sets.class_list("imagenet100-temi")}:
        for split in ("train", "val"):
            tiny.folder(tmp_path / "imagenet" / split / wnid, {"": 1}, labelled=False, side=40)
    words = ["--recipe", "imagenet100-r50", "--root", str(tmp_path), "--out", str(tmp_path / "run")]
    small = ["--batch", "50", "--epochs", "1", "--size", "32", "--cache-side", "32", "--no-evaluate", "--scores", "0"]
    small += ["--no-report", "--diagnoses", "0"]
    assert cli.main(["pretrain", name, *words, *small]) == 0
    assert "100 images to train on, 100 to score on, 100 classes" in capsys.readouterr().out
    about = run_folder.read_json(tmp_path / "run" / "recipe.json")
    assert fields.from_json(about["recipe"]).backbone == RECIPES["imagenet100-r50"].recipe.backbone
    assert [row.step for row in run_folder.read_metrics(tmp_path / "run")][-1] == 2


def test_too_little_memory_is_a_sentence(tmp_path, capsys):
    data = tiny.folder(tmp_path / "data", {"train": 16, "test": 4})
    words = ["pretrain", str(data), "--out", str(tmp_path / "run"), *KNOBS, "--projector.widths", "1000000000000"]
    assert cli.main(words) == 2
    assert "out of memory: try a smaller --batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_each_of_torchs_ways_to_say_so_is_too_little_memory(error):
    assert (messages.message(error) or "").startswith("out of memory: try a smaller --batch")


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), KeyError("memory")])
def test_our_own_mistakes_are_no_lack_of_memory(error):
    assert messages.message(error) is None


@pytest.mark.parametrize("typed", [DataOptions(holdout=0.2), DataOptions(test_split="val"), DataOptions()])
@pytest.mark.parametrize("facts", [Facts(holdout=0.1), Facts(test_split="test"), Facts()])
def test_a_typed_choice_of_test_images_replaces_the_recorded_one(tmp_path, typed, facts):
    options = inputs.options_of_run(typed, tmp_path, facts)
    source = facts if typed == DataOptions() else typed
    assert (options.holdout, options.test_split) == (source.holdout, source.test_split)


def test_a_test_split_without_labels_is_said_before_training(tmp_path, capsys):
    data = tiny.folder(tmp_path / "data", {"train": 16})
    tiny.folder(data, {"test": 4}, labelled=False)
    words = ["pretrain", str(data), "--out", str(tmp_path / "run"), "--test-split", "test", *KNOBS]
    assert cli.main(words) == 0
    assert "no scores: the test images have no labels" in capsys.readouterr().out


def test_few_images_are_scored_too(tmp_path, capsys):
    data = tiny.folder(tmp_path / "data", {"train": 8, "test": 2})
    assert cli.main(["pretrain", str(data), "--out", str(tmp_path / "run"), *KNOBS]) == 0
    assert "raw pixels" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_options_but_for_those_typed(tmp_path, monkeypatch):
    monkeypatch.setattr("corinfomax.training.trackers.check", lambda name: None)
    command, flags = parse(["pretrain", "--resume", str(tmp_path), "--keep=3", "--scores", "10"])
    ran = Options(log_steps=1, keep=100, scores=2, report=False, track="wandb", checkpoint_minutes=0.5)
    facts = Facts(data="mnist5k", options=ran).to_json()
    run_folder.write_json(tmp_path / "recipe.json", {"recipe": fields.to_json(tiny.RECIPE), "facts": facts})
    again = pretrain.plan_run(command, flags, torch.device("cpu")).options
    assert again == replace(ran, keep=3, scores=10)  # typed, although these are the defaults


def test_the_words_that_go_on_with_a_run_can_be_typed(tmp_path, monkeypatch):
    words = ["pretrain", "--resume", str(tmp_path / "My Photos")]
    assert messages.command(*words) == f"corinfomax pretrain --resume '{words[-1]}'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert messages.command(*words).startswith("torchrun --nproc-per-node 8 -m corinfomax pretrain --resume '")
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert messages.command(*words).startswith("uv run torchrun --nproc-per-node 8 -m corinfomax pretrain --resume '")
    assert messages.command("embed", "run") == "uv run corinfomax embed run"  # one process embeds


def test_a_recipe_that_was_chosen_is_told_with_what_was_typed_over_it(tmp_path, capsys):
    data = tiny.folder(tmp_path / "data", {"": 8}, labelled=False, side=32)
    words = ["--epochs", "2", "--batch", "8", "--device", "cpu", "--out", str(tmp_path / "run"), "--no-report"]
    assert cli.main(["pretrain", str(data), *words]) == 0
    told = capsys.readouterr().out.splitlines()[0]
    assert told.startswith("recipe cpu-small at 24 px, ")
    assert told.endswith(", for 8 images of 32 px and no GPU, with --epochs 2 --batch 8; --recipe names another")


@pytest.mark.parametrize(("size", "side", "becomes"), [(24, 32, 32), (32, 16, 36), (100, 16, 64), (64, 64, 64)])
def test_copies_are_as_large_as_the_views_need(tmp_path, capsys, size, side, becomes):
    data = tiny.folder(tmp_path / "data", {"": 4}, labelled=False, side=64)
    recipe = replace(tiny.RECIPE, size=size, cache_side=side)
    assert fit.fit_cache(recipe, Data(str(data))).cache_side == becomes
    assert ("--cache-side" in capsys.readouterr().out) == (becomes != side)


def test_where_the_run_goes_is_known_before_images_are_decoded(tmp_path, monkeypatch, capsys):
    data = tiny.folder(tmp_path / "data", {"": 4}, labelled=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("corinfomax.images.cache.load", lambda *_, **__: pytest.fail("decoded before"))
    assert cli.main(["pretrain", str(data), "--out", str(tmp_path / "file" / "run"), *KNOBS]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path, monkeypatch, capsys):
    data = tiny.folder(tmp_path / "data", {"": 4}, labelled=False)
    monkeypatch.chdir(tmp_path)
    for path in data.iterdir():
        path.write_bytes(path.read_bytes()[:60])  # the header is whole
    assert cli.main(["pretrain", "data", *KNOBS]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert [*(tmp_path / "runs").iterdir()] == []


def test_a_named_set_is_found_again_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Data("cifar10").absolute_root == tmp_path / "data"
    assert Data("cifar10", Path("sets")).absolute_root == tmp_path / "sets"
    assert Data("mnist5k").absolute_root is None
    assert Data("./cifar10", Path("sets")).absolute_root is None


def test_a_reader_that_has_heard_enough_is_no_error():
    words = [sys.executable, "-m", "corinfomax", "recipes", "cifar10"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_a_run_that_diverged_has_a_page_all_the_same(tmp_path, capsys):
    data = tiny.folder(tmp_path / "data", {"": 16}, labelled=False)
    run = tmp_path / "run"
    words = ["pretrain", str(data), "--out", str(run), *KNOBS, "--checkpoint-minutes", "0", "--log-steps", "1"]
    assert cli.main([*words, "--optim.start-lr", "0.01", "--optim.lr", "1e30"]) == 2
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    assert run_folder.read_json(run / "results.json")["verdict"]["kind"] == "diverging"
    assert "diverging" in (run / "report.html").read_text()


def told_to_stop(*_, **__):
    signal.raise_signal(signal.SIGTERM)
    pytest.fail("it went on")


def test_sigterm_while_images_are_decoded_is_a_word_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    data = tiny.folder(tmp_path / "data", {"": 4}, labelled=False)
    monkeypatch.setattr("corinfomax.images.cache.load", told_to_stop)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["pretrain", str(data), "--out", str(tmp_path / "run"), *KNOBS]) == 130
    assert capsys.readouterr().err == "corinfomax: stopped\n"
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("place", ["corinfomax.training.loop.build", "corinfomax.evaluation.table.evaluate"])
def test_sigterm_before_and_after_training_says_how_to_go_on(tmp_path, monkeypatch, capsys, place):
    data, run = tiny.folder(tmp_path / "data", {"train": 16, "test": 4}), tmp_path / "run"
    monkeypatch.setattr(place, told_to_stop)
    words = ["pretrain", str(data), "--out", str(run), *KNOBS, "--no-report"]
    assert cli.main(words) == 130
    assert f"corinfomax pretrain --resume {run}\n" in capsys.readouterr().out
    monkeypatch.undo()
    assert cli.main(["pretrain", "--resume", str(run)]) == 0
    assert "scores" in run_folder.read_json(run / "results.json")


def test_a_signal_in_the_last_step_is_heard(tmp_path, monkeypatch, capsys):
    data, run = tiny.folder(tmp_path / "data", {"": 16}, labelled=False), tmp_path / "run"
    real, steps = batches.apply_views, itertools.count()

    def stop(*given):
        if next(steps) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(batches, "apply_views", stop)
    assert cli.main(["pretrain", str(data), "--out", str(run), *KNOBS]) == 130
    assert f"to resume: corinfomax pretrain --resume {run}" in capsys.readouterr().out
    assert run_folder.step_of(run_folder.checkpoints(run)[-1]) == 4
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("minutes", ["nan", "-1", "inf"])
def test_minutes_that_protect_nothing_are_refused(tmp_path, capsys, minutes):
    data = tiny.folder(tmp_path / "data", {"": 16}, labelled=False)
    assert (
        cli.main(["pretrain", str(data), "--out", str(tmp_path / "run"), *KNOBS, "--checkpoint-minutes", minutes]) == 2
    )
    assert "finite" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def load(root, **options):
    options = DataOptions(**options)
    return inputs.load_splits(inputs.find_data(str(root), options), tiny.RECIPE, options)


def test_labels_for_half_of_the_images_are_a_sentence(tmp_path, capsys):
    half = tiny.folder(tmp_path / "half", {"train": 16})
    for path in (half / "train" / "red").iterdir():
        path.rename(half / "train" / path.name)
    load(half)
    said = capsys.readouterr().out
    assert "no labels in train: 8 of 16 images lie beside the class folders, first 000.png" in said

    flat = tiny.folder(tmp_path / "flat", {"train": 20})
    tiny.folder(flat, {"test": 6}, labelled=False)
    load(flat)
    assert "no labels in test: scoring on 2 training images instead" in capsys.readouterr().out
    load(flat, holdout=0.2)
    assert "instead" not in capsys.readouterr().out


TUNED = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1000000"}


def test_an_impossible_loss_is_an_error_before_an_image_is_decoded(tmp_path, capsys, monkeypatch):
    data, cache = tiny.folder(tmp_path / "data", {"train": 16}), tmp_path / "cache"
    monkeypatch.chdir(tmp_path)
    for words in (["--loss.cov-decay", "2"], [*KERNEL, "--loss.temperature", "-1"]):
        assert cli.main(["pretrain", str(data), "--cache", str(cache), *words]) == 2
        assert "; it must be" in capsys.readouterr().err
        assert not cache.exists()


def test_a_typed_word_is_for_the_chosen_recipe_and_not_for_the_one_it_is_read_over(monkeypatch, tmp_path, capsys):
    """Words are read over cpu-small first, which has the covariance and no temperature."""
    entry = RECIPES["mnist5k"]
    monkeypatch.setitem(RECIPES, "mnist5k", entry._replace(recipe=replace(entry.recipe, loss=Loss(name="kernel"))))
    words = ["pretrain", "mnist5k", "--cache", str(tmp_path / "cache"), "--loss.temperature", "0.5", "--out"]
    assert cli.main([*words, str(tmp_path / "run"), "--epochs", "0.0001"]) == 2
    assert "makes no step: an epoch has" in capsys.readouterr().err


ALWAYS_HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is glibc's")
@pytest.mark.skipif(ALWAYS_HUGE.exists() and "[always]" in ALWAYS_HUGE.read_text(), reason="huge pages hide faults")
@pytest.mark.parametrize("given", [{}, {"MALLOC_MMAP_THRESHOLD_": "1000000"}, TUNED])
def test_a_command_keeps_the_memory_that_it_frees(given):
    """Ten times 128 MB that are freed and had again are 330,000 faults of pages, or 33,000."""
    code = """
import resource, torch
from corinfomax.cli import main as cli
def faults(argv):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.empty(1 << 24, dtype=torch.uint8).fill_(1) for _ in range(8)]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return 0
class Command:
    run = staticmethod(faults)
cli.parse = lambda words: (Command, frozenset())
cli.main()
"""
    ours = ("MALLOC_", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | given
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (int(said.stdout) > 100_000) == bool(given), said.stdout  # what is given comes first


@pytest.mark.parametrize(
    ("most", "asked"),
    [
        (1 << 30, [(-3, 1 << 30), (-1, (1 << 31) - 1)]),
        (1 << 25, [(-3, 1 << 30), (-3, 1 << 25), (-1, (1 << 31) - 1)]),
        (0, [(-3, 1 << 30), (-3, 1 << 25)]),  # the second alone would make all slower
    ],
)
def test_a_libc_that_refuses_is_left_as_it_is(monkeypatch, most, asked):
    heard = []

    def mallopt(what, value):
        heard.append((what, value))
        return int(what == -1 or value <= most)

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    process.keep_freed_memory()
    assert heard == asked
    assert cli.main(["recipes", "cifar10"]) == 0  # in another's process, which is left as it is
    assert heard == asked


def test_commands_compute_without_numbers_that_slow_a_processor_down():
    seen = []

    def look():
        seen.append(float((torch.full((8,), 1e-40) * 1.0).abs().max()))

    torch.set_flush_denormal(False)
    look()
    try:
        inputs.choose_device("cpu")
        for where in (threading.Thread(target=look), threading.Thread(target=look)):
            where.start()
            where.join()
    finally:
        torch.set_flush_denormal(False)
    assert seen[0] > 0 and seen[1:] == [0.0, 0.0]
    for flushed in (False, True):
        try:
            torch.set_flush_denormal(flushed)
            assert cli.main(["embed", "w.pth", "data", "--device", "cuda:77"]) == 2
            look()
        finally:
            torch.set_flush_denormal(False)
        assert (seen[-1] == 0) == flushed  # whoever called a command has them as they were


@pytest.mark.parametrize("words", [["--loss.name", "{}"], ["--loss.name={}"]])
def test_the_name_of_an_objective_alone_switches_a_recipe(words):
    typed = ["--recipe", "tiny-imagenet"]  # whose covariance has a decay of its own

    def loss(name, *more):
        return planned(*typed, *(word.format(name) for word in words), *more).loss

    own = RECIPES["tiny-imagenet"].recipe.loss
    assert loss("kernel", "--loss.temperature", "0.5") == replace(own, name="kernel", temperature=0.5)
    assert loss("corinfomax") == own
