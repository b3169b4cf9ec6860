"""Images are decoded by processes where they can be forked: to the same pixels, and without leaving anyone behind."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import tiny
from corinfomax.images import cache, decode
from corinfomax.images.files import DataError
from corinfomax.images.sources import Data

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")

SMALL = partial(decode.decode, side=8)


@pytest.fixture
def source(tmp_path):
    root = tiny.folder(tmp_path / "data", {"train": 150})
    (root / "train" / "red" / "broken.png").write_bytes(b"nothing")
    (root / "train" / "red" / "empty.png").touch()
    return Data(str(root)).splits()["train"]


def test_processes_make_what_one_thread_makes(source, monkeypatch):
    monkeypatch.setattr(decode, "FORK_ABOVE", 10)
    monkeypatch.setattr(decode, "cores", lambda: 3)
    several = list(decode.map_images(source, SMALL, progress=False))
    monkeypatch.setattr(decode, "FORK_ABOVE", 10**9)
    alone = list(decode.map_images(source, SMALL, progress=False))
    assert len(several) == len(alone) == 152
    assert sum(isinstance(made, str) for made in alone) == 2
    for a, b in zip(several, alone, strict=True):
        assert a == b if isinstance(a, str) else np.array_equal(a, b)


def test_a_process_that_dies_is_one_sentence(source, monkeypatch):
    monkeypatch.setattr(decode, "FORK_ABOVE", 10)
    monkeypatch.setattr(decode, "cores", lambda: 2)

    def die(image):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(DataError, match="killed, perhaps because memory ran out"):
        list(decode.map_images(source, die, progress=False))


def test_a_killed_process_is_not_taken_for_a_full_disk(source, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "FORK_ABOVE", 10)
    monkeypatch.setattr(decode, "cores", lambda: 2)
    monkeypatch.setattr(cache, "decode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="killed, perhaps because memory ran out"):
        cache.load(Data(tmp_path / "data", cache=tmp_path / "cache"), side=8, progress=False)


def test_where_no_more_processes_can_be_had_threads_do_it(source, monkeypatch):
    monkeypatch.setattr(decode, "FORK_ABOVE", 10)
    monkeypatch.setattr(decode, "cores", lambda: 4)
    fork, forks = os.fork, []

    def at_most_two():
        if len(forks) == 2:
            raise BlockingIOError("Resource temporarily unavailable")
        forks.append(pid := fork())
        return pid

    monkeypatch.setattr(os, "fork", at_most_two)
    made = list(decode.map_images(source, SMALL, progress=False))
    assert len(made) == 152 and sum(isinstance(each, str) for each in made) == 2
    assert len(forks) == 2
    assert all(map(gone, forks))


SLOW = """
import os, signal, sys, time
from functools import partial
from pathlib import Path
from corinfomax.images import decode
from corinfomax.images.sources import Data
decode.FORK_ABOVE = 10
decode.cores = lambda: 2

def slow(image):
    Path(sys.argv[2], str(os.getpid())).touch()
    time.sleep(0.05)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        list(decode.map_images(Data(sys.argv[1]).splits()["train"], slow, progress=False))
    except KeyboardInterrupt:
        print("stopped")
"""


def start_slow(source, tmp_path):
    """A program that decodes slowly, in a session of its own, and the processes that it forked."""
    pids = tmp_path / "pids"
    pids.mkdir()
    (tmp_path / "slow.py").write_text(SLOW)
    words = [sys.executable, str(tmp_path / "slow.py"), str(tmp_path / "data"), str(pids)]
    program = subprocess.Popen(words, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(pids.iterdir())) < 2:
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return program, [int(path.name) for path in pids.iterdir()]


def gone(pid):
    """Whether the process has ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_no_process_outlives_a_killed_program(source, tmp_path):
    program, forked = start_slow(source, tmp_path)
    program.kill()
    program.communicate()
    deadline = time.monotonic() + 20
    while not all(map(gone, forked)):
        assert time.monotonic() < deadline, "a forked process is still there"
        time.sleep(0.1)


def test_ctrl_c_is_for_the_program_alone(source, tmp_path):
    program, forked = start_slow(source, tmp_path)
    os.killpg(program.pid, signal.SIGINT)
    out, err = program.communicate(timeout=60)
    assert out == "stopped\n"
    assert err == ""
    assert all(map(gone, forked))
