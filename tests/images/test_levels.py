"""Levels of any type: stored without loss, cut off only where it is said, and statistics that outliers do not move."""

import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from corinfomax.images import cache, levels
from corinfomax.images.decode import decode, read_crops
from corinfomax.images.files import DataError
from corinfomax.images.levels import Raster, image_levels, set_levels
from corinfomax.images.sources import Data
from corinfomax.recipes.fields import RGB, PixelFormat


def raster(values: np.ndarray, *, colours: bool = False) -> Raster:
    return Raster(values if values.ndim == 3 else values[:, :, None], colours)


def fitted(*images: Raster) -> levels.SetLevels:
    return set_levels([image_levels(image) for image in images])


def noise(*shape: int, top: int = 4096, kind: str = "uint16") -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, top, shape).astype(kind)


@pytest.mark.parametrize(("top", "steps"), [(4096, 4095), (1024, 1023), (65536, 65535), (200, 65535)])
def test_integers_keep_every_level(top, steps):
    image = raster(np.arange(top, dtype=np.uint16).reshape(-1, 8))
    found = fitted(image)
    high = 2.0 ** (top - 1).bit_length() - 1
    assert (found.pixels.steps, found.pixels.high) == ((steps,), (high,))
    stored = decode(image, 10_000, found.pixels)
    np.testing.assert_array_equal(stored[0], image.values[:, :, 0] * (steps // high))
    assert stored.dtype == np.uint16


def test_the_range_does_not_depend_on_the_brightest_image():
    assert fitted(raster(noise(8, 9, top=2100))).pixels == fitted(raster(noise(8, 9, top=4096))).pixels


def test_negative_integers_start_at_the_lowest():
    image = raster(noise(9, 8, top=3000, kind="int32") - 1000)
    pixels = fitted(image).pixels
    low, high = float(image.values.min()), float(image.values.max())
    assert (pixels.low, pixels.high, pixels.steps) == ((low,), (high,), (int(high - low),))
    np.testing.assert_array_equal(decode(image, 99, pixels)[0], image.values[:, :, 0] - int(low))


def test_floats_have_a_range_for_each_channel_and_lose_less_than_a_step():
    values = np.random.default_rng(0).normal(size=(40, 30, 2)) * (1e-6, 1e4) + (0, -3)
    image = raster(values.astype(np.float32))
    pixels = fitted(image).pixels
    low, high = np.array(pixels.low), np.array(pixels.high)
    np.testing.assert_allclose(low, values.min((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(high, values.max((0, 1)), rtol=1e-5)
    back = low + decode(image, 99, pixels).transpose(1, 2, 0) / 65535 * (high - low)
    assert (np.abs(back - values) <= 0.51 * (high - low) / 65535 + 1e-6 * np.abs(values)).all()


def test_what_lies_far_from_the_rest_is_cut_off_and_said():
    values = np.random.default_rng(0).random((200, 200)).astype(np.float32)
    values[3, 3] = 1e6
    found = fitted(raster(values))
    assert len(np.unique(decode(raster(values), 999, found.pixels))) > 4000
    assert "cut off at" in found.notes[1] and "0.00% of the pixels" in found.notes[1]
    values[3, 3] = 5.0
    assert len(fitted(raster(values)).notes) == 1, "nothing is cut off"


def test_numbers_that_are_not_finite_are_said_and_read_as_the_lowest():
    values = np.random.default_rng(0).random((20, 20)).astype(np.float32) + 1
    values[0, 0], values[0, 1] = np.nan, np.inf
    found = fitted(raster(values), raster(np.full((4, 4), np.nan, np.float32)))
    assert found.pixels.low[0] >= 1 and found.pixels.high[0] < 2.01
    with pytest.raises(DataError, match="no image has a number in it"):
        fitted(raster(np.full((4, 4), np.nan, np.float32)))
    assert found.notes[-1] == "2 images have values that are not finite: NaN is read as the lowest level"
    stored = decode(raster(values), 99, found.pixels)
    assert stored[0, 0, 0] == 0 and stored[0, 0, 1] == 65535


def test_statistics_are_those_of_the_levels_but_for_the_tails():
    values = np.random.default_rng(0).normal(2000, 200, (100, 100))
    plain = fitted(raster(values.astype(np.uint16)))
    assert plain.mean == pytest.approx((2000 / 4095,), rel=0.01) and plain.std == pytest.approx((200 / 4095,), rel=0.05)
    values[:2] = 4000  # two percent of the pixels would raise the standard deviation by half
    tailed = fitted(raster(values.astype(np.uint16)))
    assert tailed.std[0] < 1.9 * plain.std[0]
    constant = fitted(raster(np.full((4, 4), 700, np.uint16)))
    assert constant.std == (1.0,)


def test_rare_signals_on_black_keep_a_standard_deviation():
    values = np.zeros((100, 100), np.uint16)
    values[0, :20] = 1000  # 0.2 % of the pixels: all percentiles are 0
    assert 0 < fitted(raster(values)).std[0] < 0.1


def test_most_images_decide_on_the_channels():
    bands = [raster(noise(8, 8, 4)) for _ in range(5)]
    found = fitted(*bands, raster(noise(8, 8, 3), colours=True))
    assert found.pixels.channels == 4 and found.notes[1] == "not read: 1 image of 3 channels, beside 4"
    with pytest.raises(DataError, match="3 channels, where 4 are read"):
        decode(raster(noise(8, 8, 3), colours=True), 8, found.pixels)
    grey = fitted(*[raster(noise(8, 8)) for _ in range(5)], raster(noise(8, 8, 3), colours=True))
    assert grey.pixels.is_rgb and len(grey.notes) == 1


def test_grey_serves_as_rgb_and_rgb_as_grey():
    rgb = PixelFormat(high=(4095.0,), steps=(4095,))
    values = noise(8, 9)
    np.testing.assert_array_equal(decode(raster(values), 99, rgb), np.stack([values] * 3))
    colours = noise(8, 9, 3)
    grey = decode(
        raster(colours, colours=True), 99, PixelFormat(channels=1, colours=False, high=(4095.0,), steps=(4095,))
    )
    np.testing.assert_allclose(grey[0], colours @ (0.2989, 0.587, 0.114), atol=0.5)
    np.testing.assert_array_equal(
        decode(raster(noise(8, 9, 4), colours=True), 99, rgb), noise(8, 9, 4).transpose(2, 0, 1)[:3]
    )


def test_eight_bits_among_deeper_ones_have_the_same_white():
    pixels = PixelFormat(channels=1, colours=False, high=(4095.0,), steps=(4095,))
    np.testing.assert_array_equal(
        decode(Image.fromarray(np.array([[0, 255, 51]], np.uint8)), 9, pixels), [[[0, 4095, 819]]]
    )
    assert decode(raster(np.array([[0, 65535, 257]], np.uint16)), 9, RGB).tolist() == [[[0, 255, 1]]] * 3


@pytest.mark.parametrize(("h", "w", "side"), [(64, 48, 16), (50, 200, 20), (7, 9, 16)])
def test_channels_are_reduced_as_an_image_of_one_channel_is(h, w, side):
    values = noise(h, w, 3)
    pixels = PixelFormat(channels=3, colours=False, high=(4095.0,), steps=(4095,))
    got = decode(raster(values), side, pixels)
    for c in range(3):
        plane = Image.fromarray(values[:, :, c].astype(np.float32))
        if min(h, w) > side:
            plane = plane.resize(got.shape[:0:-1], Image.Resampling.BICUBIC, reducing_gap=3.0)
        np.testing.assert_array_equal(got[c], np.rint(np.asarray(plane)).clip(0, 4095))


def test_crops_are_regions_of_the_levels():
    values = noise(40, 50, 2)
    pixels = PixelFormat(channels=2, colours=False, high=(4095.0,), steps=(4095,))
    ((small, box), (large, half)) = read_crops(raster(values), np.array([[3, 5, 7, 9], [0, 0, 40, 48]]), 10, pixels)
    np.testing.assert_array_equal(small, values[3:10, 5:14].transpose(2, 0, 1))
    assert box == (0, 0, 7, 9) and half == (0, 0, 20, 24)
    blocks = values[:, :48].reshape(20, 2, 24, 2, 2).mean((1, 3)).transpose(2, 0, 1)
    np.testing.assert_allclose(large, blocks, atol=0.51)


def test_the_cache_holds_sixteen_bits_and_any_channels(tmp_path):
    arrays = [noise(20 + i, 30, 5, top=60_000) for i in range(6)]
    for i, values in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", values[None])
    data = Data(tmp_path, cache=tmp_path / "cache")
    pixels = data.survey().levels.pixels
    images = cache.load(data, side=99, pixels=pixels, progress=False).train
    assert images.pixels.dtype == torch.uint16 and images.format == pixels
    batch, sizes = images.batch(torch.arange(6))
    for i, values in enumerate(arrays):
        height, width = sizes[i].tolist()
        np.testing.assert_array_equal(batch[i, :, :height, :width].numpy().transpose(1, 2, 0), values)
    files = cache.load(data, side=99, pixels=pixels, from_files=True, progress=False).train
    assert files.batch(torch.arange(6))[0].equal(batch)
    assert images.fingerprint == cache.load(data, side=99, pixels=pixels, progress=False).train.fingerprint
    again = cache.load(data, side=99, pixels=PixelFormat(channels=5, colours=False), progress=False).train
    assert again.pixels.dtype == torch.uint8, "another format is another cache"


def test_the_sample_of_a_large_image_lies_all_over_it():
    values = noise(1024, 1024, top=1000)
    values[:, :512] += 2000
    values[:512] += 10_000
    values[:, 0] = 0  # the border of a scan
    found = fitted(raster(values))
    # 1,024 pixels on a lattice: few more or less than a quarter lie in each quadrant
    assert found.mean[0] * found.pixels.high[0] == pytest.approx(values.mean(), rel=0.01)
    assert found.std[0] * found.pixels.high[0] == pytest.approx(values.std(), rel=0.01)
    floats = values.astype(np.float32)
    floats[:, 1:] = np.nan
    assert fitted(raster(floats)).mean == (0.0,), "the few numbers among NaN count"


def test_samples_of_many_images_take_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(levels, "SAMPLED", (4, 1024))
    monkeypatch.setattr(levels, "COUNTED", 100)
    for i in range(50):
        np.save(tmp_path / f"{i}.npy", np.full((9, 10, 2), 100 * i, np.uint16)[None])
    kept = []
    monkeypatch.setattr(levels, "set_levels", lambda images: kept.extend(images) or set_levels(images))
    found = Data(tmp_path, cache=tmp_path / "cache").survey().levels
    assert [len(image.sample) for image in kept] == [4, 0] * 25
    assert found.pixels.high == (8191.0,) and found.mean[0] * 8191 == pytest.approx(2450, rel=0.05)


@pytest.mark.parametrize("images", [1, 300, 5000, 20_000, 10**6])
def test_the_pixels_of_a_set_that_count_are_bounded(images):
    pixels, every = levels.sampling(images)
    assert 64 <= pixels <= 1024
    assert min(images * 1024, 2**17) <= pixels * images / every <= 2**19


def test_scaling_holds_one_channel_in_double_precision():
    image = raster(noise(256, 256, 13))
    pixels = PixelFormat(channels=13, colours=False, high=(4095.0,), steps=(4095,))
    tracemalloc.start()
    try:
        result = levels.scaled(image, pixels)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(result, image.values.astype(np.float32))
    assert peak < 2 * result.nbytes  # whole images in float64 would be twice that each


def test_photographs_are_surveyed_by_a_few_of_them(tmp_path, monkeypatch):
    data = tiny.folder(tmp_path, {"": 9})
    monkeypatch.setattr(levels, "image_levels", lambda *_: pytest.fail("8-bit RGB needs no measuring"))
    assert Data(data).survey().levels == levels.SetLevels()


def test_levels_outside_a_runs_format_are_said():
    pixels = PixelFormat(channels=1, colours=False, high=(4095.0,), steps=(4095,))
    within = [image_levels(raster(noise(8, 9)))]
    assert levels.outside(within, pixels) == []
    beyond = [*within, image_levels(raster(np.full((3, 3), 9000, np.uint16)))]
    low = min(image.low[0] for image in beyond)
    said = f"levels from {low:,.7g} to 9,000, of which the run reads 0 to 4,095: the rest is cut off"
    assert levels.outside(beyond, pixels) == [said]


def test_grey_images_of_many_levels_among_a_few_in_bytes_keep_them():
    """The kind of most images counts, also where the others have colours."""
    deep = [image_levels(raster(noise(8, 9, top=4000))) for _ in range(3)]
    colours = image_levels(Raster(noise(8, 9, 3, kind="uint8", top=256), colours=True))
    found = set_levels([*deep, colours])
    assert found.pixels == PixelFormat(high=(4095.0,), steps=(4095,)) and found.mean == set_levels(deep).mean * 3
    bytes_among = [image_levels(raster(noise(8, 9, kind="uint8", top=256))), *[colours] * 3]
    assert set_levels([*bytes_among, deep[0]]).pixels == RGB


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_a_band_of_one_value_is_not_blown_up(kind):
    """Its deviation is rounding alone: divided by that, it would be infinite."""
    values = noise(8, 9, 3, kind=kind, top=4000)
    values[:, :, 1] = 7
    found = set_levels([image_levels(Raster(values, colours=False)) for _ in range(3)])
    assert found.std[1] == 1 and 0 < found.std[0] < 1


@pytest.mark.parametrize("channels", [1, 2, 3, 13])
def test_pictures_in_false_colours_use_the_whole_range(channels):
    pixels = PixelFormat(channels=channels, colours=False, high=(65535.0,), steps=(65535,))
    values = noise(channels, 30, 30, top=300)
    values[:, 0, 0] = 65535  # one bright pixel does not make the rest black
    shown = levels.as_rgb(values, pixels)
    assert shown.shape == (3, 30, 30) and shown.dtype == np.uint8
    assert (shown.reshape(3, -1).std(1) > 60).all()
    first = shown[0].astype(float).ravel()
    assert np.corrcoef(first, np.minimum(values[0], 300).ravel())[0, 1] > 0.99
    np.testing.assert_array_equal(levels.as_rgb(values[:, :9], pixels, values), shown[:, :9])  # a view, as its image
    assert levels.colours_shown(pixels) is not None and levels.colours_shown(RGB) is None
