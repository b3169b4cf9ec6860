"""The main commands in a process as on Windows: on_windows.py DATA, in an empty folder; run by test_windows.py."""

import signal
import sys
from typing import Any

import numba  # noqa: F401  (what other packages do when they are imported is theirs)
import PIL.Image
import safetensors.torch  # noqa: F401
import timm
import torch
import tqdm.auto  # noqa: F401

import elsewhere

PIL.Image.init()
timm.create_model("resnet18")
torch.optim.SGD([torch.zeros(1)]).step()
elsewhere.strip()
sys.modules["pacmap"] = None  # type: ignore[assignment]  # its compiler asks sys.platform where to cache

import tiny  # noqa: E402
from corinfomax.cli.main import main  # noqa: E402
from corinfomax.images import decode  # noqa: E402
from corinfomax.runtime import run_folder  # noqa: E402


def interrupt_after(rows: int) -> None:
    """Press Ctrl-C when so many rows of metrics are written."""
    append = run_folder.append_metrics

    def append_then_stop(*args: Any) -> None:
        nonlocal rows
        append(*args)
        rows -= 1
        if rows == 0:
            signal.raise_signal(signal.SIGINT)

    run_folder.append_metrics = append_then_stop


data = sys.argv[1]
decode.FORK_ABOVE = 0
codes = [main(["doctor", data, "--seconds", "0", "--out", "skip.txt"])]
interrupt_after(rows=3)
words = ["--skip", "skip.txt", "--out", "run", "--log-steps", "1", "--no-evaluate"]
codes.append(main(["pretrain", data, *words, *tiny.KNOBS]))
codes.append(main(["pretrain", "--resume", "run"]))
codes.append(main(["evaluate", "run", data, "--out", "scores.json"]))
codes.append(main(["embed", "run", data, "--out", "vectors.npz"]))
print(codes)
