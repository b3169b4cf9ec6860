"""Pages of a map are given back, however the images are read."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from corinfomax.images import mapped
from corinfomax.images.cache import Images
from corinfomax.images.mapped import MappedFile

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells, and gives back")


def of_files() -> float:
    """Megabytes of files in this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) / 1000


def images(path: Path, count: int, *, equal: bool) -> Images:
    """Images of 100 px in a file of random bytes, the last one smaller unless they are equal."""
    length = 3 * 100 * 100
    path.write_bytes(np.random.default_rng(0).bytes(count * length))
    file, sizes = MappedFile(path), torch.full((count, 2), 100)
    if not equal:
        sizes[-1] = 50
    names = tuple(map(str, range(count)))
    return Images(file.bytes, torch.arange(count) * length, sizes, names, None, (), (), "", mapped=file)


@linux
@pytest.mark.parametrize("equal", [True, False])
def test_reading_all_images_in_any_order_keeps_few_pages(tmp_path, monkeypatch, equal):
    monkeypatch.setattr(mapped, "PAGES_AT_ONCE", 2**23)
    found = images(tmp_path / "pixels", 5000, equal=equal)
    before, most = of_files(), 0.0
    assert found.equal == equal
    for rows in torch.randperm(5000, generator=torch.Generator().manual_seed(0)).split(20):
        pixels, _ = found.batch(rows)
        most = max(most, of_files() - before)
        length = int(3 * found.sizes[rows[0]].prod())
        start = int(found.offsets[rows[0]])
        want = np.fromfile(tmp_path / "pixels", np.uint8, length, offset=start)
        height, width = found.sizes[rows[0]].tolist()
        assert np.array_equal(pixels[0, :, :height, :width].reshape(-1).numpy(), want)
    assert most < 75, "of 150 MB"


@linux
def test_a_copy_for_a_device_never_has_the_whole_map(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "PAGES_AT_ONCE", 2**22)
    monkeypatch.setattr("corinfomax.images.cache.COPIED_AT_ONCE", 2**21)
    found, before = images(tmp_path / "pixels", 2000, equal=True), of_files()
    moved = found.on(torch.device("cpu"))
    assert of_files() - before < 10, "of 60 MB"
    assert moved.pixels.equal(found.pixels) and moved.mapped is None


def test_an_empty_file_is_no_map(tmp_path):
    (tmp_path / "pixels").touch()
    with pytest.raises(ValueError, match="empty"):
        MappedFile(tmp_path / "pixels")
