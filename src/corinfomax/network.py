"""The network that is trained, a timm backbone with pooled features and the projector on top, and its arithmetic."""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from corinfomax.recipes.fields import Backbone, Projector, Recipe


class Network(nn.Module):
    """Backbone and projector; `network(x)` gives projections, `network.backbone(x)` the features that are kept."""

    def __init__(self, backbone: Backbone, projector: Projector, *, size: int = 224) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone, size=size)
        self.projector = build_projector(feature_width(self.backbone), projector)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Projections of one view. Each view needs a forward of its own: BatchNorm's statistics are a view's own."""
        return self.projector(self.backbone(x))


def build_backbone(backbone: Backbone, *, size: int = 224) -> nn.Module:
    """An untrained timm network without classifier: (n, 3, size, size) images to (n, feature_width) pooled features.

    `size` matters to networks of a fixed input size alone, such as ViTs, whose position embeddings it decides.
    Raises ValueError for a name that timm does not know, and for ResNet options on another network.
    """
    options: dict[str, Any] = {
        name: value for name in ("layers", "channels") if (value := getattr(backbone, name)) is not None
    }
    if not timm.is_model(backbone.name):
        near = ", ".join(timm.list_models(f"*{backbone.name}*")[:6]) or "nothing; timm.list_models() has all"
        raise ValueError(f"timm knows no network {backbone.name!r}; near it: {near}")
    if fixed_size(backbone):
        options["img_size"] = size
    if not backbone.zero_init_last:
        options["zero_init_last"] = False
    layers, channels = backbone.layers, backbone.channels
    if layers is not None and (len(layers) != 4 or layers[0] < 1):
        raise ValueError(f"layers are {layers}; a ResNet has four stages, and the first needs a block")
    if channels is not None and len(channels) != 4:
        raise ValueError(f"channels are {channels}; a ResNet has four stages")
    if layers is not None and channels is not None:
        for stage in (1, 2, 3):
            if layers[stage] == 0 and channels[stage] != channels[stage - 1]:
                raise ValueError(
                    f"stage {stage} has no block, so its width stays {channels[stage - 1]} and cannot be "
                    f"{channels[stage]}: give layers and channels that fit, such as --backbone.layers 1 1 1 1"
                )
    try:
        model = timm.create_model(backbone.name, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        raise ValueError(f"{backbone.name} does not take {', '.join(options)}; these are for ResNets") from error
    if backbone.small_stem:
        if not isinstance(model, timm.models.resnet.ResNet) or not isinstance(model.conv1, nn.Conv2d):
            raise ValueError(f"small_stem replaces the first convolution of a ResNet; {backbone.name} has none such")
        width = model.conv1.out_channels
        first = model.get_submodule("layer1.0")
        if backbone.channels is not None and isinstance(first, timm.models.resnet.BasicBlock):
            # timm's stem has 64 channels whatever follows: half of a narrow network's time.
            width = backbone.channels[0]
            model.register_module("bn1", nn.BatchNorm2d(width))
            first.register_module("conv1", _convolution(width, width, stride=1))
            if first.downsample is not None:  # 64 channels after 64 have none, and then it is no module's name
                first.register_module("downsample", None)
        model.register_module("conv1", _convolution(3, width, stride=backbone.stem_stride))
        model.register_module("maxpool", nn.Identity())
    return model


def fixed_size(backbone: Backbone) -> bool:
    """Whether timm's network of that name takes images of one size alone, as ViTs do."""
    known = timm.get_pretrained_cfg(backbone.name)
    return known is not None and bool(known.fixed_input_size)


def _convolution(inputs: int, outputs: int, *, stride: int) -> nn.Conv2d:
    """3×3, with timm's initialisation of a ResNet's convolutions."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def feature_width(backbone: nn.Module) -> int:
    """Length of the feature vectors that a timm network without classifier gives; some widen after pooling."""
    width = backbone.head_hidden_size
    assert isinstance(width, int)
    return width


def build_projector(features: int, projector: Projector) -> nn.Sequential:
    """Linear – ReLU – … – Linear(no bias); with `batch_norm` each hidden Linear is followed by BatchNorm."""
    layers: list[nn.Module] = []
    *hidden, dim = projector.widths
    for width in hidden:
        layers.append(nn.Linear(features, width))
        if projector.batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.ReLU(inplace=True))
        features = width
    return nn.Sequential(*layers, nn.Linear(features, dim, bias=False))


def precision(recipe: Recipe, device: torch.device) -> Literal["float32", "bfloat16", "float16", "float64"]:
    """The network's arithmetic: the recipe's, or for "auto" bfloat16 where the hardware is faster in it."""
    if recipe.precision != "auto":
        return recipe.precision
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


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


def ready(x: Float[Tensor, "n 3 h w"], model: nn.Module) -> Float[Tensor, "n 3 h w"]:
    """Views, which are float32, in the type of the model's weights, if it has any."""
    weight = next(model.parameters(), None)
    return x if weight is None else x.to(weight.dtype)


def arithmetic(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The context in which the network runs: autocast to the recipe's precision."""
    lower = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision(recipe, device))
    return torch.autocast(device.type, lower or torch.bfloat16, enabled=lower is not None)
