"""The network in training: a timm backbone, a projector on top, and the precision they run in."""

import contextlib
import copy
import difflib
import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

import timm
import torch
from jaxtyping import Float
from timm.models import adapt_input_conv, group_parameters
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from corinfomax.recipes.fields import Backbone, Projector, Recipe, Tuning
from corinfomax.runtime import memory
from corinfomax.runtime.seeds import generator

SIDES = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 299, 384, 448, 512)  # usual input sides of networks, in pixels


class Network(nn.Module):
    """Backbone and projector: `network(x)` gives projections, `network.backbone(x)` the features to keep."""

    def __init__(self, backbone: Backbone, projector: Projector, *, size: int = 224, channels: int = 3) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone, size=size, channels=channels)
        self.projector = build_projector(feature_width(self.backbone), projector)

    def forward(self, x: Float[Tensor, "n c h w"], *, projector_alone: bool = False) -> Float[Tensor, "n d"]:
        """Projections of one view. Call it once per view: BatchNorm's statistics belong to a single view.

        `projector_alone` gives the backbone no gradient, which takes a third of the time.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not projector_alone):
            features = self.backbone(x)
        return self.projector(features)


def is_described(backbone: nn.Module, recipe: Recipe) -> bool:
    """True if the recipe builds this very backbone, in eval mode: a folder of timm may have arguments of its own."""
    built, state = backbone_for(recipe).eval(), backbone.state_dict()
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in state.items()}:
        return False
    built.load_state_dict(state)
    x = torch.randn(2, recipe.pixels.channels, recipe.size, recipe.size, generator=generator(0, "same network"))
    with torch.inference_mode():
        return torch.allclose(built(x), backbone(x), rtol=1e-3, atol=1e-5)


def resized(backbone: nn.Module, recipe: Recipe) -> nn.Module:
    """The backbone for images of the recipe's size: a copy with resized position embeddings where they do not fit."""
    if not is_resizable(recipe.backbone):
        return backbone
    backbone = copy.deepcopy(backbone)
    backbone.set_input_size(img_size=recipe.size)  # type: ignore[operator]
    return backbone


def with_channels(backbone: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy of a backbone for the recipe's channels: timm repeats or sums the weights of its first convolution."""
    built, state = backbone_for(recipe), backbone.state_dict()
    first = cast(Any, backbone).pretrained_cfg["first_conv"]
    for layer in (first,) if isinstance(first, str) else first:
        state[f"{layer}.weight"] = adapt_input_conv(recipe.pixels.channels, state[f"{layer}.weight"])
    built.load_state_dict(state)
    return built.eval()


def start_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """A backbone's tensors under their names in a Network."""
    return {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}


def freeze(backbone: nn.Module, tuning: Tuning) -> None:
    """Leave the last share of the blocks to train, and BatchNorm's statistics as they are where `tuning` keeps them.

    Frozen blocks get no gradient and stay in eval mode.
    """
    names = set[str]()
    if tuning.blocks < 1:
        blocks = blocks_of(backbone)
        frozen = blocks[: len(blocks) - max(1, round(tuning.blocks * len(blocks)))]
        names = {name for block in frozen for name in block}
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name not in names)
    for module in backbone.modules():
        trained = [parameter.requires_grad for parameter in module.parameters()]
        keeps_statistics = tuning.batch_norm == "keep" and isinstance(module, nn.modules.batchnorm._BatchNorm)
        if keeps_statistics or (trained and not any(trained)):
            module.eval()


def blocks_of(backbone: nn.Module) -> list[list[str]]:
    """Names of the parameters of each block of a timm network, from the input on; its stem is the first block.

    ValueError for a network whose blocks timm does not know.
    """
    if not hasattr(backbone, "group_matcher"):
        remedy = "train them all: --tuning.blocks 1 --tuning.layer-decay 1"
        raise ValueError(f"timm does not know the blocks of {type(backbone).__name__}: {remedy}")
    matcher = cast(Any, backbone).group_matcher(coarse=False)
    return list(group_parameters(backbone, matcher).values())


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode inside the block; afterwards each module has its own mode back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def network_for(recipe: Recipe) -> Network:
    """The untrained network of a recipe, for its images."""
    return Network(recipe.backbone, recipe.projector, size=recipe.size, channels=recipe.pixels.channels)


def backbone_for(recipe: Recipe) -> nn.Module:
    """The untrained backbone of a recipe, for its images."""
    return build_backbone(recipe.backbone, size=recipe.size, channels=recipe.pixels.channels)


def build_backbone(backbone: Backbone, *, size: int = 224, channels: int = 3) -> nn.Module:
    """An untrained timm network without classifier: (n, channels, size, size) images to (n, feature_width) features.

    `size` matters only to networks of a fixed input size, such as ViTs: it decides their position embeddings.
    Raises ValueError for a name unknown to timm, and for options of ResNets on another network.
    """
    # refuse what timm would not name clearly
    check_name(backbone.name)
    _check_stages(backbone.layers, backbone.channels)

    # only what differs from timm's defaults: networks other than ResNets refuse these options
    options: dict[str, Any] = {"layers": backbone.layers, "channels": backbone.channels}
    options = {option: value for option, value in options.items() if value is not None}
    options |= {"img_size": size} if has_fixed_size(backbone) else {}
    options |= {} if backbone.zero_init_last else {"zero_init_last": False}
    options |= {"drop_path_rate": backbone.drop_path} if backbone.drop_path else {}
    options |= {"in_chans": channels} if channels != 3 else {}
    try:
        model = timm.create_model(backbone.name, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        raise ValueError(f"{backbone.name} does not take {', '.join(options)}; most are for ResNets") from error

    if backbone.small_stem:
        _use_small_stem(model, backbone, channels)
    return model


def check_name(name: str) -> None:
    """ValueError for a network that timm does not have, or a tag behind it of weights that timm does not have."""
    architecture = name.partition(".")[0]
    if not timm.is_model(name):
        close = difflib.get_close_matches(architecture.lower(), timm.list_models(), n=5)
        raise ValueError(f"timm knows no network {name!r}; closest: {', '.join(close) or 'none'}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*")[:6])
        raise ValueError(f"timm has no weights {name!r}; it has {tags}") from error


class Size(NamedTuple):
    """The size of a backbone."""

    weights: int
    features: int


def measure(backbone: Backbone, side: int) -> Size | None:
    """The size of a backbone, built and run without memory; None if it cannot take images of `side` pixels."""
    if side < 1 or side % (_patch(backbone) or 1):  # a ViT would drop the pixels of a partial patch
        return None
    try:
        with torch.device("meta"):
            model = build_backbone(backbone, size=side).eval()
            features = model(torch.empty(2, 3, side, side)).shape[1]
    except (RuntimeError, AssertionError, IndexError):  # timm and torch raise any of these for views that are too small
        return None
    return Size(sum(weight.numel() for weight in model.parameters()), features)


@functools.cache
def _patch(backbone: Backbone) -> int | None:
    """Side of a ViT's patches, in pixels; None for networks that take images of any size."""
    if not has_fixed_size(backbone):
        return None
    with torch.device("meta"):
        model = timm.create_model(backbone.name, num_classes=0)
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return max(size) if isinstance(size, tuple) else size


def smallest_side(backbone: Backbone, above: int) -> int:
    """The smallest side above `above` px that a network can take; ValueError if there is none up to SIDES[-1]."""
    patch = _patch(backbone)
    sides = range((above // patch + 1) * patch, SIDES[-1] + 1, patch) if patch else SIDES
    side = next((side for side in sides if side > above and measure(backbone, side) is not None), None)
    if side is None:
        raise ValueError(f"{backbone.name} cannot take views of {above} px, nor larger ones up to {SIDES[-1]} px")
    if patch:
        return side

    # the smallest between the last side that is too small and this one
    low = max(above, *(smaller for smaller in (0, *SIDES) if smaller < side))
    while side - low > 1:
        middle = (low + side) // 2
        low, side = (low, middle) if measure(backbone, middle) is not None else (middle, side)
    return side


def _check_stages(layers: tuple[int, ...] | None, channels: tuple[int, ...] | None) -> None:
    if layers is not None and (len(layers) != 4 or layers[0] < 1):
        raise ValueError(f"layers are {layers}; a ResNet has four stages, and the first needs a block")
    if channels is not None and len(channels) != 4:
        raise ValueError(f"channels are {channels}; a ResNet has four stages")
    for stage in (1, 2, 3):
        if layers and channels and layers[stage] == 0 and channels[stage] != channels[stage - 1]:
            widths = f"its width stays {channels[stage - 1]} and cannot be {channels[stage]}"
            fitting = "choose layers and channels that fit, such as --backbone.layers 1 1 1 1"
            raise ValueError(f"stage {stage} has no block, so {widths}: {fitting}")


def _use_small_stem(model: nn.Module, backbone: Backbone, channels: int) -> None:
    """Replace a ResNet's 7×7 convolution and max-pool by a 3×3 convolution, for small images."""
    if not isinstance(model, ResNet) or not isinstance(model.conv1, nn.Conv2d):
        raise ValueError(f"small_stem replaces the first convolution of a ResNet; {backbone.name} has none such")
    width = model.conv1.out_channels
    first = model.get_submodule("layer1.0")
    if backbone.channels is not None and isinstance(first, BasicBlock):
        # timm's stem has 64 channels at any width: half the time of a narrow network.
        width = backbone.channels[0]
        model.bn1 = nn.BatchNorm2d(width)
        first.conv1 = _conv3x3(width, width, stride=1)
        first.downsample = None  # no shortcut to widen any more
        stem = _conv3x3(channels, width, stride=backbone.stem_stride)
    else:  # with torch's own initialisation, as in the published code
        stem = nn.Conv2d(channels, width, 3, stride=backbone.stem_stride, padding=1, bias=False)
    model.register_module("conv1", stem)
    model.register_module("maxpool", nn.Identity())


def _conv3x3(inputs: int, outputs: int, *, stride: int) -> nn.Conv2d:
    """A 3×3 convolution with timm's initialisation of a ResNet."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def has_fixed_size(backbone: Backbone) -> bool:
    """True for a timm network that takes images of one size only, as ViTs do."""
    config = timm.get_pretrained_cfg(backbone.name)
    return config is not None and bool(config.fixed_input_size)


@functools.cache
def is_resizable(backbone: Backbone) -> bool:
    """True for a timm network of one input size that timm can change, such as a ViT; not an MLP-Mixer."""
    if not has_fixed_size(backbone):
        return False
    with torch.device("meta"):
        return hasattr(timm.create_model(backbone.name, num_classes=0), "set_input_size")


def feature_width(backbone: nn.Module) -> int:
    """Length of the feature vectors of a timm network without classifier; some networks widen after pooling."""
    return cast(int, backbone.head_hidden_size)


def build_projector(features: int, projector: Projector) -> nn.Sequential:
    """Linear – ReLU – … – Linear(no bias); with `batch_norm`, BatchNorm follows each hidden Linear."""
    layers: list[nn.Module] = []
    *hidden, dim = projector.widths
    for width in hidden:
        norm = [nn.BatchNorm1d(width)] if projector.batch_norm else []
        layers += [nn.Linear(features, width), *norm, nn.ReLU(inplace=True)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, dim, bias=False))


# Precision: `with autocast(recipe, device): z = network(match_dtype(view, network))`. Autocast lowers float32 to
# bfloat16 or float16; in float64 the weights themselves are float64, and views are cast to match.


def choose_precision(
    recipe: Recipe, device: torch.device, *, training: bool = False
) -> Literal["float32", "bfloat16", "float16", "float64"]:
    """The recipe's precision; "auto" is bfloat16 on devices that are faster in it, else float32."""
    if recipe.precision != "auto":
        return recipe.precision
    # On a CPU the backward pass of a depthwise convolution takes twice the time in bfloat16 (dev/LOG.md).
    slower = training and device.type == "cpu" and _has_grouped_convolutions(recipe.backbone)
    return "bfloat16" if faster_in_bfloat16(device) and not slower else "float32"


@functools.cache
def _has_grouped_convolutions(backbone: Backbone) -> bool:
    with torch.device("meta"):
        model = build_backbone(backbone)
    return any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in model.modules())


def faster_in_bfloat16(device: torch.device) -> bool:
    """True for devices that multiply bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # CPUs: a Xeon with AVX-512's bfloat16 but no AMX gained nothing (measured, dev/LOG.md); older torch cannot tell
    features: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(features.get("amx_bf16") or (features.get("avx512_bf16") and "AMD" in str(features.get("cpu_name"))))


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The context in which the network runs in the recipe's precision."""
    lower = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(choose_precision(recipe, device))
    return torch.autocast(device.type, lower or torch.bfloat16, enabled=lower is not None)


def match_dtype(x: Float[Tensor, "n c h w"], model: nn.Module) -> Float[Tensor, "n c h w"]:
    """Views, which are float32, in the dtype of the model's weights, if it has any."""
    weight = next(model.parameters(), None)
    return x if weight is None else x.to(weight.dtype)


@torch.inference_mode()
def activations(model: nn.Module, recipe: Recipe, device: torch.device, *, side: int) -> int:
    """Bytes that one more image of this side takes at the worst moment of a pass without gradients."""

    def forward(count: int) -> None:
        x = torch.zeros(count, recipe.pixels.channels, side, side, device=device).to(memory_format=torch.channels_last)
        model(match_dtype(x, model))

    with evaluating(model), autocast(recipe, device):
        return memory.growth(forward)


def images_at_once(model: nn.Module, recipe: Recipe, device: torch.device, *, side: int, most: int) -> int:
    """Images of this side in a batch without gradients: `most`, or fewer where their activations take much memory."""
    return memory.images_at_once(activations(model, recipe, device, side=side), device, most=most)
