"""The one training loop, readable from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from corinfomax.diagnosis import measures, verdict
from corinfomax.evaluation import features, probes
from corinfomax.images.cache import Images, Splits
from corinfomax.images.files import DataError
from corinfomax.network import Network
from corinfomax.objective.covariance import CorInfoMaxLoss, moment_dtype
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import processes, run_folder, shell
from corinfomax.runtime.seeds import generator
from corinfomax.training import batches
from corinfomax.training import optimizer as optim
from corinfomax.training.prefetch import feed
from corinfomax.training.progress import Progress
from corinfomax.training.signals import stop_signals
from corinfomax.training.step import (
    NUMBERS,
    Learner,
    NotFiniteError,
    build,
    build_criterion,
    capture,
    extras,
    find_fault,
    put_back,
    update,
)
from corinfomax.weights import checkpoint
from corinfomax.weights.checkpoint import Checkpoint


class Interrupted(Exception):  # noqa: N818 (no error)
    """The run was asked to stop; `checkpoint` is where it goes on from."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"stopped; {checkpoint} has all that was done")
        self.checkpoint = checkpoint


class Pace(NamedTuple):
    """How often a run does what does not change its result."""

    log_steps: int = 10
    checkpoint_minutes: float = 5.0
    keep: int = 3
    """How many checkpoints stay, and the best beside them; other ones are removed."""
    scores: int = 10
    """kNN scores over the whole run, where there are labels; 0 is none."""
    diagnoses: int = 25
    """Label-free looks at the network over the whole run, fewer where they would take 2 % of its time; 0 is none."""


def pretrain(
    recipe: Recipe,
    splits: Splits,
    run: Path,
    *,
    device: torch.device,
    pace: Pace,
    facts: dict[str, Any],
    resume: Checkpoint | None = None,
    tell: Callable[[dict[str, Any]], None] = lambda row: None,
    compiled: bool = False,
) -> Network:
    """Train a network on `splits.train` without its labels; metrics and checkpoints go into the folder `run`.

    `tell` is given each row of the metrics as well. With `compiled` the network goes through torch.compile.

    Everything random is keyed on (recipe.seed, step), so a resumed run goes on as if it had never stopped; views are
    drawn for the whole batch before processes share it, so their number changes nothing but rounding. Inside
    `distributed.group` every process calls this; the first alone writes.

    What metrics.jsonl says, times apart, is a matter of the steps alone: rows and looks come at steps counted
    beforehand, and a checkpoint has what the next row needs.

    Raises Interrupted after Ctrl-C or SIGTERM, with a checkpoint of the last whole step; NotFiniteError when a loss,
    gradient or weight is no number any more, with what reproduces it in a file.
    """
    images = splits.train
    steps_per_epoch = len(images) // recipe.batch
    steps = recipe.steps(len(images))
    here, writes = check_parts(recipe), processes.rank() == 0
    learner = build(recipe, device, compiled=compiled)
    first, pending = 0, torch.empty(0, len(NUMBERS), dtype=moment_dtype(device), device=device)
    if resume is not None and resume.step > 0:
        put_back(learner, resume)
        first, pending = resume.step, resume.loop.get("numbers", pending).to(device)

    def take(step: int) -> Float[Tensor, " 4"]:
        now, sizes = batches.of_step(recipe, step, steps), images.sizes[batches.indices(recipe, step, len(images))]
        given = ahead.take(step)
        crops = batches.views_of(now, given, sizes, step, device, here)
        lr = optim.learning_rate(recipe.optim, step, steps_per_epoch=steps_per_epoch, epochs=recipe.epochs)
        optim.set_learning_rate(learner.optimizer, lr)
        return update(recipe, learner, crops, step, device)

    done = first
    score_at = {round(steps * (i + 1) / pace.scores) for i in range(pace.scores)}
    watched = measures.choose(splits, recipe, device=device)
    look_at = measures.schedule(steps, recipe.batch, pace.diagnoses, watched)
    good, saved_at = capture(learner, first, recipe), time.monotonic()
    rows = run_folder.read_metrics(run) if first and writes else []
    with (
        feed(
            images,
            lambda step: batches.indices(recipe, step, len(images))[here],
            lambda step: batches.boxes(batches.of_step(recipe, step, steps), images, step, here),
            steps,
            device,
        ) as ahead,
        Progress(recipe, first, steps, rows) as progress,
        stop_signals() as stop,
    ):
        try:
            for step in range(first, steps):
                pending = torch.cat((pending, take(step)[None]))
                done = step + 1
                last, asked_to_stop = done == steps, stop.agreed(done)
                if last or done % pace.log_steps == 0 or done in score_at or done in look_at:
                    row = log_row(pending, done, learner, progress)
                    pending = pending[:0]
                    good = capture(learner, done, recipe)
                    now = batches.of_step(recipe, step, steps)  # at other sizes than it learns on it may look collapsed
                    if writes and done in score_at and scorable(splits):
                        row["knn"] = quick_knn(learner.network, splits, now, device=device)
                    if writes and done in look_at:
                        row |= measures.row(learner.network, watched, now, device=device)
                    if done in score_at or done in look_at:
                        processes.wait()  # for the first of them, however long it looked
                    if writes:
                        run_folder.append_metrics(run, row)
                        tell(row)
                    progress.show(row, ahead.waited)
                if asked_to_stop and (fault := find_fault(learner, pending, done)) is not None:
                    raise fault
                time_to_save = time.monotonic() - saved_at > 60 * pace.checkpoint_minutes or (
                    done in look_at and progress.best == done
                )
                if writes and (last or asked_to_stop or time_to_save):
                    save(run, learner, pending, done, recipe, facts, progress.rows, pace.keep)
                    saved_at = time.monotonic()
                if asked_to_stop:
                    raise Interrupted(run_folder.checkpoint_path(run, done))
        except DataError:  # a file that is gone: what was learnt is not
            if writes:
                save(run, learner, pending, done, recipe, facts, progress.rows, pace.keep)
            raise
        except NotFiniteError as fault:
            # Every process comes here after the same step, and goes once more to the one that failed.
            put_back(learner, good)
            for step in range(good.step, fault.step):
                take(step)
            if not writes:
                raise
            raise NotFiniteError(
                fault.step, f"{fault}; {keep_failure(run, learner, fault, recipe, facts, images)}"
            ) from fault
    return learner.network


def check_parts(recipe: Recipe) -> slice:
    """This process's part of a batch; ValueError where processes or micro-batches cannot share it, or for an objective
    that cannot be."""
    here = processes.share(recipe.batch)
    build_criterion(recipe)  # what is wrong with it is known before the images are decoded
    if recipe.micro_batch is not None and (here.stop - here.start) % recipe.micro_batch == 1:
        raise ValueError(
            f"{here.stop - here.start} images in parts of {recipe.micro_batch} leave a part of one, and BatchNorm "
            "needs at least 2; choose a --micro-batch that divides them"
        )
    return here


def save(
    run: Path,
    learner: Learner,
    pending: Float[Tensor, "k 4"],
    done: int,
    recipe: Recipe,
    facts: dict[str, Any],
    rows: list[dict[str, Any]],
    keep: int,
) -> None:
    """A checkpoint after `done` steps, unless something in it is not finite: the next row of metrics then says so.

    All but the last `keep` and the best are removed.
    """
    if find_fault(learner, pending, done) is not None:
        return
    network, criterion, optimizer, *_ = learner
    run_folder.sync_metrics(run)
    checkpoint.save(
        run_folder.checkpoint_path(run, done),
        network=network,
        criterion=criterion,
        optimizer=optimizer,
        step=done,
        recipe=recipe,
        facts=facts,
        loop={"numbers": pending, **extras(learner)},
    )
    saved = run_folder.checkpoints(run)
    best = verdict.best_step(rows, map(run_folder.step_of, saved))
    for old in saved[:-keep]:
        if run_folder.step_of(old) != best:
            old.unlink()


def keep_failure(
    run: Path, learner: Learner, fault: NotFiniteError, recipe: Recipe, facts: dict[str, Any], images: Images
) -> str:
    """Write the learner as it is before the step that failed, and that step's batch; how to see it again."""
    network, criterion, optimizer, *_ = learner
    indices = batches.indices(recipe, fault.step, len(images))
    now = batches.of_step(recipe, fault.step, recipe.steps(len(images)))
    path = run / f"failed-step-{fault.step}.safetensors"
    try:
        if images.files is None:
            pixels, sizes = images.batch(indices)
            given = {"pixels": pixels, "sizes": sizes}
        else:
            given = {"sizes": images.sizes[indices]}
            for crop, cut in enumerate(batches.read(now, images, fault.step, torch.device("cpu"))):
                given |= {f"{name}{crop}": tensor for name, tensor in cut._asdict().items()}
        checkpoint.save(
            path,
            network=network,
            criterion=criterion,
            optimizer=optimizer,
            step=fault.step,
            recipe=recipe,
            facts={
                **facts,
                "failure": str(fault),
                "lr": optimizer.param_groups[0]["lr"],
                "processes": processes.size(),
                "size": now.size,
            },
            loop={"indices": indices, **given, **extras(learner)},
        )
    except (OSError, DataError) as error:
        return f"its batch is not kept: {error}"
    return f"its batch is kept; to see it again, layer by layer: {shell.command('pretrain', '--replay', str(path))}"


def scorable(splits: Splits) -> bool:
    """Whether both splits have labels."""
    return splits.train.labels is not None and splits.test is not None and splits.test.labels is not None


def log_row(pending: Float[Tensor, "k 4"], done: int, learner: Learner, progress: Progress) -> dict[str, Any]:
    """The means of the steps since the last row, raised if not finite. The one place where numbers leave the device."""
    fault = find_fault(learner, pending, done)
    if fault is not None:
        raise fault
    numbers = pending.cpu()
    means = dict(zip(NUMBERS, numbers.mean(0).tolist(), strict=True))
    row: dict[str, Any] = {"step": done, **means}
    if learner.criterion.floor is None:
        del row["big_bang"]
    elif isinstance(learner.criterion, CorInfoMaxLoss):
        row["gap"] = means["big_bang"] - learner.criterion.floor
    if learner.scaler.is_enabled():  # without the updates that the scaler left out
        norms = numbers[:, 3][numbers[:, 3].isfinite()]
        row["gradient_norm"] = float(norms.mean()) if len(norms) else None
        row["scale"] = learner.scaler.get_scale()
    return {**row, "lr": learner.optimizer.param_groups[0]["lr"], "seconds": round(progress.seconds, 3)}


def quick_knn(network: Network, splits: Splits, recipe: Recipe, *, device: torch.device) -> float:
    """kNN top-1 in percent at training's size, on at most 5,000 training and 2,000 test images: a look, no result."""
    assert splits.test is not None
    recipe = replace(recipe, test_scale=1.0)
    some = [_at_most(split, most) for split, most in ((splits.train, 5000), (splits.test, 2000))]
    train, test = (features.features(network.backbone, part, recipe, device=device) for part in some)
    assert some[0].labels is not None and some[1].labels is not None
    return probes.accuracy(probes.knn(train, some[0].labels, test), some[1].labels)


def _at_most(images: Images, count: int) -> Images:
    if len(images) <= count:
        return images
    return images.select(torch.randperm(len(images), generator=generator(0, "quick kNN"))[:count])
