"""Several processes give what one gives: loss, every gradient, the moments, whole runs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from corinfomax.runtime import run_folder
from corinfomax.weights import checkpoint

HERE = Path(__file__).parents[1] / "support"


def start(*words):
    """Start Python on these words, as one thread."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(*started):
    """The exit code and the errors of each process when all have ended."""
    try:
        errors = [each.communicate(timeout=300)[1] for each in started]
    finally:
        for each in started:
            each.kill()
    return [(each.returncode, error) for each, error in zip(started, errors, strict=True)]


def two_nodes(job, out):
    """Two agents with addresses of their own, as on two machines, a process each; they meet at the first one's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    return [
        start(*words, "--local-addr", address, HERE / "world.py", job, out) for address in ("127.0.0.1", "127.0.0.2")
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of what 1, 2 and 4 processes and two nodes made."""
    folder = tmp_path_factory.mktemp("worlds")
    tiny.folder(folder / "data", {"": 80}, labelled=False)
    ((code, error),) = ended(start(HERE / "world.py", "all", folder / "n.pt", 1, 2, 4))
    assert code == 0, error
    for code, error in ended(*two_nodes("all", folder / "nodes.pt")):
        assert code == 0, error
    return folder


@pytest.mark.parametrize("count", [2, 4, "nodes"])
def test_loss_gradients_moments_and_statistics_are_those_of_one_process(results, count):
    alone, several = (torch.load(results / f"{n}.pt") for n in (1, count))
    # float32: a batch's sums in another order, through four steps of a network with BatchNorm.
    for precision, relative, absolute in (("double", 1e-9, 1e-12), ("float", 2e-3, 1e-5), ("pure", 1e-9, 1e-12)):
        assert several[precision].keys() == alone[precision].keys()
        assert len(alone[precision]) >= 4
        for name, want in alone[precision].items():
            got = several[precision][name]
            assert got.dtype == want.dtype
            # As vectors: of a bias before BatchNorm the gradient is rounding alone.
            apart, length = (torch.linalg.vector_norm(x.double()) for x in (got - want, want))
            assert apart <= relative * length + absolute, f"{precision} {name}: {got} and {want}"


@pytest.mark.parametrize("count", [2, 4, "nodes"])
def test_a_run_of_the_training_loop_is_that_of_one_process(results, count):
    # Rounding grows up to tenfold with each step; float32 starts at 1e-7, so its first steps alone can be compared.
    compared = (("float64", 20, 20, 1e-9), ("float32", 20, 3, 1e-5), ("taught", 6, 6, 1e-9), ("kernel", 6, 6, 1e-9))
    for run, done, steps, tolerance in compared:
        alone, several = (run_folder.read_metrics(results / f"{run}-{n}") for n in (1, count))
        assert [row["step"] for row in several] == list(range(1, done + 1))
        for name in ("loss", "gradient_norm"):  # the latter is clipped in every step
            got, want = ([row[name] for row in rows[:steps]] for rows in (several, alone))
            assert got == pytest.approx(want, rel=tolerance if name == "loss" else 100 * tolerance)
    for run in ("float64", "taught", "kernel"):
        alone, several = (checkpoint.load(checkpoint.last(results / f"{run}-{n}")) for n in (1, count))
        assert any(name.startswith("teacher/") for name in alone.loop) == (run == "taught")
        for part in ("network", "criterion", "optimizer", "loop"):
            for name, want in getattr(alone, part).items():
                apart = torch.linalg.vector_norm((getattr(several, part)[name] - want).double())
                assert apart <= 1e-9 * torch.linalg.vector_norm(want.double()) + 1e-12, (
                    f"{part} {name} {apart} {torch.linalg.vector_norm(want.double())}"
                )


def test_what_fails_in_one_process_stops_them_all_and_is_kept(tmp_path):
    tiny.folder(tmp_path / "data", {"": 40}, labelled=False)
    ((code, error),) = ended(start(HERE / "world.py", "fail", tmp_path / "said", 2))
    assert code == 0, error
    first, second = ((tmp_path / f"2-{rank}").read_text() for rank in (0, 1))
    assert "the loss became nan in step 5" in second
    assert first.startswith(second) and "--replay" in first
    kept = checkpoint.load(tmp_path / "failed" / "failed-step-5.safetensors")
    assert len(kept.loop["pixels"]) == tiny.RECIPE.batch
    assert all(tensor.isfinite().all() for tensor in kept.network.values())


def test_a_process_that_goes_silent_is_a_sentence_in_time(tmp_path):
    tiny.folder(tmp_path / "data", {"": 40}, labelled=False)
    ((code, error),) = ended(start(HERE / "world.py", "hang", tmp_path / "said", 2))
    assert code == 0, error
    said, _, seconds = (tmp_path / "2").read_text().rpartition(" after ")
    assert said.startswith("another process of this run is gone, or gave no answer for 0.05 minutes (")
    assert int(seconds.split()[0]) < 15  # before the other ends, at 20


def test_an_uneven_split_is_one_sentence(tmp_path):
    ((code, error),) = ended(start(HERE / "world.py", "uneven", tmp_path / "n.pt", 2))
    assert code != 0
    assert "25 images a step cannot be shared equally by 2 processes; choose a multiple" in error


def test_long_waits_are_waited_for_and_processes_that_differ_say_in_what(tmp_path):
    for rank in (0, 1):
        tiny.folder(tmp_path / f"images-{rank}", {"": 24 + 2 * rank}, labelled=False)
    ((code, error),) = ended(start(HERE / "world.py", "differ", tmp_path / "n.pt", 2))
    assert code == 0, error
    for what in ("images", "recipe"):
        assert (
            error.count(f"the processes of this run differ in their {what}; every machine needs the same images") == 2
        )
    assert {path.parts[-3] for path in tmp_path.glob("*/checkpoints/*")} == {"mixed"}
    assert checkpoint.load(checkpoint.last(tmp_path / "mixed")).recipe.precision == "float32"
