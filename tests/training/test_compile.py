"""`--compile`: the same run up to rounding, and one sentence where there is no compiler."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import tiny
from corinfomax.images import cache
from corinfomax.images.sources import Data
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Options
from corinfomax.training import loop


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_a_compiled_network_learns_the_same(tmp_path):
    recipe = replace(tiny.RECIPE, micro_batch=4)  # which calls the network as a whole batch does, and without gradients
    data = tiny.folder(tmp_path / "images", {"train": 40, "test": 20})
    splits = cache.load(Data(data, cache=tmp_path / "cache"), side=16, progress=False)
    rows = {}
    for compiled in (False, True):
        run = tmp_path / str(compiled)
        run.mkdir()
        options = Options(log_steps=1, scores=0, diagnoses=2, compile=compiled)
        network = loop.pretrain(recipe, splits, run, device=torch.device("cpu"), options=options)
        rows[compiled] = run_folder.read_metrics(run)
    assert network._compiled_call_impl is not None
    for plain, other in zip(rows[False][:3], rows[True][:3], strict=True):
        assert other.loss == pytest.approx(plain.loss, rel=1e-4)
    assert [row.step for row in rows[True]] == list(range(1, 11))
    assert rows[True][-1].look is not None, "the looks go through the same weights"


def test_without_a_compiler_it_says_so(tmp_path):
    environment = {
        **os.environ,
        "CXX": str(tmp_path / "no-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "made"),
    }
    words = [
        "pretrain",
        str(tiny.folder(tmp_path / "images", {"train": 40})),
        "--compile",
        "--out",
        str(tmp_path / "run"),
        *tiny.KNOBS,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "corinfomax", *words],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("corinfomax: torch.compile failed: run without --compile (")
    assert "Traceback" not in done.stderr
