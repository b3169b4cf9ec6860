"""The SLURM script is valid bash, starts one agent a node, and resumes after its time limit."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from corinfomax.recipes.published import RECIPES
from corinfomax.runtime import run_folder

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sh"
TORCHRUN = f'exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"'
HOSTS = "show hostnames node[1-2]"


@pytest.fixture
def start(tmp_path):
    """Start the edited script as SLURM would, with stand-ins for its commands and for torchrun."""
    (tmp_path / "bin").mkdir()

    def command(name, body):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)

    # srun starts a single task; scontrol writes down its words, and names two nodes, of which the first is this machine
    command("srun", 'exec "$@"')
    command("scontrol", f'echo "$@" >> {tmp_path}/asked; echo localhost; echo other')

    def start(*options, data="data", torchrun=TORCHRUN):
        command("torchrun", torchrun)
        settings = {"data": shlex.quote(data), "options": f"({shlex.join(options)})"}
        lines = SCRIPT.read_text().splitlines()
        names = [line.partition("=")[0] for line in lines]
        for name, value in settings.items():
            lines[names.index(name)] = f"{name}={value}"
        (tmp_path / "job.sh").write_text("\n".join(lines) + "\n")
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_GPUS_ON_NODE": "1",
            "SLURM_JOB_ID": "7",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            ["bash", "job.sh"],
            cwd=tmp_path,
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines()


def wait_for(condition, job, seconds=120):
    """Until the condition holds, while the job runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[1]
        time.sleep(0.05)


def test_the_script_is_valid_bash_of_which_slurm_reads_every_setting():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    lines = SCRIPT.read_text().splitlines()
    first_command = next(place for place, line in enumerate(lines) if line and not line.startswith("#"))
    settings = [place for place, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert len(settings) == 10 and max(settings) < first_command  # SLURM stops reading at the first command


def test_the_recipe_of_the_script_exists():
    names = set(re.findall(r"--recipe ([\w-]+)", SCRIPT.read_text()))
    assert names and names <= RECIPES.keys()


def test_torchrun_gets_every_word(tmp_path, start):
    output, errors = start("--epochs", "3", data="a folder/with 'quotes'", torchrun='printf "%s\\n" "$@"').communicate()
    assert not errors
    agent = shlex.split("--nnodes 1 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id 7 --rdzv-endpoint localhost:29500")
    command = ["pretrain", "a folder/with 'quotes'", "--out", "runs/slurm-7", "--epochs", "3"]
    assert output.splitlines() == [*agent, "-m", "corinfomax", *command]
    assert asked(tmp_path) == [HOSTS]

    (tmp_path / "runs" / "slurm-7").mkdir(parents=True)
    (tmp_path / "runs" / "slurm-7" / "recipe.json").touch()
    output, _ = start("--epochs", "3", torchrun='printf "%s\\n" "$@"').communicate()
    assert output.splitlines() == [*agent, "-m", "corinfomax", "pretrain", "--resume", "runs/slurm-7"]


def test_a_run_that_fails_is_not_requeued(tmp_path, start):
    (job := start(torchrun="exit 3")).communicate()
    assert job.returncode == 3
    assert asked(tmp_path) == [HOSTS]


@pytest.mark.parametrize("code", [0, 1])
def test_a_stopped_run_is_requeued_if_it_is_not_finished(tmp_path, start, code):
    job = start(torchrun=f"trap 'sleep 0.5; exit {code}' TERM\ntouch ready\nwhile :; do sleep 0.1; done")
    wait_for((tmp_path / "ready").exists, job)
    job.send_signal(signal.SIGTERM)
    job.communicate()
    assert job.returncode == code  # waited for, although the signal interrupts the first wait
    assert asked(tmp_path) == [HOSTS] + ["requeue 7"] * code


def test_a_run_goes_back_into_the_queue_and_resumes(tmp_path, start):
    tiny.folder(tmp_path / "data", {"": 16}, labelled=False)
    options = ["--no-report", *tiny.KNOBS, "--epochs", "100", "--log-steps", "1", "--diagnoses", "0"]
    run = tmp_path / "runs" / "slurm-7"
    job = start(*options)
    wait_for(lambda: len(run_folder.read_metrics(run)) >= 5, job)
    job.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=100)
    assert job.returncode != 0
    assert asked(tmp_path) == [HOSTS, "requeue 7"]
    stopped = len(run_folder.read_metrics(run))
    assert 5 <= stopped < 200, errors
    assert run_folder.step_of(run_folder.checkpoints(run)[-1]) == stopped

    _, errors = (again := start(*options)).communicate(timeout=200)
    assert again.returncode == 0, errors
    assert [row.step for row in run_folder.read_metrics(run)] == list(range(1, 201))
    assert asked(tmp_path)[2:] == [HOSTS]
