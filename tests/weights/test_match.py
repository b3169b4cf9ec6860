"""Layouts of other tools: each loads whole and computes the same, or the refusal says what to do."""

import re

import pytest
import timm
import torch
from torch import Tensor, nn

from corinfomax.runtime.records import WeightsOptions
from corinfomax.weights.load import load_backbone

Tensors = dict[str, Tensor]


def trained(name: str, **options) -> nn.Module:
    """A network without classifier whose every tensor is random, so that one in a wrong place shows."""
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=0, **options).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if tensor.ndim == 1 else tensor.normal_(std=0.05)
    return model


def named(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def linear(prefix: str, *layers: int) -> Tensors:
    return {f"{prefix}{layer}.{name}": torch.randn(4, 4) for layer in layers for name in ("weight", "bias")}


def outputs(model: nn.Module, size: int) -> Tensor:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x)


def numbered(model: nn.Module, state: Tensors) -> Tensors:
    """The names of nn.Sequential(*model.children())."""
    numbers = {name: str(i) for i, (name, _) in enumerate(model.named_children())}
    return {numbers[name.partition(".")[0]] + "." + name.partition(".")[2]: x for name, x in state.items()}


def lightly(model: nn.Module, state: Tensors) -> dict:
    heads = linear("projection_head.layers.", 0, 3) | linear("prediction_head.layers.", 0)
    return {"state_dict": named("backbone.", numbered(model, state)) | heads}


def moco_v2(model: nn.Module, state: Tensors) -> dict:
    other = {name: tensor * 0.5 for name, tensor in state.items()}
    both = named("module.encoder_q.", state | linear("fc.", 0, 2)) | named(
        "module.encoder_k.", other | linear("fc.", 0, 2)
    )
    return {"arch": "resnet18", "state_dict": both | {"module.queue": torch.randn(4, 8)}}


def moco_v3(model: nn.Module, state: Tensors) -> dict:
    other = {name: tensor * 0.5 for name, tensor in state.items()}
    head = linear("head.", 0, 1, 3, 4, 6)
    networks = named("module.base_encoder.", state | head) | named("module.momentum_encoder.", other | head)
    return {"state_dict": networks | linear("module.predictor.", 0, 1, 3)}


def dino(model: nn.Module, state: Tensors) -> dict:
    other = {name: tensor * 0.5 for name, tensor in state.items()}
    student = named("module.backbone.", other) | linear("module.head.mlp.", 0, 2)
    return {"student": student, "teacher": named("backbone.", state) | linear("head.mlp.", 0, 2), "epoch": 3}


def lightly_train(model: nn.Module, state: Tensors) -> dict:
    other = {name: tensor * 0.5 for name, tensor in state.items()}
    inner = "embedding_model.wrapped_model._model."
    return {"state_dict": named(f"teacher_{inner}", state) | named(f"student_{inner}", other)}


def compiled(model: nn.Module, state: Tensors) -> Tensors:
    return {f"module._orig_mod.{re.sub(r'^layer2.', 'layer2._orig_mod.', name)}": x for name, x in state.items()}


def convnext_of_facebook(model: nn.Module, state: Tensors) -> dict:
    """The names of the original ConvNeXt, from timm's."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("stem.", "downsample_layers.0.")
        name = re.sub(r"stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2", name)
        name = re.sub(r"stages\.(\d)\.blocks\.(\d+)", r"stages.\1.\2", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
        renamed[name.replace("head.norm.", "norm.")] = tensor
    return {"model": renamed | {"head.weight": torch.randn(9, 9), "head.bias": torch.randn(9)}}


def dinov2(model: nn.Module, state: Tensors) -> Tensors:
    return state | {"mask_token": torch.randn(1, 384)}


CASES = [
    # network, its own options, the layout, options to load it, words of the summary
    ("resnet18", {}, lightly, {}, "prefix backbone. removed; numbered children named"),
    ("resnet18", {}, numbered, {}, "numbered children named"),
    ("resnet18", {}, moco_v2, {"prefix": "module.encoder_q"}, "classifier module.encoder_q.fc.0.weight and "),
    ("resnet18", {}, compiled, {}, "prefix module. removed"),
    ("resnet18", {}, lightly_train, {"prefix": "teacher_embedding_model"}, "prefix teacher_embedding_model."),
    ("vit_tiny_patch16_224", {"img_size": 32}, moco_v3, {"prefix": "module.base_encoder", "size": 32}, "head.0.weight"),
    ("vit_tiny_patch16_224", {"img_size": 32}, dino, {"prefix": "teacher", "size": 32}, "prefix teacher.backbone."),
    ("convnext_atto", {}, convnext_of_facebook, {"size": 64}, "names converted by timm"),
    ("vit_small_patch14_dinov2", {"img_size": 28, "depth": 1}, dinov2, {"size": 28}, "names converted by timm"),
]


@pytest.mark.parametrize(("name", "options", "layout", "loading", "words"), CASES)
def test_a_layout_of_another_tool_loads_whole(tmp_path, monkeypatch, name, options, layout, loading, words):
    if "depth" in options:  # the network in one block
        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, **given: create(name, **given | {"depth": 1}))
        options = {"img_size": options["img_size"]}
    model = trained(name, **options)
    path = tmp_path / "a.pth"
    torch.save(layout(model, model.state_dict()), path)
    loaded = load_backbone(str(path), WeightsOptions(architecture=name, **loading))
    size = loaded.recipe.size
    torch.testing.assert_close(outputs(loaded.backbone, size), outputs(model, size), rtol=0, atol=0)
    assert words in loaded.summary


@pytest.mark.parametrize("layout", [lightly, numbered, compiled, convnext_of_facebook])
def test_a_layout_of_another_tool_is_recognised(tmp_path, layout):
    name = "convnext_tiny" if layout is convnext_of_facebook else "resnet34"
    model = trained(name)
    torch.save(layout(model, model.state_dict()), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"does not record its network; add --architecture {name}"):
        load_backbone(str(tmp_path / "a.pth"))


def test_position_embeddings_are_resized_and_it_is_said(tmp_path):
    model = trained("vit_tiny_patch16_224", img_size=64)
    torch.save(named("backbone.", model.state_dict()), tmp_path / "a.pth")
    loaded = load_backbone(str(tmp_path / "a.pth"), WeightsOptions(architecture="vit_tiny_patch16_224", size=32))
    assert "resized by timm: pos_embed" in loaded.summary
    ours, theirs = loaded.backbone.state_dict(), model.state_dict()
    assert ours["pos_embed"].shape == (1, 5, 192)
    assert all(ours[name].equal(theirs[name]) for name in ours if name != "pos_embed")
    small = timm.layers.resample_abs_pos_embed(theirs["pos_embed"], new_size=[2, 2])
    torch.testing.assert_close(ours["pos_embed"], small)


def test_patches_of_another_size_are_another_network(tmp_path):
    torch.save(trained("vit_small_patch32_224", img_size=64).state_dict(), tmp_path / "a.pth")  # timm would resample
    with pytest.raises(ValueError, match=r"is no vit_small_patch16_224.*patch_embed\.proj\.weight: 384×3×32×32 for "):
        load_backbone(str(tmp_path / "a.pth"), WeightsOptions(architecture="vit_small_patch16_224", size=32))


@pytest.mark.parametrize(("channels", "note"), [(1, "channels)"), (4, "channels: the last 1 left out)")])
def test_a_first_convolution_of_other_channels_is_adapted_and_it_is_said(tmp_path, channels, note):
    model = trained("resnet18", in_chans=channels)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    loaded = load_backbone(str(tmp_path / "a.pth"), WeightsOptions(architecture="resnet18", size=32))
    assert f"conv1.weight adapted from {channels} to 3 input {note}" in loaded.summary
    image = torch.randn(2, 1, 32, 32)
    if channels == 1:  # a grey image gives what it gave
        with torch.no_grad():
            torch.testing.assert_close(loaded.backbone(image.expand(2, 3, 32, 32)), model(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_weights_that_were_never_trained_are_refused(tmp_path, value):
    state = {name: torch.full_like(tensor, value) for name, tensor in trained("resnet18").state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"was never trained: all weights of 20 layers are {value:g}, as conv1"):
        load_backbone(str(tmp_path / "a.pth"), WeightsOptions(architecture="resnet18"))
