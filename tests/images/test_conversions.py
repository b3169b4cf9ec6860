"""Images that are read in another way than their files have them are counted, and a sentence says what is lost."""

import importlib.util
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

import tiny
from corinfomax.api.encoder import Encoder
from corinfomax.cli import inputs
from corinfomax.cli.arguments import DataOptions
from corinfomax.images import cache, conversions
from corinfomax.images.conversions import conversion
from corinfomax.images.levels import Raster
from corinfomax.images.sources import Data
from corinfomax.network import build_backbone
from corinfomax.recipes.fields import RGB, PixelFormat
from corinfomax.weights.load import LoadedBackbone

GREY = PixelFormat(channels=1, colours=False)
DEEP_GREY = PixelFormat(channels=1, colours=False, high=(4095.0,), steps=(4095,))
DEEP = PixelFormat(high=(4095.0,), steps=(4095,))
FOUR = PixelFormat(channels=4)


def numbers(channels: int, kind: str, **form: bool) -> Raster:
    return Raster(np.ones((4, 5, channels), kind), **{"colours": channels > 2, **form})


@pytest.mark.parametrize(
    ("image", "pixels", "form"),
    [
        (Image.new("RGBA", (5, 4), (9, 9, 9, 254)), RGB, "transparent"),
        (Image.new("RGBA", (5, 4), (9, 9, 9, 255)), RGB, ""),
        (Image.new("RGBA", (5, 4), (9, 9, 9, 0)), FOUR, ""),
        (Image.new("LA", (5, 4), (9, 0)), RGB, "transparent"),
        (Image.new("RGB", (5, 4)), GREY, "in colour"),
        (Image.new("RGB", (5, 4)), DEEP_GREY, "8-bit in colour"),
        (Image.new("RGB", (5, 4)), DEEP, "8-bit"),
        (Image.new("L", (5, 4)), RGB, "grey"),
        (Image.new("L", (5, 4)), GREY, ""),
        (Image.new("I;16", (5, 4)), RGB, "16-bit"),
        (Image.new("I;16", (5, 4)), DEEP, ""),
        (Image.new("F", (5, 4)), RGB, "floating-point"),
        (numbers(4, "u1"), RGB, "of more than 3 channels"),
        (numbers(4, "u2", alpha=True), DEEP, "transparent"),
        (numbers(4, "u2", alpha=True), replace(FOUR, high=(4095.0,), steps=(4095,)), ""),
        (numbers(3, "u2"), RGB, "16-bit"),
        (numbers(3, "u2"), DEEP_GREY, "in colour"),
        (numbers(3, "f4"), RGB, "floating-point"),
        (numbers(1, "u1"), DEEP_GREY, "8-bit"),
    ],
)
def test_the_form_that_reading_changes(image, pixels, form):
    assert conversion(image, pixels) == form


def test_deep_colours_that_pillow_reads_as_bytes_are_told():
    values = np.random.default_rng(0).integers(0, 65536, (8, 9, 3)).astype(np.uint16)
    files = [b"P6 9 8 65535\n" + values.astype(">u2").tobytes(), b"P6 9 8 255\n" + bytes(216)]
    deep = [conversion(Image.open(io.BytesIO(file)), RGB) for file in files]
    assert deep == ["in colour of more than 8 bits", ""]
    if not features.check("jpg_2000"):
        pytest.skip("this Pillow reads no JPEG 2000")
    imagecodecs = pytest.importorskip("imagecodecs")
    for kind, form in (("u2", "in colour of more than 8 bits"), ("u1", "")):
        packed = imagecodecs.jpeg2k_encode(values.astype(kind), level=0, codecformat="jp2")
        with Image.open(io.BytesIO(packed)) as image:
            assert conversion(image, RGB) == form
            image.load()  # its header was read, its pixels still can be


def test_sentences_leave_out_forms_that_lose_nothing():
    said = conversions.sentences({"grey": 3, "palette-based": 1, "in colour": 1, "8-bit": 1200}, DEEP_GREY)
    assert said == [
        "1,200 images are 8-bit: 255 is read as 4,095, the highest level",
        "1 image is in colour: only brightness is read",
    ]


def transparent(folder: Path, count: int = 4) -> Path:
    """A folder of RGBA pictures, one of them opaque, and one in RGB."""
    folder.mkdir()
    for row, pixels in enumerate(tiny.pictures(count)):
        alpha = np.full((16, 16, 1), 255 if row == 0 else 40 * row, np.uint8)
        Image.fromarray(np.dstack((pixels, alpha))).save(folder / f"{row}.png")
    Image.fromarray(tiny.pictures(1)[0]).save(folder / "plain.png")
    return folder


SAID = "3 images are transparent: the background turns white; --channels 4 reads transparency as a fourth channel"


def test_transparency_is_said_once_by_each_command(tmp_path, capsys):
    options = DataOptions(holdout=0.4, cache=tmp_path / "cache")
    data = inputs.find_data(str(transparent(tmp_path / "data")), options)
    for _ in range(2):  # also when the images are cached
        inputs.load_splits(data, tiny.RECIPE, options)
        assert capsys.readouterr().out.count(SAID) == 1
    loaded = LoadedBackbone(build_backbone(tiny.RECIPE.backbone), tiny.RECIPE, "these weights")
    encoder = Encoder(loaded, torch.device("cpu"))
    encoder.embed(str(tmp_path / "data"), cache=tmp_path / "cache")
    assert capsys.readouterr().out.count(SAID) == 1
    encoder.embed([tmp_path / "data" / f"{row}.png" for row in range(4)])  # without a cache
    assert capsys.readouterr().out.count(SAID) == 1
    four = cache.load(Data(tmp_path / "data", channels=4, cache=tmp_path / "cache"), side=16, pixels=FOUR)
    assert not conversions.sentences(four.train.converted, FOUR)


def test_sixteen_bit_colour_without_its_library_names_the_extra(tmp_path, monkeypatch):
    imagecodecs = pytest.importorskip("imagecodecs")
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(np.full((9, 8, 3), 40_000, np.uint16)))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "imagecodecs" else find(name))
    train = cache.load(Data(tmp_path, cache=tmp_path / "cache"), side=16).train
    (said,) = conversions.sentences(train.converted, RGB)
    assert said.startswith("1 image is 16-bit in colour: 8 bits of each level are read; the rest needs imagecodecs, ")
    assert "the extra formats" in said and "corinfomax" in said


def test_sixteen_bit_transparency_may_be_a_channel(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs")
    values = np.random.default_rng(0).integers(0, 65536, (9, 8, 4)).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(values))
    data = Data(tmp_path, channels=4, cache=tmp_path / "cache")
    pixels = data.survey().levels.pixels
    train = cache.load(data, side=16, pixels=pixels).train
    np.testing.assert_array_equal(train.cached(torch.tensor([0]))[0], values.transpose(2, 0, 1))
    assert not train.converted


def test_images_in_memory_are_read_as_those_of_a_folder(tmp_path, capsys):
    """By weights for 8-bit RGB: grey images of 12 bits keep their levels, and the range is said."""
    values = [16 * image[:, :, 0].astype(np.uint16) for image in tiny.pictures(4)]
    for row, image in enumerate(values):
        Image.fromarray(image).save(tmp_path / f"{row}.png")
    loaded = LoadedBackbone(build_backbone(tiny.RECIPE.backbone), tiny.RECIPE, "these weights")
    encoder = Encoder(loaded, torch.device("cpu"))
    files = encoder.embed(str(tmp_path), cache=tmp_path / "cache").features
    said = capsys.readouterr().out
    np.testing.assert_array_equal(encoder.embed(values).features, files)
    assert said == capsys.readouterr().out and "are read as 0 to 1" in said


def test_the_width_of_an_encoder_of_two_channels():
    recipe = replace(tiny.RECIPE, pixels=PixelFormat(channels=2, colours=False), mean=(0.5, 0.5), std=(0.2, 0.2))
    loaded = LoadedBackbone(build_backbone(recipe.backbone, channels=2), recipe, "these weights")
    assert Encoder(loaded, torch.device("cpu")).width == 16


def test_weights_of_other_channels_say_so_before_decoding(tmp_path):
    recipe = replace(tiny.RECIPE, pixels=PixelFormat(channels=2, colours=False), mean=(0.5, 0.5), std=(0.2, 0.2))
    with pytest.raises(ValueError, match=r" has images of 3 channels, and these weights read 2: give other images"):
        inputs.fit_pixels(recipe, Data(tiny.folder(tmp_path, {"": 3}), cache=tmp_path / "cache"))


def test_rgb_weights_on_infrared_beside_colours(tmp_path, capsys):
    for row, pixels in enumerate(tiny.pictures(3)):
        values = np.dstack((pixels, pixels[:, :, :1]))
        pytest.importorskip("tifffile").imwrite(
            tmp_path / f"{row}.tif", values, photometric="rgb", extrasamples=["unspecified"]
        )
    data = Data(tmp_path, cache=tmp_path / "cache")
    recipe = inputs.fit_pixels(tiny.RECIPE, data)
    splits = inputs.load_every(data, recipe)
    inputs.print_skipped(data, None, splits)
    assert recipe.pixels == RGB
    assert capsys.readouterr().out == "3 images are of more than 3 channels: only red, green and blue are read\n"
