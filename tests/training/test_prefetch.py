"""Batches read ahead equal those that are not, in any order of steps; errors are raised where they are taken."""

import threading
import time

import pytest
import torch

import tiny
from corinfomax.training import batches, prefetch
from corinfomax.training.prefetch import AHEAD

CPU = torch.device("cpu")
STEPS = 6


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.splits(tmp_path_factory.mktemp("data")).train


def watch(monkeypatch, before):
    """Call `before(step)` whenever a batch is drawn."""
    real = batches.draw_batch

    def draw(recipe, images, step, part):
        before(step)
        return real(recipe, images, step, part)

    monkeypatch.setattr(prefetch, "draw_batch", draw)


@pytest.mark.parametrize("part", [slice(None), slice(2, 6)])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [3, 4, 1, 2, 3, 5, 0], [5, 5, 0]])
def test_every_step_gets_its_own_batch(images, order, part):
    with prefetch.prefetch(tiny.RECIPE, images, STEPS, CPU, part) as ahead:
        for step in order:
            batch = ahead.take(step)
            want = batches.read_batch(tiny.RECIPE, images, step, CPU, part)
            assert batch.indices.equal(batches.indices(tiny.RECIPE, step, len(images))[part])
            assert batch.pixels[0].images.equal(want.pixels[0].images) and batch.sizes.equal(want.sizes)
            for one, other in zip(batch.parameters, want.parameters, strict=True):
                assert all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_no_more_is_read_than_is_needed_soon(images, monkeypatch):
    drawn = []
    watch(monkeypatch, drawn.append)
    with prefetch.prefetch(tiny.RECIPE, images, 100, CPU) as ahead:
        ahead.take(0)
    assert drawn[0] == 0
    assert set(drawn) <= set(range(AHEAD + 1))
    drawn.clear()
    with prefetch.prefetch(tiny.RECIPE, images, 2, CPU) as ahead:
        ahead.take(0)
        ahead.take(1)
    assert sorted(drawn) == [0, 1], "nothing beyond the last step"


def test_reading_goes_on_beside_the_step(images, monkeypatch):
    watch(monkeypatch, lambda step: time.sleep(0.05))
    with prefetch.prefetch(tiny.RECIPE, images, 100, CPU) as ahead:
        ahead.take(0)
        first = ahead.waited
        assert first >= 0.05
        time.sleep(0.6)
        for step in range(1, AHEAD):
            ahead.take(step)
        assert ahead.waited < first + 0.04, "they were ready"


def test_an_error_of_the_reading_thread_is_raised_by_its_step(images, monkeypatch):
    def fail(step):
        if step == 7:
            raise OSError("lost")

    watch(monkeypatch, fail)
    with prefetch.prefetch(tiny.RECIPE, images, 10, CPU) as ahead:
        for step in range(3, 7):
            ahead.take(step)
        with pytest.raises(OSError, match="lost"):
            ahead.take(7)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.gpu
def test_on_cuda_the_images_are_copied_once_and_equal(images):
    device = torch.device("cuda")
    with prefetch.prefetch(tiny.RECIPE, images, STEPS, device) as ahead:
        for step in range(STEPS):
            want = batches.read_batch(tiny.RECIPE, images, step, CPU)
            assert ahead.take(step).pixels[0].images.cpu().equal(want.pixels[0].images)
        assert ahead.waited == 0.0, "they are there"
