"""The one training loop, readable from top to bottom."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from corinfomax import checkpoint, diagnosis, distributed, embed, optim, probes, runs, verdict, views
from corinfomax.checkpoint import Checkpoint
from corinfomax.feed import Batch, feed, of_files
from corinfomax.files import DataError
from corinfomax.images import Images, Splits
from corinfomax.knobs import Recipe, View
from corinfomax.learner import (
    NUMBERS,
    Learner,
    NotFiniteError,
    build,
    build_criterion,
    capture,
    find_fault,
    put_back,
    scale,
    update,
)
from corinfomax.networks import Network
from corinfomax.objective import moment_dtype
from corinfomax.seeds import generator
from corinfomax.signals import stop_signals


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
    here, writes = check_parts(recipe), distributed.rank() == 0
    learner = build(recipe, device, compiled=compiled)
    first, pending = 0, torch.empty(0, len(NUMBERS), dtype=moment_dtype(device), device=device)
    if resume is not None and resume.step > 0:
        put_back(learner, resume)
        first, pending = resume.step, resume.loop.get("numbers", pending).to(device)

    def take(step: int) -> Float[Tensor, " 4"]:
        now, sizes = of_step(recipe, step, steps), images.sizes[batch_indices(recipe, step, len(images))]
        given = batches.take(step)
        if images.files is None:
            crops = make_views(now, given[0].pixels, sizes, step, device, here)
        else:
            crops = cut_views(now, given, sizes, step, device, here)
        lr = optim.learning_rate(recipe.optim, step, steps_per_epoch=steps_per_epoch, epochs=recipe.epochs)
        optim.set_learning_rate(learner.optimizer, lr)
        return update(recipe, learner, crops, step, device)

    done = first
    score_at = {round(steps * (i + 1) / pace.scores) for i in range(pace.scores)}
    watched = diagnosis.choose(splits, recipe, device=device)
    look_at = diagnosis.schedule(steps, recipe.batch, pace.diagnoses, watched)
    good, saved_at = capture(learner, first, recipe), time.monotonic()
    rows = runs.read_metrics(run) if first and writes else []
    with (
        feed(
            images,
            lambda step: batch_indices(recipe, step, len(images))[here],
            lambda step: boxes(of_step(recipe, step, steps), images, step, here),
            steps,
            device,
        ) as batches,
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
                    now = of_step(recipe, step, steps)  # at other sizes than it learns on it may look collapsed
                    if writes and done in score_at and scorable(splits):
                        row["knn"] = quick_knn(learner.network, splits, now, device=device)
                    if writes and done in look_at:
                        row |= diagnosis.row(learner.network, watched, now, device=device)
                    if done in score_at or done in look_at:
                        distributed.wait()  # for the first of them, however long it looked
                    if writes:
                        runs.append_metrics(run, row)
                        tell(row)
                    progress.show(row, batches.waited)
                if asked_to_stop and (fault := find_fault(learner, pending, done)) is not None:
                    raise fault
                time_to_save = time.monotonic() - saved_at > 60 * pace.checkpoint_minutes or (
                    done in look_at and progress.best == done
                )
                if writes and (last or asked_to_stop or time_to_save):
                    save(run, learner, pending, done, recipe, facts, progress.rows, pace.keep)
                    saved_at = time.monotonic()
                if asked_to_stop:
                    raise Interrupted(runs.checkpoint_path(run, done))
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
    here = distributed.share(recipe.batch)
    if recipe.loss.name != "corinfomax":
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
    network, criterion, optimizer, scaler = learner
    runs.sync_metrics(run)
    checkpoint.save(
        runs.checkpoint_path(run, done),
        network=network,
        criterion=criterion,
        optimizer=optimizer,
        step=done,
        recipe=recipe,
        facts=facts,
        loop={"numbers": pending, **scale(scaler)},
    )
    saved = runs.checkpoints(run)
    best = verdict.best_step(rows, map(runs.step_of, saved))
    for old in saved[:-keep]:
        if runs.step_of(old) != best:
            old.unlink()


def keep_failure(
    run: Path, learner: Learner, fault: NotFiniteError, recipe: Recipe, facts: dict[str, Any], images: Images
) -> str:
    """Write the learner as it is before the step that failed, and that step's batch; how to see it again."""
    network, criterion, optimizer, scaler = learner
    indices = batch_indices(recipe, fault.step, len(images))
    now = of_step(recipe, fault.step, recipe.steps(len(images)))
    path = run / f"failed-step-{fault.step}.safetensors"
    try:
        if images.files is None:
            pixels, sizes = images.batch(indices)
            given = {"pixels": pixels, "sizes": sizes}
        else:
            given = {"sizes": images.sizes[indices]}
            for crop, cut in enumerate(read_cuts(now, images, fault.step)):
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
                "processes": distributed.size(),
                "size": now.size,
            },
            loop={"indices": indices, **given, **scale(scaler)},
        )
    except (OSError, DataError) as error:
        return f"its batch is not kept: {error}"
    return f"its batch is kept; to see it again, layer by layer: corinfomax pretrain --replay {path}"


def scorable(splits: Splits) -> bool:
    """Whether both splits have labels."""
    return splits.train.labels is not None and splits.test is not None and splits.test.labels is not None


def batch_indices(recipe: Recipe, step: int, count: int) -> Int[Tensor, " b"]:
    """Which images make the global batch of a step: a slice of the epoch's permutation, the short last one dropped."""
    epoch, place = divmod(step, count // recipe.batch)
    return _order(recipe.seed, epoch, count)[place * recipe.batch : (place + 1) * recipe.batch]


@functools.lru_cache(maxsize=2)  # a million images take 20 ms to shuffle; batches are read ahead into the next epoch
def _order(seed: int, epoch: int, count: int) -> Int[Tensor, " n"]:
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def of_step(recipe: Recipe, step: int, steps: int) -> Recipe:
    """The recipe with the size of the views in that one of a run's steps."""
    for size, end in _early(recipe, steps):
        if step < end:
            return replace(recipe, size=size)
    return recipe


def _early(recipe: Recipe, steps: int) -> list[tuple[int, int]]:
    """Side of the views of each early part, and the step at which it ends."""
    ends = itertools.accumulate(recipe.early_shares)
    return [(size, min(steps, round(end * steps))) for size, end in zip(recipe.early_sizes, ends, strict=True)]


def work(recipe: Recipe, step: int, steps: int) -> int:
    """Of a view, summed over the first `step` of a run's steps: roughly what these cost."""
    done, total = 0, 0
    for size, end in (*_early(recipe, steps), (recipe.size, steps)):
        part = max(0, min(step, end) - done)
        done, total = done + part, total + part * size**2
    return total


def make_views(
    recipe: Recipe,
    pixels: UInt8[Tensor, "n 3 h w"],
    sizes: Int[Tensor, "b 2"],
    step: int,
    device: torch.device,
    here: slice = slice(None),
) -> list[Float[Tensor, "n 3 s s"]]:
    """The views of the images `here` of one step's batch, drawn for all of it from generators keyed on the step."""
    pixels = pixels.to(device)
    drawn = draw_views(recipe, sizes, step)
    return [
        views.apply(pixels, sizes[here], p.take(here), size=recipe.size, mean=recipe.mean, std=recipe.std)
        for p in drawn
    ]


def cut_views(
    recipe: Recipe,
    cuts: Sequence[Batch],
    sizes: Int[Tensor, "b 2"],
    step: int,
    device: torch.device,
    here: slice = slice(None),
) -> list[Float[Tensor, "n 3 s s"]]:
    """The same of crops that were cut out already; `sizes` are those of the whole images."""
    made = []
    for cut, drawn in zip(cuts, draw_views(recipe, sizes, step), strict=True):
        assert cut.boxes is not None
        p, pixels = drawn.take(here)._replace(box=cut.boxes), cut.pixels.to(device)
        made.append(views.apply(pixels, cut.sizes, p, size=recipe.size, mean=recipe.mean, std=recipe.std))
    return made


def boxes(recipe: Recipe, images: Images, step: int, here: slice) -> tuple[Int[Tensor, "n v 4"], int]:
    """The boxes that one step's crops of the images `here` of its batch are cut out by, and the side of the views."""
    sizes = images.sizes[batch_indices(recipe, step, len(images))]
    return torch.stack([drawn.box[here] for drawn in draw_views(recipe, sizes, step)], 1), recipe.size


def step_views(
    recipe: Recipe, images: Images, step: int, device: torch.device, here: slice = slice(None)
) -> list[Float[Tensor, "n 3 s s"]]:
    """The views of the images `here` of one step's batch, read for this once."""
    indices = batch_indices(recipe, step, len(images))
    sizes = images.sizes[indices]
    if images.files is None:
        return make_views(recipe, images.batch(indices[here])[0], sizes, step, device, here)
    return cut_views(recipe, read_cuts(recipe, images, step, here), sizes, step, device, here)


def read_cuts(recipe: Recipe, images: Images, step: int, here: slice = slice(None)) -> list[Batch]:
    """What one step's crops are made of, read from the files for this once."""
    with contextlib.ExitStack() as stack:
        indices = batch_indices(recipe, step, len(images))[here]
        return of_files(images, stack)(indices, *boxes(recipe, images, step, here))


def draw_views(recipe: Recipe, sizes: Int[Tensor, "b 2"], step: int) -> list[views.Parameters]:
    """What is done to each image of a step's batch, for each of its crops."""
    return [
        views.draw(of_crop(recipe, crop), sizes, generator(recipe.seed, f"view {crop}", step))
        for crop in range(recipe.crops)
    ]


def of_crop(recipe: Recipe, crop: int) -> View:
    """How the crop of that number is made."""
    return recipe.views[crop % len(recipe.views)]


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
    else:
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
    train, test = (embed.features(network.backbone, part, recipe, device=device) for part in some)
    assert some[0].labels is not None and some[1].labels is not None
    return probes.accuracy(probes.knn(train, some[0].labels, test), some[1].labels)


def _at_most(images: Images, count: int) -> Images:
    if len(images) <= count:
        return images
    return images.select(torch.randperm(len(images), generator=generator(0, "quick kNN"))[:count])


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then."""

    def __init__(self, recipe: Recipe, first: int, steps: int, rows: list[dict[str, Any]]) -> None:
        self.recipe, self.first, self.steps, self.batch = recipe, first, steps, recipe.batch
        self.rows = rows
        self.before = max((row.get("seconds", 0.0) for row in rows), default=0.0)
        self.kind: verdict.Kind | None = None
        self.started = self.told = time.monotonic()
        self.bar = tqdm(
            initial=first * self.batch,
            total=steps * self.batch,
            unit="img",
            unit_scale=True,
            desc="pretraining",
            disable=not sys.stderr.isatty() or distributed.rank() > 0,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    @property
    def best(self) -> int | None:
        """After how many steps the look was that is best so far."""
        return verdict.best_step(self.rows, (row["step"] for row in self.rows))

    @property
    def seconds(self) -> float:
        """Time spent on training, that before a resume with it."""
        return self.before + time.monotonic() - self.started

    def show(self, row: dict[str, Any], waited: float) -> None:
        """Tell where the run is: speed, time left, the loss, how far the spread is from its bound; and what share of
        the time it `waited`, in seconds, for images, where that is worth a word."""
        text = f"loss {row['loss']:.3f} · attraction {row['attraction']:.5f}"
        if "gap" in row:
            text += f" · {row['gap']:.3f} above 2·ln D"
        if "knn" in row:
            text += f" · kNN {row['knn']:.1f} %"
        self.rows.append(row)
        self.judge()
        if self.kind is not None:
            text += f" · {self.kind}"
        if (share := waited / (time.monotonic() - self.started)) >= 0.01:
            text += f" · {share:.0%} of the time waiting for images"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(row["step"] * self.batch - self.bar.n)
        now = time.monotonic()
        due = now - self.told > 20 or "knn" in row or row["step"] == self.steps
        if due and self.bar.disable and distributed.rank() == 0:
            self.told = now
            speed = (row["step"] - self.first) / (now - self.started)
            before, done, whole = (
                work(self.recipe, step, self.steps) for step in (self.first, row["step"], self.steps)
            )
            left = (whole - done) / (done - before) * (now - self.started)
            print(
                f"step {row['step']}/{self.steps} · {speed * self.batch:.0f} images/s · "
                f"{left / 60:.1f} min left · {text}",
                file=sys.stderr,
            )

    def judge(self) -> None:
        """Say what the run looks like when that has changed; after the last step the command says it."""
        if distributed.rank() > 0:
            return
        found = verdict.judge(self.rows, self.recipe, steps=self.steps)
        if found is not None and found.kind != self.kind and self.rows[-1]["step"] < self.steps:
            self.bar.write(f"step {self.rows[-1]['step']}: {found.text}", file=sys.stderr)
            self.kind = found.kind
