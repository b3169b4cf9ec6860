"""The house: imports point down only, siblings do not import each other, and light rooms stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "src" / "corinfomax"
FLOORS = (
    ("__init__",),  # names only: it imports when asked
    ("knobs", "runs", "bottleneck", "track", "slurm", "shell"),
    ("recipes", "verdict", "hardware"),
    ("seeds", "distributed", "fused", "muon"),
    ("objective", "views", "files", "networks", "optim", "probes", "scores", "similar", "maps", "signals"),
    ("named", "decode", "archives"),
    ("sources",),
    ("images", "checkpoint", "examine", "cuts"),
    ("embed", "feed", "micro", "baselines", "kernel", "diagnosis", "pictures", "page", "health"),
    ("batches", "supervised", "card", "neighbors", "learner"),
    ("progress",),
    ("train", "evaluate", "weights", "export"),
    ("bench", "report", "replay"),
    ("options",),
    ("commands.errors", "commands.inputs"),
    tuple(
        f"commands.{name}"
        for name in ["evaluate", "embed", "neighbors", "report", "export", "recipes", "bench", "doctor"]
    ),
    ("commands.pretrain",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = {
    ".".join(path.relative_to(HOUSE).with_suffix("").parts): path
    for path in sorted(HOUSE.rglob("*.py"))
    if path.relative_to(HOUSE) != Path("commands/__init__.py")
}
ROOMS = list(FILES)


def imports(room: str) -> dict[str, bool]:
    """Every module that a room imports, and whether it does so at its top."""
    found: dict[str, bool] = {}
    tree = ast.parse(FILES[room].read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            found[name] = found.get(name, False) or id(node) in top
    return found


def test_every_room_has_a_floor():
    assert set(ROOMS) == set(FLOOR)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room):
    for name in imports(room):
        package, _, rest = name.partition(".")
        below = ".".join(rest.split(".")[: 2 if rest.startswith("commands.") else 1])
        if package == "corinfomax" and below in FLOOR and room != "__init__":
            assert FLOOR[below] < FLOOR[room], f"{room} imports {below}"


@pytest.mark.parametrize("room", ["knobs", "recipes", "runs", "verdict"])
def test_the_ground_floor_needs_the_standard_library_alone(room):
    for name in imports(room):
        assert name.partition(".")[0] in {*sys.stdlib_module_names, "corinfomax"}, name


def test_only_one_room_may_know_torch_distributed():
    knowing = [room for room in ROOMS if any(name.startswith("torch.distributed") for name in imports(room))]
    assert knowing == ["distributed"]


def test_importing_the_package_or_its_command_line_does_not_import_torch():
    code = "import sys, corinfomax.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
