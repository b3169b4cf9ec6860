"""Shapes in signatures are checked while the tests run; the library itself is not decorated."""

import importlib.util
import os
from pathlib import Path

if importlib.util.find_spec("setuptools") is not None:
    # torch.compile imports it late, and it refuses to if a test has loaded the standard library's distutils before
    import setuptools  # noqa: F401

import pytest
from jaxtyping import install_import_hook

install_import_hook("corinfomax", "shapes.check")

import torch  # noqa: E402

os.environ.pop("UV_RUN_RECURSION_DEPTH", None)  # what is said to type next hangs on it
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many faults test_faults.py puts in."""
    parser.addoption("--faults", type=int, default=8, help="how many faults to put into tiny runs; 200 take minutes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need what is not here are skipped with the reason."""
    for item in items:
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"needs {SHARED}, which is not here"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference values and images beside the project."""
    return SHARED


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Decoded images of tests never land in the user's cache."""
    os.environ.setdefault("CORINFOMAX_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def without_shape_check():
    """Call with the shape checks of the test run off, to see the library's own error."""
    from jaxtyping import config

    def call(function, *args):
        config.update("jaxtyping_disable", True)
        try:
            return function(*args)
        finally:
            config.update("jaxtyping_disable", False)

    return call
