"""The one training loop, readable from top to bottom."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from corinfomax import checkpoint, diagnosis, distributed, embed, micro, optim, probes, runs, verdict, views
from corinfomax.checkpoint import Checkpoint
from corinfomax.images import Images, Splits
from corinfomax.knobs import Recipe
from corinfomax.networks import Network, arithmetic, ready
from corinfomax.objective import CorInfoMaxLoss, Terms
from corinfomax.seeds import generator, key

CURE = "a lower learning rate or a larger batch is the usual cure"


class Interrupted(Exception):  # noqa: N818 (no error)
    """The run was asked to stop; `checkpoint` is where it goes on from."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"stopped; {checkpoint} has all that was done")
        self.checkpoint = checkpoint


class Learner(NamedTuple):
    """What training changes: the network, the loss with its moments, the optimiser with its state."""

    network: Network
    criterion: CorInfoMaxLoss
    optimizer: torch.optim.Optimizer


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
) -> Network:
    """Train a network on `splits.train` without its labels; metrics and checkpoints go into the folder `run`.

    `tell` is given each row of the metrics as well.

    Everything random is keyed on (recipe.seed, step), so a resumed run goes on as if it had never stopped; views are
    drawn for the whole batch before processes share it, so their number changes nothing but rounding. Inside
    `distributed.group` every process calls this; the first alone writes.

    Raises FloatingPointError when the loss is no number any more, and Interrupted after Ctrl-C or SIGTERM, with a
    checkpoint of the last whole step.
    """
    images = splits.train
    steps_per_epoch = len(images) // recipe.batch
    steps = recipe.epochs * steps_per_epoch
    here, writes = distributed.share(recipe.batch), distributed.rank() == 0
    if recipe.micro_batch is not None and (here.stop - here.start) % recipe.micro_batch == 1:
        raise ValueError(
            f"{here.stop - here.start} images in parts of {recipe.micro_batch} leave a part of one, and BatchNorm "
            "needs at least 2; choose a --micro-batch that divides them"
        )

    learner = build(recipe, device)
    network, criterion, optimizer = learner
    first = 0
    if resume is not None:
        network.load_state_dict(resume.network)
        criterion.load_state_dict(resume.criterion)
        checkpoint.restore_optimizer(optimizer, resume.optimizer, network)
        first = resume.step

    def save(done: int) -> None:
        path = runs.checkpoint_path(run, done)
        checkpoint.save(
            path, network=network, criterion=criterion, optimizer=optimizer, step=done, recipe=recipe, facts=facts
        )
        saved = runs.checkpoints(run)
        best = verdict.best_step(progress.rows, map(runs.step_of, saved))
        for old in saved[: -pace.keep]:
            if runs.step_of(old) != best:
                old.unlink()

    pending: list[Tensor] = []
    score_at = {round(steps * (i + 1) / pace.scores) for i in range(pace.scores)}
    watched = diagnosis.choose(splits, recipe, device=device)
    look_at = diagnosis.schedule(steps, recipe.batch, pace.diagnoses, watched)
    saved_at = time.monotonic()
    with Progress(recipe, first, steps, runs.read_metrics(run) if first else []) as progress, stop_signals() as stop:
        for step in range(first, steps):
            indices = batch_indices(recipe, step, len(images))
            pixels, _ = images.batch(indices[here])
            x1, x2 = make_views(recipe, pixels, images.sizes[indices], step, device, here)

            lr = optim.learning_rate(recipe.optim, step, steps_per_epoch=steps_per_epoch, epochs=recipe.epochs)
            optim.set_learning_rate(optimizer, lr)
            terms = update(recipe, learner, (x1, x2), step, device)

            pending.append(torch.stack([term.detach() for term in terms]))
            done = step + 1
            asked_to_stop = done < steps and agreed(stop, done, pace)
            time_to_save = writes and time.monotonic() - saved_at > 60 * pace.checkpoint_minutes
            due = done % pace.log_steps == 0 or done == steps or done in score_at or done in look_at
            if due or asked_to_stop or time_to_save:
                row = log_row(pending, done, optimizer, criterion, progress)
                pending.clear()
                if writes and done in score_at and scorable(splits):
                    row["knn"] = quick_knn(network, splits, recipe, device=device)
                if writes and (done in look_at or (time_to_save and pace.diagnoses)):
                    row |= diagnosis.row(network, watched, recipe, device=device)
                if writes:
                    runs.append_metrics(run, row)
                    tell(row)
                progress.show(row)
            if asked_to_stop:
                if writes:
                    save(done)
                raise Interrupted(runs.checkpoint_path(run, done))
            if writes and (time_to_save or done == steps):
                save(done)
                saved_at = time.monotonic()
    return network


def build(recipe: Recipe, device: torch.device) -> Learner:
    """Network, loss and optimiser as they are before the first step; the weights follow from the recipe's seed."""
    torch.manual_seed(key(recipe.seed, "weights"))
    network = Network(recipe.backbone, recipe.projector, size=recipe.size)
    network = network.to(device, torch.float64 if recipe.precision == "float64" else None)
    network = network.to(memory_format=torch.channels_last)
    distributed.share_batch_norm(network)
    criterion = CorInfoMaxLoss(recipe.projector.widths[-1], **vars(recipe.loss)).to(device)
    return Learner(network, criterion, optim.build(network, recipe.optim))


def update(
    recipe: Recipe,
    learner: Learner,
    pair: Sequence[Float[Tensor, "n 3 s s"]],
    step: int,
    device: torch.device,
    lap: Callable[[str], object] = lambda part: None,
) -> Terms:
    """One update on ready views: forward, loss, backward, optimiser; `lap` is told of each of them when it is done."""
    network, criterion, optimizer = learner

    def project(x: Tensor, part: int) -> Tensor:
        # For dropout and stochastic depth, where a backbone has them; each process and part its own.
        torch.manual_seed(key(recipe.seed, f"network {distributed.rank()} {part}", step))
        with arithmetic(recipe, device):
            return network(ready(x, network))

    optimizer.zero_grad(set_to_none=True)
    try:
        if recipe.micro_batch is not None and recipe.micro_batch < len(pair[0]):
            terms = micro.backward(project, network, criterion, pair, recipe.micro_batch)
        else:
            z1, z2 = project(pair[0], 0), project(pair[1], 1)  # apart: each view has its own BatchNorm statistics
            lap("forward")
            terms = criterion(z1, z2)
            lap("loss")
            terms.loss.backward()
    except ValueError as error:  # on the CPU the loss looks at its input
        lr = optimizer.param_groups[0]["lr"]
        raise FloatingPointError(f"in step {step}, at learning rate {lr:.3g}: {error}; {CURE}") from error
    distributed.average_gradients(network.parameters())
    lap("backward")
    optimizer.step()
    lap("optimizer")
    return terms


def scorable(splits: Splits) -> bool:
    """Whether both splits have labels."""
    return splits.train.labels is not None and splits.test is not None and splits.test.labels is not None


def batch_indices(recipe: Recipe, step: int, count: int) -> Int[Tensor, " b"]:
    """Which images make the global batch of a step: a slice of the epoch's permutation, the short last one dropped."""
    epoch, place = divmod(step, count // recipe.batch)
    return _order(recipe.seed, epoch, count)[place * recipe.batch : (place + 1) * recipe.batch]


@functools.lru_cache(maxsize=1)  # a million images take 20 ms to shuffle
def _order(seed: int, epoch: int, count: int) -> Int[Tensor, " n"]:
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def make_views(
    recipe: Recipe,
    pixels: UInt8[Tensor, "n 3 h w"],
    sizes: Int[Tensor, "b 2"],
    step: int,
    device: torch.device,
    here: slice = slice(None),
) -> list[Float[Tensor, "n 3 s s"]]:
    """The views of the images `here` of one step's batch, drawn for all of it from generators keyed on the step."""
    pixels = pixels.to(device, non_blocking=True)
    drawn = [views.draw(view, sizes, generator(recipe.seed, f"view {v}", step)) for v, view in enumerate(recipe.views)]
    return [
        views.apply(pixels, sizes[here], p.take(here), size=recipe.size, mean=recipe.mean, std=recipe.std)
        for p in drawn
    ]


def agreed(stop: threading.Event, done: int, pace: Pace) -> bool:
    """Whether to stop after this step; several processes ask each other only when they log, as that makes them wait."""
    if distributed.size() == 1:
        return stop.is_set()
    return done % pace.log_steps == 0 and distributed.any_of(stop.is_set())


def log_row(
    pending: list[Tensor], done: int, optimizer: torch.optim.Optimizer, criterion: CorInfoMaxLoss, progress: Progress
) -> dict[str, Any]:
    """The means of the steps since the last row. The one place where numbers leave the device."""
    terms = torch.stack(pending).cpu()
    bad = (~terms.isfinite().all(1)).nonzero()[:, 0]
    if len(bad):
        before, at = done - len(terms), done - len(terms) + int(bad[0])
        eigenvalues = [float(torch.linalg.eigvalsh(R.cpu()).min()) for R in (criterion.R1, criterion.R2)]
        loss, attraction, big_bang = terms[bad[0]].tolist()
        raise FloatingPointError(
            f"the loss became {loss:.3g} in step {at} (attraction {attraction:.3g}, big bang {big_bang:.3g}, smallest "
            f"eigenvalue of the covariances {min(eigenvalues):.3g}; looked at every {len(terms)} steps, last good "
            f"look after step {before}); {CURE}"
        )
    loss, attraction, big_bang = terms.mean(0).tolist()
    return {
        "step": done,
        "loss": loss,
        "attraction": attraction,
        "big_bang": big_bang,
        "gap": big_bang - criterion.floor,
        "lr": optimizer.param_groups[0]["lr"],
        "seconds": round(progress.seconds, 3),
    }


def quick_knn(network: Network, splits: Splits, recipe: Recipe, *, device: torch.device) -> float:
    """kNN top-1 in percent on at most 5,000 training and 2,000 test images: a look, not a result."""
    assert splits.test is not None
    some = [_at_most(split, most) for split, most in ((splits.train, 5000), (splits.test, 2000))]
    train, test = (embed.features(network.backbone, part, recipe, device=device) for part in some)
    assert some[0].labels is not None and some[1].labels is not None
    return probes.accuracy(probes.knn(train, some[0].labels, test), some[1].labels)


def _at_most(images: Images, count: int) -> Images:
    if len(images) <= count:
        return images
    return images.select(torch.randperm(len(images), generator=generator(0, "quick kNN"))[:count])


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that a step is never cut in half; a second Ctrl-C stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then."""

    def __init__(self, recipe: Recipe, first: int, steps: int, rows: list[dict[str, Any]]) -> None:
        self.recipe, self.first, self.steps, self.batch = recipe, first, steps, recipe.batch
        self.rows = rows
        self.before = max((row["seconds"] for row in rows), default=0.0)
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
    def seconds(self) -> float:
        """Time spent on training, that before a resume with it."""
        return self.before + time.monotonic() - self.started

    def show(self, row: dict[str, Any]) -> None:
        """Tell where the run is: speed, time left, the loss and how far the spread is from its bound."""
        text = f"loss {row['loss']:.3f} · attraction {row['attraction']:.5f} · {row['gap']:.3f} above 2·ln D"
        if "knn" in row:
            text += f" · kNN {row['knn']:.1f} %"
        self.rows.append(row)
        self.judge()
        if self.kind is not None:
            text += f" · {self.kind}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(row["step"] * self.batch - self.bar.n)
        now = time.monotonic()
        due = now - self.told > 20 or "knn" in row or row["step"] == self.steps
        if due and self.bar.disable and distributed.rank() == 0:
            self.told = now
            speed = (row["step"] - self.first) / (now - self.started)
            left = (self.steps - row["step"]) / speed
            print(
                f"step {row['step']}/{self.steps} · {speed * self.batch:.0f} images/s · "
                f"{left / 60:.1f} min left · {text}",
                file=sys.stderr,
            )

    def judge(self) -> None:
        """Say what the run looks like when that has changed; after the last step the command says it."""
        found = verdict.judge(self.rows, self.recipe, steps=self.steps)
        if found is not None and found.kind != self.kind and self.rows[-1]["step"] < self.steps:
            self.bar.write(f"step {self.rows[-1]['step']}: {found.text}", file=sys.stderr)
            self.kind = found.kind
