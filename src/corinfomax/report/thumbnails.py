"""Images of several splits as one pool, and their thumbnails: pixels to compare, WebP to show."""

import io
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from jaxtyping import Float, Int, Num, UInt8
from PIL import Image
from torch import Tensor

from corinfomax.images.cache import Images
from corinfomax.images.levels import as_rgb, shown_channels
from corinfomax.recipes.fields import Recipe
from corinfomax.views import operations

SIDES = (128, 96, 72, 56, 48, 40, 32, 24, 16)  # long side of a thumbnail in pixels: the first one within the budget


@dataclass(frozen=True, eq=False)
class Pool:
    """Images of one or more splits, by name, numbered as one list of rows."""

    splits: Mapping[str, Images]

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))

    def place(self, row: int) -> tuple[str, Images, int]:
        """Name and images of the split that holds a row, and the row within that split."""
        for name, images in self.splits.items():
            if row < len(images):
                return name, images, row
            row -= len(images)
        raise IndexError(f"the pool has only {len(self)} images")

    def path(self, row: int) -> str:
        _, images, local = self.place(row)
        return images.paths[local]

    def label(self, row: int) -> str | None:
        """Name of an image's class; None without labels."""
        _, images, local = self.place(row)
        return None if images.labels is None else images.classes[int(images.labels[local])]

    def levels(self, row: int) -> Num[np.ndarray, "c h w"]:
        """The levels of one image in the size of the cache."""
        _, images, local = self.place(row)
        return images.batch(torch.tensor([local]))[0][0].cpu().numpy()

    def pixels(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        """A picture of one image in the size of the cache."""
        return as_rgb(self.levels(row), self.place(row)[1].format).transpose(1, 2, 0)

    def thumbnails(self, rows: Int[Tensor, " m"], *, side: int) -> Float[Tensor, "m 3 {side} {side}"]:
        """Whole images at ascending `rows`, each squeezed into a small square, in [0, 1]."""
        squares = [torch.zeros(0, 3, side, side)]
        for _, images, local in self._by_split(rows):
            for chunk in local.split(256):
                pixels, sizes = images.batch(chunk)
                box = torch.cat((torch.zeros_like(sizes), sizes), 1)  # all of the image
                unflipped = torch.zeros(len(sizes), dtype=torch.bool)
                steps, shown = images.format.each(images.format.steps), shown_channels(images.format)
                squares.append(operations.resized_crop(pixels, box, unflipped, size=side, steps=steps)[:, shown].cpu())
        return torch.cat(squares)

    def sample(self, count: int, generator: torch.Generator) -> "Pool":
        """At most `count` images, drawn evenly from all splits, in the same order."""
        if len(self) <= count:
            return self
        rows = torch.randperm(len(self), generator=generator)[:count].sort().values
        return Pool({name: images.select(local) for name, images, local in self._by_split(rows)})

    def _by_split(self, rows: Int[Tensor, " m"]) -> Iterator[tuple[str, Images, Int[Tensor, " _"]]]:
        """Each split that holds some of the ascending rows, and these rows counted within it."""
        for name, images in self.splits.items():
            local = rows[(rows >= 0) & (rows < len(images))]
            if len(local):
                yield name, images, local
            rows = rows - len(images)


def webp(pixels: UInt8[np.ndarray, "h w 3"], side: int, *, quality: int = 72) -> bytes:
    """An image as a WebP file, its long side at most `side` pixels."""
    image = Image.fromarray(pixels)
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=quality, method=4)
    return stream.getvalue()


def webp_text(pixels: UInt8[np.ndarray, "h w 3"], side: int, *, quality: int = 72) -> str:
    """As `webp`, in base64 for a page."""
    return b64encode(webp(pixels, side, quality=quality)).decode()


def webp_thumbnails(pool: Pool, rows: Sequence[int], *, budget: int) -> list[str]:
    """The images at `rows` as WebP, as large as `budget` characters for all of them allow."""
    if not rows:
        return []
    trials = [pool.pixels(row) for row in rows[:: max(1, len(rows) // 48)]]  # to predict the size of all
    for side in SIDES:
        predicted = len(rows) * fmean(len(webp_text(pixels, side)) for pixels in trials)
        if 1.1 * predicted <= budget:  # 10 % for the error of the prediction
            break
    return [webp_text(pool.pixels(row), side) for row in rows]


def view_pixels(
    x: Float[Tensor, "n c s s"], recipe: Recipe, wholes: Sequence[Num[np.ndarray, "c _ _"]]
) -> UInt8[np.ndarray, "n s s 3"]:
    """Views as the network gets them, turned back into pictures; false colours as in the images they are views of."""
    pixels = recipe.pixels
    shift, scale, steps = (
        torch.tensor(numbers, dtype=torch.float32, device=x.device)[:, None, None]
        for numbers in (recipe.mean, recipe.std, pixels.each(pixels.steps))
    )
    levels = ((x.float() * scale + shift).clamp_(0, 1) * steps).cpu().numpy()
    pictures = [as_rgb(view, pixels, whole) for view, whole in zip(levels, wholes, strict=True)]
    return np.stack(pictures).transpose(0, 2, 3, 1)
