"""The main commands where nothing of Linux is left and Windows' rules hold; see tests/support/elsewhere.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny
from corinfomax.cli import messages

HERE = Path(__file__).parents[1] / "support"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="takes away what Linux has")


def test_commands_run_as_on_windows(tmp_path):
    data = tiny.folder(tmp_path / "data", {"train": 40, "test": 12})
    for split in ("train", "test"):
        (data / split / "red").rename(data / split / "красный")  # no letters of cp1252
    (data / "train" / "green" / "торн.png").write_bytes(b"\x89PNG")

    program = [sys.executable, "-W", "ignore::EncodingWarning", "-X", "warn_default_encoding", HERE / "on_windows.py"]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    terminal = {"PYTHONPATH": path, "PYTHONIOENCODING": "cp1252:replace", "CORINFOMAX_TRACEBACK": "1"}
    done = subprocess.run(
        [*program, "data"],
        cwd=tmp_path,
        env=os.environ | terminal | {"OMP_NUM_THREADS": "1", "CORINFOMAX_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        encoding="cp1252",
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["[1, 130, 0, 0, 0]"], done.stdout[-1000:] + done.stderr[-3000:]
    assert "no report" not in done.stderr

    # whole files, whose names have / between folders
    run = tmp_path / "run"
    rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    assert rows == sorted({*rows}) and rows[-1] == 10
    assert (run / json.loads((run / "results.json").read_bytes())["best_checkpoint"]).is_file()
    assert (run / "skip.txt").read_text("utf-8") == "train/green/торн.png\n"
    with np.load(tmp_path / "vectors.npz") as vectors:
        paths = {*map(str, vectors["path"])}
    assert {"train/красный/000.png", "test/green/001.png"} <= paths and len(paths) == 52
    assert not [*tmp_path.rglob("*.part")]


REFUSED = """
import elsewhere, mmap, os, signal
from pathlib import Path
elsewhere.strip()
assert str(Path("a/b/c").relative_to("a")) == "b\\\\c" and not hasattr(os, "fork")
a, b, folder = Path("a"), Path("b"), Path("folder")
a.write_bytes(b"1"), b.write_bytes(b"2"), folder.mkdir()
with a.open("rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
for refused in (a.unlink, lambda: b.replace(a), lambda: b.rename(a), lambda: os.open(folder, os.O_RDONLY),
                Path("c:d").touch, lambda: os.fsync(os.open(b, os.O_RDONLY)), Path("/proc/self/status").stat,
                lambda: signal.signal(17, signal.SIG_DFL), lambda: os.kill(os.getpid(), 0)):
    try:
        refused()
    except (OSError, ValueError, AssertionError):
        continue
    raise SystemExit("not refused")
mapped.close()
b.replace(a)
"""


def test_what_windows_refuses_is_refused(tmp_path):
    subprocess.run([sys.executable, "-c", REFUSED], cwd=tmp_path, env=os.environ | {"PYTHONPATH": HERE}, check=True)


def test_a_command_to_type_has_the_quotes_of_the_system(monkeypatch):
    words = ("embed", "my runs/it's")
    assert messages.command(*words) == """corinfomax embed 'my runs/it'"'"'s'"""
    monkeypatch.setattr(sys, "platform", "win32")
    assert messages.command(*words) == '''corinfomax embed "my runs/it's"'''
