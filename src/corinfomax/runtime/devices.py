"""Copies to the device that computes."""

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` on the device; on CUDA the host goes on meanwhile.

    On MPS such a copy may read memory that is freed by then, and give wrong numbers (pytorch/pytorch#139550, #189690).
    """
    return x.to(device, non_blocking=device.type == "cuda")
