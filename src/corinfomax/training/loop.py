"""The training loop, flat: take a step, do what is due after it, write it down."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from math import nan
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corinfomax.diagnosis import measures, verdict
from corinfomax.evaluation import table
from corinfomax.images.cache import Images, Splits
from corinfomax.images.files import DataError
from corinfomax.network import Network, check_name
from corinfomax.objective.covariance import CorInfoMaxLoss, moment_dtype
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import processes, run_folder
from corinfomax.runtime.records import Facts, Options, Row
from corinfomax.training import batches, failure, optimizer
from corinfomax.training.prefetch import Prefetch, prefetch
from corinfomax.training.progress import Progress
from corinfomax.training.signals import stop_signals
from corinfomax.training.step import (
    NUMBERS,
    Learner,
    NotFiniteError,
    average,
    build,
    build_criterion,
    capture,
    find_fault,
    put_back,
    state_of,
    update,
)
from corinfomax.weights import checkpoint
from corinfomax.weights.checkpoint import Checkpoint


class Interrupted(Exception):  # noqa: N818 (not an error)
    """The run was asked to stop; it resumes from `checkpoint`."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"stopped after {checkpoint}")
        self.checkpoint = checkpoint


def pretrain(
    recipe: Recipe,
    splits: Splits,
    run: Path,
    *,
    device: torch.device,
    options: Options = Options(),
    facts: Facts = Facts(),
    resume: Checkpoint | None = None,
    on_row: Callable[[Row], object] = lambda row: None,
    criterion: nn.Module | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> Network:
    """Train a network on `splits.train` without labels; metrics and checkpoints go into the folder `run`.

    Every random number is keyed on (recipe.seed, step), so a resumed run continues as if it had never stopped. Inside
    `processes.join` every process calls this and the first one writes. `criterion` replaces the recipe's loss, and
    `start`, tensors by their names in the network, the random weights. An error of `on_row` comes after a checkpoint.

    Raises Interrupted after Ctrl-C or SIGTERM, with a checkpoint of the last step; NotFiniteError when a loss, gradient
    or weight is not finite, with the batch in a file; DataError when an image file is lost, after a checkpoint.
    """
    share, steps = check_parts(recipe), recipe.steps(len(splits.train))
    learner = build(recipe, device, compiled=options.compile, criterion=criterion, start=start)
    recorder = Recorder(run, recipe, learner, options, facts, resume, device)
    due = Due(splits, recipe, options, steps, device, start, facts)
    with (
        prefetch(recipe, splits.train, steps, device, share) as ahead,
        Progress(recipe, recorder.done, steps, recorder.rows) as progress,
        stop_signals() as stop,
    ):
        train_step = functools.partial(take_step, learner, ahead, len(splits.train) // recipe.batch, device)
        with recorder.failures(train_step, splits.train):
            # the weights that the run starts from
            if start is not None and recorder.done == 0 and 0 in due.rows:
                row = due.measure(Row(0, nan, nan, None, lr=0.0, seconds=0.0), learner.network)
                recorder.write(row)
                recorder.tell(on_row, row)

            for step in range(recorder.done, steps):
                recorder.add(train_step(step, recipe))
                done, stopping = step + 1, stop.agreed(step + 1)
                if done == steps and start is not None:
                    average(learner.network, start, recipe.tuning.average)

                # a row of metrics, with a score and a look when they are due
                if done in due.rows:
                    row = due.measure(recorder.row(progress.seconds), learner.network)
                    recorder.write(row)
                    progress.show(recorder.rows, ahead.waited)

                # a checkpoint: at the end, on a signal, after some minutes, at the best look so far
                if stopping:
                    recorder.check()
                if done == steps or stopping or recorder.save_due(best=done in due.looks):
                    recorder.save()
                if done in due.rows:
                    recorder.tell(on_row, row)
                if stopping:
                    raise Interrupted(run_folder.checkpoint_path(run, done))
    return learner.network


def take_step(
    learner: Learner, ahead: Prefetch, steps_per_epoch: int, device: torch.device, step: int, recipe: Recipe
) -> Float[Tensor, " 4"]:
    """One step on its batch at its learning rate; gives its NUMBERS."""
    views = batches.apply_views(recipe, ahead.take(step), device)
    lr = optimizer.learning_rate(recipe.optim, step, steps_per_epoch=steps_per_epoch, epochs=recipe.epochs)
    share = optimizer.backbone_share(recipe, step, steps_per_epoch=steps_per_epoch)
    optimizer.set_learning_rate(learner.optimizer, lr, share)
    return update(recipe, learner, views, step, device, projector_alone=share == 0)


class Due:
    """The steps after which something is due, counted before the run, so that a resumed run does the same."""

    def __init__(
        self,
        splits: Splits,
        recipe: Recipe,
        options: Options,
        steps: int,
        device: torch.device,
        start: Mapping[str, Tensor] | None,
        facts: Facts,
    ) -> None:
        self._splits, self._recipe, self._device = splits, recipe, device
        backbone = None
        if start is not None and options.diagnoses and processes.rank() == 0:
            backbone = build(recipe, device, start=start).network.backbone
        assumed = facts.start is not None and facts.start.assumed_input
        self._sample = measures.choose_sample(splits, recipe, device=device, start=backbone, assumed_input=assumed)
        self.looks = measures.look_steps(steps, recipe.batch, options.diagnoses, self._sample)
        self._scores = {round(steps * (i + 1) / options.scores) for i in range(options.scores)}
        if start is not None:  # the weights of the start are measured too
            self.looks |= {0} if options.diagnoses else set()
            self._scores |= {0} if options.scores else set()
        self.rows = {steps, *range(options.log_steps, steps, options.log_steps)} | self._scores | self.looks

    def measure(self, row: Row, network: Network) -> Row:
        """The row with a score and a look when they are due; the first process measures, the others wait for it."""
        if processes.rank() == 0 and row.step in self._scores and self._splits.labelled:
            row = row._replace(knn=table.quick_knn(network.backbone, self._splits, self._recipe, device=self._device))
        if processes.rank() == 0 and row.step in self.looks:
            row = row._replace(look=measures.look(network, self._sample, self._recipe, device=self._device))
        if row.step in self._scores | self.looks:
            processes.wait()
        return row


class Recorder:
    """Everything the loop writes: rows of metrics, checkpoints, and the file of a failed step."""

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        learner: Learner,
        options: Options,
        facts: Facts,
        resume: Checkpoint | None,
        device: torch.device,
    ) -> None:
        self.run, self.recipe, self.learner, self.options, self.facts = run, recipe, learner, options, facts
        self.writes = processes.rank() == 0
        self.done, self.rows = 0, list[Row]()
        self.pending = torch.empty(0, len(NUMBERS), dtype=moment_dtype(device), device=device)
        """NUMBERS of the steps since the last row, on the device."""
        if resume is not None and resume.step > 0:
            put_back(learner, resume)
            self.done, self.pending = resume.step, resume.loop.get("numbers", self.pending).to(device)
            self.rows = run_folder.read_metrics(run) if self.writes else []
        self.good = capture(learner, self.done, recipe)
        """The learner at the last row, known to be finite."""
        self._saved_at = time.monotonic()

    def add(self, numbers: Float[Tensor, " 4"]) -> None:
        """Count a step with its NUMBERS; the host does not wait for them."""
        self.pending = torch.cat((self.pending, numbers[None]))
        self.done += 1

    def check(self) -> None:
        """Raise NotFiniteError if a step since the last row went wrong."""
        fault = find_fault(self.learner, self.pending, self.done)
        if fault is not None:
            raise fault

    def row(self, seconds: float) -> Row:
        """Means over the steps since the last row. The host waits for them here and in a checkpoint alone."""
        self.check()
        numbers, learner = self.pending.cpu(), self.learner
        loss, attraction, big_bang, norm = numbers.mean(0).tolist()
        self.pending = self.pending[:0]
        self.good = capture(learner, self.done, self.recipe)

        # A foreign criterion has no big bang, and a kernel's lower bound is not 2·ln D.
        floor, scale = getattr(learner.criterion, "floor", None), None
        gap = big_bang - learner.criterion.floor if isinstance(learner.criterion, CorInfoMaxLoss) else None
        if learner.scaler.is_enabled():  # without the updates that it skipped
            norms = numbers[:, 3][numbers[:, 3].isfinite()]
            norm = float(norms.mean()) if len(norms) else None
            scale = learner.scaler.get_scale()
        return Row(
            step=self.done,
            loss=loss,
            attraction=attraction,
            gradient_norm=norm,
            lr=learner.optimizer.param_groups[0]["lr"],
            seconds=round(seconds, 3),
            big_bang=None if floor is None else big_bang,
            gap=gap,
            scale=scale,
        )

    def write(self, row: Row) -> None:
        """Add a row to the metrics."""
        self.rows.append(row)
        if self.writes:
            run_folder.append_metrics(self.run, row)

    def tell(self, on_row: Callable[[Row], object], row: Row) -> None:
        """Hand the row to `on_row`; an error of its own, or Ctrl-C in it, ends the run with its work saved."""
        try:
            on_row(row)
        except BaseException:
            self.save()
            raise

    def save_due(self, *, best: bool) -> bool:
        """True if a checkpoint is due: some minutes after the last, or at the `best` look so far."""
        late = time.monotonic() - self._saved_at > 60 * self.options.checkpoint_minutes
        return late or (best and verdict.best_step(self.rows, (row.step for row in self.rows)) == self.done)

    def save(self) -> None:
        """Write a checkpoint, unless something in it is not finite; remove all but the last few and the best."""
        self._saved_at = time.monotonic()
        if not self.writes or find_fault(self.learner, self.pending, self.done) is not None:
            return
        run_folder.sync_metrics(self.run)
        state = state_of(self.learner, self.done, self.recipe, self.facts, {"numbers": self.pending})
        checkpoint.save_checkpoint(run_folder.checkpoint_path(self.run, self.done), state)

        saved = run_folder.checkpoints(self.run)
        best = verdict.best_step(self.rows, map(run_folder.step_of, saved))
        for path in saved[: -self.options.keep]:
            if run_folder.step_of(path) != best:
                path.unlink()

    @contextlib.contextmanager
    def failures(self, train_step: failure.TrainStep, images: Images) -> Iterator[None]:
        """Save the work when images are lost; explain a value that is not finite."""
        try:
            yield
        except DataError:
            self.save()
            raise
        except NotFiniteError as fault:
            # Every process comes here after the same step. An update may fail because of an earlier step.
            earlier = None if self.pending.isfinite().all() else find_fault(self.learner, self.pending, self.done)
            first = earlier or fault
            raise failure.explain(first, self.learner, self.good, train_step, images, self.run, self.facts) from fault


def check_parts(recipe: Recipe) -> slice:
    """This process's slice of a batch; ValueError when processes or micro-batches cannot share it."""
    share = processes.share(recipe.batch)
    check_name(recipe.backbone.name)
    build_criterion(recipe)  # its errors come before the images are decoded
    n = share.stop - share.start
    if recipe.micro_batch is not None and n % recipe.micro_batch == 1:
        single = f"{n} images in micro-batches of {recipe.micro_batch} leave one image, and BatchNorm needs 2"
        raise ValueError(f"{single}: choose a --micro-batch that divides them")
    return share
