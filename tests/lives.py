"""What a process of test_kill.py does: begin a run or go on with it, until it is done or killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import tiny
from corinfomax import checkpoint, images, runs, train

# Thirty steps; weights that take some time to write, so that a kill can meet it.
RECIPE = replace(
    tiny.RECIPE,
    epochs=6,
    projector=replace(tiny.RECIPE.projector, widths=(700, 700, 8)),
    optim=replace(tiny.RECIPE.optim, name="adamw", lr=0.003, clip=1.0),
)
PACE = train.Pace(log_steps=4, checkpoint_minutes=0.0, scores=3)  # a checkpoint after every step, most between two rows


def live(data: Path, run: Path) -> None:
    """The run in `run` to its end, from its last checkpoint if it has one, as `pretrain --resume` does it."""
    torch.set_num_threads(1)
    recipe = RECIPE
    splits = images.load(data, side=16, progress=False, cache=data.parent / "cache")
    run.mkdir(exist_ok=True)
    resume = None
    if runs.checkpoints(run):
        resume = checkpoint.load_begun(run)
        recipe = resume.recipe
    runs.forget_after(run, 0 if resume is None else resume.step)
    train.pretrain(recipe, splits, run, device=torch.device("cpu"), pace=PACE, facts={}, resume=resume)
