"""The published pair of views against torchvision on PIL images and against kornia."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision import transforms as T

from benchmarks.speed.clock import Effort, alternate
from benchmarks.speed.machine import installed
from benchmarks.speed.metrics import Metric, metric
from benchmarks.speed.views import make_views
from corinfomax.recipes.fields import IMAGENET_STATS, PAPER_VIEWS, Recipe, View
from corinfomax.runtime.seeds import generator

MEAN, STD = IMAGENET_STATS
IMAGES = {32: (32, 256), 64: (64, 128), 224: (256, 32)}
"""View's side: the images' side, and how many a call."""
GOALS = {
    (32, "torchvision"): (6.0, 12.0),
    (64, "torchvision"): (2.0, 4.0),
    (224, "torchvision"): (2.0, 4.0),
    (32, "kornia"): (3.0, 6.0),
    (224, "kornia"): (3.0, 6.0),
}
AGAINST = {
    "torchvision": "torchvision's transforms on PIL images",
    "pil": "the same with Pillow's own blur, as the published code has it",
    "kornia": "kornia on the same batch",
}


def run(effort: Effort) -> Iterator[Metric]:
    """Three rivals at each size, all on the threads that torch has now; PIL uses one in any case."""
    for size, (side, count) in {16: (16, 8)}.items() if effort.quick else IMAGES.items():
        pixels = pictures(count, side)
        contestants = {
            "ours": ours(pixels, size),
            "torchvision": pil_pair(pixels, size, pillow_blur=False),
            "pil": pil_pair(pixels, size, pillow_blur=True),
        }
        if installed("kornia"):
            contestants["kornia"] = kornia_pair(pixels, size)
        seconds = alternate(contestants, effort, least=0.5)
        each = {name: [1e6 * s / (2 * count) for s in samples] for name, samples in seconds.items()}
        for name in list(contestants)[1:]:
            at_least, aim = GOALS.get((size, name), (None, None))
            yield metric(
                "views",
                f"published pair of views, {size} px",
                AGAINST[name],
                each["ours"],
                each[name],
                unit="µs/view",
                at_least=at_least,
                aim=aim,
            )


def pictures(count: int, side: int) -> Tensor:
    """Smooth colours with a little noise, (count, 3, side, side), uint8: neither flat nor noise alone."""
    g = generator(0, "benchmark")
    coarse = torch.rand(count, 3, 4, 4, generator=g)
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return ((0.9 * smooth + 0.1 * torch.rand(count, 3, side, side, generator=g)) * 255).to(torch.uint8)


def ours(pixels: Tensor, size: int) -> Callable[[], object]:
    """What training calls; each call is another step."""
    recipe = Recipe(size=size, views=PAPER_VIEWS, mean=MEAN, std=STD)
    sizes = torch.tensor(pixels.shape[2:]).expand(len(pixels), 2)
    steps = iter(range(10**9))
    return lambda: make_views(recipe, pixels, sizes, next(steps), torch.device("cpu"))


def pil_transform(view: View, size: int, *, pillow_blur: bool) -> Callable[[Image.Image], Tensor]:
    """One published view by torchvision, image by image; the blur Pillow's fast one where wanted."""
    assert view.rotate == 0
    # Three sigma to each side, as ours: torchvision wants an odd number of taps.
    reach = min(6, (size - 1) // 2)
    blur = PillowBlur(view.blur_sigma) if pillow_blur else T.GaussianBlur(2 * reach + 1, view.blur_sigma)
    return T.Compose(
        [
            T.RandomResizedCrop(size, view.crop_area, view.crop_ratio, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(view.flip),
            T.RandomApply([T.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)], view.jitter),
            T.RandomGrayscale(view.grey),
            T.RandomApply([blur], view.blur),
            T.RandomSolarize(128, view.solarize),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )


class PillowBlur:
    """Pillow's approximation of a Gaussian by boxes."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(*self.sigma))))


def pil_pair(pixels: Tensor, size: int, *, pillow_blur: bool) -> Callable[[], object]:
    """Both views of images that lie in memory as PIL images, each stacked to a batch."""
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    both = [pil_transform(view, size, pillow_blur=pillow_blur) for view in PAPER_VIEWS]
    return lambda: [torch.stack([transform(image) for image in images]) for transform in both]


def kornia_pair(pixels: Tensor, size: int) -> Callable[[], object]:
    """Both views by kornia, drawn for each image, from the same uint8 batch."""
    import kornia.augmentation as K

    def transform(view: View) -> nn.Module:
        reach = min(6, (size - 1) // 2)
        jitter = (view.brightness, view.contrast, view.saturation, view.hue)
        return nn.Sequential(
            K.RandomResizedCrop((size, size), view.crop_area, view.crop_ratio, resample="bicubic"),
            K.RandomHorizontalFlip(view.flip),
            K.ColorJitter(*jitter, p=view.jitter),
            K.RandomGrayscale(p=view.grey),
            K.RandomGaussianBlur((2 * reach + 1, 2 * reach + 1), view.blur_sigma, p=view.blur),
            K.RandomSolarize(thresholds=(128 / 255, 128 / 255), additions=(0.0, 0.0), p=view.solarize),
            K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        )

    both = [transform(view) for view in PAPER_VIEWS]

    def call() -> list[Tensor]:
        with torch.no_grad():
            images = pixels.float() / 255
            return [view(images) for view in both]

    return call
