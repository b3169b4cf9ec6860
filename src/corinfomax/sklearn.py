"""Pretraining as a transformer of scikit-learn: images in, features out (extra `sklearn`)."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

from corinfomax.api.encoder import Place, load
from corinfomax.api.run import pretrain


class ImageEncoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Pretrain a backbone on images without labels, then turn images into feature vectors.

    X is images in memory as `corinfomax.pretrain` takes them: an array of n×height×width×channels, or a list of paths,
    Pillow images, arrays or tensors. `recipe` and `init` (weights to start from) are those of `pretrain`, `settings`
    its other options, such as {"epochs": 20}. The run goes into a temporary folder unless `out` names one.

    After fit: `encoder_` (as `corinfomax.load` gives it), `verdict_` (in words, without labels), `metrics_`.
    """

    def __init__(
        self,
        recipe: str | None = None,
        init: Place | None = None,
        settings: Mapping[str, Any] | None = None,
        out: Place | None = None,
        device: str = "auto",
        verbose: bool = False,
    ) -> None:
        self.recipe = recipe
        self.init = init
        self.settings = settings
        self.out = out
        self.device = device
        self.verbose = verbose

    def fit(self, X: Any, y: object = None) -> "ImageEncoder":
        """Pretrain on the images; `y` is ignored."""
        options = {"evaluate": False, "report": False, **(self.settings or {})}
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._quiet())
            out = Path(self.out or stack.enter_context(tempfile.TemporaryDirectory()))
            run = pretrain(X, recipe=self.recipe, init=self.init, out=out, device=self.device, **options)
            self.encoder_ = load(run.path, device=self.device)
            self.verdict_, self.metrics_ = run.verdict, run.metrics
        self._n_features_out = self.encoder_.width
        return self

    def transform(self, X: Any) -> Float32[np.ndarray, "n f"]:
        """The feature vector of each image."""
        check_is_fitted(self)
        with self._quiet():
            return self.encoder_.embed(X).features

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """No output in the block, unless `verbose`."""
        with contextlib.ExitStack() as stack:
            if not self.verbose:
                nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.no_validation = True
        return tags
