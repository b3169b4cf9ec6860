"""The command line: which command was typed, and what its end means to the shell."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from corinfomax import __version__
from corinfomax.cli import errors, slurm
from corinfomax.cli.options import Bench, Doctor, Embed, Evaluate, Export, Neighbors, Pretrain, Recipes, Report, parse
from corinfomax.recipes import fields


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 doctor found what must be mended, 2 a mistake, said in a sentence,
    130 stopped."""
    if argv is None:  # the process is this command's alone
        _keep_memory()
    try:
        with _told_to_stop(), _tiny_numbers_afterwards():
            return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("corinfomax: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads has heard enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor will Python complain at its end
        return 141
    except Exception as error:
        said = errors.sentence(error)
        if said is None or os.environ.get("CORINFOMAX_TRACEBACK"):
            raise
        print(f"corinfomax: {said}", file=sys.stderr)
        return 2


MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of glibc's mallopt


def _keep_memory() -> None:
    """What is freed stays with the process, where glibc would give it back and fetch it anew, page by page, every step.

    A float32 step of `cpu-small` on two cores took 0.18 s instead of 0.21, in a tenth more memory at most
    (docs/log.md). What the environment says of malloc comes first.
    """
    said = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # glibc's alone
    if said or mallopt is None:
        return
    # Older ones take 32 MB at most. Without the first the second would leave it at 128 kB for good.
    if mallopt(MMAP_THRESHOLD, 1 << 30) or mallopt(MMAP_THRESHOLD, 1 << 25):
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)


@contextlib.contextmanager
def _told_to_stop() -> Iterator[None]:
    """SIGTERM is as Ctrl-C; training has its own answer to both."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _tiny_numbers_afterwards() -> Iterator[None]:
    """Commands flush numbers below 1e-38 to 0 (`inputs.device_of`); whoever called one has them again as they were."""
    torch = sys.modules.get("torch")
    flushed = (
        torch is not None and float(torch.tensor(1e-39, dtype=torch.float32, device="cpu") * 1) == 0
    )  # there is no way to ask
    try:
        yield
    finally:
        if torch := sys.modules.get("torch"):
            torch.set_flush_denormal(flushed)


def _run(argv: list[str]) -> int:
    # torch takes seconds to import; a command is imported when it is wanted, so that --help answers at once.
    if argv == ["--version"]:
        print(f"corinfomax {__version__}")
        return 0
    match parse(argv):
        case Pretrain(sbatch=(nodes, gpus)) as command:
            if command.recipe is not None:  # else it is chosen where the job runs
                fields.check_objective(command.knobs)
            words, run = slurm.without_flag(argv, "--sbatch", 2), command.resume or command.out
            print(slurm.script(words, nodes=nodes, gpus=gpus, run=run, device=command.where.device), end="")
            return 0
        case Pretrain() as command:
            from corinfomax.cli import pretrain

            return pretrain.run(command, argv)
        case Evaluate() as command:
            from corinfomax.cli import evaluate

            return evaluate.run(command)
        case Embed() as command:
            from corinfomax.cli import embed

            return embed.run(command)
        case Neighbors() as command:
            from corinfomax.cli import neighbors

            return neighbors.run(command)
        case Export() as command:
            from corinfomax.cli import export

            return export.run(command)
        case Report() as command:
            from corinfomax.cli import report

            return report.run(command)
        case Recipes() as command:
            from corinfomax.cli import recipes

            return recipes.run(command)
        case Bench() as command:
            from corinfomax.cli import bench

            return bench.run(command, argv)
        case Doctor() as command:
            from corinfomax.cli import doctor

            return doctor.run(command)
