"""Commands that a person is told to type next."""

from __future__ import annotations

import os
import shlex


def command(*words: str, processes: int = 1) -> str:
    """`corinfomax words`, begun as uv wants it where uv started this process; by torchrun for several processes."""
    started = ["uv", "run"] if "UV_RUN_RECURSION_DEPTH" in os.environ else []  # what uv gives to all that it runs
    several = ["torchrun", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    return shlex.join([*started, *several, "corinfomax", *words])
