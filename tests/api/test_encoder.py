"""`corinfomax.load` and `Encoder.embed`: one image, one vector, however it is handed over."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import corinfomax
import tiny
from corinfomax.cli.main import main
from corinfomax.images import in_memory
from corinfomax.images.files import DataError

SIZE = {"architecture": "test_resnet", "size": 32}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def encoder(weights):
    return corinfomax.load(weights, **SIZE)


@pytest.fixture(scope="module")
def pixels():
    return tiny.pictures(9, side=40)


@pytest.mark.parametrize(
    "given",
    [
        torch.from_numpy,
        lambda x: torch.from_numpy(x).permute(0, 3, 1, 2),
        lambda x: x.transpose(0, 3, 1, 2),
        lambda x: x / 255,
        lambda x: torch.from_numpy(x).permute(0, 3, 1, 2) / 255,
        lambda x: [Image.fromarray(image) for image in x],
        lambda x: [Image.fromarray(image).convert("RGBA") for image in x],
        lambda x: [x[0], *(torch.from_numpy(image) for image in x[1:])],
    ],
)
def test_an_image_has_one_vector(encoder, pixels, given):
    expected = encoder.embed(pixels).features
    assert expected.dtype == np.float32 and expected.shape == (9, encoder.width)
    assert np.array_equal(encoder.embed(given(pixels)).features, expected)


def test_files_and_folders_give_what_memory_gives(encoder, weights, pixels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    order = [4, 0, 8, 2, 6, 1, 3, 5, 7]
    for row, image in enumerate(pixels):
        (tmp_path / "data" / f"class{row % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "data" / f"class{row % 3}" / f"{row}.png")
    paths = [f"data/class{row % 3}/{row}.png" for row in order]
    listed = encoder.embed(paths)
    assert np.array_equal(listed.features, encoder.embed(pixels).features[order])
    assert listed.paths == tuple(path.removeprefix("data/") for path in paths)

    folder = encoder.embed("data")
    assert folder.labels == tuple(path.partition("/")[0] for path in folder.paths)
    rows = [listed.paths.index(path) for path in folder.paths]
    assert np.array_equal(folder.features, listed.features[rows])
    assert main(["embed", str(weights), "data", "--architecture", "test_resnet", "--size", "32"]) == 0
    with np.load("embeddings.npz") as saved:
        assert np.array_equal(saved["features"], folder.features) and tuple(saved["path"]) == folder.paths


def test_unequal_sizes_and_depths_keep_their_order(encoder):
    images = [np.full((30 + 7 * i, 50, 3), 20 * i, np.uint8) for i in range(6)]
    deep = [
        np.full((40, 40), 257 * 9, np.uint16),
        np.full((40, 40), 9, np.uint8),
        np.full((40, 40), 9 / 255, np.float32),
    ]
    vectors = encoder.embed([*images, *deep]).features
    for image, vector in zip(images, vectors[: len(images)], strict=True):
        assert np.allclose(encoder.embed([image]).features[0], vector, atol=1e-5)
    assert np.allclose(vectors[6:], vectors[7], atol=1e-5)


def test_one_encoder_embeds_more_than_a_batch(encoder, pixels, monkeypatch):
    expected = encoder.embed(pixels).features
    monkeypatch.setattr("corinfomax.evaluation.features.BATCH", 4)
    assert np.allclose(encoder.embed(pixels).features, expected, atol=1e-5)


def test_an_embedding_is_an_array(encoder, pixels):
    embedding = encoder.embed(pixels)
    assert np.asarray(embedding).shape == embedding.features.shape
    assert repr(embedding) == f"Embedding(9 images × {encoder.width} features)"
    assert "test_resnet at 32 px" in repr(encoder)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (3, "not int"),
        ([], "there are no images"),
        ([np.zeros((5, 4, 5), np.uint8)], "images of 5 channels, and these weights read red, green and blue"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros(4, np.uint8)], "image 1 has the shape 4:"),
        ([np.zeros((0, 4, 3), np.uint8)], "image 0 has the shape 0×4×3"),
        ([np.full((4, 4, 3), 2.0)], "float64 levels from 2 to 2: colours are integers, or floats from 0 to 1"),
        ([np.full((4, 4, 3), np.nan)], "levels from nan"),
        (["a.png", np.zeros((4, 4), np.uint8)], "image 0 is a path and others are not"),
        (["missing.png"], "no image at"),
        (["torn.png"], "torn.png: not an image"),
        (["torn.png", "torn.png"], "is listed twice"),
    ],
)
def test_what_is_no_image_is_named(encoder, tmp_path, monkeypatch, images, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torn.png").write_bytes(b"torn")
    with pytest.raises(DataError, match=said):
        encoder.embed(images)


@pytest.mark.parametrize(
    ("options", "said"), [({"device": "cpu"}, "no setting 'device'"), ({"holdout": 0.5}, "holdout: for files alone")]
)
def test_an_option_that_would_do_nothing_is_refused(encoder, pixels, options, said):
    with pytest.raises(TypeError, match=said):
        encoder.embed(pixels, **options)


def test_a_number_of_labels_that_does_not_fit_is_refused():
    with pytest.raises(DataError, match="2 images have 1 labels"):
        in_memory.from_memory(tiny.pictures(2), [0])


def test_labels_are_plain_names():
    source = in_memory.from_memory(tiny.pictures(4), [np.int64(3), torch.tensor(3), "x", 3])
    assert source.labels == ("3", "3", "x", "3")


def test_other_pixels_are_another_source():
    a, b = tiny.pictures(4), tiny.pictures(4)
    assert in_memory.from_memory(a).root == in_memory.from_memory(list(b)).root
    b[2, 5, 5, 0] ^= 1
    assert in_memory.from_memory(a).root != in_memory.from_memory(b).root


def test_a_photograph_in_memory_is_upright(encoder, tmp_path):
    image = Image.fromarray(tiny.pictures(1, side=40)[0][:24])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        assert np.array_equal(encoder.embed([opened]).features, encoder.embed([tmp_path / "turned.png"]).features)


@pytest.mark.parametrize(
    ("name", "options", "error", "said"),
    [
        ("nothing", {}, FileNotFoundError, "nothing"),
        ("{weights}", {}, ValueError, "--architecture"),
        ("{weights}", {"achitecture": "x"}, TypeError, "did you mean architecture"),
        ("{weights}", {"device": "tpu"}, ValueError, "cannot compute on device 'tpu'"),
    ],
)
def test_weights_that_cannot_be_loaded_say_why(weights, name, options, error, said):
    with pytest.raises(error, match=said):
        corinfomax.load(name.format(weights=weights), **options)
