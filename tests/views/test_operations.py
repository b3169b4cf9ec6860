"""Every operation against torchvision with the same parameters, image by image; every rate against its frequency."""

import math
from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as T
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from corinfomax.recipes.fields import PAPER_VIEWS, Scaling, View
from corinfomax.runtime.seeds import generator
from corinfomax.views import operations

BOTH = pytest.mark.parametrize("apply", [operations.apply, operations.compose])  # compiled, and for every device
NOTHING = View(flip=0, jitter=0, grey=0, blur=0, solarize=0)
PLAIN = {"scaling": Scaling((255,) * 3, 3, (0.0,) * 3, (1.0,) * 3)}
BYTES = (255, 255, 255)
# float32 arithmetic in another order; one step of uint8 is 4e-3
CLOSE = {"rtol": 0, "atol": 2e-5}


def photos(n: int, h: int, w: int, seed: int = 0) -> Tensor:
    """Smooth images with edges; pure noise would hide a shift by less than a pixel."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 5, generator=g)
    x = T.resize(coarse, [h, w], InterpolationMode.BICUBIC, antialias=True)
    x = (x + (torch.rand(n, 3, h, w, generator=g) > 0.9) * 0.3).clamp(0, 1)
    return (x * 255).round().to(torch.uint8)


def sizes_of(images: Tensor) -> Tensor:
    return torch.tensor(images.shape[-2:]).expand(len(images), 2)


def floats(n: int, size: int, seed: int = 0) -> Tensor:
    return photos(n, size, size, seed).float() / 255


@pytest.mark.parametrize(("h", "w", "size"), [(32, 32, 32), (64, 64, 32), (40, 57, 24), (28, 28, 64), (90, 130, 70)])
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_crop_and_flip(h, w, size, kind):
    images = photos(16, h, w)
    images = images if kind == "uint8" else images.float() / 255
    p = operations.draw(replace(NOTHING, flip=0.5), sizes_of(images), generator(0, "test"))
    got = operations.resized_crop(images, p.box, p.flip, size=size, steps=BYTES if kind == "uint8" else (1, 1, 1))
    for image, (top, left, height, width), flip, ours in zip(images, p.box.tolist(), p.flip, got, strict=True):
        want = T.crop(image if kind == "float" else image.float() / 255, top, left, height, width)
        want = T.resize(want, [size, size], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        torch.testing.assert_close(ours, T.horizontal_flip(want) if flip else want, **CLOSE)


def test_crop_is_antialiased():
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    whole = operations.resized_crop(
        stripes, torch.tensor([[0, 0, 64, 64]]), torch.tensor([False]), size=16, steps=BYTES
    )
    assert (whole[..., 2:-2] - 0.5).abs().max() < 0.02


@BOTH
def test_padding_of_mixed_sizes_reaches_no_view(apply):
    a, b = photos(1, 20, 30, 1), photos(1, 33, 25, 2)
    padded = torch.full((2, 3, 33, 30), 255, dtype=torch.uint8)
    padded[0, :, :20], padded[1, :, :, :25] = a[0], b[0]
    sizes = torch.tensor([[20, 30], [33, 25]])
    p = operations.draw(replace(PAPER_VIEWS[0], rotate=20.0), sizes, generator(3, "test"))
    together = apply(padded, sizes, p, size=16, **PLAIN)
    centre = operations.centre_view(padded, sizes, size=16, **PLAIN)
    for i, image in enumerate((a, b)):
        alone = apply(image, sizes[i : i + 1], p.take(slice(i, i + 1)), size=16, **PLAIN)
        torch.testing.assert_close(together[i], alone[0], **CLOSE)
        torch.testing.assert_close(
            centre[i], operations.centre_view(image, sizes[i : i + 1], size=16, **PLAIN)[0], **CLOSE
        )


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("h", "w", "size"), [(32, 32, 32), (36, 49, 32), (64, 64, 64), (300, 200, 224), (28, 28, 28)])
def test_centre_view(h, w, size, interpolation):
    images, mode = photos(3, h, w), InterpolationMode(interpolation)
    got = operations.centre_view(images, sizes_of(images), size=size, interpolation=interpolation, **PLAIN)
    for image, ours in zip(images, got, strict=True):
        resized = T.resize(image.float() / 255, [size * 8 // 7], mode, antialias=True)
        torch.testing.assert_close(ours, T.center_crop(resized, [size, size]).clamp(0, 1), **CLOSE)


@pytest.mark.parametrize(
    ("adjustment", "theirs", "values"),
    [
        (operations.BRIGHTNESS, T.adjust_brightness, [0.0, 0.6, 1.0, 1.4]),
        (operations.CONTRAST, T.adjust_contrast, [0.0, 0.6, 1.0, 1.4]),
        (operations.SATURATION, T.adjust_saturation, [0.0, 0.8, 1.0, 1.7]),
        (operations.HUE, T.adjust_hue, [-0.5, -0.1, 0.0, 0.03, 0.1, 0.5]),
    ],
)
def test_colour(adjustment, theirs, values):
    x = floats(len(values), 32)
    x[:, :, :4, :4] = 0.5  # grey: no hue
    x[:, :, 4:8, :4] = 0.0
    x[:, :2, 8:12, :4] = 0.7  # two channels share the maximum
    factors = torch.tensor(values)
    got = (
        operations.hue(x, factors)
        if adjustment == operations.HUE
        else operations.blend(x, torch.full((len(x),), adjustment), factors)
    )
    for image, value, result in zip(x, values, got, strict=True):
        torch.testing.assert_close(result, theirs(image, value), **CLOSE)


def test_jitter_follows_the_order_of_each_image():
    n = 48
    x = floats(n, 16)
    p = operations.draw(View(jitter=0.7), torch.full((n, 2), 16), generator(1, "test"))
    assert len({tuple(order) for order in p.order.tolist()}) > 12
    assert 0 < p.jitter.sum() < n
    before = x.clone()
    got = operations.jitter(x, p)
    steps = (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, T.adjust_hue)
    for i in range(n):
        want = x[i]
        if p.jitter[i]:
            for adjustment in p.order[i].tolist():
                want = steps[adjustment](want, float(p.factors[i, adjustment]))
        torch.testing.assert_close(got[i], want, **CLOSE)
    assert x.equal(before)


def test_grey():
    x = floats(3, 16)
    torch.testing.assert_close(operations.grey(x), T.rgb_to_grayscale(x), **CLOSE)


@pytest.mark.parametrize("size", [7, 32, 48, 65, 224])
def test_blur(size):
    sigma = torch.tensor([0.1, 0.5, 1.3, 2.0])
    x = floats(4, size)
    got = operations.blur(x, sigma)
    kernel = 2 * min(operations.BLUR_RADIUS, size - 1) + 1
    for image, s, ours in zip(x, sigma.tolist(), got, strict=True):
        torch.testing.assert_close(ours, T.gaussian_blur(image, [kernel, kernel], [s, s]), **CLOSE)
    assert (got[3] - x[3]).abs().mean() > 0.01


def test_solarize():
    x = floats(4, 16)
    x[0, 0, 0, 0] = 128 / 255
    torch.testing.assert_close(operations.solarize(x), T.solarize(x, 128 / 255), rtol=0, atol=0)


@pytest.mark.parametrize(("h", "w"), [(28, 28), (31, 20)])
def test_rotate(h, w):
    x = photos(4, h, w).float() / 255
    angle = torch.tensor([-15.0, 0.0, 7.5, 90.0])
    got = operations.rotate(x, sizes_of(x), angle)
    for image, a, ours in zip(x, angle.tolist(), got, strict=True):
        torch.testing.assert_close(ours, T.rotate(image, a, InterpolationMode.BILINEAR), rtol=0, atol=2e-4)


def test_normalize_is_channels_last():
    x = floats(2, 8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    got = operations.normalize(x, mean=mean, std=std)
    torch.testing.assert_close(got, T.normalize(x, list(mean), list(std)), **CLOSE)
    assert got.is_contiguous(memory_format=torch.channels_last)


@BOTH
@pytest.mark.parametrize("view", [*PAPER_VIEWS, View(rotate=15.0, jitter=0, flip=0, grey=0, crop_area=(0.5, 1.0))])
def test_a_view_is_its_operations_in_order(view, apply):
    n, size = 24, 32
    images = photos(n, 40, 36)
    p = operations.draw(view, sizes_of(images), generator(5, "test"))
    got = apply(images, sizes_of(images), p, size=size, scaling=Scaling(BYTES, 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    assert got.is_contiguous(memory_format=torch.channels_last)
    steps = (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, T.adjust_hue)
    kernel = 2 * operations.BLUR_RADIUS + 1
    wrong = 0
    for i in range(n):
        x = images[i].float() / 255
        if view.rotate:
            x = T.rotate(x, float(p.angle[i]), InterpolationMode.BILINEAR)
        x = T.resize(T.crop(x, *p.box[i].tolist()), [size, size], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        x = T.horizontal_flip(x) if p.flip[i] else x
        for adjustment in p.order[i].tolist() if p.jitter[i] else ():
            x = steps[adjustment](x, float(p.factors[i, adjustment]))
        x = T.rgb_to_grayscale(x, 3) if p.grey[i] else x
        x = T.gaussian_blur(x, [kernel, kernel], [float(p.sigma[i])] * 2) if p.blur[i] else x
        x = T.solarize(x, 128 / 255) if p.solarize[i] else x
        x = T.normalize(x, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
        wrong += int(((got[i] - x).abs() > 1e-3).sum())
    # Rounding moves at most a few values across the threshold of solarize.
    assert wrong <= (3 if view.solarize else 0)


@pytest.mark.parametrize("field", ["flip", "jitter", "grey", "blur", "solarize"])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_each_rate_is_drawn_as_often_as_stated(field, p):
    n = 4000
    drawn = operations.draw(replace(NOTHING, **{field: p}), torch.full((n, 2), 32), generator(0, field))
    spread = 4.5 * math.sqrt(p * (1 - p) / n)  # four and a half standard deviations
    assert float(getattr(drawn, field).float().mean()) == pytest.approx(p, abs=spread + 1e-12)
    for name in {"flip", "jitter", "grey", "blur", "solarize"} - {field}:
        assert not getattr(drawn, name).any()


@pytest.mark.parametrize("field", ["flip", "jitter", "grey", "blur", "solarize"])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@BOTH
def test_each_rate_reaches_the_pixels(field, p, apply):
    n = 300
    images = photos(1, 32, 32).expand(n, 3, 32, 32)
    view = replace(NOTHING, crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), blur_sigma=(1.0, 2.0), **{field: p})
    drawn = operations.draw(view, sizes_of(images), generator(0, field))
    out = apply(images, sizes_of(images), drawn, size=32, **PLAIN)
    changed = ((out - images / 255).abs().amax((1, 2, 3)) > 1e-3).float().mean()
    assert float(changed) == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / n) + 1e-12)


def test_parameters_fill_their_ranges():
    n = 4000
    p = operations.draw(View(rotate=20.0), torch.full((n, 2), 32), generator(0, "ranges"))
    for values, low, high in (
        (p.angle, -20, 20),
        (p.factors[:, 0], 0.6, 1.4),
        (p.factors[:, 1], 0.6, 1.4),
        (p.factors[:, 2], 0.8, 1.2),
        (p.factors[:, 3], -0.1, 0.1),
        (p.sigma, 0.1, 2.0),
    ):
        assert low <= float(values.min()) < low + 0.02 * (high - low)
        assert high >= float(values.max()) > high - 0.02 * (high - low)
        assert float(values.mean()) == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    orders = torch.bincount(p.order @ torch.tensor([64, 16, 4, 1]))
    assert (orders > 0).sum() == 24
    assert orders.max() < 1.5 * n / 24


@pytest.mark.parametrize(("h", "w"), [(32, 32), (20, 200), (200, 20), (1, 1), (3, 2)])
def test_crop_boxes_are_torchvisions(h, w):
    """Equal means and spreads of all four numbers, and every box inside its image."""
    n = 3000
    box = operations.draw(View(), torch.tensor([[h, w]]).expand(n, 2), generator(0, "boxes")).box
    top, left, height, width = box.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= h).all() and (left + width <= w).all()
    torch.manual_seed(0)
    crop = RandomResizedCrop(32)
    image = torch.zeros(3, h, w)
    theirs = torch.tensor([crop.get_params(image, list(crop.scale), list(crop.ratio)) for _ in range(n)]).float()
    for ours_column, theirs_column in zip(box.float().T, theirs.T, strict=True):
        spread = max(float(theirs_column.std()), 1e-6)
        # the difference of two means of n draws has a standard deviation of spread·√(2/n)
        assert float(ours_column.mean() - theirs_column.mean()) == pytest.approx(0, abs=4.5 * spread * math.sqrt(2 / n))
        assert float(ours_column.std()) == pytest.approx(float(theirs_column.std()), rel=0.1, abs=1e-6)


def test_images_and_steps_draw_independently():
    p = operations.draw(View(rotate=5.0), torch.full((64, 2), 32), generator(0, "view 0", 7))
    assert len(set(p.sigma.tolist())) == len(set(p.angle.tolist())) == 64
    assert len({tuple(box) for box in p.box.tolist()}) > 55
    again = operations.draw(View(rotate=5.0), torch.full((64, 2), 32), generator(0, "view 0", 7))
    assert all(a.equal(b) for a, b in zip(p, again, strict=True))
    for rng in (generator(1, "view 0", 7), generator(0, "view 1", 7), generator(0, "view 0", 8)):
        assert not operations.draw(View(rotate=5.0), torch.full((64, 2), 32), rng).sigma.equal(p.sigma)


def test_an_image_does_not_depend_on_its_neighbours():
    images = photos(12, 32, 32)
    p = operations.draw(PAPER_VIEWS[1], sizes_of(images), generator(0, "slice"))
    whole = operations.apply(images, sizes_of(images), p, size=32, **PLAIN)
    alone = operations.apply(images[4:9], sizes_of(images[4:9]), p.take(slice(4, 9)), size=32, **PLAIN)
    assert whole[4:9].equal(alone)
    composed = operations.compose(images[4:9], sizes_of(images[4:9]), p.take(slice(4, 9)), size=32, **PLAIN)
    assert ((composed - alone).abs() > 1e-3).sum() <= 3  # solarize's threshold, as above


@pytest.mark.gpu
def test_views_on_cuda_are_the_same_and_never_wait():
    images = photos(32, 48, 48)
    p = operations.draw(PAPER_VIEWS[1], sizes_of(images), generator(0, "cuda"))
    on_gpu = images.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = operations.apply(on_gpu, sizes_of(images), p, size=32, **PLAIN)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = operations.apply(images, sizes_of(images), p, size=32, **PLAIN)
    assert ((got.cpu() - want).abs() > 1e-3).sum() <= 3  # solarize's threshold, as above


def test_chunks_of_a_large_batch_give_the_same_views(monkeypatch):
    images = photos(7, 40, 36)
    p = operations.draw(PAPER_VIEWS[0], sizes_of(images), generator(0, "chunks"))
    whole = operations.resized_crop(images, p.box, p.flip, size=24, steps=BYTES)
    monkeypatch.setattr(operations, "CPU_CHUNK", 2 * 3 * 40 * 36)  # chunks of 2, 2, 2 and 1
    torch.testing.assert_close(
        operations.resized_crop(images, p.box, p.flip, size=24, steps=BYTES), whole, rtol=0, atol=1e-6
    )
