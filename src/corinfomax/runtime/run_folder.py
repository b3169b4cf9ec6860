"""The run folder: recipe.json, metrics.jsonl, results.json and checkpoints. Every file is whole or absent."""

import contextlib
import errno
import glob
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from corinfomax.runtime.records import Json, Results, Row


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a sibling file, sync it to disk and rename it to `path`, so that no half file appears.

    Leftovers of a killed process are removed. OSError with the path and the system's reason when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for half in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            if _is_abandoned(half):
                half.unlink(missing_ok=True)

        try:
            write(temporary)
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)  # the new name is on the disk too
        finally:
            temporary.unlink(missing_ok=True)


def _is_abandoned(half: Path) -> bool:
    """True if the process that wrote this half file has ended; on Windows, where none can be asked, False."""
    number = half.name.split(".")[-2]
    if sys.platform == "win32" or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        return False
    return int(number) == os.getpid()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the path into any OSError inside the block."""
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
    except OSError:  # some file systems refuse to sync folders; a file's content must be synced
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with its own line ends, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def add_json(path: Path, content: Json) -> None:
    """Merge `content` into the JSON object of a file, or start the file with it."""
    write_json(path, read_object(path) | content)


def read_object(path: Path) -> Json:
    """The JSON object of a file, empty if there is none; ValueError for other content."""
    content = read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: choose another file")
    return content


def check_writable(path: Path) -> None:
    """Check, before hours of work, that a file can be written there; ValueError or OSError with the path."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    probe = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError with its name when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error


def read_results(run: Path) -> Results:
    """The verdict and scores of a run so far; empty without results.json, ValueError when it is damaged."""
    path = run / "results.json"
    try:
        return Results.from_json(read_json(path)) if path.exists() else Results()
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no verdict and scores: remove it and evaluate again ({error})") from error


def append_metrics(run: Path, row: Row) -> None:
    """Add one line to metrics.jsonl."""
    path = run / "metrics.jsonl"
    with _naming(path), path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(row.to_json()) + "\n")


def sync_metrics(run: Path) -> None:
    """Bring metrics.jsonl to the disk, before a checkpoint that continues from it."""
    path = run / "metrics.jsonl"
    if path.exists():
        with _naming(path):
            _sync(path)


def read_metrics(run: Path) -> list[Row]:
    """Every row of metrics.jsonl, without an end that a crash damaged; ValueError for damage before the last row."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows: list[Row] = []
    damaged = None
    for number, line in enumerate(lines, 1):
        try:
            row = Row.from_json(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):  # no JSON, no number, no object
            damaged = damaged or number
            continue
        if damaged is not None:
            raise ValueError(f"line {damaged} of {path} is not a row of metrics: correct or remove it")
        rows.append(row)
    return rows


def forget_after(run: Path, step: int) -> None:
    """Remove rows and checkpoints after `step`, which the resumed run writes again, and leftovers of a kill."""
    late = [path for path in checkpoints(run) if step_of(path) > step]
    for path in (*run.glob(".*.part"), *(run / "checkpoints").glob(".*.part"), *late):
        path.unlink(missing_ok=True)
    rows = [row for row in read_metrics(run) if row.step <= step] if step else []  # step 0 has a row of its own
    write_text(run / "metrics.jsonl", "".join(json.dumps(row.to_json()) + "\n" for row in rows))


def checkpoint_path(run: Path, step: int) -> Path:
    """The path of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"step-{step:08d}.safetensors"


def start_path(run: Path) -> Path:
    """The copy of the weights that a run started from."""
    return run / "start.safetensors"


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    paths = (run / "checkpoints").glob("step-*.safetensors")
    return sorted(path for path in paths if path.stem.removeprefix("step-").isdecimal())


def step_of(checkpoint: Path) -> int:
    """The number of steps before a checkpoint, from its name."""
    return int(checkpoint.stem.removeprefix("step-"))


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Lock the run folder against other processes; the system releases it even when this process is killed.

    ValueError when another process holds it. Systems and file systems without locks go unprotected.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    path = run / ".lock"
    while True:
        with _naming(run):
            file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ValueError(f"{run} is in use by another process: wait for it, or choose another --out") from error
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
                file.close()
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # the process before removed it between open and flock
    with file:
        yield


@contextlib.contextmanager
def new_run(run: Path) -> Iterator[None]:
    """Lock the folder of a new run; remove it again if nothing began by the end of the block.

    ValueError when it already holds a run, or another process uses it.
    """
    with _naming(run):
        run.mkdir(parents=True, exist_ok=True)
    with locked(run):
        if checkpoints(run) or read_metrics(run):
            raise ValueError(f"{run} already holds a run: resume it with --resume {run}, or choose another --out")
        try:
            yield
        finally:
            if not (run / "recipe.json").exists():
                with contextlib.suppress(OSError):
                    (run / ".lock").unlink(missing_ok=True)
                    run.rmdir()  # only when it is empty


def fresh_folder(parent: Path, name: str) -> Path:
    """Create the folder `parent/name`, or name-2, name-3, … when that exists."""
    parent.mkdir(parents=True, exist_ok=True)
    path, number = parent / name, 1
    while True:
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
        number += 1
        path = parent / f"{name}-{number}"
