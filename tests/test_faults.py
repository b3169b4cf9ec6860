"""Nothing is lost to faults: `python -m pytest tests/test_faults.py --faults 200` puts in as many as are asked for."""

import random

import pytest

import faults


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return faults.World.made(tmp_path_factory.mktemp("world"))


def pytest_generate_tests(metafunc):
    kinds = list(faults.KINDS)
    count = metafunc.config.getoption("--faults")
    metafunc.parametrize(("kind", "seed"), [(kinds[i % len(kinds)], i // len(kinds)) for i in range(count)])


def test_nothing_is_lost(world, tmp_path, kind, seed):
    faults.KINDS[kind](faults.Case(world, tmp_path, random.Random(f"{kind} {seed}")))
