"""The house: a room may import only rooms below it, and light rooms stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "src" / "corinfomax"
FLOORS = (
    ("runtime", "recipes"),
    ("objective", "images", "views", "network"),
    ("weights", "diagnosis"),
    ("evaluation",),
    ("checkup", "training"),
    ("search",),
    ("report",),
    ("cli",),
    ("api",),
    ("sklearn",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(HOUSE.rglob("*.py"))
OUTSIDE = ("__init__", "__main__")  # the public names, imported when asked for, and `python -m corinfomax`


def room_of(path: Path) -> str:
    """The first folder or file below the package."""
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Full names of everything that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_room_has_a_floor():
    assert {room_of(path) for path in FILES} == {*FLOOR, *OUTSIDE}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_a_room_imports_only_rooms_below_it(path):
    room = room_of(path)
    if room in OUTSIDE:
        return
    below = {name.split(".")[1] for name in imports(path) if name.startswith("corinfomax.")} & set(FLOOR)
    for other in below - {room}:
        assert FLOOR[other] < FLOOR[room], f"{room} imports {other}"


def test_no_two_files_of_a_room_import_each_other():
    names = {path: ".".join(("corinfomax", *path.relative_to(HOUSE).with_suffix("").parts)) for path in FILES}
    below = {names[path]: {other for other in names.values() if other in text} for path, text in _prefixes(names)}
    seen: dict[str, int] = {}  # 1 while below it is searched, 2 when done

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert seen.get(name) != 1, f"a circle: {' → '.join((*trail, name))}"
        if name not in seen:
            seen[name] = 1
            for other in below[name] - {name}:
                visit(other, (*trail, name))
            seen[name] = 2

    for name in below:
        visit(name, ())


def _prefixes(names: dict[Path, str]) -> list[tuple[Path, set[str]]]:
    """For each file the modules it imports, or imports a name from."""
    return [(path, {prefix for name in imports(path) for prefix in (name, name.rpartition(".")[0])}) for path in names]


@pytest.mark.parametrize(
    "path", ["recipes/fields.py", "recipes/published.py", "runtime/run_folder.py", "diagnosis/verdict.py"]
)
def test_light_files_need_the_standard_library_alone(path):
    for name in imports(HOUSE / path):
        assert name.partition(".")[0] in {*sys.stdlib_module_names, "corinfomax"}, name


def test_only_one_file_knows_torch_distributed():
    knowing = [path for path in FILES if any(name.startswith("torch.distributed") for name in imports(path))]
    assert knowing == [HOUSE / "runtime" / "processes.py"]


def test_importing_the_package_or_its_command_line_does_not_import_torch():
    code = "import sys, corinfomax.cli.main; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
