"""Tensors of anyone's file under the names of a timm network: whole, or refused with the reason."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from corinfomax.network import build_backbone
from corinfomax.recipes.fields import Backbone

Tensors = dict[str, Tensor]
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # torch adds them anywhere
RESNETS = "resnet18 resnet34 resnet50 resnet101 resnet152 wide_resnet50_2 resnext50_32x4d"
CONVNEXTS = "convnext_tiny convnext_small convnext_base convnextv2_tiny convnextv2_base"
FAMILIES = {  # networks that weights are often of, by a part of their tensors' names
    "layer1.0.": RESNETS,
    "4.0.conv1.": RESNETS,
    "blocks.0.attn.": "vit_tiny_patch16_224 vit_small_patch16_224 vit_base_patch16_224 vit_large_patch16_224 "
    "vit_small_patch14_dinov2 vit_base_patch14_dinov2 vit_large_patch14_dinov2 "
    "vit_small_patch14_reg4_dinov2 vit_base_patch14_reg4_dinov2 vit_large_patch14_reg4_dinov2",
    "stages.0.": f"{CONVNEXTS} regnety_016",
    "layers.0.blocks.": "swin_tiny_patch4_window7_224 swin_base_patch4_window7_224",
    "conv_stem.": "efficientnet_b0 efficientnet_b1 tf_efficientnet_lite0 tf_efficientnet_b0 tf_efficientnetv2_s "
    "mobilenetv3_large_100 mobilenetv3_small_100",
    "denseblock1.": "densenet121 densenet169",
}


def match_names(tensors: Tensors, model: nn.Module, *, source: str, prefix: str | None = None) -> tuple[Tensors, str]:
    """Tensors under the model's names, and a summary of what was ignored, added or converted ("" for nothing).

    The tensors must be the model's, in name and shape, with these exceptions. All names may have a prefix, such as
    `module.` or `backbone.`; tensors without it, such as a projector's, are then ignored. So is whatever stands in the
    place of the classifier. The children of the network may be numbered, as nn.Sequential does, and the names may be
    of another layout that timm knows how to convert; timm also resizes position embeddings. The first convolution may
    take another number of channels. BatchNorm's batch counts, missing in old files, are set to 0. Raises ValueError
    for others, and for several networks unless `prefix` begins the names of one alone.
    """
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    fits = list(_fits(tensors, model))
    chosen = [fit for fit in fits if prefix is None or f"{fit.prefix}.".startswith(f"{prefix.rstrip('.')}.")]
    complete = [fit for fit in chosen if fit.complete]

    # Exactly one must hold the whole model and nothing else.
    if prefix is not None and not chosen:
        if any(fit.complete and not fit.prefix for fit in fits):
            raise ValueError(f"the network in {source} has no prefix: leave out --prefix")
        starts = [fit.prefix for fit in fits if fit.prefix]
        # a network's inner layers may start like the network
        outer = [start for start in starts if not any(start != other and start.startswith(other) for other in starts)]
        raise ValueError(f"{source} has no network under the prefix {prefix!r}; it has {', '.join(outer) or 'none'}")
    if len(complete) > 1:
        under = " and ".join(fit.prefix or "no prefix" for fit in complete)
        choice = complete[-1].prefix.rstrip(".")
        problem = f"{source} holds {len(complete)} networks that fit, under {under}"
        raise ValueError(f"{problem}: choose one, for example --prefix {choice}")
    if not complete or complete[0].unexpected:
        raise ValueError(_misfit(tensors, chosen, model, source))

    # Note each exception.
    (fit,) = complete
    notes = [f"prefix {fit.prefix} removed"] if fit.prefix else []
    notes += fit.notes
    if fit.ignored:
        notes.append(f"classifier {' and '.join(fit.prefix + name for name in fit.ignored)} ignored")
    if outside := [name for name in tensors if not name.startswith(fit.prefix)]:
        some = f"{len(outside)} tensors" if len(outside) > 1 else "1 tensor"
        notes.append(f"{some} outside the backbone ignored, such as {outside[0]}")
    wanted = model.state_dict()
    if counts := [name for name in wanted if name not in fit.tensors]:
        notes.append(f"{len(counts)} batch counts set to 0")
    matched = {name: fit.tensors.get(name, torch.zeros_like(tensor)) for name, tensor in wanted.items()}
    return matched, "; ".join(notes)


def identify(tensors: Tensors) -> str | None:
    """The network of FAMILIES that the tensors fit, under any prefix and in any layout; None if none does."""
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    names = next((names for key, names in FAMILIES.items() if any(key in name for name in tensors)), "")
    for network in names.split():
        with torch.device("meta"):
            model = build_backbone(Backbone(name=network))
        # a smaller network of the family may lie within a larger one: few tensors, a projector's, may be left over
        most = max(8, len(model.state_dict()) // 10)
        if any(fit.complete and len(fit.unexpected) + len(fit.ignored) <= most for fit in _fits(tensors, model)):
            return network
    return None


class _Fit(NamedTuple):
    """The tensors under one prefix in one layout, beside those of the model."""

    prefix: str
    tensors: Tensors  # under the model's names, where they have one
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]  # name, shape and the shape wanted
    ignored: list[str]  # in the place of the classifier
    notes: list[str]  # what was converted

    @property
    def complete(self) -> bool:
        return not self.missing and not self.reshaped

    @property
    def problems(self) -> dict[str, list[str]]:
        return {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.reshaped}


def _fits(tensors: Tensors, model: nn.Module) -> Iterator[_Fit]:
    """Every prefix of the model's first name; if no tensors under one are the model's, every prefix in any layout."""
    anchor = next(iter(model.state_dict()))
    starts = sorted({"", *(name[: -len(anchor)] for name in tensors if f".{name}".endswith(f".{anchor}"))})
    plain = [_compare(_under(tensors, start), model, start) for start in starts]
    if any(fit.complete and not fit.unexpected for fit in plain):
        yield from plain
        return

    # Every prefix that has enough tensors for a network.
    names = [name.split(".") for name in tensors]
    prefixes = {".".join([*parts[:depth], ""]) for parts in names for depth in range(min(len(parts), 6))}
    many = len(list(model.parameters())) // 2
    converted = []
    for start in sorted(prefixes):
        if len(under := _under(tensors, start)) >= many:
            for layout in (_named_children, _of_timm):
                if (renamed := layout(under, model)) is not None:
                    converted.append(_compare(*renamed[:1], model, start, *renamed[1:]))
    fitting = [fit for fit in converted if fit.complete and not fit.unexpected]
    yield from fitting or plain


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _compare(tensors: Tensors, model: nn.Module, prefix: str, *notes: str) -> _Fit:
    """Names that do not fit the model's, by problem; those in the place of its classifier are optional."""
    config, wanted = model.pretrained_cfg, model.state_dict()
    heads, first = (
        ((each,) if isinstance(each := config.get(key) or (), str) else each)  # type: ignore[union-attr,operator]
        for key in ("classifier", "first_conv")
    )
    places = tuple(f"{head.partition('.')[0]}." for head in heads)  # of head.fc all of head, its norm too
    ignored = [name for name in tensors if name not in wanted and name.startswith(places)]
    unexpected = [name for name in tensors if name not in wanted and name not in ignored]
    missing = [name for name in wanted if name not in tensors and not name.endswith(".num_batches_tracked")]

    # Another number of input channels.
    remarks = list(notes)
    for name in (f"{layer}.weight" for layer in first):
        have, want = tensors.get(name), wanted.get(name)
        if have is None or want is None or have.ndim != 4 or have.shape == want.shape:
            continue
        if (have.shape[0], *have.shape[2:]) == (want.shape[0], *want.shape[2:]):
            tensors = tensors | {name: adapt_input_conv(want.shape[1], have, have.shape[1])}
            dropped = f": the last {have.shape[1] - 3} left out" if have.shape[1] > 3 else ""
            remarks.append(f"{name} adapted from {have.shape[1]} to {want.shape[1]} input channels{dropped}")

    reshaped = [
        f"{name}: {_shape(tensors[name])} for {_shape(tensor)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    return _Fit(prefix, tensors, missing, unexpected, reshaped, ignored, remarks)


def _named_children(tensors: Tensors, model: nn.Module) -> tuple[Tensors, str] | None:
    """Tensors of nn.Sequential(*network.children()) under the children's names; None if they are not numbered."""
    children = [name for name, _ in model.named_children()]
    numbers = {name.partition(".")[0] for name in tensors}
    if not numbers or not all(number.isdecimal() and int(number) < len(children) for number in numbers):
        return None
    renamed = {}
    for name, tensor in tensors.items():
        number, _, rest = name.partition(".")
        renamed[f"{children[int(number)]}.{rest}"] = tensor
    return renamed, "numbered children named"


def _of_timm(tensors: Tensors, model: nn.Module) -> tuple[Tensors, str] | None:
    """Tensors converted by timm's own function for this network; None if there is none or it fails."""
    module = sys.modules[type(model).__module__]
    convert: Callable[[Tensors, nn.Module], Tensors] | None = getattr(module, "checkpoint_filter_fn", None)
    if convert is None:
        return None
    try:
        converted = convert(dict(tensors), model)
    except Exception:  # timm's functions raise anything for layouts they do not know
        return None

    # timm also resamples patches of another size: that is another network
    same = {name: tensor for name, tensor in converted.items() if name in tensors}
    if any(tensor.ndim == 4 and tensors[name].shape != tensor.shape for name, tensor in same.items()):
        return None
    resized = [name for name, tensor in same.items() if tensors[name].shape != tensor.shape]
    return converted, f"resized by timm: {', '.join(resized)}" if resized else "names converted by timm"


def _misfit(tensors: Tensors, fits: list[_Fit], model: nn.Module, source: str) -> str:
    """The sentence about weights that do not fit: the network that they are of, if it is known, and what differs."""
    name = model.pretrained_cfg.get("architecture") or "network of this kind"  # type: ignore[union-attr,operator]
    likely = identify(tensors)
    if likely is not None and likely != name:
        return f"{source} is no {name}, so nothing was loaded: its tensors are those of {likely}"

    # the prefix under which most tensors fit
    wanted = len(model.state_dict())
    closest = max(fits, key=lambda fit: (wanted - len(fit.missing) - len(fit.reshaped), -len(fit.prefix)))
    problems = [
        f"{len(names)} {problem} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for problem, names in closest.problems.items()
        if names
    ]
    if any(problem.startswith("conv1.weight: ") for problem in closest.reshaped):
        problems.append("--small-stem is for a first convolution of 3×3")
    under = f" under {closest.prefix}" if closest.prefix else ""
    return f"{source} is no {name}, so nothing was loaded; tensors{under}: {', '.join(problems)}"


def check_values(tensors: Mapping[str, Tensor], model: nn.Module, *, source: str) -> None:
    """ValueError for weights that are not floats, not finite, or constant."""
    for name, wanted in model.state_dict().items():
        if wanted.is_floating_point() and not tensors[name].is_floating_point():
            raise ValueError(f"{source} holds integers ({tensors[name].dtype}) instead of weights, first in {name}")
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        some = f"{len(bad)} tensors, first" if len(bad) > 1 else "one tensor,"
        raise ValueError(f"{source} holds nan or inf in {some} {bad[0]}: its training diverged")
    if bad := [name for name, tensor in tensors.items() if name.endswith("running_var") and (tensor < 0).any()]:
        raise ValueError(f"{source} holds a negative variance in {bad[0]}: it is damaged")
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.ndim > 1}
    flat = [name for name, tensor in matrices.items() if tensor.min() == tensor.max()]
    if len(flat) > len(matrices) / 2:
        value = matrices[flat[0]].flatten()[0].item()
        raise ValueError(f"{source} was never trained: all weights of {len(flat)} layers are {value:g}, as {flat[0]}")


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"
