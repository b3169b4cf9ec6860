"""Files that hold more than 8-bit RGB: the numbers that were written come back, in the order of their channels."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from corinfomax.images import levels, readers
from corinfomax.images.files import DataError
from corinfomax.images.levels import Raster
from corinfomax.images.readers import UnclearError, opened, planes
from corinfomax.images.sources import Data

tifffile = pytest.importorskip("tifffile")
pydicom = pytest.importorskip("pydicom")


def noise(*shape: int, kind: str = "uint16", top: int = 60_000) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, top, shape).astype(kind)


def numbers(content: Path | io.BytesIO | np.ndarray, plane: int | None = None, stack: str | None = None) -> Raster:
    with opened(content, plane, stack) as image:
        if not isinstance(image, Raster):
            image.load()
        return levels.as_raster(image)


@pytest.mark.parametrize("kind", ["uint16", "int16", "int32", "float32", "float64"])
@pytest.mark.parametrize("suffix", ["tif", "npy"])
def test_one_channel_of_any_type(tmp_path, kind, suffix):
    values = noise(9, 7, kind=kind, top=30_000) - (1000 if kind[0] != "u" else 0)
    path = tmp_path / f"a.{suffix}"
    tifffile.imwrite(path, values) if suffix == "tif" else np.save(path, values)
    raster = numbers(path)
    np.testing.assert_array_equal(raster.values[:, :, 0], values)
    assert not raster.colours and planes(path) == 1


@pytest.mark.parametrize("bands", [2, 4, 5, 13])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("big", [False, True])
def test_bands_keep_their_order(tmp_path, bands, planar, big):
    values = noise(8, 9, bands)
    written = np.ascontiguousarray(values.transpose(2, 0, 1)) if planar else values
    config = "separate" if planar else "contig"
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, written, photometric="minisblack", planarconfig=config, bigtiff=big)
    raster = numbers(path)
    np.testing.assert_array_equal(raster.values, values)
    assert not raster.colours
    np.testing.assert_array_equal(numbers(io.BytesIO(path.read_bytes())).values, values)  # as in an archive


def test_near_infrared_is_a_channel_and_declared_transparency_of_bytes_is_not(tmp_path):
    values = noise(8, 9, 4, kind="uint8", top=256)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extrasamples=["unspecified"])
    raster = numbers(tmp_path / "a.tif")
    np.testing.assert_array_equal(raster.values, values)
    assert raster.colours
    tifffile.imwrite(tmp_path / "b.tif", values, photometric="rgb", extrasamples=["unassalpha"])
    assert numbers(tmp_path / "b.tif").channels == 3
    with opened(tmp_path / "b.tif") as image:
        np.testing.assert_array_equal(levels.as_raster(image, 4).values, values)  # --channels 4


def test_colours_of_sixteen_bits(tmp_path):
    values = noise(8, 9, 3)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    raster = numbers(tmp_path / "a.tif")
    np.testing.assert_array_equal(raster.values, values)
    assert raster.colours
    imagecodecs = pytest.importorskip("imagecodecs")
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(values))
    np.testing.assert_array_equal(numbers(tmp_path / "a.png").values, values)
    rgba = np.dstack((values, noise(8, 9, top=65536)))
    (tmp_path / "b.png").write_bytes(imagecodecs.png_encode(rgba))
    alpha = rgba[:, :, 3:] / 65535
    over_white = rgba[:, :, :3] * alpha + 65535 * (1 - alpha)
    np.testing.assert_allclose(numbers(tmp_path / "b.png").values, over_white, atol=0.5)


def test_white_may_be_zero(tmp_path):
    values = noise(8, 9, 2)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite", planarconfig="contig")
    np.testing.assert_array_equal(numbers(tmp_path / "a.tif").values, 65535 - values)
    tifffile.imwrite(tmp_path / "b.tif", values[:, :, 0], photometric="miniswhite")  # Pillow would not turn it round
    np.testing.assert_array_equal(numbers(tmp_path / "b.tif").values[:, :, 0], 65535 - values[:, :, 0])


def test_a_photograph_in_a_tiff_that_pillow_does_not_read_alone_is_a_photograph(tmp_path):
    """Beside a thumbnail, or one of several grey images: 8-bit RGB, as from any other file."""
    values = noise(8, 9, 3, kind="uint8", top=256)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(values, photometric="rgb")
        file.write(values[::2, ::2], photometric="rgb")
    tifffile.imwrite(tmp_path / "b.tif", values.transpose(2, 0, 1), imagej=True, metadata={"axes": "ZYX"})
    with opened(tmp_path / "a.tif") as image:
        np.testing.assert_array_equal(np.asarray(image), values)
        assert isinstance(image, Image.Image) and planes(tmp_path / "a.tif") == 1
    with opened(tmp_path / "b.tif", 2) as image:
        np.testing.assert_array_equal(np.asarray(image), values[:, :, 2])
        assert isinstance(image, Image.Image)


@pytest.mark.parametrize("start", [b"RIFF\xff\x0a\0\0WEBP", b"BM\xff\x0a\0\0\0\0ftypheic", b"\0\0JXL \0\0"])
def test_marks_elsewhere_in_a_file_ask_for_no_plug_in(tmp_path, monkeypatch, start):
    for module in ("pillow_heif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, module, None)
    readers._use_plugin.cache_clear()
    (tmp_path / "a.webp").write_bytes(start)
    with pytest.raises(DataError, match=r"^not an image$"):
        numbers(tmp_path / "a.webp")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_of_numbers_comes_upright(tmp_path, orientation):
    """As Pillow turns the same image in 8 bits."""
    values = noise(6, 9, 5)
    extra = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", planarconfig="contig", extratags=extra)
    Image.fromarray(noise(6, 9, kind="uint8", top=256)).save(tmp_path / "b.tif", tiffinfo={274: orientation})
    raster = numbers(tmp_path / "a.tif").values
    plain = Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9))
    exif = Image.Exif()
    exif[274] = orientation
    stream = io.BytesIO()
    plain.save(stream, "PNG", exif=exif)
    from PIL import ImageOps

    places = np.asarray(ImageOps.exif_transpose(Image.open(stream)))
    np.testing.assert_array_equal(raster, values.reshape(54, 5)[places])


def test_pages_that_are_named_channels_or_images(tmp_path):
    values = noise(3, 2, 8, 9)  # depth, channel, height, width
    tifffile.imwrite(tmp_path / "ome.tif", values, ome=True, metadata={"axes": "ZCYX"})
    assert planes(tmp_path / "ome.tif") == 3
    for plane in range(3):
        np.testing.assert_array_equal(numbers(tmp_path / "ome.tif", plane).values, values[plane].transpose(1, 2, 0))
    tifffile.imwrite(tmp_path / "imagej.tif", values[0], imagej=True, metadata={"axes": "CYX"})
    assert planes(tmp_path / "imagej.tif") == 1
    np.testing.assert_array_equal(numbers(tmp_path / "imagej.tif").values, values[0].transpose(1, 2, 0))


@pytest.mark.parametrize("suffix", ["tif", "npy", "npz"])
def test_planes_without_a_name_are_asked_about(tmp_path, suffix):
    values = noise(5, 8, 9)
    path = tmp_path / f"a.{suffix}"
    {"tif": lambda: tifffile.imwrite(path, values), "npy": lambda: np.save(path, values)}.get(
        suffix, lambda: np.savez(path, values)
    )()
    with pytest.raises(UnclearError, match=r"5 planes, .*--stack channels for one image of 5 channels"):
        planes(path)
    assert (planes(path, "channels"), planes(path, "images")) == (1, 5)
    np.testing.assert_array_equal(numbers(path, None, "channels").values, values.transpose(1, 2, 0))
    for plane in range(5):
        np.testing.assert_array_equal(numbers(path, plane, "images").values[:, :, 0], values[plane])
    with pytest.raises(UnclearError, match=f"a.{suffix} in .* 5 planes"):
        Data(tmp_path).splits()
    source = Data(tmp_path, stack="images").splits()["train"]
    assert source.paths == tuple(f"a.{suffix}#{plane}" for plane in range(5))
    np.testing.assert_array_equal(numbers(source.content(3), source.plane(3), "images").values[:, :, 0], values[3])
    assert source.take([4, 1]).plane(0) == 4 and source.take([4, 1]).file(1) == f"a.{suffix}"


def test_arrays_of_images(tmp_path):
    values = noise(4, 8, 9, 3, kind="uint8", top=256)
    np.savez(tmp_path / "a.npz", first=values, second=values[0])
    assert planes(tmp_path / "a.npz") == 5
    for plane, want in enumerate([*values, values[0]]):
        np.testing.assert_array_equal(numbers(tmp_path / "a.npz", plane).values, want)
    np.save(tmp_path / "b.npy", values.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(numbers(tmp_path / "b.npy", 2).values, values[2])
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects|pickle"):
        numbers(tmp_path / "objects.npy")


def dicom(path: Path, values: np.ndarray, photometric: str = "MONOCHROME2", **tags: object) -> Path:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    frames = values.shape[0] if values.ndim == 3 and values.shape[2] != 3 else 1
    if frames > 1:
        dataset.NumberOfFrames = frames
    dataset.Rows, dataset.Columns = values.shape[-2:] if values.shape[-1] != 3 else values.shape[:2]
    bits = 8 * values.dtype.itemsize
    dataset.SamplesPerPixel = 3 if values.shape[-1] == 3 else 1
    if dataset.SamplesPerPixel == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation, dataset.PhotometricInterpretation = int(values.dtype.kind == "i"), photometric
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.PixelData = values.tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_dicom_is_read_in_its_own_units_and_without_a_window(tmp_path):
    values = noise(8, 9, top=4096)
    scaled = dicom(tmp_path / "a.dcm", values, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=80)
    raster = numbers(scaled)
    np.testing.assert_array_equal(raster.values[:, :, 0], values.astype(int) - 1024)
    half = numbers(dicom(tmp_path / "b.dcm", values, RescaleSlope="0.5", RescaleIntercept=3))
    np.testing.assert_allclose(half.values[:, :, 0], values * 0.5 + 3)
    plain = numbers(dicom(tmp_path / "c.dcm", values))
    np.testing.assert_array_equal(plain.values[:, :, 0], values)
    inverted = numbers(dicom(tmp_path / "d.dcm", values, "MONOCHROME1"))
    np.testing.assert_array_equal(inverted.values[:, :, 0], 65535 - values.astype(int))
    rgb = noise(8, 9, 3, kind="uint8", top=256)
    with opened(dicom(tmp_path / "e.dcm", rgb, "RGB")) as image:
        np.testing.assert_array_equal(np.asarray(image), rgb)
    frames = noise(4, 8, 9)
    path = dicom(tmp_path / "f.dcm", frames)
    assert planes(path) == 4
    np.testing.assert_array_equal(numbers(path, 2).values[:, :, 0], frames[2])


def test_dicom_files_named_by_a_scanner_are_images(tmp_path):
    """Without an ending, or by numbers between dots; other files of such names are none."""
    dicom(tmp_path / "IM0001", noise(8, 9))
    dicom(tmp_path / "1.2.840.113619.2", noise(3, 8, 9))
    (tmp_path / "README").write_text("no image")
    data = Data(tmp_path)
    names = [f"1.2.840.113619.2#{plane}" for plane in range(3)]
    assert data.splits()["train"].paths == (*names, "IM0001")
    assert data.notes == ("not read: 1 file without an ending, first README",)


@pytest.mark.parametrize(("module", "suffix"), [("tifffile", "tif"), ("pydicom", "dcm")])
def test_a_file_that_needs_an_extra_says_so(tmp_path, monkeypatch, module, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(path, noise(8, 9, 5), photometric="minisblack", planarconfig="contig")
    else:
        dicom(path, noise(8, 9))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"needs {module}, the extra formats: .*corinfomax"):
        numbers(path)


@pytest.mark.parametrize(
    "start", [b"\x93NUMPY\x01", b"PK\x03\x04rubbish", b"II*\0\xff\xff\xff\xff", b"\0" * 128 + b"DICM"]
)
def test_damaged_files_are_an_error_each(tmp_path, start):
    path = tmp_path / "a.bin"
    path.write_bytes(start)
    with pytest.raises(Exception) as caught:
        numbers(path)
    assert not isinstance(caught.value, SystemExit)


def test_a_photograph_is_pillows(tmp_path):
    for mode in ("RGB", "L", "RGBA", "LA", "P", "CMYK"):
        path = tmp_path / f"{mode}.tif" if mode in ("RGBA", "LA", "CMYK", "RGB") else tmp_path / f"{mode}.png"
        Image.new(mode, (9, 8)).save(path)
        with opened(path) as image:
            assert isinstance(image, Image.Image)
    assert readers.planes(tmp_path / "RGB.tif") == 1


def test_formats_of_plug_ins(tmp_path):
    """Written without Pillow, so that only the reader can have loaded the plug-in."""
    pillow_heif, imagecodecs = pytest.importorskip("pillow_heif"), pytest.importorskip("imagecodecs")
    pytest.importorskip("pillow_jxl")
    y, x = np.mgrid[0:64, 0:48]
    values = np.dstack((4 * y, 5 * x, 2 * (x + y))).astype(np.uint8)
    pillow_heif.from_bytes("RGB", (48, 64), values.tobytes()).save(tmp_path / "a.heic", quality=95)
    (tmp_path / "a.jxl").write_bytes(imagecodecs.jpegxl_encode(values, lossless=True))
    for suffix, apart in (("heic", 12), ("jxl", 0)):
        with opened(tmp_path / f"a.{suffix}") as image:
            assert image.mode == "RGB" and image.size == (48, 64)
            assert np.abs(np.asarray(image).astype(int) - values).max() <= apart
    assert Data(tmp_path).splits()["train"].paths == ("a.heic", "a.jxl")
