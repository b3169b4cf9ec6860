"""A SLURM batch script for a command: one torchrun agent a node, a process a GPU, and back into the queue when told to
stop."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

PORT = 29_500  # torchrun's usual one, on the first node
GRACE = 120  # seconds before the time limit at which SLURM tells the script; torchrun then gives the run 30


def script(argv: Sequence[str], *, nodes: int, gpus: int, run: Path | None, device: str = "auto") -> str:
    """The text for `sbatch` that runs `corinfomax argv` on `nodes` machines with `gpus` GPUs each, by this Python.

    `run` is the folder that argv names, by --out or --resume; else one with the job's number. A job that starts anew,
    after its time limit, for others' sake or on other nodes, goes on with what is in it, on `device`.

    Raises ValueError for fewer than one of either.
    """
    if nodes < 1 or gpus < 1:
        raise ValueError(f"--sbatch takes how many nodes and how many GPUs each has, at least 1; got {nodes} {gpus}")
    folder = '"runs/slurm-$SLURM_JOB_ID"' if run is None else shlex.quote(str(run))
    begin = shlex.join(argv) + (' --out "$run"' if run is None else "")
    go_on = "" if device == "auto" else f" --device {shlex.quote(device)}"
    return f"""\
#!/bin/bash
#SBATCH --job-name=corinfomax
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@{GRACE}
#SBATCH --output=corinfomax-%j.log
#SBATCH --open-mode=append

set -uo pipefail
run={folder}
if [ -e "$run/recipe.json" ]; then
    words=(pretrain --resume "$run"{go_on})
else
    words=({begin})
fi
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# When time is up, or others come first: a checkpoint, and the job goes back into the queue.
told= child=
trap 'told=1; [ -z "$child" ] || kill -TERM "$child"' USR1 TERM
srun {shlex.quote(sys.executable)} -m torch.distributed.run \\
    --nnodes {nodes} --nproc-per-node {gpus} \\
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:{PORT}" \\
    -m corinfomax "${{words[@]}}" &
child=$!
wait "$child"
status=$?
while kill -0 "$child" 2>/dev/null; do  # a signal ends a wait early
    wait "$child"
    status=$?
done
if [ -n "$told" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def without_flag(argv: Sequence[str], flag: str, values: int) -> list[str]:
    """The words of a command less `flag`, which it has, and its `values`, of which the first may follow on a `=`."""
    words = list(argv)
    place = next(place for place, word in enumerate(words) if word.partition("=")[0] == flag)
    return words[:place] + words[place + 1 + values - ("=" in words[place]) :]
