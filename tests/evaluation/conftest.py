"""Images and a backbone that the tests of this room share."""

import pytest
import torch

import tiny
from corinfomax import network
from corinfomax.images import cache


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return cache.load(tiny.folder(tmp_path_factory.mktemp("data"), {"train": 60, "test": 20}), side=16, progress=False)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(3)
    return network.build_backbone(tiny.RECIPE.backbone)
