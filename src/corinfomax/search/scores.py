"""The score of a short run: a probe where images have labels, else a label-free measure of the features."""

import math
from collections import Counter
from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import normalize

from corinfomax.diagnosis import measures
from corinfomax.evaluation import features, probes
from corinfomax.images.cache import Images
from corinfomax.recipes.fields import Recipe, View
from corinfomax.runtime.seeds import generator

SCORED = 5000  # images at most
FOLDS = 5
JUDGE = View(crop_area=(0.25, 1.0))
FOUND_AMONG = 512  # images
LEAST_OF_CLASS = 2 * FOLDS  # images of the smallest class for a probe to say much


def has_labels(images: Images) -> bool:
    """True if a probe can tell views apart: two classes or more, with ten images each in most of them."""
    if images.labels is None:
        return False
    counts = Counter(images.labels.tolist())
    return len(counts) > 1 and sum(count >= LEAST_OF_CLASS for count in counts.values()) > len(counts) / 2


def by_labels(backbone: nn.Module, images: Images, recipe: Recipe, *, device: torch.device) -> tuple[float, float]:
    """Accuracy in percent of a ridge probe, cross-validated on at most SCORED images, and its standard error."""
    order = torch.randperm(len(images), generator=generator(0, "search"))[:SCORED]
    sample = images.select(order)
    assert sample.labels is not None
    x = features.extract_features(backbone, sample, recipe, device=device)
    predicted = probes.out_of_fold(x, sample.labels, torch.arange(len(sample)) % FOLDS)
    share = probes.accuracy(predicted, sample.labels) / 100
    return 100 * share, 100 * (share * (1 - share) / len(sample)) ** 0.5


def without_labels(backbone: nn.Module, images: Images, recipe: Recipe, *, device: torch.device) -> tuple[float, float]:
    """Rank at which features find another view of an image among all images, and its standard error.

    The mean over images of −ln of the place at which the other view is found, 0 at best, by the cosine of centred
    features. The views are those of JUDGE, the same for every run.
    """
    order = torch.randperm(len(images), generator=generator(0, "search"))[:FOUND_AMONG]
    sample = images.select(order)
    seen = measures.features_of_views(backbone, sample, replace(recipe, views=(JUDGE, JUDGE)), device=device)
    unit = normalize(seen - seen.mean((0, 1)), dim=-1)
    places = []
    for first, second in ((0, 1), (2, 3)):
        cosines = unit[:, first] @ unit[:, second].T
        places.append((cosines >= cosines.diagonal()[:, None]).double().sum(1).log())
    place = torch.stack(places).mean(0)
    return -float(place.mean()), float(place.std() / len(place) ** 0.5)


def worst(images: Images) -> float:
    """The score of a run that diverged, below that of any other."""
    return 0.0 if has_labels(images) else -math.log(FOUND_AMONG)
