"""Many images that take no room: files with holes, and one file under many names."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from corinfomax.images import Images

NAMES = 20_000  # a file's names; ext4 allows 65,000


def million(folder: Path, count: int, side: int) -> Images:
    """`count` images of zeros in a memory map of a file that is one hole, as `images.load` would give them."""
    stride = 3 * side * side
    path = folder / f"{count}-{side}.bin"
    with path.open("wb") as stream:
        stream.truncate(count * stride)
    mapped = np.memmap(path, np.uint8, "c")  # copy-on-write, never written: torch wants it writable
    return Images(
        pixels=torch.from_numpy(mapped),
        offsets=torch.arange(count) * stride,
        sizes=torch.full((count, 2), side),
        paths=tuple(f"train/{i % 1000:04}/{i:08}.jpg" for i in range(count)),
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
