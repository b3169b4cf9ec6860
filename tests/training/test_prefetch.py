"""Batches read ahead are the batches, in any order of steps; what goes wrong with one is raised where it is taken."""

import threading
import time

import pytest
import torch

import tiny
from corinfomax.training.prefetch import AHEAD, feed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.splits(tmp_path_factory.mktemp("data")).train


def indices(step):
    return torch.arange(4) + step


def no_boxes(step):
    pytest.fail("copies are not cut")


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [3, 4, 1, 2, 3, 5, 0], [5, 5, 0]])
def test_every_step_gets_its_own_images(images, order):
    with feed(images, indices, no_boxes, 6, CPU) as batches:
        for step in order:
            ((pixels, sizes, _),) = batches.take(step)
            assert pixels.equal(images.batch(indices(step))[0]) and sizes.equal(images.sizes[indices(step)])


def test_no_more_is_read_than_is_wanted_soon(images):
    asked = []

    def noted(step):
        asked.append(step)
        return indices(step)

    with feed(images, noted, no_boxes, 100, CPU) as batches:
        batches.take(0)
    assert asked[0] == 0
    assert set(asked) <= set(range(AHEAD + 1))
    with feed(images, noted, no_boxes, 2, CPU) as batches:
        asked.clear()
        batches.take(0)
        batches.take(1)
    assert sorted(asked) == [0, 1], "nothing beyond the last step"


def test_reading_goes_on_beside_the_step(images):
    def slow(step):
        time.sleep(0.05)
        return indices(step)

    with feed(images, slow, no_boxes, 100, CPU) as batches:
        batches.take(0)
        first = batches.waited
        assert first >= 0.05
        time.sleep(0.4)
        for step in range(1, AHEAD):
            batches.take(step)
        assert batches.waited < first + 0.04, "they were there"


def test_what_cannot_be_read_is_raised_where_it_is_taken(images):
    with feed(images, indices, no_boxes, 50, CPU) as batches:
        for step in range(30, 37):
            batches.take(step)
        with pytest.raises(IndexError):
            batches.take(37)  # of forty images
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


@pytest.mark.gpu
def test_on_cuda_the_images_are_copied_once_and_the_same(images):
    device = torch.device("cuda")
    with feed(images, indices, no_boxes, 6, device) as batches:
        for step in range(6):
            assert batches.take(step)[0][0].cpu().equal(images.batch(indices(step))[0])
        assert batches.waited == 0.0, "they lie there"
