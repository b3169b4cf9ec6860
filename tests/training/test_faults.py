"""Nothing is lost to faults: `python -m pytest tests/test_faults.py --faults 200` puts in as many as are asked for."""

import random

import pytest

import faults
from corinfomax.runtime import run_folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return faults.World.made(tmp_path_factory.mktemp("world"))


def pytest_generate_tests(metafunc):
    if "kind" not in metafunc.fixturenames:
        return
    kinds = list(faults.KINDS)
    count = metafunc.config.getoption("--faults")
    metafunc.parametrize(("kind", "seed"), [(kinds[i % len(kinds)], i // len(kinds)) for i in range(count)])


def test_nothing_is_lost(world, tmp_path, kind, seed):
    faults.KINDS[kind](faults.Case(world, tmp_path, random.Random(f"{kind} {seed}")))


def test_two_processes_begin_and_one_goes_on(world, tmp_path):
    """Another order of sums: rounding apart the same run, as far as rounding has not yet grown."""
    case = faults.Case(world, tmp_path, random.Random(0))
    wire = faults.Wire("update", 6, True, "stop")
    first, second = case.go({0: wire, 1: wire}, processes=2)
    assert (first.code, second.code) == (130, 130), (first, second)
    (end,) = case.go(None)
    assert end.code == 0, end
    stopped = case.step()
    assert stopped == faults.STEPS
    ours, theirs = (run_folder.read_metrics(run) for run in (case.run, world.whole(2)))
    assert [row.step for row in ours] == [row.step for row in theirs]
    for mine, other in zip(ours[:3], theirs[:3], strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=1e-3)
