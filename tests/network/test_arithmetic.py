"""Which processors multiply bfloat16 faster than float32; and that this one does, where it is said to."""

import platform
import statistics
import time

import pytest
import torch

from corinfomax import network as hardware

CPU = torch.device("cpu")
KEYS = {"cpu_name", "avx512_bf16", "amx_bf16"}


@pytest.mark.parametrize(
    ("known", "faster"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R) Processor", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R) Processor", "avx512_bf16": True, "amx_bf16": True}, True),
        ({}, False),
    ],
)
def test_processors_are_told_apart(monkeypatch, known, faster):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert hardware.multiplies_bfloat16(CPU) is faster


@pytest.mark.parametrize(("capability", "faster"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_are_told_apart(monkeypatch, capability, faster):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hardware.multiplies_bfloat16(torch.device("cuda")) is faster


def test_an_older_torch_and_other_devices_have_float32(monkeypatch):
    assert hardware.multiplies_bfloat16(torch.device("mps")) is False
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert hardware.multiplies_bfloat16(CPU) is False


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have other words")
@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this torch does not tell")
def test_torch_tells_what_is_asked_of_it():
    assert torch.cpu.get_capabilities().keys() >= KEYS


def test_where_bfloat16_is_said_to_be_faster_it_is():
    if not hardware.multiplies_bfloat16(CPU):
        pytest.skip("this processor is not said to be")
    kinds, rng = (torch.float32, torch.bfloat16), torch.Generator().manual_seed(0)
    given = torch.randn(32, 64, 32, 32, generator=rng), torch.randn(64, 64, 3, 3, generator=rng)
    ready = {kind: [t.to(kind, memory_format=torch.channels_last) for t in given] for kind in kinds}
    taken: dict[torch.dtype, list[float]] = {kind: [] for kind in kinds}
    for _ in range(7):
        for kind in kinds:
            began = time.process_time()
            torch.conv2d(*ready[kind], padding=1)
            taken[kind].append(time.process_time() - began)
    ratio = statistics.median(taken[torch.float32]) / statistics.median(taken[torch.bfloat16])
    assert ratio > 1.2, f"bfloat16 is {ratio:.2f} times as fast"  # 2.0 on an EPYC, between other programs
