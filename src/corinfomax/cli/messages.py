"""Sentences for the user: a mistake in one line, and the command to type next."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def message(error: Exception) -> str | None:
    """One sentence for the user; None for a mistake of ours, whose traceback is needed."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return str(error)

    # torch: of a compiler's message, the line that says most
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        telling = (line for line in lines if "Error" in line or "not found" in line)
        reason = next(telling, lines[0] if lines else "no reason given")
        return f"torch.compile failed: run without --compile ({reason})"
    if is_out_of_memory(error):
        first = str(error).partition("\n")[0] or type(error).__name__
        return f"out of memory: try a smaller --batch, --micro-batch, --size or network ({first})"
    return None


def is_out_of_memory(error: Exception) -> bool:
    """True if torch or Python ran out of memory, on a GPU or a CPU."""
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError"):
        return True
    overflow = "integer multiplication overflow"  # more bytes than a number counts
    texts = ("can't allocate memory", overflow, "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def command(*words: str) -> str:
    """`corinfomax words` as this program was started: by uv, and by torchrun for several processes that train."""
    prefix = ["uv", "run"] if "UV_RUN_RECURSION_DEPTH" in os.environ else []  # uv sets it for everything it runs
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # set by torchrun
    if words[0] == "pretrain" and processes != "1":
        prefix += ["torchrun", "--nproc-per-node", processes, "-m"]
    return joined([*prefix, "corinfomax", *words])


def joined(words: Sequence[str]) -> str:
    """The words as one line to type: cmd.exe knows double quotes alone."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def from_here(path: str | Path) -> str:
    """A path below this folder as it is typed here; any other, or a name, as it is."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else str(path)
