"""A SLURM batch script for a command: one torchrun agent a node, a process a GPU."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

PORT = 29_500  # torchrun's usual one, on the first node
GRACE = 120  # seconds before the time limit at which SLURM asks the run to stop; torchrun then gives it 30


def script(argv: Sequence[str], *, nodes: int, gpus: int) -> str:
    """The text for `sbatch` that runs `corinfomax argv` on `nodes` machines with `gpus` GPUs each, by this Python.

    Raises ValueError for fewer than one of either.
    """
    if nodes < 1 or gpus < 1:
        raise ValueError(f"--sbatch takes how many nodes and how many GPUs each has, at least 1; got {nodes} {gpus}")
    return f"""\
#!/bin/bash
#SBATCH --job-name=corinfomax
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@{GRACE}
#SBATCH --output=corinfomax-%j.log

set -euo pipefail
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
srun {shlex.quote(sys.executable)} -m torch.distributed.run \\
    --nnodes {nodes} --nproc-per-node {gpus} \\
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:{PORT}" \\
    -m corinfomax {shlex.join(argv)}
"""


def without_flag(argv: Sequence[str], flag: str, values: int) -> list[str]:
    """The words of a command less `flag`, which it has, and its `values`, of which the first may follow on a `=`."""
    words = list(argv)
    place = next(place for place, word in enumerate(words) if word.partition("=")[0] == flag)
    return words[:place] + words[place + 1 + values - ("=" in words[place]) :]
