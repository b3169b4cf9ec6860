"""The published linear probe and fine-tuning with few labels."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import tiny
from corinfomax.evaluation import fine_tuning, probes
from corinfomax.recipes.fields import Probe

CPU = {"device": torch.device("cpu")}


def test_a_linear_probe_that_diverges_is_an_error(splits, backbone):
    recipe = replace(tiny.RECIPE, probe=Probe(epochs=9, batch=16, lr=3e38))
    with pytest.raises(FloatingPointError, match="linear probe diverged"):
        fine_tuning.linear_probe(backbone, *splits, recipe, **CPU)


def test_the_linear_probe_learns_and_does_not_change_the_backbone(splits, backbone):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    recipe = replace(tiny.RECIPE, probe=Probe(epochs=15, batch=16))
    predicted = fine_tuning.linear_probe(nn.Flatten(), *splits, recipe, **CPU)
    assert probes.accuracy(predicted, splits.test.labels) >= 90
    fine_tuning.linear_probe(backbone, *splits, recipe, **CPU)
    assert tiny.equal_states(before, backbone.state_dict())
    assert predicted.equal(fine_tuning.linear_probe(nn.Flatten(), *splits, recipe, **CPU))


@pytest.mark.parametrize("decay_epochs", [None, 2])
def test_the_schedule_of_the_linear_probe(splits, monkeypatch, decay_epochs):
    rates = []
    monkeypatch.setattr(fine_tuning, "_step", lambda optimizer, loss, *lr: rates.extend(lr))
    probe = Probe(epochs=4, batch=30, lr=0.2, min_lr=0.002, decay_epochs=decay_epochs)
    fine_tuning.linear_probe(nn.Flatten(), *splits, replace(tiny.RECIPE, probe=probe), **CPU)
    cosine = [0.2, 0.002 + 0.198 * (1 + 2**-0.5) / 2, 0.101, 0.002 + 0.198 * (1 - 2**-0.5) / 2]
    rates_of_epochs = cosine if decay_epochs is None else [0.2, 0.2, 0.02, 0.02]
    assert rates == pytest.approx([lr for lr in rates_of_epochs for _ in range(2)])


def test_the_linear_probe_sees_every_image_in_every_epoch(splits, monkeypatch):
    """The last batch is shorter: 60 images make two batches of 25 and one of 10."""
    seen, batch = [], fine_tuning.Images.batch

    def watched(images, indices):
        seen.append(indices)
        return batch(images, indices)

    recipe = replace(tiny.RECIPE, probe=Probe(epochs=2, batch=25))
    monkeypatch.setattr(fine_tuning.Images, "batch", watched)
    monkeypatch.setattr(
        fine_tuning, "extract_features", lambda _, images, *args, **kwargs: torch.zeros(len(images), 768)
    )
    monkeypatch.setattr(fine_tuning, "_step", lambda *_: None)
    fine_tuning.linear_probe(nn.Flatten(), *splits, recipe, **CPU)
    assert [len(indices) for indices in seen] == [25, 25, 10] * 2
    for epoch in (seen[:3], seen[3:]):
        assert torch.cat(epoch).sort().values.tolist() == list(range(60))


def test_a_share_of_the_labels_has_at_least_one_per_class():
    labels = torch.tensor([0] * 500 + [1] * 40 + [5] * 3)
    few = fine_tuning.labelled_share(labels, 0.01, 0)
    assert labels[few].bincount().tolist() == [5, 1, 0, 0, 0, 1]  # 40 and 3 images would round to none
    more = fine_tuning.labelled_share(labels, 0.1, 0)
    assert labels[more].bincount().tolist() == [50, 4, 0, 0, 0, 1]
    assert set(few.tolist()) < set(more.tolist())
    assert not few.equal(fine_tuning.labelled_share(labels, 0.01, 1))


def test_fine_tuning_trains_a_copy_and_learns(splits, backbone, monkeypatch):
    monkeypatch.setattr(fine_tuning, "FEWEST_STEPS", 160)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    recipe = replace(tiny.RECIPE, size=8)
    predicted = fine_tuning.fine_tune(backbone, *splits, recipe, share=0.1, **CPU)
    assert tiny.equal_states(before, backbone.state_dict())
    assert probes.accuracy(predicted, splits.test.labels) >= 90


def test_fine_tuning_is_reproducible(splits, backbone, monkeypatch):
    monkeypatch.setattr(fine_tuning, "FEWEST_STEPS", 4)
    first, again = (fine_tuning.fine_tune(backbone, *splits, tiny.RECIPE, share=0.1, **CPU) for _ in range(2))
    assert first.equal(again)


@pytest.mark.parametrize(("share", "times"), [(0.01, 0.4), (0.1, 0.8)])
def test_the_schedule_of_fine_tuning(splits, backbone, monkeypatch, share, times):
    rates = []
    monkeypatch.setattr(fine_tuning, "_step", lambda optimizer, loss, *lr: rates.extend(lr))
    monkeypatch.setattr(fine_tuning, "FEWEST_STEPS", 24)
    recipe = replace(tiny.RECIPE, size=8, probe=Probe(lr=25.0))
    fine_tuning.fine_tune(backbone, *splits, recipe, share=share, **CPU)
    head, body = rates[::2], rates[1::2]
    assert len(head) == len(body) == 24  # one batch an epoch, and 24 epochs rather than 20
    # The published 10 and 20 times 0.1, and 0.005 times 0.2, at each quarter.
    assert head == pytest.approx([25 * times * 0.1**q for q in range(4) for _ in range(6)])
    assert body == pytest.approx([0.005 * 0.2**q for q in range(4) for _ in range(6)])


def test_fine_tuning_that_diverges_is_an_error(splits, backbone, monkeypatch):
    monkeypatch.setattr(fine_tuning, "FEWEST_STEPS", 4)
    recipe = replace(tiny.RECIPE, size=8, probe=Probe(lr=1e38))
    with pytest.raises(FloatingPointError, match="fine-tuning diverged"):
        fine_tuning.fine_tune(backbone, *splits, recipe, share=0.1, **CPU)
