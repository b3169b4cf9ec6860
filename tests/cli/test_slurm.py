"""The batch script is valid bash, runs the typed command on every node, and goes on after the end of its time."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import tiny
from corinfomax.cli import slurm
from corinfomax.cli.main import main
from corinfomax.runtime import run_folder


@pytest.mark.parametrize("flag", [["--sbatch", "2", "8"], ["--sbatch=2", "8"]])
def test_the_command_is_kept_word_by_word(capsys, flag):
    assert main(["pretrain", "a folder/with 'quotes'", *flag, "--epochs", "3"]) == 0
    text = capsys.readouterr().out
    assert "words=(pretrain 'a folder/with '\"'\"'quotes'\"'\"'' --epochs 3 --out \"$run\")\n" in text
    assert 'run="runs/slurm-$SLURM_JOB_ID"\n' in text
    assert "#SBATCH --nodes=2\n" in text
    assert "--nnodes 2 --nproc-per-node 8" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.parametrize(("nodes", "gpus"), [(0, 8), (1, 0)])
def test_no_node_is_a_sentence(nodes, gpus):
    with pytest.raises(ValueError, match="how many nodes"):
        slurm.script(["pretrain", "x"], nodes=nodes, gpus=gpus, run=None)


@pytest.fixture
def job(tmp_path, capsys):
    """Start the script of `pretrain` with these words as SLURM would, in a folder of its own."""
    (tmp_path / "bin").mkdir()
    # What SLURM brings: the names of the job's nodes, the way back into the queue, and srun, which here is one task.
    for name, body in {
        "scontrol": f'echo "$@" >> {tmp_path}/asked; echo localhost; echo other',
        "srun": 'exec "$@"',
    }.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    tiny.folder(tmp_path / "data", {"": 16}, labelled=False)

    def start(*words):
        assert main(["pretrain", "data", "--sbatch", "1", "1", "--no-report", *tiny.KNOBS, *words]) == 0
        (tmp_path / "job.sh").write_text(capsys.readouterr().out)
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_ID": "7",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            ["bash", "job.sh"],
            cwd=tmp_path,
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    return start


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines()


def test_the_script_trains_where_srun_starts_it(tmp_path, job):
    _, said = (running := job("--out", "run", "--device", "cpu")).communicate(timeout=200)
    assert running.returncode == 0, said
    assert run_folder.read_metrics(tmp_path / "run")[-1]["step"] == 4
    assert asked(tmp_path) == ["show hostnames node[1-2]"]


def test_a_job_told_to_stop_goes_back_into_the_queue_and_on_from_there(tmp_path, job):
    words = ["--device", "cpu", "--epochs", "150", "--log-steps", "1", "--diagnoses", "0"]
    run = tmp_path / "runs" / "slurm-7"
    first, deadline = job(*words), time.monotonic() + 120
    while len(run_folder.read_metrics(run)) < 5:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[1]
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    _, said = first.communicate(timeout=100)
    assert first.returncode != 0
    assert asked(tmp_path) == ["show hostnames node[1-2]", "requeue 7"]
    stopped = len(run_folder.read_metrics(run))
    assert 5 <= stopped < 300, said
    assert run_folder.step_of(run_folder.checkpoints(run)[-1]) == stopped

    _, said = (again := job(*words)).communicate(timeout=200)
    assert again.returncode == 0, said
    assert [row["step"] for row in run_folder.read_metrics(run)] == list(range(1, 301))
    assert asked(tmp_path)[2:] == ["show hostnames node[1-2]"]
