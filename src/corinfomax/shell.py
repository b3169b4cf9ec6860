"""Commands that a person is told to type next."""

from __future__ import annotations

import os
import shlex


def command(*words: str) -> str:
    """`corinfomax words` as this process was started: by uv, by torchrun, for as many processes as there are here."""
    started = ["uv", "run"] if "UV_RUN_RECURSION_DEPTH" in os.environ else []  # what uv gives to all that it runs
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")  # what torchrun gives
    program = ["corinfomax"] if here == "1" else ["torchrun", "--nproc-per-node", here, "-m", "corinfomax"]
    return shlex.join([*started, *program, *words])
