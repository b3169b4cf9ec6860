"""Many images that take no room: files with holes, and one file under many names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from corinfomax.images import cache as images
from corinfomax.images.cache import Images
from corinfomax.images.files import Source
from corinfomax.recipes.fields import RGB

NAMES = 20_000  # a file's names; ext4 allows 65,000


def million(folder: Path, count: int, side: int) -> Images:
    """`count` images of zeros from a cache whose pixels are one hole, opened as the package opens its own."""
    cache, stride = folder / f"{count}-{side}", 3 * side * side
    cache.mkdir()
    with (cache / "pixels.bin").open("wb") as stream:
        stream.truncate(count * stride)
    index = np.stack((np.arange(count), *[np.full(count, side)] * 2), 1)
    np.save(cache / "index.npy", index, allow_pickle=False)
    paths = tuple(f"train/{i % 1000:04}/{i:08}.jpg" for i in range(count))
    source = Source("", paths, np.zeros((count, 4), np.int64), None)
    notes = {"skipped": [], "converted": {}, "digest": "", "stamps": images._digest_of(source.stamps.tobytes())}
    (cache / "index.json").write_text(json.dumps(notes))
    opened = images._open(
        cache, source, RGB, False
    )  # the layout is the package's own affair: if it changes, this fails
    assert opened is not None and opened.mapped is not None
    return Images(
        pixels=opened.mapped.bytes,
        mapped=opened.mapped,
        offsets=torch.arange(count) * stride,
        sizes=torch.from_numpy(opened.table[:, 1:].copy()),
        paths=paths,
        labels=None,
        classes=(),
        skipped=(),
        fingerprint="",
    )


def tree(folder: Path, count: int, *, classes: int = 100, side: int = 8) -> Path:
    """A folder train/<class>/<name>.png of `count` files, which are hard links to a few small images."""
    root, rng = folder / "images", np.random.default_rng(0)
    originals = []
    for i in range(-(-count // NAMES)):
        originals.append(folder / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(originals[-1])
    for c in range(classes):
        (root / "train" / f"{c:03}").mkdir(parents=True)
    for i in range(count):
        os.link(originals[i // NAMES], root / "train" / f"{i % classes:03}" / f"{i:07}.png")
    return root
