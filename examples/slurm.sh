#!/bin/bash
# Pretrain on SLURM. Edit both blocks of settings, then submit: sbatch slurm.sh
# Before the time limit, and when it is preempted, the job saves a checkpoint and goes back into the queue. It resumes
# from there when it starts again.

#SBATCH --job-name=corinfomax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
# One torchrun agent per node; it starts one process per GPU.
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
# SLURM signals this script two minutes before the time limit.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --output=corinfomax-%j.log
#SBATCH --open-mode=append

# source .venv/bin/activate
data=path/to/images                 # every node needs the same images
run=runs/slurm-$SLURM_JOB_ID        # on a disk that all nodes share; a requeued job keeps its number
options=(--recipe imagenet100-r18)  # more of `corinfomax pretrain --help`; ignored when a run resumes

set -uo pipefail
if [ -e "$run/recipe.json" ]; then
    command=(pretrain --resume "$run")
else
    command=(pretrain "$data" --out "$run" "${options[@]}")
fi
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# A signal goes on to the run, which finishes its step and saves a checkpoint; torchrun gives it 30 seconds.
stopped='' agents=''
trap 'stopped=1; [ -z "$agents" ] || kill -TERM "$agents"' USR1 TERM
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first_node:29500" \
    -m corinfomax "${command[@]}" &
agents=$!
wait "$agents"
status=$?
while kill -0 "$agents" 2>/dev/null; do # the signal interrupts `wait`, while the run still saves
    wait "$agents"
    status=$?
done

# A stopped run that is not finished goes back into the queue; a run that failed does not.
if [ -n "$stopped" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
