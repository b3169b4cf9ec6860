"""Every random number comes from a Generator keyed on (seed, purpose, step), so a run can stop and go on anywhere."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A CPU Generator that depends on its three keys alone: no state to save, the same numbers on every machine.

    The keys are hashed, because neighbouring integer seeds of one generator are not guaranteed independent streams.
    """
    return torch.Generator().manual_seed(key(seed, purpose, step))


def key(seed: int, purpose: str, step: int = 0) -> int:
    """The 63-bit integer that `generator` is seeded with."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
