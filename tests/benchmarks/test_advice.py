"""Advice on views and on length: the sets, the measures and the tables."""

import numpy as np
import pytest
import torch

from benchmarks.advice import choice, length, panel, rank, scale, sets


def test_drawn_cells_of_a_class_are_alike():
    rng = np.random.default_rng(0)
    few, many = (np.mean([sets._field(3.2, number, True, rng).mean() for _ in range(40)]) for number in (5, 11))
    assert many > 1.2 * few
    assert sets._field(2.0, 5, False, rng).shape == (40, 40)


def test_an_image_lies_anywhere_in_its_frame():
    rng, image = np.random.default_rng(0), np.full((28, 28, 3), 255, np.uint8)
    rows = [np.argwhere((sets._anywhere(image, rng) == 255).all(2))[0, 0] for _ in range(40)]
    assert min(rows) < 5 and max(rows) > sets.FRAME - sets.OBJECT - 5


@pytest.mark.parametrize("dim", [1, 3])
def test_the_dimension_of_a_spanning_tree(dim):
    x = torch.rand(1000, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert rank.spanning_dimension(x) == pytest.approx(dim, rel=0.25)


def test_clusters_that_are_apart_are_learnt():
    rng = torch.Generator().manual_seed(0)
    apart = torch.eye(20, dtype=torch.float64).repeat(20, 1) + 0.01 * torch.randn(400, 20, generator=rng).double()
    noise = torch.randn(400, 20, generator=rng).double()
    assert rank.cluster_learnability(apart) > 95 > rank.cluster_learnability(noise) + 20


def test_a_measure_that_agrees_loses_nothing():
    views = list(panel.VIEWS)[:5]
    records = [
        {
            "set": "cells",
            "views": view,
            "seed": 0,
            "scores": {"linear": score},
            "measures": {"good": score, "bad": -score},
        }
        for view, score in zip(views, (50.0, 52.0, 55.0, 51.0, 40.0), strict=True)
    ]
    rows = {line.split(" | ")[0].strip("| "): line for line in rank.table(records)}
    assert "+1.00 / 0.0" in rows["good"] and "-1.00 / 15.0" in rows["bad"]
    assert "/ 5.0" in rows["recipe's views"]


def test_the_records_hold_what_the_page_says():
    found = length.pairs(length.read(), "linear")
    assert len(found) == 32 and sum(after > before for _, _, before, after in found) == 31
    low, middle, high = np.quantile(length.errors_left(found), (0.1, 0.5, 0.9))
    from corinfomax.evaluation.longer import ERRORS_LEFT

    assert (low, middle, high) == pytest.approx(ERRORS_LEFT, abs=0.006)
    assert any("11 of 16 others" in line for line in length.table(length.read()))


def test_what_a_way_to_choose_loses_is_counted_from_the_best_of_all():
    linear = {"recipe": 50.0, "rules": 52.0, "tune": 56.0, "tune without labels": 51.0}
    record = {"set": "cells", "linear": linear, "panel": {"recipe": 50.0, "turned": 55.0}}
    assert choice.regrets(record) == {"recipe": 6.0, "rules": 4.0, "tune": 0.0, "tune without labels": 5.0}
    record["panel"]["turned"] = 57.0
    assert choice.regrets(record)["tune"] == 1.0
    assert list(choice.table([record]))[-1] == "| mean | | 7.0 | 5.0 | 1.0 | 6.0 |"


def test_the_ways_to_choose_lose_what_the_page_says():
    records = choice.read()
    means = [np.mean([choice.regrets(record)[way] for record in records]) for way in choice.WAYS]
    assert len(records) == 8 and means == pytest.approx([4.4, 2.6, 0.2, 1.8], abs=0.06)
    assert all(choice.regrets(r)["tune"] <= choice.regrets(r)["recipe"] + 0.5 for r in records)


def test_runs_that_are_not_ahead_are_counted_against_their_probes():
    def record(features, linear, epochs):
        return {
            "epochs": epochs,
            "linear": linear,
            "raw": 50.0,
            "features": features,
            "pixels": 0.3,
            "untrained": 0.2,
        }

    rows = list(scale.table([record(0.3, 40.0, 1.0), record(0.35, 60.0, 1.0), record(0.9, 60.0, 4.0)]))
    assert "| 0.1 | 2 | 1 | 0 of 1 |" in rows and "| 0 | 1 | 1 | 0 of 2 |" in rows
    assert "| 1 | 2 of 2 | 1 of 2 | 1 of 2 |" in rows
