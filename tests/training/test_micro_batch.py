"""Micro-batches: the exact gradient of the whole batch, whatever the parts."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import tiny
from corinfomax.images import cache
from corinfomax.images.sources import Data
from corinfomax.objective.covariance import CorInfoMaxLoss
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Options
from corinfomax.training import loop, micro_batch

CPU = torch.device("cpu")


def network(norm):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(8 * 36, 6))
    return body.double()


def projector_of(net):
    def project(x, i):
        torch.manual_seed(i)
        return net(x)

    return project


def in_parts(norm, part, count=12, views=2):
    net, criterion = network(norm), CorInfoMaxLoss(6, views=views)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(views, count, 3, 8, 8, generator=rng, dtype=torch.float64).unbind()
    terms = micro_batch.backward(projector_of(net), net, criterion, x, part)
    return net, criterion, terms, x


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("part", [2, 5, 12])
def test_the_gradient_is_the_whole_batchs(part, views):
    net, criterion, terms, images = in_parts(lambda c: nn.GroupNorm(2, c), part, views=views)
    whole, once = network(lambda c: nn.GroupNorm(2, c)), CorInfoMaxLoss(6, views=views)
    # Dropout is drawn for each part: the whole batch gets the same masks by running the parts with their graphs.
    split = [x.split(part) for x in images]
    each = len(split[0])
    z = [torch.cat([projector_of(whole)(x, v * each + i) for i, x in enumerate(view)]) for v, view in enumerate(split)]
    want = once(*z)
    want.loss.backward()
    torch.testing.assert_close(terms.loss, want.loss, rtol=1e-12, atol=0)
    for p, q in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    assert tiny.equal_states(criterion.state_dict(), once.state_dict())


def test_batch_norm_sees_the_parts_and_its_statistics_move_once_for_each():
    net, _, terms, pair = in_parts(nn.BatchNorm2d, 4)
    whole = network(nn.BatchNorm2d)
    z = [
        torch.cat([projector_of(whole)(x, 3 * v + i) for i, x in enumerate(view.split(4))])
        for v, view in enumerate(pair)
    ]
    want = CorInfoMaxLoss(6)(*z)
    want.loss.backward()
    for p, q in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    assert tiny.equal_states(dict(net.named_buffers()), dict(whole.named_buffers()))
    # It is another loss than the whole batch's: what the docs say.
    other = CorInfoMaxLoss(6)(*(projector_of(network(nn.BatchNorm2d))(view, v) for v, view in enumerate(pair)))
    assert abs(other.loss - terms.loss) > 1e-3


def test_a_run_in_micro_batches_trains_and_one_as_large_as_the_batch_is_the_run_itself(tmp_path):
    splits = cache.load(Data(tiny.folder(tmp_path / "data", {"train": 32}), holdout=0.0), side=16, progress=False)
    losses = {}
    for part in (None, 8, 4):
        recipe = replace(tiny.RECIPE, micro_batch=part)
        (tmp_path / str(part)).mkdir()
        loop.pretrain(recipe, splits, tmp_path / str(part), device=CPU, options=Options(log_steps=1, diagnoses=0))
        losses[part] = [row.loss for row in run_folder.read_metrics(tmp_path / str(part))]
    assert losses[8] == losses[None]
    assert losses[4] != losses[None]
    assert losses[4] == pytest.approx(losses[None], rel=0.5)


def test_a_part_of_one_image_is_a_mistake_and_no_divergence(tmp_path):
    splits = cache.load(Data(tiny.folder(tmp_path / "data", {"train": 9}), holdout=0.0), side=16, progress=False)
    recipe = replace(tiny.RECIPE, batch=9, micro_batch=4)
    with pytest.raises(ValueError, match="9 images in micro-batches of 4 leave one image"):
        loop.pretrain(recipe, splits, tmp_path, device=CPU, options=Options())
