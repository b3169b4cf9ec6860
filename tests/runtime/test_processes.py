"""Several processes against one: loss, every gradient, the moments, whole runs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from corinfomax.runtime import run_folder
from corinfomax.weights import checkpoint

HERE = Path(__file__).parents[1] / "support"


def start(*arguments):
    """Start Python with these arguments, on one thread."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(*started):
    """Exit code and errors of each process, once all have ended."""
    try:
        errors = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


def two_nodes(job, out):
    """Two agents of torchrun with different addresses, as on two machines, with one process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    return [
        start(*options, "--local-addr", address, HERE / "world.py", job, out) for address in ("127.0.0.1", "127.0.0.2")
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder with the results of 1, 2 and 4 processes and of two nodes."""
    folder = tmp_path_factory.mktemp("worlds")
    tiny.folder(folder / "data", {"": 80}, labelled=False)
    ((code, error),) = ended(start(HERE / "world.py", "all", folder / "n.pt", 1, 2, 4))
    assert code == 0, error
    for code, error in ended(*two_nodes("all", folder / "nodes.pt")):
        assert code == 0, error
    return folder


@pytest.mark.parametrize("count", [2, 4, "nodes"])
def test_loss_gradients_moments_and_statistics_equal_those_of_one_process(results, count):
    alone, several = (torch.load(results / f"{n}.pt") for n in (1, count))
    # float32: a batch's sums in another order, through four steps of a network with BatchNorm.
    for precision, relative, absolute in (("double", 1e-9, 1e-12), ("float", 2e-3, 1e-5), ("pure", 1e-9, 1e-12)):
        assert several[precision].keys() == alone[precision].keys()
        assert len(alone[precision]) >= 4
        for name, want in alone[precision].items():
            got = several[precision][name]
            assert got.dtype == want.dtype
            # As vectors: the gradient of a bias before BatchNorm is nothing but rounding.
            apart, length = (torch.linalg.vector_norm(x.double()) for x in (got - want, want))
            assert apart <= relative * length + absolute, f"{precision} {name}: {got} and {want}"


@pytest.mark.parametrize("count", [2, 4, "nodes"])
def test_a_run_of_the_training_loop_equals_that_of_one_process(results, count):
    # Rounding grows up to tenfold with each step and starts at 1e-7 in float32: compare only its first steps.
    compared = (("float64", 10, 10, 1e-9), ("float32", 4, 3, 1e-5), ("kernel", 6, 6, 1e-9), ("tuned", 6, 6, 1e-9))
    for run, done, steps, tolerance in compared:
        alone, several = (run_folder.read_metrics(results / f"{run}-{n}") for n in (1, count))
        assert [row.step for row in several] == list(range(1, done + 1))
        for name in ("loss", "gradient_norm"):  # the latter is clipped in every step
            got, want = ([getattr(row, name) for row in rows[:steps]] for rows in (several, alone))
            assert got == pytest.approx(want, rel=tolerance if name == "loss" else 100 * tolerance)

    # the last checkpoints
    for run in ("float64", "kernel", "tuned"):
        alone, several = (checkpoint.load_last(results / f"{run}-{n}")[1] for n in (1, count))
        for part in ("network", "criterion", "optimizer", "loop"):
            for name, want in getattr(alone, part).items():
                apart = torch.linalg.vector_norm((getattr(several, part)[name] - want).double())
                assert apart <= 1e-9 * torch.linalg.vector_norm(want.double()) + 1e-12, (
                    f"{part} {name} {apart} {torch.linalg.vector_norm(want.double())}"
                )


def test_a_failure_in_one_process_stops_all_and_saves_the_batch(tmp_path):
    tiny.folder(tmp_path / "data", {"": 40}, labelled=False)
    ((code, error),) = ended(start(HERE / "world.py", "fail", tmp_path / "errors", 2))
    assert code == 0, error
    first, second = ((tmp_path / f"2-{rank}").read_text() for rank in (0, 1))
    assert "the loss became nan in step 5" in second
    # nan reaches the first process in BatchNorm, whose statistics all processes share
    assert "; the first bad output is backbone.conv1; a lower learning rate" in second
    assert first == f"{second}; the batch is saved in {tmp_path / 'failed' / 'failed-step-5.safetensors'}"
    saved = checkpoint.load_checkpoint(tmp_path / "failed" / "failed-step-5.safetensors")
    assert len(saved.loop["pixels"]) == tiny.RECIPE.batch
    assert all(tensor.isfinite().all() for tensor in saved.network.values())


def test_a_silent_process_is_reported_in_time(tmp_path):
    tiny.folder(tmp_path / "data", {"": 40}, labelled=False)
    ((code, error),) = ended(start(HERE / "world.py", "hang", tmp_path / "errors", 2))
    assert code == 0, error
    error, _, seconds = (tmp_path / "2").read_text().rpartition(" after ")
    assert error.startswith("another process of this run has ended, or did not answer for 0.05 minutes (")
    assert int(seconds.split()[0]) < 11  # the silent one ends at 14


def test_an_uneven_split_is_one_sentence(tmp_path):
    ((code, error),) = ended(start(HERE / "world.py", "uneven", tmp_path / "n.pt", 2))
    assert code != 0
    assert "25 images a step cannot be shared equally by 2 processes; choose a multiple" in error


def test_one_process_measures_the_levels_for_all(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(5):
        np.save(tmp_path / "data" / f"{i}.npy", np.full((1, 8, 9, 2), 900 + i, np.uint16))
    ((code, error),) = ended(start(HERE / "world.py", "survey", tmp_path / "levels", 2))
    assert code == 0, error
    first, second = ((tmp_path / f"2-{rank}").read_text() for rank in (0, 1))
    assert first.startswith("5 measured: ") and "high=(1023.0,)" in first
    assert second == first.replace("5 measured", "0 measured")


def test_processes_wait_for_hours_and_name_their_differences(tmp_path):
    for rank in (0, 1):
        tiny.folder(tmp_path / f"images-{rank}", {"": 24 + 2 * rank}, labelled=False)
    ((code, error),) = ended(start(HERE / "world.py", "differ", tmp_path / "n.pt", 2))
    assert code == 0, error
    for name in ("images", "recipe"):
        assert (
            error.count(f"the processes of this run differ in their {name}; every machine needs the same images") == 2
        )
    assert {path.parts[-3] for path in tmp_path.glob("*/checkpoints/*")} == {"mixed"}
    assert checkpoint.load_last(tmp_path / "mixed")[1].recipe.precision == "float32"
