"""Faults put into tiny runs of the command, one a case, each drawn from a seed: nothing that was done may be lost.

A life is one process of `corinfomax pretrain`. A wire ends it, or spoils what it does, at the n-th call of a function.
"""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tiny
from corinfomax.cli.main import main
from corinfomax.diagnosis import measures
from corinfomax.evaluation import table
from corinfomax.images import cache, decode
from corinfomax.runtime import run_folder
from corinfomax.training import batches, loop
from corinfomax.weights import checkpoint

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["faults", "corinfomax.cli.pretrain", "timm"])  # torch is imported once
STEPS = 30
KNOBS = [*tiny.KNOBS[:-3], "--projector.widths", "300", "8", "--epochs", "6", "--optim.name", "adamw"]
KNOBS += ["--optim.lr", "0.003", "--checkpoint-minutes", "0", "--log-steps", "4", "--scores", "3", "--diagnoses", "6"]
KNOBS += ["--no-evaluate", "--no-report"]
PLACES: dict[str, tuple[Any, str, int]] = {
    "views": (batches, "apply_views", STEPS),
    "update": (loop, "update", STEPS),
    "look": (measures, "look", 6),
    "score": (table, "quick_knn", 3),
    "row": (run_folder, "append_metrics", 10),
    "save": (checkpoint, "save_checkpoint", STEPS),
    "bytes": (checkpoint, "save_file", STEPS),
    "sync": (run_folder, "_sync", 2 * STEPS),
    "remove": (Path, "unlink", STEPS),
    "decode": (cache, "decode", 10),
}
"""Where a wire can be, and how often a life comes by."""


class Wire(NamedTuple):
    """`action` at the `nth` call, from 1, before or after it is done."""

    place: str
    nth: int
    after: bool
    action: str
    """kill, stop (SIGTERM), full (the disk), nan."""


def draw(rng: random.Random, action: str, places: list[str] | None = None) -> Wire:
    """A wire at any place and time of a run."""
    place = rng.choice(places or [name for name in PLACES if name != "decode"])
    return Wire(place, rng.randint(1, PLACES[place][2]), rng.random() < 0.5, action)


def spring(wire: Wire, rng: random.Random) -> None:
    """Lay the wire in this process."""
    owner, name, _ = PLACES[wire.place]
    real, calls = getattr(owner, name), 0

    def act(*arguments: Any) -> None:
        if wire.action == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        elif wire.action == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif wire.action == "kill":
            if wire.place == "bytes" and wire.after:  # half a file
                path = arguments[1]
                os.truncate(path, rng.randrange(path.stat().st_size))
            os.kill(os.getpid(), signal.SIGKILL)

    def wired(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == wire.nth and wire.action == "nan":
            arguments = (*arguments[:2], [x * math.nan for x in arguments[2]], *arguments[3:])
        if calls == wire.nth and not wire.after:
            act(*arguments)
        result = real(*arguments, **named)
        if calls == wire.nth and wire.after:
            act(*arguments)
        return result

    setattr(owner, name, wired)


def _life(words: list[str], said: Path, wire: Wire | None, seed: int, world: dict[str, str]) -> None:
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    os.environ |= world
    decode.FORK_ABOVE = 1  # processes for few images too
    if wire is not None:
        spring(wire, random.Random(seed))
    raise SystemExit(main(words))


class Ended(NamedTuple):
    """How a life ended: the exit code, the negative signal where it was killed, and all that it said."""

    code: int
    said: str


def live(words: list[str], said: Path, wires: dict[int, Wire], *, processes: int = 1, seed: int = 0) -> list[Ended]:
    """One command in as many processes, with the wire of each rank that has one; 99 where one did not end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(processes):
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_PORT": port}
        world |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(processes)}
        place = said.with_name(f"{said.name}-{rank}")
        arguments = (words, place, wires.get(rank), seed, world if processes > 1 else {})
        child = FORK.Process(target=_life, args=arguments)
        child.start()
        children.append((child, place))
    ends = []
    for child, place in children:
        child.join(120)
        code = 99 if child.is_alive() else child.exitcode
        child.kill()
        ends.append(Ended(code, place.read_text() if place.exists() else ""))
    return ends


class World(NamedTuple):
    """A folder with images, and what a run on them is that nothing disturbs, in one process and in two."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def whole(self, processes: int = 1) -> Path:
        return self.folder / f"whole-{processes}"

    @classmethod
    def made(cls, folder: Path) -> World:
        world = cls(folder)
        tiny.folder(world.data, {"train": 40, "test": 12})
        for processes in (1, 2):
            ends = live(world.begin(world.whole(processes)), folder / "said", {}, processes=processes)
            assert all(end.code == 0 for end in ends), ends
        return world

    def begin(self, run: Path, *more: str) -> list[str]:
        """The command of a new run."""
        return ["pretrain", str(self.data), "--out", str(run), "--cache", str(self.folder / "cache"), *KNOBS, *more]


def sentence(ended: Ended) -> None:
    """A mistake or a misfortune is told in a line, not by a traceback."""
    assert "Traceback" not in ended.said, ended.said
    assert any(line.startswith("corinfomax: ") for line in ended.said.splitlines()), ended.said


def lines(run: Path) -> list[str]:
    """Every line of metrics.jsonl without the time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({key: value for key, value in row.items() if key != "seconds"}) for row in rows]


def same_end(run: Path, whole: Path) -> None:
    """Bit for bit the same: metrics, weights, moments, optimiser; and nothing half written is left."""
    assert lines(run) == lines(whole)
    ours, theirs = (checkpoint.load_last(each)[1] for each in (run, whole))
    assert (ours.step, ours.recipe) == (theirs.step, theirs.recipe) == (STEPS, theirs.recipe)
    for part in ("network", "criterion", "optimizer", "loop"):
        assert tiny.equal_states(getattr(ours, part), getattr(theirs, part)), part
    assert ours.optimizer
    assert not [*run.rglob("*.part")]


class Case(NamedTuple):
    """One run with faults in it."""

    world: World
    folder: Path
    rng: random.Random

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def go(self, wires: dict[int, Wire] | None = None, *more: str, processes: int = 1) -> list[Ended]:
        """The run's next life: its beginning, or what goes on with it."""
        begun = (self.run / "recipe.json").exists()
        words = ["pretrain", "--resume", str(self.run), *more] if begun else self.world.begin(self.run, *more)
        seed = self.rng.randrange(2**32)
        return live(words, self.folder / "said", wires or {}, processes=processes, seed=seed)

    def step(self) -> int:
        """How far the last whole checkpoint is."""
        return max(map(run_folder.step_of, run_folder.checkpoints(self.run)), default=0)

    def end(self, *more: str, processes: int = 1) -> list[Ended]:
        """A life without faults, which must end as if there had been none."""
        ends = self.go(None, *more, processes=processes)
        assert all(end.code == 0 for end in ends), ends
        same_end(self.run, self.world.whole(processes))
        return ends


def killed(case: Case) -> None:
    """kill -9 in one to three lives, each at any moment."""
    for _ in range(case.rng.randint(1, 3)):
        before = case.step()
        (end,) = case.go({0: draw(case.rng, "kill")})
        assert end.code in (-signal.SIGKILL, 0), end
        assert case.step() >= before
    case.end()


def torn(case: Case) -> None:
    """Killed, and then the last checkpoint, or the last row, is not what was written."""
    wire = Wire("update", case.rng.randint(4, STEPS), True, "kill")
    assert case.go({0: wire})[0].code == -signal.SIGKILL
    path, what = run_folder.checkpoints(case.run)[-1], case.rng.choice(["short", "flip", "zeros", "rows"])
    content = bytearray(path.read_bytes())
    if what == "rows":
        with (case.run / "metrics.jsonl").open("ab") as file:
            file.write(case.rng.choice([b'{"step": 29, "lo', b"\0" * 500, b"\0\n\0\n"]))
    elif what == "short":
        path.write_bytes(content[: case.rng.randrange(len(content))])
    elif what == "zeros":
        begin = case.rng.randrange(len(content) - 600)
        path.write_bytes(content[:begin] + bytes(len(content) - begin))
    else:
        content[case.rng.randrange(len(content))] ^= 1 << case.rng.randrange(8)
        path.write_bytes(content)
    (end,) = case.end()
    assert (what == "rows") or "trying the one before" in end.said, (what, end.said)


def stopped(case: Case) -> None:
    """SIGTERM at any moment of training: a checkpoint, the command to resume, exit code 130."""
    (end,) = case.go({0: draw(case.rng, "stop")})
    assert end.code in (130, 0), end
    if end.code:
        assert f"to resume: corinfomax pretrain --resume {case.run}" in end.said, end.said
        case.end()
    else:  # it never came by
        same_end(case.run, case.world.whole())


def full(case: Case) -> None:
    """The disk is full when a row or a checkpoint is written."""
    (end,) = case.go({0: draw(case.rng, "full", ["row", "save", "bytes", "sync"])})
    assert end.code in (2, 0), end  # 0: of a folder's sync it is no error
    if end.code:
        sentence(end)
        assert "No space left on device" in end.said
    case.end() if end.code else same_end(case.run, case.world.whole())


def not_a_number(case: Case) -> None:
    """A batch that is no numbers: the step is named and kept, and nothing of it is saved."""
    nth = case.rng.randint(1, STEPS)
    (end,) = case.go({0: Wire("update", nth, False, "nan")})
    assert end.code == 2, end
    sentence(end)
    assert f"step {nth - 1}" in end.said, end.said
    kept = checkpoint.load_checkpoint(case.run / f"failed-step-{nth - 1}.safetensors")
    assert all(tensor.isfinite().all() for part in (kept.network, kept.optimizer) for tensor in part.values())
    assert case.step() < nth
    case.end()


def unreadable(case: Case) -> None:
    """Some of the images are damaged: of 40 one is named and left out, as if it were on the list to leave out; more
    are a sentence."""
    data = shutil.copytree(case.world.data, case.folder / "data")
    files = sorted((data / "train").rglob("*.png"))
    damaged = case.rng.sample(files, case.rng.randint(1, 3))
    for path in damaged:
        content = path.read_bytes()
        half = content[: case.rng.randrange(len(content) // 2)]
        path.write_bytes(case.rng.choice([half, b"", case.rng.randbytes(300), b"GIF89a" + half]))
    left_out = case.folder / "skip.txt"
    left_out.write_text("".join(f"{path.relative_to(data).as_posix()}\n" for path in damaged))
    world = World(case.folder)
    ends = [
        live(world.begin(case.folder / name, *more), case.folder / "said", {})[0]
        for name, more in (("run", ()), ("whole", ("--skip", str(left_out))))
    ]
    names = [path.relative_to(data).as_posix() for path in damaged]
    assert ends[1].code == 0, ends
    if len(damaged) > 1:
        assert ends[0].code == 2, ends
        sentence(ends[0])
        assert all(name in ends[0].said for name in names), ends[0].said
        return
    assert ends[0].code == 0, ends
    assert f"1 unreadable image left out of train, such as {names[0]}" in ends[0].said, ends[0].said
    assert lines(case.folder / "run") == lines(case.folder / "whole")


def lost_worker(case: Case) -> None:
    """A process that decodes images is killed: one sentence, and the next life decodes them all."""
    alone = World(case.folder)  # with a cache of its own
    alone.data.symlink_to(case.world.data)
    wire = Wire("decode", case.rng.randint(1, PLACES["decode"][2]), case.rng.random() < 0.5, "kill")
    words = alone.begin(case.run)
    (end,) = live(words, case.folder / "said", {0: wire})
    assert end.code == 2, end
    sentence(end)
    assert "was killed" in end.said, end.said
    assert not [*(case.folder / "cache").rglob("*.npy")], "half a cache"
    (end,) = live(words, case.folder / "said", {})
    assert end.code == 0, end
    same_end(case.run, case.world.whole())


def lost_rank(case: Case) -> None:
    """Of two processes one is killed at any moment: the other says so and ends, and two go on."""
    rank = case.rng.randrange(2)
    places = ["views", "update"] if rank else None
    ends = case.go({rank: draw(case.rng, "kill", places)}, processes=2)
    if ends[rank].code == 0:  # it never came by
        same_end(case.run, case.world.whole(2))
        return
    assert ends[rank].code == -signal.SIGKILL, ends
    other = ends[1 - rank]
    assert other.code in (2, 0), other  # 0: it had done its part
    if other.code:
        sentence(other)
        assert "another process of this run has ended" in other.said, other.said
    if case.step() < STEPS:
        case.end(processes=2)


KINDS: dict[str, Callable[[Case], None]] = {
    kind.__name__: kind for kind in (killed, torn, stopped, full, not_a_number, unreadable, lost_worker, lost_rank)
}
