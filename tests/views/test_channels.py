"""Views of images with any number of channels and up to 16 bits, compiled and batched, against NumPy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from corinfomax.recipes.fields import PAPER_VIEWS, PixelFormat, Recipe, View
from corinfomax.runtime.seeds import generator
from corinfomax.views import operations
from corinfomax.views.operations import ViewParameters

BOTH = pytest.mark.parametrize("apply", [operations.apply, operations.compose])  # compiled, and for every device
WHOLE = View(flip=0, jitter=0, grey=0, crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0))
GREY16 = PixelFormat(channels=1, colours=False, high=(4095.0,), steps=(4095,))
STACK16 = PixelFormat(channels=2, colours=False, low=(-3.0, 0.0), high=(1.0, 1e6), steps=(65535, 1000))
RGB_NIR = PixelFormat(channels=4)
BANDS = PixelFormat(channels=13, colours=False, high=(10000.0,), steps=(10000,))
RGB16 = PixelFormat(high=(65535.0,), steps=(65535,))
FORMATS = {"grey": GREY16, "stack": STACK16, "rgb+nir": RGB_NIR, "bands": BANDS, "rgb 16 bits": RGB16}
ANY_FORMAT = pytest.mark.parametrize("pixels", FORMATS.values(), ids=FORMATS)


def recipe_for(pixels: PixelFormat) -> Recipe:
    """A recipe whose normalisation leaves [0, 1] as it is."""
    return replace(Recipe(), pixels=pixels, mean=(0.0,) * pixels.channels, std=(1.0,) * pixels.channels)


def levels(pixels: PixelFormat, n: int, h: int, w: int) -> Tensor:
    """Images of random levels, which use the whole range of each channel."""
    rng = np.random.default_rng(0)
    steps = np.array(pixels.each(pixels.steps)).reshape(-1, 1, 1)
    kind = np.uint8 if steps.max() < 256 else np.uint16
    return torch.from_numpy((rng.random((n, pixels.channels, h, w)) * (steps + 1)).astype(kind))


def drawn(view: View, images: Tensor, pixels: PixelFormat) -> tuple[Tensor, ViewParameters]:
    sizes = torch.tensor(images.shape[2:]).expand(len(images), 2)
    return sizes, operations.draw(view, sizes, generator(1, "channels"), pixels)


@ANY_FORMAT
@pytest.mark.parametrize("size", [5, 24, 40])
def test_both_paths_agree(pixels, size):
    recipe = recipe_for(pixels)
    images = levels(pixels, 10, 30, 33)
    view = replace(PAPER_VIEWS[1], rotate=20.0, jitter=0.9, grey=0.4, blur=0.5, solarize=0.0)
    sizes, p = drawn(view, images, pixels)
    views = [f(images, sizes, p, size=size, scaling=recipe.scaling) for f in (operations.apply, operations.compose)]
    torch.testing.assert_close(*views, rtol=0, atol=2e-5)
    assert views[0].shape == (10, pixels.channels, size, size)
    assert views[0].is_contiguous(memory_format=torch.channels_last)


@BOTH
@ANY_FORMAT
def test_every_level_reaches_the_network(apply, pixels):
    """A view of the whole image in its own size holds its levels, each divided by the steps of its channel."""
    images = levels(pixels, 2, 64, 64)
    sizes, p = drawn(WHOLE, images, pixels)
    x = apply(images, sizes, p, size=64, scaling=recipe_for(pixels).scaling)
    steps = np.array(pixels.each(pixels.steps), np.float64).reshape(-1, 1, 1)
    np.testing.assert_allclose(x, images.numpy() / steps, rtol=0, atol=1e-6)
    for c, number in enumerate(pixels.each(pixels.steps)):
        assert len(x[:, c].unique()) == len(np.unique(images[:, c])), f"{number} steps"


@BOTH
def test_four_thousand_levels_of_twelve_bits_stay_apart(apply):
    images = torch.arange(4096, dtype=torch.int32).view(1, 1, 64, 64).to(torch.uint16)
    sizes, p = drawn(WHOLE, images, GREY16)
    assert len(apply(images, sizes, p, size=64, scaling=recipe_for(GREY16).scaling).unique()) == 4096


@ANY_FORMAT
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_centre_view(pixels, interpolation):
    """The test view of each channel is that of the channel alone, as grey."""
    images = levels(pixels, 3, 40, 50)
    sizes, recipe = torch.tensor([[40, 50]]).expand(3, 2), recipe_for(pixels)
    got = operations.centre_view(images, sizes, size=32, scaling=recipe.scaling, interpolation=interpolation)
    for c, steps in enumerate(pixels.each(pixels.steps)):
        alone = recipe_for(PixelFormat(channels=1, colours=False, steps=(steps,))).scaling
        channel = images[:, c : c + 1]
        want = operations.centre_view(channel, sizes, size=32, scaling=alone, interpolation=interpolation)
        torch.testing.assert_close(got[:, c : c + 1], want, rtol=0, atol=1e-6)


@BOTH
def test_colours_of_four_channels_are_changed_as_those_of_three(apply):
    """Near infrared keeps its place: hue, saturation, grey and solarize touch red, green and blue only."""
    images = levels(RGB_NIR, 12, 20, 20)
    view = replace(PAPER_VIEWS[1], jitter=1.0, grey=0.5, blur=0.0, solarize=0.5, brightness=0.0, contrast=0.0)
    sizes, p = drawn(view, images, RGB_NIR)
    got = apply(images, sizes, p, size=16, scaling=recipe_for(RGB_NIR).scaling)
    rgb = apply(images[:, :3].contiguous(), sizes, p._replace(own=p.own[:, :0]), size=16, scaling=Recipe().scaling)
    mean, std = (torch.tensor(values)[:, None, None] for values in (Recipe().mean, Recipe().std))
    torch.testing.assert_close(got[:, :3], rgb * std + mean, rtol=0, atol=2e-6)

    calm = p._replace(jitter=torch.zeros(12, dtype=torch.bool))
    infrared = apply(images, sizes, calm, size=16, scaling=recipe_for(RGB_NIR).scaling)[:, 3]
    torch.testing.assert_close(got[:, 3], infrared, rtol=0, atol=1e-6)


@BOTH
def test_channels_without_colours_have_a_brightness_and_a_contrast_each(apply):
    """Against NumPy, in the order of each image; the other two adjustments and grey do nothing."""
    images, recipe = levels(STACK16, 30, 16, 16), recipe_for(STACK16)
    sizes, plain = drawn(WHOLE, images, STACK16)
    _, p = drawn(replace(WHOLE, jitter=0.7, grey=1.0, solarize=1.0), images, STACK16)
    got = apply(images, sizes, p, size=16, scaling=recipe.scaling)
    start = apply(images, sizes, plain, size=16, scaling=recipe.scaling).numpy().astype(np.float64)
    assert 0 < p.jitter.sum() < 30
    assert not p.own[:, 0].equal(p.own[:, 1]), "each channel has its own"
    for i, order in enumerate(p.order.tolist()):
        for c in range(2):
            x = start[i, c]
            for adjustment in order if p.jitter[i] else ():
                factor = float(p.own[i, c, adjustment]) if adjustment < 2 else 1.0
                rest = (1 - factor) * x.mean() if adjustment == operations.CONTRAST else 0.0
                x = np.clip(factor * x + rest, 0, 1)
            np.testing.assert_allclose(got[i, c], x, rtol=0, atol=2e-6)


def test_drawing_for_other_channels_leaves_the_rest_as_it_was():
    sizes = torch.tensor([[30, 40]]).expand(50, 2)
    rgb, bands = (operations.draw(PAPER_VIEWS[0], sizes, generator(3, "own"), f) for f in (PixelFormat(), BANDS))
    assert all(a.equal(b) for a, b in zip(rgb[:-1], bands[:-1], strict=True))
    assert rgb.own.shape == (50, 0, 2) and bands.own.shape == (50, 13, 2)
    assert 0.6 <= float(bands.own.min()) < 0.61 and 1.39 < float(bands.own.max()) <= 1.4


def test_images_of_other_channels_than_the_format_are_refused():
    images = levels(RGB_NIR, 2, 20, 20)
    sizes, p = drawn(View(), images, PixelFormat())
    with pytest.raises(ValueError, match="4 channels, the scaling 3"):
        operations.apply(images, sizes, p, size=8, scaling=Recipe().scaling)
