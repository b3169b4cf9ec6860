"""The metrics in a tracker of the user's choice, beside metrics.jsonl."""

import contextlib
import hashlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from corinfomax.runtime import extras
from corinfomax.runtime.records import Row

Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]
OnRow = Callable[[Row], object]
PROJECT = "corinfomax"


def check(name: Tracker) -> None:
    """Raise ValueError unless the tracker is installed; called before training, so that its absence costs nothing."""
    try:
        importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise ValueError(f"{extras.missing(f'--track {name}', name)} ({error})") from None


@contextlib.contextmanager
def tracking(name: Tracker, run: Path, config: Mapping[str, str]) -> Iterator[OnRow]:
    """A function that sends each row of metrics to a tracker, until the end of the block.

    `config` holds the settings of the run. TensorBoard writes into the run folder, the others wherever they are set up
    to. A resumed run continues in the same wandb run, in other trackers in a new one. A tracker that fails later is
    reported once and ignored: a lost tracker must not end a run. ValueError when it does not start.
    """
    check(name)
    opened = {"tensorboard": _tensorboard, "mlflow": _mlflow}.get(name, _wandb_like)(name, run, config)
    try:
        send = opened.__enter__()
    except Exception as error:  # trackers raise anything: no login, no server, no disk space
        raise ValueError(f"--track {name} could not start: {type(error).__name__}: {error}") from error

    lost = False

    def send_or_give_up(row: Row) -> None:
        nonlocal lost
        try:
            if not lost:
                send(row)
        except Exception as error:
            lost = True
            print(f"lost the tracker, the run continues: {type(error).__name__}: {error}", file=sys.stderr)

    try:
        yield send_or_give_up
    finally:
        try:
            opened.__exit__(None, None, None)
        except Exception as error:
            print(f"the tracker could not be closed: {type(error).__name__}: {error}", file=sys.stderr)


@contextlib.contextmanager
def _tensorboard(name: str, run: Path, config: Mapping[str, str]) -> Iterator[OnRow]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tensorboard")) as writer:
        writer.add_text("recipe", "\n".join(f"    {name}: {value}" for name, value in config.items()))

        def send(row: Row) -> None:
            for name, value in finite_numbers(row).items():
                writer.add_scalar(name, value, row.step)

        yield send


@contextlib.contextmanager
def _wandb_like(name: str, run: Path, config: Mapping[str, str]) -> Iterator[OnRow]:
    module = importlib.import_module(name)
    same: dict[str, Any] = {"id": identity(run), "resume": "allow", "dir": run} if name == "wandb" else {}
    module.init(project=PROJECT, name=run.absolute().name, config=dict(config), **same)
    try:
        yield lambda row: module.log(finite_numbers(row), step=row.step)
    finally:
        module.finish()


@contextlib.contextmanager
def _mlflow(name: str, run: Path, config: Mapping[str, str]) -> Iterator[OnRow]:
    mlflow = importlib.import_module(name)
    mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_name=run.absolute().name):
        mlflow.log_params(dict(config))
        yield lambda row: mlflow.log_metrics(finite_numbers(row), step=row.step)


def identity(run: Path) -> str:
    """A digest of where and when a run started: the same whenever it resumes, another for every other run."""
    recipe = run / "recipe.json"
    stamp = recipe.stat().st_mtime_ns if recipe.exists() else 0
    return f"{run.name}-{hashlib.blake2b(f'{run.absolute()} {stamp}'.encode(), digest_size=4).hexdigest()}"


def finite_numbers(row: Row) -> dict[str, float]:
    """Every finite number of a row by name, without the step; spectra stay in metrics.jsonl."""
    return {name: float(value) for name, value in row.numbers().items() if math.isfinite(value)}
