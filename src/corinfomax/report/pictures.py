"""Images as a web page holds them: small WebP files as text, in as many bytes as they are allowed."""

from __future__ import annotations

import bisect
import io
from base64 import b64encode
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from corinfomax.images.cache import Images
from corinfomax.views import operations

SIDES = (128, 96, 72, 56, 48, 40, 32, 24, 16)
QUALITY = 72


class Pool(NamedTuple):
    """Images of several splits in one row."""

    splits: tuple[str, ...]
    parts: tuple[Images, ...]

    def __len__(self) -> int:  # a NamedTuple would count its fields
        return sum(map(len, self.parts))

    @property
    def ends(self) -> list[int]:
        """Row after the last one of each split."""
        return list(accumulate(map(len, self.parts)))

    def place(self, row: int) -> tuple[int, int]:
        """Which split the image lies in, and its row there."""
        part = bisect.bisect_right(self.ends, row)
        return part, row - (self.ends[part - 1] if part else 0)

    def path(self, row: int) -> str:
        part, local = self.place(row)
        return self.parts[part].paths[local]

    def label(self, row: int) -> str | None:
        """The name of an image's class, where it has one."""
        part, local = self.place(row)
        images = self.parts[part]
        return None if images.labels is None else images.classes[int(images.labels[local])]

    def squares(self, rows: Int[Tensor, " m"], *, side: int) -> Float[Tensor, "m 3 {side} {side}"]:
        """The images at ascending `rows`, each squeezed whole into a small square, in [0, 1]."""
        starts = [0, *self.ends[:-1]]
        some = [
            squares(part, rows[(rows >= start) & (rows < end)] - start, side=side)
            for part, start, end in zip(self.parts, starts, self.ends, strict=True)
        ]
        return torch.cat(some)

    def pixels(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        """One image as it lies in the cache."""
        part, local = self.place(row)
        pixels, _ = self.parts[part].batch(torch.tensor([local]))
        return pixels[0].cpu().permute(1, 2, 0).numpy()


def pool(parts: dict[str, Images], *, most: int, generator: torch.Generator) -> Pool:
    """At most `most` images, drawn evenly from all splits where there are more, in their old order."""
    counts = [len(part) for part in parts.values()]
    if sum(counts) <= most:
        return Pool(tuple(parts), tuple(parts.values()))
    chosen = torch.randperm(sum(counts), generator=generator)[:most].sort().values
    starts = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
    selected = {
        name: part.select(chosen[(chosen >= start) & (chosen < start + len(part))] - start)
        for (name, part), start in zip(parts.items(), starts, strict=True)
    }
    kept = {name: part for name, part in selected.items() if len(part)}
    return Pool(tuple(kept), tuple(kept.values()))


def squares(
    images: Images, rows: Int[Tensor, " m"], *, side: int, batch: int = 256
) -> Float[Tensor, "m 3 {side} {side}"]:
    """The whole images at `rows` squeezed into small squares, in [0, 1]."""
    found = [torch.zeros(0, 3, side, side)]
    for indices in rows.split(batch):
        if len(indices):  # nothing splits into one empty part
            pixels, sizes = images.batch(indices)
            box = torch.cat((torch.zeros_like(sizes), sizes), 1)
            never = torch.zeros(len(sizes), dtype=torch.bool)
            found.append(operations.resized_crop(pixels, box, never, size=side).contiguous().cpu())
    return torch.cat(found)


def webp(pixels: UInt8[np.ndarray, "h w 3"], side: int, *, quality: int = QUALITY) -> str:
    """A picture whose long side is at most `side` as base64 of a WebP file."""
    image = Image.fromarray(pixels)
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=quality, method=4)
    return b64encode(stream.getvalue()).decode()


def thumbnails(pool: Pool, rows: Sequence[int], *, budget: int) -> tuple[list[str], int]:
    """A picture of each row as large as `budget` characters for all of them allow, and the side in pixels."""
    if not rows:
        return [], SIDES[0]
    look = rows[:: max(1, len(rows) // 48)]
    side = next(
        (s for s in SIDES if 1.1 * len(rows) * np.mean([len(webp(pool.pixels(row), s)) for row in look]) <= budget),
        SIDES[-1],
    )
    return [webp(pool.pixels(row), side) for row in rows], side


def normalised_to_bytes(
    x: Float[Tensor, "n 3 s s"], *, mean: tuple[float, ...], std: tuple[float, ...]
) -> UInt8[np.ndarray, "n s s 3"]:
    """What the network was given as pixels again: the normalisation undone."""
    shift, scale = torch.tensor((mean, std), device=x.device)[:, :, None, None]
    return (255 * (x * scale + shift)).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
