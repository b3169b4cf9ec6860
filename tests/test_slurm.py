"""The batch script is valid bash, runs the typed command on every node, and nothing is trained by printing it."""

import os
import subprocess

import pytest

import tiny
from corinfomax import cli, runs, slurm


@pytest.mark.parametrize("flag", [["--sbatch", "2", "8"], ["--sbatch=2", "8"]])
def test_the_command_is_kept_word_by_word(capsys, flag):
    assert cli.main(["pretrain", "a folder/with 'quotes'", *flag, "--epochs", "3"]) == 0
    text = capsys.readouterr().out
    assert "-m corinfomax pretrain 'a folder/with '\"'\"'quotes'\"'\"'' --epochs 3\n" in text
    assert "#SBATCH --nodes=2\n" in text
    assert "--nnodes 2 --nproc-per-node 8" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.parametrize(("nodes", "gpus"), [(0, 8), (1, 0)])
def test_no_node_is_a_sentence(nodes, gpus):
    with pytest.raises(ValueError, match="how many nodes"):
        slurm.script(["pretrain", "x"], nodes=nodes, gpus=gpus)


def test_the_script_trains_where_srun_starts_it(tmp_path):
    # What SLURM brings: the first name of the job's nodes, and srun, which here starts one task.
    (tmp_path / "bin").mkdir()
    for name, body in {"scontrol": "echo localhost; echo other", "srun": 'exec "$@"'}.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    data = tiny.folder(tmp_path / "data", {"": 16}, labelled=False)
    run = tmp_path / "run"
    words = ["pretrain", str(data), "--out", str(run), "--device", "cpu", "--no-report", *tiny.KNOBS]
    (tmp_path / "job.sh").write_text(slurm.script(words, nodes=1, gpus=1))
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "7",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", str(tmp_path / "job.sh")],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert runs.read_metrics(run)[-1]["step"] == 4
