"""Crops from the files themselves: the pixels of the whole image, at full resolution, and runs that are fed by them."""

import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import tiny
from corinfomax.cli.main import main
from corinfomax.images import cache, decode
from corinfomax.images.files import DataError, scan
from corinfomax.images.sources import Data
from corinfomax.recipes.fields import Scaling, View
from corinfomax.runtime import run_folder
from corinfomax.runtime.seeds import generator
from corinfomax.training import batches
from corinfomax.training.batches import Batch, Pixels
from corinfomax.training.prefetch import Prefetch
from corinfomax.views import operations
from corinfomax.weights import checkpoint

CPU = torch.device("cpu")


def smooth(height, width, seed=0):
    """A picture without detail that JPEG or a reduction would lose."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (333, 500), (900, 1411)])
@pytest.mark.parametrize("ending", ["png", "jpg", "tiff"])
@pytest.mark.parametrize("turn", [None, 2, 3, 4, 5, 6, 7, 8])
def test_a_crop_is_that_of_the_whole_image(tmp_path, height, width, ending, turn):
    """A view made of what was cut is the view made of the whole upright image."""
    whole = smooth(height, width)
    path = tmp_path / f"a.{ending}"
    exif = Image.Exif()
    if turn:
        exif[0x0112] = turn
    whole.save(path, exif=exif, **({"quality": 95} if ending == "jpg" else {}))
    with Image.open(path) as image:
        upright = np.ascontiguousarray(np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1))
    size = torch.tensor([upright.shape[1:]])
    for seed in range(3):
        drawn = [operations.draw(View(jitter=0.0), size, generator(seed, "view", v)) for v in range(2)]
        boxes = np.stack([p.box[0].numpy() for p in drawn])
        with Image.open(path) as image:
            found = decode.read_crops(image, boxes, 24)
        for p, (pixels, part) in zip(drawn, found, strict=True):
            assert min(pixels.shape[1:]) >= min(decode.OVERSIZE * 24, int(p.box[0, 2:].min())) - 1
            made = []
            for x, box in ((upright, p.box), (pixels, torch.tensor([part]))):
                x = torch.from_numpy(x)[None]
                args = {"size": 24, "scaling": Scaling((255,) * 3, 3, (0.0,) * 3, (1.0,) * 3)}
                made.append(operations.apply(x, torch.tensor([x.shape[2:]]), p._replace(box=box), **args))
            assert float((made[0] - made[1]).abs().max()) < 0.1
            assert float((made[0] - made[1]).abs().mean()) < 0.005


def test_exact_where_nothing_is_reduced(tmp_path):
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    with Image.open(path) as image:
        ((found, box),) = decode.read_crops(image, np.array([[3, 5, 40, 60]]), 24)
    assert box == (0, 0, 40, 60)
    assert np.array_equal(found, noise[3:43, 5:65].transpose(2, 0, 1))


@pytest.fixture
def folder(tmp_path):
    """Photographs of unequal sizes, some in files that begin turned."""
    for split, count in (("train", 40), ("test", 12)):
        for i in range(count):
            place = tmp_path / "data" / split / ("even", "odd")[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            exif = Image.Exif()
            exif[0x0112] = 6 if i % 5 == 0 else 1
            smooth(60 + 3 * i, 90 - i, seed=i).save(place / f"{i:02}.jpg", exif=exif)
    return tmp_path / "data"


RECIPE = replace(tiny.RECIPE, from_files=True, cache_side=20)


def load(folder, **choices):
    data = Data(folder, cache=folder.parent / "cache", **choices)
    return cache.load(data, side=20, from_files=True, progress=False)


def test_nothing_is_cached_and_no_file_is_checked_again(folder, monkeypatch):
    splits = load(folder)
    assert len(splits.train) == 40 and splits.train.sizes[0].tolist() == [90, 60]  # the first is on its side
    kept = sum(path.stat().st_size for path in (folder.parent / "cache").rglob("*") if path.is_file())
    assert kept < 100 * 52
    monkeypatch.setattr(cache, "map_images", lambda *a, **k: pytest.fail("checked again"))
    again = load(folder)
    assert again.train.fingerprint == splits.train.fingerprint
    pixels, sizes = again.train.batch(torch.tensor([0, 7]))
    assert sizes.amin(1).tolist() == [20, 20] and pixels.shape[0] == 2


def test_batches_are_those_of_cached_images(folder, tmp_path):
    ours, theirs = load(folder), cache.load(Data(folder, cache=tmp_path / "copies"), side=20, progress=False)
    assert ours.train.paths == theirs.train.paths and ours.train.labels.equal(theirs.train.labels)
    indices = torch.tensor([3, 0, 39])
    for one, other in zip(ours.train.batch(indices), theirs.train.batch(indices), strict=True):
        assert one.equal(other)
    some = ours.train.select(torch.tensor([5, 0]))
    assert some.batch(torch.tensor([1]))[0].equal(ours.train.batch(torch.tensor([0]))[0])


def test_a_run_is_fed_by_files_and_resumes_bitwise(folder, tmp_path, monkeypatch):
    splits = load(folder)
    whole = tiny.run(splits, tmp_path / "whole", RECIPE, scores=1, diagnoses=2)
    rows = run_folder.read_metrics(tmp_path / "whole")
    assert len(rows) == 10 and rows[-1].knn is not None and rows[-1].look is not None
    take = Prefetch.take

    def stop(self, step):
        if step == 6:
            raise DataError("gone")
        return take(self, step)

    monkeypatch.setattr(Prefetch, "take", stop)
    with pytest.raises(DataError, match="gone"):
        tiny.run(splits, tmp_path / "stopped", RECIPE, scores=1, diagnoses=2)
    monkeypatch.undo()
    saved = checkpoint.load_last(tmp_path / "stopped")[1]
    assert saved.step == 6, "what was learnt before the file was lost is kept"
    resumed = tiny.run(splits, tmp_path / "stopped", RECIPE, scores=1, diagnoses=2, resume=saved)
    assert tiny.equal_states(whole.state_dict(), resumed.state_dict())


def test_a_lost_file_is_named(folder, tmp_path):
    splits = load(folder)
    lost = folder / splits.train.paths[17]
    lost.unlink()
    with pytest.raises(DataError, match=r"odd/17\.jpg|even/.*\.jpg"):
        tiny.run(splits, tmp_path / "run", RECIPE)
    with pytest.raises(DataError, match=r"cannot be read any more"):
        splits.train.batch(torch.tensor([17]))


def test_a_torn_file_is_found_before_training(folder):
    path = folder / "train" / "odd" / "17.jpg"
    path.write_bytes(path.read_bytes()[:900])
    shutil.rmtree(folder / "test")
    for i in range(80):  # so that one is less than a hundredth
        shutil.copy(folder / "train" / "odd" / "01.jpg", folder / "train" / "odd" / f"copy{i}.jpg")
    train_images = load(folder, holdout=0).train
    assert len(train_images) == len(scan(folder)) - 1
    assert train_images.skipped[0][0] == "train/odd/17.jpg"


def test_the_file_of_a_failed_step_holds_its_crops(folder, tmp_path):
    """They give the views of that step bit for bit, even when the images are gone."""
    splits = load(folder)
    wild = replace(RECIPE, optim=replace(RECIPE.optim, lr=1e30, start_lr=1e30))
    with pytest.raises(FloatingPointError, match=r"; the batch is saved in .*failed-step-0.safetensors"):
        tiny.run(splits, tmp_path / "run", wild)
    views = batches.apply_views(wild, batches.read_batch(wild, splits.train, 0, CPU), CPU)
    shutil.rmtree(folder)
    failed = checkpoint.load_checkpoint(tmp_path / "run" / "failed-step-0.safetensors")
    pixels = [Pixels(*(failed.loop[f"{name}{i}"] for name in ("pixels", "sizes", "boxes"))) for i in range(len(views))]
    parameters = batches.draw_views(failed.recipe, failed.loop["sizes"], 0)
    batch = Batch(failed.loop["indices"], failed.loop["sizes"], tuple(parameters), tuple(pixels))
    again = batches.apply_views(failed.recipe, batch, CPU)
    assert all(one.equal(other) for one, other in zip(views, again, strict=True))


def test_what_cannot_be_cut_says_so(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"from_files .*rotate"):
        replace(RECIPE, views=(View(rotate=10.0), View()))
    assert cache.load("mnist5k", side=28, from_files=True, progress=False).train.files is None
    assert main(["pretrain", "mnist5k", "--recipe", "cpu-small", "--from-files", "--out", str(tmp_path / "run")]) == 2
    assert "leave out --from-files" in capsys.readouterr().err


def test_huge_images_are_small_crops():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8))
    found = decode.read_crops(image, np.array([[0, 0, 1500, 2000], [700, 900, 50, 60]]), 24)
    assert max(found[0][0].shape[1:]) < 6 * 24 and found[1][0].shape == (3, 50, 60)


@pytest.mark.skipif(sys.platform != "linux", reason="threads decode elsewhere")
def test_a_killed_decoder_loses_nothing(folder, tmp_path, monkeypatch):
    splits, take = load(folder), Prefetch.take

    def kill(self, step):
        if step == 4:
            multiprocessing.active_children()[0].kill()
            time.sleep(0.3)
        return take(self, step)

    monkeypatch.setattr(Prefetch, "take", kill)
    with pytest.raises(DataError, match="killed, perhaps because memory ran out"):
        tiny.run(splits, tmp_path / "run", replace(RECIPE, epochs=20))
    assert checkpoint.load_last(tmp_path / "run")[1].step >= 3
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform != "linux", reason="threads decode elsewhere")
@pytest.mark.parametrize("killed", [1, 2])
def test_decoders_killed_in_the_middle_of_a_result_are_noticed(monkeypatch, killed):
    def half_a_result(_):
        frame = sys._getframe()
        while "result_queue" not in frame.f_locals:  # of the executor's own loop
            frame = frame.f_back
        os.write(frame.f_locals["result_queue"]._writer.fileno(), struct.pack("!i", 1000) + b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(decode, "GRACE", 0.5)
    with (
        pytest.raises(DataError, match="killed, perhaps because memory ran out"),
        decode.worker_pool(half_a_result, 2, fork=True) as submit,
    ):
        for future in [submit(None) for _ in range(killed)]:
            future.result(timeout=30)
    assert not multiprocessing.active_children()


def test_signals_are_for_the_parent(folder, tmp_path):
    """SIGTERM to all processes of the run, as a batch system sends it, ends it as one to the first would."""
    words = ["pretrain", folder, "--from-files", "--out", tmp_path / "run", "--cache", tmp_path / "cache", *tiny.KNOBS]
    command = [sys.executable, "-m", "corinfomax", *map(str, words), "--epochs", "400"]
    running = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    rows = tmp_path / "run" / "metrics.jsonl"
    try:
        for _ in range(600):
            if rows.exists() and rows.read_text().count("\n") > 2:
                break
            time.sleep(0.1)
        os.killpg(running.pid, signal.SIGTERM)
        said, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert "to resume: corinfomax pretrain --resume" in said
    assert checkpoint.load_last(tmp_path / "run")[1].step > 20


def unequal(root, sizes):
    """Copies of pictures of these heights and widths, eight of each."""
    root.mkdir()
    for i, (height, width) in enumerate(8 * sizes):
        smooth(height, width, seed=i).save(root / f"{i:02}.png")
    return cache.load(Data(root, holdout=0), side=16, progress=False).train


CUDA = torch.device("cuda")  # for it cached images are cropped on the CPU, with or without a GPU


@pytest.mark.parametrize(("apply", "apart"), [(operations.apply, 0), (operations.compose, 1e-4)])
@pytest.mark.parametrize("part", [slice(None), slice(2, 5)])
def test_views_of_crops_for_a_gpu_are_those_of_the_whole(tmp_path, monkeypatch, apply, apart, part):
    """To the bit; the reference to rounding."""
    monkeypatch.setattr(operations, "apply", apply)
    train = unequal(tmp_path / "data", [(16, 90), (70, 16), (16, 20)])
    recipe = replace(tiny.RECIPE, n_views=3)
    for step in range(2):
        whole = batches.read_batch(recipe, train, step, CPU, part)
        cropped = batches.read_batch(recipe, train, step, CUDA, part)
        assert [len(whole.pixels), len(cropped.pixels)] == [1, 3] and whole.pixels[0].boxes is None
        if part == slice(None):
            assert sum(crop.images.nbytes for crop in cropped.pixels) < whole.pixels[0].images.nbytes / 2
        for crop in cropped.pixels:
            assert len(crop.images) == len(range(8)[part])
            for image, (height, width) in zip(crop.images, crop.sizes.tolist(), strict=True):
                image[:, height:], image[:, :, width:] = 255, 255  # undefined there
        want, got = (batches.apply_views(recipe, batch, CPU) for batch in (whole, cropped))
        torch.testing.assert_close(got, want, rtol=0, atol=apart)


def test_cached_images_go_to_a_gpu_whole_if_that_takes_no_more_room_or_they_are_rotated(tmp_path):
    wide, alike = unequal(tmp_path / "wide", [(16, 90), (70, 16)]), unequal(tmp_path / "alike", [(16, 18), (18, 16)])
    turned = replace(tiny.RECIPE, views=tuple(replace(view, rotate=5.0) for view in tiny.RECIPE.views))
    # 3,927 and 5,250 pixels an image of 4,096
    nine, twelve = (replace(tiny.RECIPE, n_views=n_views) for n_views in (9, 12))
    for recipe, images, cropped in (
        (tiny.RECIPE, wide, True),
        (turned, wide, False),
        (tiny.RECIPE, alike, False),
        (nine, wide, True),
        (twelve, wide, False),
    ):
        batch = batches.read_batch(recipe, images, 0, CUDA)
        assert [crop.boxes is not None for crop in batch.pixels] == ([True] * recipe.n_views if cropped else [False])
        if not cropped:
            assert batch.pixels[0].images.equal(images.batch(batches.indices(recipe, 0, len(images)))[0])
