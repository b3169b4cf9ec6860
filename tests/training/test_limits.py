"""What stops a run from outside costs one sentence, exit code 2, and nothing that was saved."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import tiny
from corinfomax.cli.main import main
from corinfomax.images import cache as images
from corinfomax.images.sources import Data
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Row
from corinfomax.training import loop
from corinfomax.weights import checkpoint

KNOBS = [*tiny.KNOBS, "--no-evaluate", "--no-report"]
PACE = ["--scores", "0", "--diagnoses", "0", "--checkpoint-minutes", "0", "--log-steps", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("data") / "data", {"train": 40, "test": 12})


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a disk of some size, or changes it; skipped where nothing may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        again = "remount," if place.is_mount() else ""
        words = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("no file system may be mounted here")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


def sentence(capsys):
    """The one line that the command ended with."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("corinfomax: ")
    assert sum(line.startswith("corinfomax: ") for line in err.splitlines()) == 1
    return last


def whole(run):
    """Every checkpoint of a run can be read, and nothing half-written is left."""
    assert not list((run / "checkpoints").glob(".*.part"))
    return [checkpoint.load_checkpoint(path).step for path in run_folder.checkpoints(run)]


def test_a_disk_that_fills_up(data, small_disk, capsys):
    """For real: the disk holds some checkpoints and not all; with room the run goes on from the last."""
    disk = small_disk("size=300k")
    run = disk / "run"
    assert main(["pretrain", str(data), "--out", str(run), *KNOBS, *PACE, "--keep", "100"]) == 2
    said = sentence(capsys)
    assert "cannot write" in said and "No space left" in said
    assert f"once that is fixed: corinfomax pretrain --resume {run}" in said
    steps = whole(run)
    assert steps == list(range(1, len(steps) + 1)) and 1 <= len(steps) < 10
    small_disk("size=50m")
    assert main(["pretrain", "--resume", str(run), *PACE, "--no-evaluate", "--no-report", "--keep", "100"]) == 0
    assert whole(run) == list(range(1, 11))
    assert [row.step for row in run_folder.read_metrics(run)] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("what", ["save_file", "_sync"])
def test_a_write_that_fails_leaves_the_checkpoint_before(data, tmp_path, capsys, monkeypatch, what):
    room = checkpoint if what == "save_file" else run_folder
    real, calls = getattr(room, what), []

    def full(*arguments, **named):
        calls.append(arguments)
        if len(run_folder.checkpoints(tmp_path / "run")) >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **named)

    monkeypatch.setattr(room, what, full)
    assert main(["pretrain", str(data), "--out", str(tmp_path / "run"), *KNOBS, *PACE]) == 2
    said = sentence(capsys)
    assert "cannot write" in said and "No space left on device" in said and "Errno" not in said
    assert whole(tmp_path / "run") == [1, 2, 3]


def test_a_run_folder_that_may_only_be_read(data, small_disk, tmp_path, capsys):
    assert main(["pretrain", str(data), "--out", str(tmp_path / "run"), *KNOBS, *PACE]) == 0
    disk = small_disk("size=50m")
    shutil.copytree(tmp_path / "run", disk / "run")
    small_disk("ro")
    before = whole(disk / "run")
    capsys.readouterr()
    assert main(["pretrain", "--resume", str(disk / "run")]) == 2
    assert "cannot write" in (said := sentence(capsys)) and "Read-only file system" in said
    assert main(["pretrain", str(data), "--out", str(disk / "other"), *KNOBS]) == 2
    assert "Read-only file system" in sentence(capsys)
    assert whole(disk / "run") == before


def test_images_that_vanish_while_running_are_not_missed(data, tmp_path, monkeypatch, capsys):
    """Everything comes from the decoded cache, and that is mapped: its pages stay while a process holds them."""
    mine, cache = tmp_path / "mine", tmp_path / "cache"
    shutil.copytree(data, mine)
    real = loop.update

    def lose(recipe, learner, pair, step, device, **options):
        if step == 3:
            shutil.rmtree(mine)
            shutil.rmtree(cache)
        return real(recipe, learner, pair, step, device, **options)

    monkeypatch.setattr(loop, "update", lose)
    run, kept = tmp_path / "run", tmp_path / "kept"
    words = ["--cache", str(cache), *KNOBS, *PACE]
    assert main(["pretrain", str(mine), "--out", str(run), *words]) == 0
    monkeypatch.undo()
    assert main(["pretrain", str(data), "--out", str(kept), *KNOBS, *PACE]) == 0
    ours, theirs = (checkpoint.load_last(folder)[1] for folder in (run, kept))
    assert tiny.equal_states(ours.network, theirs.network)
    capsys.readouterr()
    assert main(["pretrain", "--resume", str(run)]) == 2  # but to go on with a run they must be there
    assert f"images are not at {mine} any more" in sentence(capsys)
    assert whole(run)


def test_a_refused_resume_touches_nothing(data, tmp_path, capsys):
    """Changed images and a folder in use: what the run had stays as it was."""
    mine, run = tmp_path / "mine", tmp_path / "run"
    shutil.copytree(data, mine)
    assert main(["pretrain", str(mine), "--out", str(run), *KNOBS, *PACE]) == 0
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    with run_folder.locked(run):
        assert main(["pretrain", "--resume", str(run)]) == 2
    assert "is in use by another process" in sentence(capsys)
    next((mine / "train").rglob("*.png")).unlink()
    assert main(["pretrain", "--resume", str(run)]) == 2
    assert "are not the ones that" in sentence(capsys)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def test_the_cache_says_so_when_its_disk_is_full(data, small_disk):
    disk = small_disk("size=8k")
    with pytest.raises(ValueError, match=r"cannot write the image cache.*No space left.*--cache"):
        images.load(Data(data, cache=disk), side=16, progress=False)


def line_of(step):
    row = Row(step=step, loss=1.0, attraction=0.1, gradient_norm=1.0, lr=0.1, seconds=1.0)
    return json.dumps(row.to_json()).encode() + b"\n"


@pytest.mark.parametrize(
    ("end", "left"),
    [(b"", 2), (b'{"step": 3, "lo', 2), (b"\0" * 40, 2), (b"\0\n\0\n", 2), (line_of(3), 3)],
)
def test_the_end_of_the_metrics_that_was_never_written_is_left_out(tmp_path, end, left):
    (tmp_path / "metrics.jsonl").write_bytes(line_of(1) + line_of(2) + end)
    assert [row.step for row in run_folder.read_metrics(tmp_path)] == [1, 2, 3][:left]


@pytest.mark.parametrize("line", [b"\0\0", b"{}", b'"step"', b'{"step": "1"}', b"\xff"])
def test_a_line_of_the_metrics_that_is_damaged_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(line_of(1) + line + b"\n" + line_of(3))
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is not a row of metrics"):
        run_folder.read_metrics(tmp_path)


def test_a_second_command_leaves_the_folder_to_the_one_that_is_about_to_begin(tmp_path):
    run = tmp_path / "run"
    with run_folder.new_run(run):
        before = (run / ".lock").stat().st_ino
        for _ in range(2):
            with pytest.raises(ValueError, match="is in use by another process"), run_folder.new_run(run):
                pass
        assert (run / ".lock").stat().st_ino == before
    assert not run.exists(), "nothing began"


def test_a_lock_that_was_taken_away_holds_nobody(tmp_path, monkeypatch):
    import fcntl

    real, calls = fcntl.flock, []

    def flock(file, how):
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        return real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_folder.locked(tmp_path):
        assert len(calls) == 2
        monkeypatch.undo()
        with pytest.raises(ValueError, match="in use"), run_folder.locked(tmp_path):
            pass


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle):
        done.append(("sync", str(Path(f"/proc/self/fd/{handle}").readlink())))
        fsync(handle)

    def renamed(self, target):
        done.append(("name", str(target)))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    run_folder.write_text(tmp_path / "a", "a")
    assert [what for what, _ in done] == ["sync", "name", "sync"]
    assert done[0][1].endswith(".part")
    assert done[1:] == [("name", str(tmp_path / "a")), ("sync", str(tmp_path))]


def test_all_checkpoints_damaged_is_a_sentence_that_says_what_to_do(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (1, 2):
        (folder / f"step-{step:08d}.safetensors").write_bytes(b"nothing")
    (folder / f"step-{3:08d}.safetensors").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"none of the 3 checkpoints in .* is whole: put a good copy back, or"):
        checkpoint.load_resumable(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"recipe": {}}', "nothing"])
def test_a_damaged_recipe_file_is_named(tmp_path, content):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match=r"recipe\.json"):
        checkpoint.load_resumable(tmp_path)
