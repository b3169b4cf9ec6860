"""Memory: limits of control groups, the user's limit, and tensors counted at their worst moment."""

from pathlib import Path

import pytest
import torch

from corinfomax.runtime import memory
from corinfomax.runtime.memory import Tally

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_limit():
    """Leave the process without a limit."""
    yield
    memory.set_limit(None)


def group(folder: Path, **files: str) -> None:
    """A control group's files; _ stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("memory_", "memory.")).write_text(text)


@pytest.mark.parametrize(
    ("line", "names", "parent"),
    [
        ("0::/jobs/42\n", ("memory_max", "memory_current", "inactive_file"), "jobs"),
        (
            "7:cpu:/other\n5:memory:/jobs/42\n",
            ("memory_limit_in_bytes", "memory_usage_in_bytes", "total_inactive_file"),
            "memory/jobs",
        ),
    ],
    ids=["v2", "v1"],
)
def test_the_tightest_group_decides_and_cached_files_are_free(tmp_path, line, names, parent):
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text(line)
    most, usage, cached = names
    assert memory.free_in_cgroup(own, root) == float("inf")  # no such folder
    group(root / parent / "42", **{most: "max" if most == "memory_max" else str(2**63 - 4096), usage: "500"})
    group(root / parent / "42", memory_stat=f"anon 1\n{cached} 10\n")
    group(root / parent, **{most: "1000\n", usage: "900\n", "memory_stat": f"anon 1\n{cached} 300\n"})
    assert memory.free_in_cgroup(own, root) == 1000 - 900 + 300


def test_a_group_of_a_container_may_have_the_name_it_has_outside(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/system/docker-1234\n")
    group(tmp_path, memory_max="1000", memory_current="100", memory_stat="inactive_file 0\n")
    assert memory.free_in_cgroup(own, tmp_path) == 900
    assert memory.free_in_cgroup(tmp_path / "none", tmp_path) == float("inf")  # no Linux


def test_the_limit_counts_what_the_process_has():
    free, used = memory.room(CPU), memory.resident()
    assert used > 1e8 and free > 0
    memory.set_limit((used + 5e7) / 1e9)
    assert 0 < memory.room(CPU) < 1e8
    memory.set_limit(0.001)
    assert memory.room(CPU) == 0
    assert memory.images_at_once(10**6, CPU, most=512) == 1
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be above 0"):
            memory.set_limit(wrong)


def test_a_tally_counts_storages_once_and_forgets_what_is_dropped():
    with Tally() as tally:
        x = torch.zeros(1000)
        y = x.view(10, 100)[0] + 0.0
        x.add_(1)
        assert (tally.live, tally.peak) == (4400, 4400)
        del x
        assert tally.live == 400
        z = torch.zeros(50)
    assert (tally.live, tally.peak) == (600, 4400) and len(y) + len(z) == 150


def test_a_tally_sees_what_backward_needs():
    x = torch.zeros(100, 10, requires_grad=True)
    with Tally() as tally:
        y = x.exp().exp()
        assert tally.live == 8000
        y.sum().backward()
    assert 8000 + 4000 <= tally.peak <= 8000 + 3 * 4000 + 8


def test_growth_is_the_cost_of_an_image_without_what_is_fixed():
    assert memory.growth(lambda n: (torch.zeros(5000), torch.zeros(n, 25))) == 100
    assert memory.growth(lambda n: None) == 1


def test_images_at_once_follow_their_size():
    assert memory.images_at_once(1, CPU, most=512) == 512
    assert memory.images_at_once(memory.ACTIVATIONS // 7, CPU, most=512) == 7
    assert memory.images_at_once(10**15, CPU, most=512) == 1
