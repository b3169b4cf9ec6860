"""The run folder: recipe.json, metrics.jsonl, results.json, checkpoints; whatever is written is whole or not there."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

CHECKPOINT = re.compile(r"step-(\d+)\.safetensors")


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """`write(temporary)` into a sibling file, synced to the disk, then renamed onto `path`: never half a file.

    What a killed process left of an earlier try is removed: a file of the run has one writer at a time. OSError with
    the path and the system's reason where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            left.unlink(missing_ok=True)
        try:
            write(temporary)
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)  # the new name too is on the disk
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An OSError inside says in words what could not be written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error


def _sync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs no read-only file
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError:  # some file systems refuse it for folders; for a file's content it must hold
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """`content` as an indented JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """`text` as a UTF-8 file with the line ends it has, whole or not at all."""
    write_whole(path, lambda temporary: _write_text(temporary, text))


def add_json(path: Path, content: dict[str, Any]) -> None:
    """`content` into the JSON object of a file, beside what else it holds; a new file where there is none."""
    write_json(path, (read_json(path) if path.exists() else {}) | content)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def read_json(path: Path) -> Any:
    """What a JSON file says; ValueError with its name when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable JSON: {error}") from error


def sync_metrics(run: Path) -> None:
    """Every line of metrics.jsonl so far is on the disk, as a checkpoint that goes on from them is."""
    path = run / "metrics.jsonl"
    if path.exists():
        with _named(path):
            _sync(path)


def append_metrics(run: Path, row: dict[str, Any]) -> None:
    """One more line of metrics.jsonl."""
    path = run / "metrics.jsonl"
    with _named(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Every whole line of metrics.jsonl; the end of the file that a crash cut short or never wrote is left out.

    ValueError where a line before others is no row.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    broken = None
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            broken = broken or number
        elif broken is not None:
            raise ValueError(f"line {broken} of {path} is no row of metrics; mend it or take it out")
        else:
            rows.append(row)
    return rows


def forget_after(run: Path, step: int) -> None:
    """Leave out rows and checkpoints after `step`: the resumed run writes them again, and the latter are damaged.

    What a killed process was writing is removed too.
    """
    for left in (*run.glob(".*.part"), *(run / "checkpoints").glob(".*.part")):
        left.unlink(missing_ok=True)
    for path in checkpoints(run):
        if step_of(path) > step:
            path.unlink()
    rows = [row for row in read_metrics(run) if row["step"] <= step]
    write_text(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps belongs."""
    return run / "checkpoints" / f"step-{step:08d}.safetensors"


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*.safetensors") if CHECKPOINT.fullmatch(path.name))


def step_of(checkpoint: Path) -> int:
    """After how many steps a checkpoint was written."""
    found = CHECKPOINT.fullmatch(checkpoint.name)
    assert found is not None, checkpoint
    return int(found[1])


@contextlib.contextmanager
def held(run: Path) -> Iterator[None]:
    """Keep other processes from writing into the run's folder; the system lets go of it even if this one is killed.

    ValueError when another process holds it. Where the system or the file system has no such locks, nothing is kept.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = run / ".lock"
    while True:
        with _named(run):
            file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ValueError(f"{run} is in use by another process; wait for it, or choose another --out") from error
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
                file.close()
                raise
        if _is(file, path):
            break
        file.close()  # whoever held it took it away in the moment between
    with file:
        yield


@contextlib.contextmanager
def begun(run: Path) -> Iterator[None]:
    """A new run in the folder `run`, held; the folder is taken away if by the end of the block nothing began in it.

    ValueError when it holds a run, or another process holds it.
    """
    with _named(run):
        run.mkdir(parents=True, exist_ok=True)
    with held(run):
        if checkpoints(run) or read_metrics(run):
            raise ValueError(f"{run} holds a run already; --resume {run} goes on with it, another --out starts anew")
        try:
            yield
        finally:
            if not (run / "recipe.json").exists():
                with contextlib.suppress(OSError):
                    (run / ".lock").unlink(missing_ok=True)
                    run.rmdir()  # only where it is empty


def _is(file: IO[str], path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def fresh_folder(parent: Path, name: str) -> Path:
    """A new folder `parent/name`, or name-2, name-3, … when that is taken."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"{parent} holds 9,999 runs called {name}; name another folder")
