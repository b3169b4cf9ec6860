"""Compiled views on a CPU against the plain operations: any shape, any number of threads, any order of memory."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from corinfomax.recipes.fields import Scaling, View
from corinfomax.runtime.seeds import generator
from corinfomax.views import cpu, operations

STATS = {"scaling": Scaling((255,) * 3, 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))}
EVERYTHING = View(rotate=20.0, jitter=1.0, grey=0.3, blur=0.7)
CLOSE = {"rtol": 0, "atol": 1e-4}  # 2e-5 of a value in [0, 1], over the smallest std


def noise(n: int, h: int, w: int) -> Tensor:
    """Images of random bytes."""
    return torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=generator(0, "pictures", 1000 * h + w))


def sample(n: int, h: int, w: int, view: View) -> tuple[Tensor, Tensor, operations.ViewParameters]:
    """n images, their sizes, and parameters of one view of each."""
    sizes = torch.tensor([[h, w]]).expand(n, 2)
    return noise(n, h, w), sizes, operations.draw(view, sizes, generator(1, "fused"))


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 13, 32, 50])
@pytest.mark.parametrize(("h", "w"), [(1, 1), (3, 2), (32, 32), (5, 190), (301, 7), (90, 130)])
def test_any_shape(h, w, size):
    images, sizes, p = sample(9, h, w, EVERYTHING)
    got = operations.apply(images, sizes, p, size=size, **STATS)
    want = operations.compose(images, sizes, p, size=size, **STATS)
    # grid_sample's float32 coordinates, in units of half an image, are off by some 1e-5 pixels of noise in a tall one.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3 if h > 200 else 1e-4)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "change",
    [
        {"rotate": 180.0},
        {"flip": 1.0},
        {"jitter": 1.0, "brightness": 1.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0},
        {"jitter": 1.0, "brightness": 0.0, "contrast": 1.0, "saturation": 0.0, "hue": 0.0},
        {"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 1.0, "hue": 0.0},
        {"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.5},
        {"grey": 1.0},
        {"blur": 1.0},
        {"crop_area": (0.02, 0.1)},
    ],
)
def test_each_operation(change):
    nothing = View(flip=0, jitter=0, grey=0, crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    images, sizes, p = sample(12, 40, 40, replace(nothing, **change))
    got, plain = (operations.apply(images, sizes, q, size=32, **STATS) for q in (p, sample(12, 40, 40, nothing)[2]))
    torch.testing.assert_close(got, operations.compose(images, sizes, p, size=32, **STATS), **CLOSE)
    assert (got - plain).abs().mean() > 0.05, "the operation does something"


@pytest.mark.parametrize("byte", [0, 127, 128, 129, 255])
def test_solarize_at_its_threshold(byte):
    """An image of one value: its crop has that value up to rounding, and at the threshold rounding decides."""
    images = torch.full((1, 3, 24, 24), byte, dtype=torch.uint8)
    p = operations.draw(View(flip=0, jitter=0, grey=0, solarize=1.0), torch.tensor([[24, 24]]), generator(0, "one"))
    got = operations.apply(
        images, torch.tensor([[24, 24]]), p, size=16, scaling=Scaling((255,) * 3, 3, (0, 0, 0), (1, 1, 1))
    )
    want = byte / 255 if byte < 128 else 1 - byte / 255
    torch.testing.assert_close(got, torch.full_like(got, want), rtol=0, atol=0.004 if byte == 128 else 1e-6)


def test_bits_depend_neither_on_threads_nor_on_the_order_of_memory(monkeypatch):
    images, sizes, p = sample(11, 40, 30, EVERYTHING)
    before = images.clone()
    want = operations.apply(images, sizes, p, size=24, **STATS)
    assert images.equal(before)
    for threads in (1, 2, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert operations.apply(images, sizes, p, size=24, **STATS).equal(want), threads
    reordered = images.contiguous(memory_format=torch.channels_last)
    assert operations.apply(reordered, sizes, p, size=24, **STATS).equal(want)


@pytest.mark.parametrize(
    ("field", "value"),
    [("sizes", [[21, 20]]), ("box", [[0, 0, 0, 5]]), ("box", [[3, 3, 18, 5]]), ("box", [[-1, 0, 5, 5]])],
)
def test_a_window_that_leaves_its_image_is_refused(field, value):
    images, sizes, p = sample(1, 20, 20, EVERYTHING)
    sizes, p = (torch.tensor(value), p) if field == "sizes" else (sizes, p._replace(box=torch.tensor(value)))
    with pytest.raises(ValueError, match="of image 0"):
        operations.apply(images, sizes, p, size=8, **STATS)


def test_as_many_parameters_as_images():
    images, sizes, p = sample(3, 20, 20, EVERYTHING)
    with pytest.raises(ValueError, match="3 images need as many rows"):
        operations.apply(images, sizes, p.take(slice(0, 2)), size=8, **STATS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_makes_views_too():
    """A worker of torch's DataLoader inherits the pool, but none of its threads."""
    program = """
import os, torch
from corinfomax.recipes.fields import Scaling, View
from corinfomax.runtime.seeds import generator
from corinfomax.views import operations
torch.set_num_threads(2)
sizes = torch.tensor([[20, 20]]).expand(8, 2)
images = torch.randint(0, 256, (8, 3, 20, 20), dtype=torch.uint8)
p = operations.draw(View(), sizes, generator(0, "fork"))
views = lambda: operations.apply(images, sizes, p, size=16, scaling=Scaling((255,) * 3, 3, (0, 0, 0), (1, 1, 1)))
want = views()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as DataLoader does: torch's own threads do not survive a fork
    torch.get_num_threads = lambda: 2
    os._exit(0 if views().equal(want) else 3)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "0\n", done.stderr


def test_an_empty_batch_has_no_views():
    images, sizes, p = sample(2, 8, 8, EVERYTHING)
    views = operations.apply(images[:0], sizes[:0], p.take(slice(0, 0)), size=24, **STATS)
    assert views.shape == (0, 3, 24, 24)


def test_nothing_outside_the_box_is_read():
    images, sizes, p = sample(6, 40, 40, replace(EVERYTHING, rotate=0.0, crop_area=(0.1, 0.3)))
    want = operations.apply(images, sizes, p, size=24, **STATS)
    for image, (top, left, height, width) in zip(images, p.box.tolist(), strict=True):
        inside = image[:, top : top + height, left : left + width].clone()
        image.random_(0, 256, generator=generator(5, "outside"))
        image[:, top : top + height, left : left + width] = inside
    assert operations.apply(images, sizes, p, size=24, **STATS).equal(want)


def test_code_compiled_in_memory_makes_the_same_bits(tmp_path):
    """A read-only installation without a home directory compiles in each process; others read the code from a disk.

    Numba optimises a function again for each caller that inlines it: unless all are inlined, the two differ.
    """
    package = Path(cpu.__file__).parents[1]
    for name in ("__init__.py", "views/__init__.py", "views/cpu.py", "views/operations.py"):
        (tmp_path / "corinfomax" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corinfomax" / name).write_text((package / name).read_text())
    for room in ("recipes", "runtime"):
        (tmp_path / "corinfomax" / room).symlink_to(package / room)
    torch.save(sample(8, 30, 26, EVERYTHING), tmp_path / "sample.pt")
    program = """
import numba.core.caching as caching
for locator in caching.CacheImpl._locator_classes:
    locator.from_function = classmethod(lambda cls, function, path: None)
import torch
from corinfomax.recipes.fields import Scaling
from corinfomax.views import cpu, operations
images, sizes, p = torch.load("sample.pt", weights_only=False)
views = operations.apply(images, sizes, p, size=24, scaling=Scaling((255,) * 3, 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
torch.save(views, "views.pt")
print(cpu.__file__, sum(cpu._make_views.stats.cache_hits.values()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/corinfomax/views/cpu.py 0\n"
    images, sizes, p = sample(8, 30, 26, EVERYTHING)
    operations.apply(images, sizes, p, size=24, **STATS)  # compiles, if the code is not on the disk
    assert torch.load(tmp_path / "views.pt").equal(operations.apply(images, sizes, p, size=24, **STATS))
