"""What arithmetic a device is fast in."""

from __future__ import annotations

from typing import Any

import torch


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it multiplies bfloat16 faster than float32.

    On CUDA from compute capability 8.0. Of CPUs those with AMX, and AMD's with AVX-512's bfloat16, which take half as
    long in it; a Xeon with that alone gained nothing (docs/log.md has both).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # absent in older versions
    amd = "AMD" in str(known.get("cpu_name", ""))
    return bool(known.get("amx_bf16") or (amd and known.get("avx512_bf16")))
