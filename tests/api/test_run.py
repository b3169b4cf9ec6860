"""`corinfomax.pretrain`, `evaluate` and `doctor` against the commands, and runs as objects."""

import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import corinfomax
import tiny
from corinfomax.api import run as api
from corinfomax.api import settings
from corinfomax.cli.main import main
from corinfomax.cli.pretrain import Pretrain
from corinfomax.images.files import DataError
from corinfomax.recipes import fields
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import run_folder
from corinfomax.weights import checkpoint

KNOBS = {
    "size": 16,
    "cache_side": 16,
    "batch": 8,
    "epochs": 2,
    "backbone_layers": (1, 1, 1, 1),
    "backbone_channels": [8, 8, 8, 16],
    "projector_widths": (32, 8),
}
"""The settings of `tiny.KNOBS` as keywords."""
BRIEF = {**KNOBS, "evaluate": False, "report": False, "scores": 0, "log_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("images"), {"train": 40, "test": 24})


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run with everything, and its rows as they were handed out."""
    rows: list[run_folder.Row] = []
    out = tmp_path_factory.mktemp("whole") / "run"
    return corinfomax.pretrain(str(folder), out=out, diagnoses=2, scores=1, on_row=rows.append, **KNOBS), rows


def tensors(run):
    return checkpoint.load_network(run.path)[1].network


def timeless(rows):
    return [row._replace(seconds=0.0) for row in rows]


def test_a_call_is_the_same_run_as_the_command(folder, whole, tmp_path, capsys):
    run, rows = whole
    assert (
        main(
            ["pretrain", str(folder), "--out", str(tmp_path / "run"), *tiny.KNOBS, "--diagnoses", "2", "--scores", "1"]
        )
        == 0
    )
    same = corinfomax.Run(tmp_path / "run")
    assert tiny.equal_states(tensors(run), tensors(same))
    assert (run.recipe, run.facts) == (same.recipe, same.facts)
    assert timeless(run.metrics) == timeless(same.metrics) == timeless(rows)
    assert run.verdict == same.verdict and run.verdict is not None
    assert run.scores == same.scores and run.scores.table["pretrained"]["linear"].mean > 50
    assert run.report.read_text().count("<section") == same.report.read_text().count("<section")
    assert str(run.scores) in capsys.readouterr().out.replace(
        "\nprobes fitted on 40 labelled images, scored on 24 others", ""
    )


def test_every_flag_has_its_keyword():
    flags = [flag for group in (Recipe(), corinfomax.api.run.Pretrain().options) for flag in fields.flags(group)]
    keywords = {flag.replace(".", "_").replace("-", "_"): flag for flag in flags}
    assert len(keywords) == len(flags) > 80
    for keyword, flag in keywords.items():
        usual = fields.flags(settings.read("pretrain", {}, "recipe", "options").recipe) | vars(Pretrain().options)
        value = usual.get(flag, usual.get(keyword))
        assert flag in settings.read("pretrain", {keyword: value}, "recipe", "options").typed


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"epocs": 3}, TypeError, r"pretrain\(\) has no setting 'epocs'; did you mean epochs\?"),
        ({"optim_lr": "fast"}, ValueError, "recipe.optim.lr must be a number, got 'fast'"),
        ({"projector_widths": 64}, ValueError, "recipe.projector.widths must be a list of values, each a whole number"),
        ({"precision": "half"}, ValueError, "must be 'auto' or 'float32'"),
        ({"holdout": 1.5}, ValueError, "holdout is 1.5"),
        ({"resume": True}, ValueError, "name it with out="),
        ({"labels": [0, 1]}, TypeError, "labels are for images in memory"),
        ({"prefix": "encoder"}, ValueError, "--prefix needs --init"),
        ({"recipe": "cifar11"}, ValueError, "cifar10"),
    ],
)
def test_a_wrong_call_is_one_sentence_and_leaves_nothing(folder, tmp_path, monkeypatch, options, error, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said):
        corinfomax.pretrain(folder, **BRIEF | options)
    assert not list(tmp_path.iterdir())


def test_a_path_is_a_folder_and_a_string_may_name_a_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.folder(tmp_path / "cifar10", {"": 16}, labelled=False)
    with pytest.raises(DataError, match="cifar10 is not whole"):
        corinfomax.pretrain("cifar10", **BRIEF)
    assert corinfomax.pretrain(tmp_path / "cifar10", out="run", **BRIEF).facts.images == 16


def test_an_error_of_the_callback_costs_no_work(folder, whole, tmp_path):
    """The run ends with a checkpoint of that row, and goes on to the same weights."""

    def stop_at_six(row):
        if row.step == 6:
            raise RuntimeError("enough")

    options = {**KNOBS, "diagnoses": 2, "scores": 1}
    with pytest.raises(RuntimeError, match="enough"):
        corinfomax.pretrain(folder, out=tmp_path / "run", on_row=stop_at_six, **options | {"log_steps": 3})
    assert run_folder.step_of(run_folder.checkpoints(tmp_path / "run")[-1]) == 6
    again = corinfomax.pretrain(folder, out=tmp_path / "run", resume=True, **options | {"log_steps": 3})
    assert tiny.equal_states(tensors(again), tensors(whole[0]))
    assert again.report is not None and again.scores == whole[0].scores


def test_an_error_at_the_last_row_leaves_the_final_weights(tmp_path, folder, whole):
    """Averaging with the start comes before the last row is handed out, and happens once."""
    start = whole[0].path / "checkpoints" / "step-00000010.safetensors"
    options = BRIEF | {"diagnoses": 0, "tuning_average": 0.5}
    options = {name: value for name, value in options.items() if not name.startswith("backbone")}
    sound = corinfomax.pretrain(folder, init=start, out=tmp_path / "a", **options)

    def fail_at_the_end(row):
        assert row.step < 10

    with pytest.raises(AssertionError):
        corinfomax.pretrain(folder, init=start, out=tmp_path / "b", on_row=fail_at_the_end, **options)
    assert tiny.equal_states(tensors(sound), tensors(corinfomax.Run(tmp_path / "b")))


def test_ctrl_c_saves_the_run_and_stops_the_program(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        corinfomax.pretrain(
            folder,
            out=tmp_path / "run",
            on_row=lambda row: row.step == 3 and signal.raise_signal(signal.SIGINT),
            **BRIEF,
        )
    assert 3 <= run_folder.step_of(run_folder.checkpoints(tmp_path / "run")[-1]) < 10
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_complete_run_is_opened_and_not_trained_again(folder, whole, monkeypatch):
    monkeypatch.setattr(Pretrain, "train", None)
    run = corinfomax.pretrain(folder, out=whole[0].path, resume=True, **KNOBS)
    assert run.path == whole[0].path and run.verdict == whole[0].verdict
    for changed in (
        {"epochs": 3},
        {"optim_lr": 0.1},
        {"recipe": "cifar10"},
        {"holdout": 0.5},
        {"init": "timm:resnet18"},
    ):
        name = next(iter(changed))
        with pytest.raises(ValueError, match=f"has {name.replace(chr(95), chr(46))} "):
            corinfomax.pretrain(folder, out=whole[0].path, resume=True, **KNOBS | changed)


def test_a_complete_run_of_other_images_is_not_opened(folder, tmp_path):
    """The images are compared, in files that moved and in memory; only equal ones are those of the run."""
    pixels, options = tiny.pictures(16), BRIEF | {"epochs": 1, "diagnoses": 0}
    run = corinfomax.pretrain(pixels, out=tmp_path / "run", **options)
    assert corinfomax.pretrain(list(pixels), out=run.path, resume=True, **options).path == run.path
    with pytest.raises(ValueError, match="are not the ones that"):
        corinfomax.pretrain(pixels[::-1], out=run.path, resume=True, **options)
    other = tiny.folder(tmp_path / "other", {"": 16}, labelled=False)
    first = corinfomax.pretrain(other, out=tmp_path / "files", **options)
    moved = other.rename(tmp_path / "moved")
    assert corinfomax.pretrain(moved, out=first.path, resume=True, **options).path == first.path
    (moved / "000.png").unlink()
    with pytest.raises(ValueError, match="are not the ones that"):
        corinfomax.pretrain(moved, out=first.path, resume=True, **options)


def test_resuming_where_nothing_began_starts_a_run(folder, tmp_path):
    options = BRIEF | {"epochs": 0.4, "diagnoses": 0}
    assert (
        corinfomax.pretrain(folder, out=tmp_path / "new", resume=True, **options).best.name
        == "step-00000002.safetensors"
    )


def test_images_in_memory_train_as_they_do_in_files(tmp_path):
    """The same pixels in the same order give the same weights; names of files decide nothing."""
    pixels = tiny.pictures(24)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i:03}.png")
    options = BRIEF | {"diagnoses": 0}
    in_files = corinfomax.pretrain(tmp_path, out=tmp_path / "files", **options)
    in_memory = corinfomax.pretrain(pixels, out=tmp_path / "memory", **options)
    assert tiny.equal_states(tensors(in_files), tensors(in_memory))
    assert in_memory.facts.data.startswith("images in memory ")
    with pytest.raises(DataError, match="hand them over again"):
        in_memory.evaluate()


def test_labels_in_memory_score_the_run(tmp_path):
    pixels, labels = tiny.pictures(60), np.arange(60) % 2
    run = corinfomax.pretrain(pixels, labels=labels, out=tmp_path / "run", holdout=0.4, scores=1, diagnoses=1, **KNOBS)
    assert set(run.scores.table) == {"pretrained", "untrained", "raw pixels"}
    call = "corinfomax.pretrain(images, recipe='cpu-small', holdout=0.4, "
    assert call.replace("'", "&#39;") in run.report.read_text()


def test_a_run_that_did_not_improve_is_what_it_started_from(folder, whole, tmp_path):
    run = corinfomax.pretrain(
        folder,
        init=whole[0].path,
        out=tmp_path / "run",
        size=16,
        batch=8,
        epochs=1,
        projector_widths=(32, 8),
        report=False,
    )
    assert run.scores.keep_start and run.best == tmp_path / "run" / "start.safetensors"
    assert tiny.equal_states(run.backbone.state_dict(), whole[0].backbone.state_dict())
    assert "before" in run._repr_html_()


def test_evaluate_and_doctor_give_what_the_commands_print(folder, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scores = whole[0].evaluate()
    assert scores == corinfomax.evaluate(whole[0], folder) and scores.table == whole[0].scores.table
    against = corinfomax.evaluate(
        whole[0].path, folder, against=whole[0].path / "checkpoints" / "step-00000010.safetensors"
    )
    assert against.table["step-00000010"] == against.table["pretrained"]

    capsys.readouterr()
    checkup = corinfomax.doctor(folder, seconds=0)
    assert capsys.readouterr().out == "batch 256 is more than the 40 images: using batch 40\n"
    assert main(["doctor", str(folder), "--seconds", "0"]) == int(not checkup.ok)
    assert str(checkup) in capsys.readouterr().out
    assert not list(tmp_path.glob("skip*")) or checkup.skip_lines


def test_the_doctor_of_broken_images_is_not_ok(tmp_path):
    tiny.folder(tmp_path, {"train": 12})
    (tmp_path / "train" / "red" / "torn.png").write_bytes(b"torn")
    checkup = corinfomax.doctor(tmp_path, seconds=0)
    assert not checkup.ok and checkup.skip == {"train/red/torn.png"}
    assert "torn.png" in checkup._repr_html_()


def test_export_and_load_agree(whole, tmp_path):
    assert tiny.equal_states(corinfomax.load(whole[0]).backbone.state_dict(), whole[0].backbone.state_dict())
    path = whole[0].export("state-dict", tmp_path / "weights.safetensors")
    again, pixels = corinfomax.load(path), tiny.pictures(5)
    assert np.array_equal(again.embed(pixels).features, whole[0].embed(pixels).features)


def test_html_is_escaped(tmp_path, whole):
    scores = whole[0].scores
    foul = api.Scores(*scores._replace(table={"<script>": scores.table["pretrained"]}, remarks=("a <b> & c",)))
    html = foul._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and "a &lt;b&gt; &amp; c" in html
    assert "<b>" in whole[0]._repr_html_() and "report.html" in whole[0]._repr_html_()


def test_a_run_below_this_folder_is_named_from_here(whole, monkeypatch):
    run, _ = whole
    assert repr(run) == f"Run({str(run.path)!r})"
    monkeypatch.chdir(run.path.parent)
    assert repr(run) == "Run('run')"


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run"):
        corinfomax.Run(tmp_path)


def test_the_process_is_left_as_it_was(folder, tmp_path):
    torch.backends.cudnn.allow_tf32 = True
    corinfomax.pretrain(folder, out=tmp_path / "run", **BRIEF | {"epochs": 0.2, "diagnoses": 0})
    assert torch.backends.cudnn.allow_tf32
    assert float(torch.full((), 1e-40) * 1) > 0


def test_it_works_in_a_thread(folder, tmp_path):
    runs: list[corinfomax.Run] = []
    options = BRIEF | {"epochs": 0.2, "diagnoses": 0}
    thread = threading.Thread(target=lambda: runs.append(corinfomax.pretrain(folder, out=tmp_path / "run", **options)))
    thread.start()
    thread.join()
    assert runs[0].best.exists()


def test_public_names_are_lazy_and_stay():
    """Rooms of the house must not take the place of functions when they are imported."""
    code = """
import sys, corinfomax
assert set(corinfomax.__all__) <= set(dir(corinfomax)) and "torch" not in sys.modules
import corinfomax.cli.main, corinfomax.cli.doctor, corinfomax.checkup.findings, corinfomax.report.gather
corinfomax.pretrain
for name in corinfomax.__all__:
    assert type(getattr(corinfomax, name)).__name__ != "module", name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
