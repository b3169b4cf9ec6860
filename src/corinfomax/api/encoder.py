"""Weights of any kind as an encoder: images in, feature vectors out."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32

from corinfomax.api import settings
from corinfomax.cli import inputs, process
from corinfomax.cli.arguments import DataOptions
from corinfomax.evaluation import features
from corinfomax.images.files import Source
from corinfomax.images.in_memory import Labels, from_memory
from corinfomax.images.sources import Data
from corinfomax.weights.load import LoadedBackbone, load_backbone

Place = str | os.PathLike[str]


class Embedding(NamedTuple):
    """The feature vectors of n images, in the order of the images; `numpy.asarray` gives the vectors alone."""

    features: Float32[np.ndarray, "n f"]
    paths: tuple[str, ...]  # from the folder of the images, with forward slashes
    splits: tuple[str, ...]  # split of each image
    labels: tuple[str | None, ...]  # class of each image; None where there is none

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.features, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        count, width = self.features.shape
        return f"Embedding({count:,} images × {width} features)"


class Encoder:
    """A backbone in eval mode with the size and the normalisation of its images."""

    def __init__(self, loaded: LoadedBackbone, device: torch.device) -> None:
        self.backbone = loaded.backbone.to(device).to(memory_format=torch.channels_last)
        self.recipe, self.summary, self.device = loaded.recipe, loaded.summary, device

    @cached_property
    def width(self) -> int:
        """Number of features of an image."""
        side, form = self.recipe.test_side, self.recipe.pixels
        blank = torch.zeros(1, form.channels, side, side, dtype=getattr(torch, form.dtype))
        size = torch.tensor([[side, side]])
        return features.features_of_pixels(self.backbone, blank, size, self.recipe, self.device).shape[1]

    def embed(self, data: Any, **options: Any) -> Embedding:
        """The features of images.

        `data` is whatever `pretrain` takes, a folder, archive, list or named set with all its splits, or images in
        memory: an array or tensor, or a list of paths, Pillow images, arrays or tensors. These keep their order, and
        one that cannot be read is an error; in a folder it is left out, with a message. `options` are those of
        `corinfomax embed`, such as `root`, `skip` and `cache`.
        """
        images = settings.read("embed", options, "images").images
        with computing(str(self.device)):
            if (source := as_source(data)) is None:
                return self._embed_splits(as_name(data), images)
            if options:
                raise TypeError(f"{', '.join(options)}: for files alone, not for images in memory")
            recipe = inputs.fit_pixels(self.recipe, Data(source))
            vectors, converted = features.features_of_source(self.backbone, source, recipe, device=self.device)
            inputs.print_conversions(converted, recipe.pixels)
        labels = source.labels or (None,) * len(source.paths)
        return Embedding(vectors.numpy(), source.paths, ("train",) * len(source.paths), labels)

    def _embed_splits(self, name: str, options: DataOptions) -> Embedding:
        """The features of every split, one after the other, from cached images."""
        data = inputs.find_data(name, options)
        recipe = inputs.fit_pixels(self.recipe, data)
        splits = inputs.load_every(data, recipe)
        inputs.print_skipped(data, options.skip, splits)
        vectors, paths, names = [], list[str](), list[str]()
        labels: list[str | None] = []
        for split, images in splits.items():
            bar = f"embedding {split}"
            vectors.append(features.extract_features(self.backbone, images, recipe, device=self.device, progress=bar))
            paths += images.paths
            names += [split] * len(images)
            classes = [None] * len(images) if images.labels is None else images.labels.tolist()
            labels += [None if label is None else images.classes[label] for label in classes]
        return Embedding(torch.cat(vectors).numpy(), tuple(paths), tuple(names), tuple(labels))

    def __repr__(self) -> str:
        return f"<Encoder: {self.summary}, on {self.device}>"


def load(weights: Place, *, device: str = "auto", **options: Any) -> Encoder:
    """An encoder from a run or its folder, a checkpoint, an exported folder, a file of weights, or "timm:NAME".

    A run that continued from weights without getting better gives the weights of its start. `options` tell what a file
    of weights does not record: `architecture`, `small_stem`, `prefix`, `size`, `mean`, `std`, `interpolation`. Raises
    FileNotFoundError or ValueError with the cure.
    """
    network = settings.read("load", options, "network").network
    with computing(device) as chosen:
        return Encoder(load_backbone(os.fspath(weights), network), chosen)


@contextmanager
def computing(device: str, memory: float | None = None) -> Iterator[torch.device]:
    """The device of a call, with the settings of a command; the process has its own back afterwards."""
    with process.borrowed():
        yield inputs.choose_device(device, gigabytes=memory)


def as_source(data: Any, labels: Labels | None = None) -> Source | None:
    """Images in memory as a source; None for the name or place of images."""
    if isinstance(data, str | os.PathLike):
        if labels is not None:
            raise TypeError("labels are for images in memory; those of a folder are the names of its class folders")
        return None
    return from_memory(data, labels)


def as_name(data: Place) -> str:
    """DATA as a command takes it: a string that names a set means the set, a Path always the folder."""
    return data if isinstance(data, str) else str(Path(data).expanduser().absolute())
