"""What the figures are of: hardware and versions."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from corinfomax import network

PACKAGES = ("torch", "torchvision", "pillow", "timm", "kornia", "lightly")


def machine(clock: str) -> dict[str, str]:
    """Hardware, versions, clock and threads, as words."""
    found = {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "clock": "processor seconds" if clock == "cpu" else "seconds",
        "arithmetic": "bfloat16" if network.faster_in_bfloat16(torch.device("cpu")) else "float32",
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def installed(package: str) -> bool:
    """Whether a rival can be measured; if not, it is said once and its figures are left out."""
    if importlib.util.find_spec(package) is not None:
        return True
    print(f"{package} is not installed (the extra bench): left out", file=sys.stderr)
    return False


def processor() -> str:
    """Model and what of it decides the network's speed."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    flags = named.get("flags", "").split()
    known = {"avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX"}
    special = [said for flag, said in known.items() if flag in flags]
    return ", ".join([named.get("model name", platform.machine()), *special, *["no AMX"] * ("AMX" not in special)])


def commit() -> str:
    """The commit of the checkout, with "-dirty" where its code was changed since; "" outside of one.

    Results that were written since do not count.
    """
    git = ["git", "-C", str(Path(__file__).parents[2])]
    done = subprocess.run([*git, "describe", "--always", "--exclude=*"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return ""
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], capture_output=True, check=False)
    return done.stdout.strip() + ("-dirty" if changed.returncode == 1 else "")
