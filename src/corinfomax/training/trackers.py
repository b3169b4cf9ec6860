"""The rows of metrics.jsonl also to a tracker that the person asked for; metrics.jsonl is written in any case."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

Name = Literal["tensorboard", "trackio", "wandb", "mlflow"]
Row = Mapping[str, Any]
Tell = Callable[[Row], None]
PROJECT = "corinfomax"


def check(name: Name) -> None:
    """ValueError unless the tracker is installed; before training, so that its absence costs nothing."""
    try:
        importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise ValueError(f"--track {name} needs {name}: pip install {name} ({error})") from None


@contextlib.contextmanager
def to(name: Name, run: Path, config: Mapping[str, str]) -> Iterator[Tell]:
    """A function that takes each row of metrics, until the end of the block; `config` is what the run was told.

    TensorBoard's files go into the run's folder, the others where they are set up to write; the run is called as its
    folder is. A resumed run goes on under the same name: in wandb in the same run, in the others in a new one. Once it
    has begun, a tracker that fails is said and left alone. ValueError when it does not begin.
    """
    check(name)
    match name:
        case "tensorboard":
            opened = _tensorboard(run, config)
        case "mlflow":
            opened = _mlflow(run, config)
        case _:
            opened = _wandb_like(name, run, config)
    try:
        tell = opened.__enter__()
    except Exception as error:  # whatever a tracker raises: no login, no server, no room
        raise ValueError(f"--track {name} could not begin: {type(error).__name__}: {error}") from error
    try:
        yield _forgiving(tell)
    finally:
        try:
            opened.__exit__(None, None, None)
        except Exception as error:
            print(f"the tracker could not be closed: {type(error).__name__}: {error}", file=sys.stderr)


@contextlib.contextmanager
def _tensorboard(run: Path, config: Mapping[str, str]) -> Iterator[Tell]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tensorboard")) as writer:
        writer.add_text("recipe", "\n".join(f"    {key}: {value}" for key, value in config.items()))

        def tell(row: Row) -> None:
            for key, value in numbers(row).items():
                writer.add_scalar(key, value, row["step"])

        yield tell


@contextlib.contextmanager
def _wandb_like(name: str, run: Path, config: Mapping[str, str]) -> Iterator[Tell]:
    module = importlib.import_module(name)
    same: dict[str, Any] = {"id": identity(run), "resume": "allow", "dir": run} if name == "wandb" else {}
    module.init(project=PROJECT, name=run.absolute().name, config=dict(config), **same)
    try:
        yield lambda row: module.log(numbers(row), step=row["step"])
    finally:
        module.finish()


def identity(run: Path) -> str:
    """The same for a run each time it goes on, another one for each run: a digest of where and when it was begun."""
    begun = run / "recipe.json"
    stamp = begun.stat().st_mtime_ns if begun.exists() else 0
    return f"{run.name}-{hashlib.blake2b(f'{run.absolute()} {stamp}'.encode(), digest_size=4).hexdigest()}"


@contextlib.contextmanager
def _mlflow(run: Path, config: Mapping[str, str]) -> Iterator[Tell]:
    mlflow = importlib.import_module("mlflow")
    mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_name=run.absolute().name):
        mlflow.log_params(dict(config))
        yield lambda row: mlflow.log_metrics(numbers(row), step=row["step"])


def _forgiving(tell: Tell) -> Tell:
    """`tell` until it first fails, which is said: a tracker that is gone must not end a run."""
    gone = False

    def told(row: Row) -> None:
        nonlocal gone
        if gone:
            return
        try:
            tell(row)
        except Exception as error:  # whatever a tracker raises
            gone = True
            print(f"the tracker is lost, the run goes on: {type(error).__name__}: {error}", file=sys.stderr)

    return told


def numbers(row: Row) -> dict[str, float]:
    """What of a row is one finite number, without the step; spectra and words stay in metrics.jsonl."""
    return {
        key: float(value)
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }
