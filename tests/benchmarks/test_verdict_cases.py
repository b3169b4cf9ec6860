"""The cases of the verdict's benchmark: what they start from, and a table of one that continued."""

from dataclasses import replace

import pytest

import tiny
from benchmarks.verdict import cases, judged
from benchmarks.verdict.cases import CASES
from corinfomax.images.cache import Splits
from corinfomax.network import Network
from corinfomax.recipes.fields import Tuning
from corinfomax.weights import export


def test_every_kind_of_case_is_seen_and_unseen():
    for kind in ("tuned ", "vit ", "views"):
        some = [case for name, case in CASES.items() if kind in name]
        assert {case.tuned for case in some} == {case.good for case in some} == {True, False}
    assert all((case.init is None) == (case.recipe.tuning == Tuning()) for case in CASES.values())
    assert sum(case.init is not None or case.recipe.n_views > 2 for case in CASES.values()) >= 16


@pytest.mark.parametrize(("rate", "last"), [(1e-9, "unchanged"), (1.0, "still warming up")])
def test_a_case_that_continues_is_trained_from_its_start_and_judged(tmp_path, monkeypatch, rate, last):
    splits = tiny.splits(tmp_path / "data")
    monkeypatch.setattr(cases.Case, "splits", lambda *_: Splits(splits.train, splits.test))
    (tmp_path / "weights").mkdir()
    network = Network(tiny.RECIPE.backbone, tiny.RECIPE.projector)
    export.write_tensors(tmp_path / "weights/small.safetensors", network.backbone, tiny.RECIPE)
    recipe = replace(tiny.RECIPE, tuning=Tuning(lr_scale=rate, batch_norm="keep"))
    case = cases.Case("", recipe, frozenset({last}), init="small.safetensors", images=len(splits.train))
    judged.run_case(case, tmp_path / "run", tmp_path, tmp_path, tmp_path / "weights")
    outcome = judged.judge_case(case, tmp_path / "run")
    assert outcome.last == last
    assert outcome.before is not None and outcome.ridge is not None
    if last == "unchanged":
        assert outcome.before == outcome.ridge
