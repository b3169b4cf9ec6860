"""Optional packages: the sentence that says what to install when one is missing."""

import importlib.util
import os
from pathlib import Path


def missing(what: str, packages: str, *, extra: str | None = None, program: str = "corinfomax") -> str:
    """Say that `what` needs `packages`, of an extra or one that no extra has, and how this `program` gets them."""
    of_extra = "" if extra is None else f", the extra {extra}"
    return f"{what} needs {packages}{of_extra}: {_command(packages, extra, program)}"


def _command(package: str, extra: str | None, program: str) -> str:
    wanted = package if extra is None else f"'corinfomax[{extra}]'"
    if "UV_RUN_RECURSION_DEPTH" not in os.environ:  # uv sets it for everything it runs
        # uv's environments have no pip, and the pip found first would install into another one
        return f"{'pip' if importlib.util.find_spec('pip') else 'uv pip'} install {wanted}"
    if Path(__file__).parents[2].name != "src":  # installed into a project of the user's
        return f"uv add {wanted}"
    return f"uv run {f'--with {package}' if extra is None else f'--extra {extra}'} {program} …"
