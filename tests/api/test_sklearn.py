"""`corinfomax.sklearn.ImageEncoder` in scikit-learn's own checks and pipelines."""

import pickle

import numpy as np
import pytest

pytest.importorskip("sklearn")
from api.test_run import KNOBS
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks

import tiny
from corinfomax.sklearn import ImageEncoder

SETTINGS = {**KNOBS, "diagnoses": 1, "scores": 0, "epochs": 1}
# The other checks fit tables of numbers.
CHECKS = [
    "check_estimator_cloneable",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
    "check_estimator_repr",
    "check_no_attributes_set_in_init",
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_mixin_order",
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
]


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_of_scikit_learn_passes(name, without_shape_check):
    without_shape_check(getattr(estimator_checks, name), "ImageEncoder", ImageEncoder(settings=SETTINGS))


def test_it_stands_in_a_pipeline(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    X, y = tiny.pictures(32), np.arange(32) % 2
    before = X.copy()
    pipeline = make_pipeline(ImageEncoder(settings=SETTINGS), LogisticRegression())
    search = GridSearchCV(pipeline, {"imageencoder__settings": [SETTINGS, SETTINGS | {"optim_lr": 0.01}]}, cv=2).fit(
        X, y
    )
    encoder, classifier = search.best_estimator_
    assert np.array_equal(search.predict(X), classifier.predict(encoder.transform(X)))
    assert encoder.transform(X).shape == (32, 16)
    assert list(encoder.get_feature_names_out()[:2]) == ["imageencoder0", "imageencoder1"]
    assert encoder.verdict_ is not None and encoder.metrics_
    assert np.array_equal(X, before)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")

    again = clone(encoder)
    with pytest.raises(NotFittedError):
        again.transform(X)
    assert np.array_equal(again.fit_transform(X), encoder.transform(X))
    assert np.array_equal(pickle.loads(pickle.dumps(encoder)).transform(X), encoder.transform(X))


def test_out_keeps_the_run_and_verbose_talks(tmp_path, capsys):
    ImageEncoder(settings=SETTINGS, out=tmp_path / "run", verbose=True).fit(tiny.pictures(16))
    assert (tmp_path / "run" / "recipe.json").exists()
    assert "16 images to train on" in capsys.readouterr().out
