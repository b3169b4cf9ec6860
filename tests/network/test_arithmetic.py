"""Devices that multiply bfloat16 faster than float32, and a measurement of this one."""

import platform
import statistics
import time

import pytest
import torch

from corinfomax import network
from corinfomax.recipes.fields import Backbone, Recipe

CPU = torch.device("cpu")
KEYS = {"cpu_name", "avx512_bf16", "amx_bf16"}


@pytest.mark.parametrize(
    ("capabilities", "faster"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R) Processor", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R) Processor", "avx512_bf16": True, "amx_bf16": True}, True),
        ({}, False),
    ],
)
def test_cpus_by_their_capabilities(monkeypatch, capabilities, faster):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert network.faster_in_bfloat16(CPU) is faster


@pytest.mark.parametrize(("name", "trained_in"), [("test_resnet", "bfloat16"), ("test_efficientnet", "float32")])
def test_depthwise_convolutions_train_in_float32_on_a_cpu(monkeypatch, name, trained_in):
    monkeypatch.setattr(network, "faster_in_bfloat16", lambda device: True)
    recipe = Recipe(backbone=Backbone(name=name))
    assert network.choose_precision(recipe, CPU, training=True) == trained_in
    assert network.choose_precision(recipe, CPU) == "bfloat16"
    assert network.choose_precision(recipe, torch.device("cuda"), training=True) == "bfloat16"
    typed = Recipe(backbone=Backbone(name=name), precision="bfloat16")
    assert network.choose_precision(typed, CPU, training=True) == "bfloat16"


@pytest.mark.parametrize(("capability", "faster"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_by_their_compute_capability(monkeypatch, capability, faster):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert network.faster_in_bfloat16(torch.device("cuda")) is faster


def test_an_older_torch_and_other_devices_use_float32(monkeypatch):
    assert network.faster_in_bfloat16(torch.device("mps")) is False
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert network.faster_in_bfloat16(CPU) is False


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors name other capabilities")
@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="needs a torch with capabilities")
def test_torch_knows_these_capabilities():
    assert torch.cpu.get_capabilities().keys() >= KEYS


def test_this_cpu_is_faster_in_bfloat16_if_it_claims_to_be():
    if not network.faster_in_bfloat16(CPU):
        pytest.skip("this CPU is not one of them")
    kinds, rng = (torch.float32, torch.bfloat16), torch.Generator().manual_seed(0)
    images, kernel = torch.randn(32, 64, 32, 32, generator=rng), torch.randn(64, 64, 3, 3, generator=rng)
    cast = {kind: [t.to(kind, memory_format=torch.channels_last) for t in (images, kernel)] for kind in kinds}
    seconds: dict[torch.dtype, list[float]] = {kind: [] for kind in kinds}
    for _ in range(7):
        for kind in kinds:
            began = time.process_time()
            torch.conv2d(*cast[kind], padding=1)
            seconds[kind].append(time.process_time() - began)
    ratio = statistics.median(seconds[torch.float32]) / statistics.median(seconds[torch.bfloat16])
    assert ratio > 1.2, f"bfloat16 is {ratio:.2f} times as fast"  # 2.0 on a busy EPYC
