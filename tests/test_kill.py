"""A run that kill -9 ends again and again gives bit for bit what one gives that nothing stops."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import lives
import tiny
from corinfomax import checkpoint, cli, runs

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["corinfomax.train", "corinfomax.images"]
)  # torch is imported once, and no thread runs yet where processes fork off


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("data") / "data", {"train": 40, "test": 12})


def wait_for(condition, alive, *, every=5e-4):
    """Until the condition holds; whether it did while the process lived."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        if not alive():
            return False
        time.sleep(every)
    return True


def begin(target, *arguments):
    process = FORK.Process(target=target, args=arguments)
    process.start()
    return process


def parts(run):
    folder = run / "checkpoints"
    return [path.name for path in folder.glob(".*.part")]


def lines(run):
    """Every line of metrics.jsonl without the time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({key: value for key, value in row.items() if key != "seconds"}) for row in rows]


def same_end(killed, whole):
    assert lines(killed) == lines(whole)
    ours, theirs = (checkpoint.load(checkpoint.last(run)) for run in (killed, whole))
    assert (ours.step, ours.recipe) == (theirs.step, theirs.recipe)
    for part in ("network", "criterion", "optimizer", "loop"):
        assert tiny.equal_states(getattr(ours, part), getattr(theirs, part)), part
    assert ours.optimizer
    assert not parts(killed)


def test_a_run_killed_at_any_moment_ends_as_one_never_stopped(data, tmp_path):
    """Three lives end while a checkpoint is being written, two at moments drawn from a seed, the last one by itself."""
    whole, run, moments = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    torn = 0
    for life in range(5):
        left, before = set(parts(run)), runs.checkpoints(run)[-1:]
        process = begin(lives.live, data, run)

        def time_to_kill(writing=life < 3, left=left, before=before):
            if runs.checkpoints(run)[-1:] == before:  # each life gets further
                return False
            return not writing or set(parts(run)) - left

        assert wait_for(time_to_kill, process.is_alive)
        if life >= 3:
            time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        torn += len(set(parts(run)) - left) > 0
    assert torn >= 1, "no kill met a checkpoint half written"
    for folder in (run, whole):
        process = begin(lives.live, data, folder)
        process.join()
        assert process.exitcode == 0
    same_end(run, whole)


def test_the_command_killed_before_and_while_it_saves_goes_on(data, tmp_path):
    knobs = ["--size", "16", "--cache-side", "16", "--batch", "8", "--epochs", "12", "--cache", str(tmp_path / "cache")]
    knobs += ["--backbone.layers", "1", "1", "1", "1", "--backbone.channels", "8", "8", "8", "16"]
    knobs += ["--projector.widths", "32", "8"]
    pace = ["--diagnoses", "0", "--scores", "2", "--log-steps", "3", "--no-evaluate", "--no-report"]
    run, whole = tmp_path / "run", tmp_path / "whole"

    words = [sys.executable, "-m", "corinfomax", "pretrain", str(data), "--out", str(run), *knobs, *pace]
    first = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    assert wait_for(lambda: len(runs.read_metrics(run)) > 2, lambda: first.poll() is None, every=0.02)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert not runs.checkpoints(run)
    again = ["pretrain", "--resume", str(run), *pace]  # what `corinfomax` runs, without the seconds of its imports
    second = begin(cli.main, [*again, "--checkpoint-minutes", "0"])
    assert wait_for(lambda: len(runs.checkpoints(run)) > 2 and parts(run), second.is_alive)
    second.kill()
    second.join()
    assert second.exitcode == -signal.SIGKILL
    assert 0 < runs.step_of(runs.checkpoints(run)[-1]) < 60
    for arguments in (again, ["pretrain", str(data), "--out", str(whole), *knobs, *pace]):
        begin(cli.main, arguments).join()
    same_end(run, whole)
