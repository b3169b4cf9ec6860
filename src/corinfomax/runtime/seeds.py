"""Random generators keyed on (seed, purpose, step): a run can stop anywhere and resume with the same numbers."""

import hashlib

import torch


def generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A CPU Generator that depends on its three keys only: no state to save, the same numbers on every machine.

    The keys are hashed because neighbouring integer seeds do not guarantee independent streams.
    """
    return torch.Generator().manual_seed(key(seed, purpose, step))


def key(seed: int, purpose: str, step: int = 0) -> int:
    """The 63-bit integer that seeds `generator`."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
