"""The loops in examples/, in DistributedDataParallel and in Lightning: two processes train what one does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loops
import tiny

HERE = Path(__file__).parents[1] / "support"


def run(loop, out, count):
    """The weights after three steps in `count` processes, each with the environment that torchrun gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
        world |= {"MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": 1}
        environment = os.environ | {name: str(value) for name, value in world.items()}
        words = [sys.executable, str(HERE / "loops.py"), loop, str(out)]
        started.append(subprocess.Popen(words, env=environment, cwd=out.parent, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=200)[1] for process in started]
    assert all(process.returncode == 0 for process in started), errors
    return torch.load(out)


@pytest.mark.parametrize("loop", ["ddp", "lightning"])
def test_two_processes_train_what_one_does(tmp_path, loop):
    if loop == "lightning":
        pytest.importorskip("lightning")
    network = loops.build_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    loops.plain(network)
    found = run(loop, tmp_path / "weights.pt", 2)
    for name, want in network.state_dict().items():
        moved = (want - before[name]).norm()
        assert moved > 1e-3
        assert (found[name] - want).norm() <= 1e-9 * moved, name
    assert not tiny.equal_states(before, found)
