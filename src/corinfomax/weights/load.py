"""Backbones from trained weights, whole or not at all: our runs and exports, timm's weights, any state dict."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from timm.models import PretrainedCfg
from torch import Tensor, nn

from corinfomax.network import build_backbone, check_name
from corinfomax.recipes import fields
from corinfomax.recipes.fields import Backbone, Recipe
from corinfomax.runtime import run_folder
from corinfomax.weights import checkpoint

PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt")
# Keys under which training scripts save their state dict.
NESTED = ("state_dict", "model_state_dict", "model", "backbone", "encoder", "network", "net")
Tensors = dict[str, Tensor]


class LoadedBackbone(NamedTuple):
    """A backbone in eval mode with trained weights."""

    backbone: nn.Module
    recipe: Recipe  # size, mean, std and precision of its input; for a run of ours, its whole training
    summary: str  # source and number of the tensors, and any that were ignored


def load_backbone(
    name: str, *, architecture: str | None = None, small_stem: bool = False, size: int | None = None
) -> LoadedBackbone:
    """The backbone of `name`: a path, or `timm:NETWORK` for timm's pretrained weights.

    A path is a run folder or its checkpoint, a folder in timm's layout such as an export, or a state dict in
    .safetensors or a pickle, from which only tensors and plain values are read. `architecture` is the timm network of
    a state dict that does not record one, `small_stem` its 3×3 first convolution without max-pool. `size` is the input
    side of foreign weights, timm's by default. Only `timm:` may connect to the internet. Raises ValueError or OSError.
    """
    path = Path(name).expanduser()
    if name.startswith("timm:"):
        return _load_timm(name.removeprefix("timm:"), size)
    if (path / "config.json").is_file():
        return _load_timm_folder(path, size)

    # A run or a checkpoint.
    is_tensors = path.suffix == ".safetensors" and path.is_file()
    if path.is_dir() or (is_tensors and "corinfomax" in checkpoint.read_safetensors(path)[1]):
        network, saved = checkpoint.load_network(path)
        summary = f"all {len(network.backbone.state_dict())} tensors of the backbone, step {saved.step} of {path}"
        return LoadedBackbone(network.backbone, saved.recipe, summary)

    # A state dict.
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; name a run folder, a file of weights, or timm:NETWORK")
    tensors, recipe, recorded = read_state_dict(path)
    if recipe is None:
        if (architecture := architecture or recorded) is None:
            raise ValueError(f"{path} does not record its network; add --architecture, a timm name such as resnet18")
        recipe = _timm_recipe(Backbone(name=architecture, small_stem=small_stem), size, _timm_config(architecture))
    return _load_tensors(build_backbone(recipe.backbone, size=recipe.size), tensors, recipe, str(path))


def match_names(tensors: Tensors, model: nn.Module, *, source: str) -> tuple[Tensors, str]:
    """Tensors under the model's names, and a summary of the ones ignored or added ("" for none).

    The tensors must be the model's, in name and shape, with three exceptions. All names may have a prefix, such as
    `module.` or `backbone.`; tensors without it, such as a projector's, are then ignored. So is the classifier of a
    timm network. BatchNorm's batch counts, missing in old files, are set to 0. Raises ValueError for others.
    """
    # The classifier's names; our models have none.
    classifier = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr,operator]
    modules = (classifier,) if isinstance(classifier, str) else classifier
    heads = {f"{module}.{tensor}" for module in modules for tensor in ("weight", "bias")}

    # Every prefix of the model's first name is a candidate.
    wanted = model.state_dict()
    anchor = next(iter(wanted))
    prefixes = sorted({name[: -len(anchor)] for name in tensors if f".{name}".endswith(f".{anchor}")})
    mismatches = {prefix: _mismatch(tensors, wanted, prefix, heads) for prefix in prefixes or [""]}

    # Exactly one must hold the whole model and nothing else.
    complete = [prefix for prefix, bad in mismatches.items() if not bad["missing"] and not bad["of another shape"]]
    if len(complete) > 1:
        under = ", ".join(prefix or "no prefix" for prefix in complete)
        raise ValueError(f"{source} holds several matching networks, under {under}; save only the one you want")
    if not complete or mismatches[complete[0]]["unexpected"]:
        closest = min(mismatches.values(), key=lambda mismatch: sum(map(len, mismatch.values())))
        problems = [
            f"{len(names)} {problem} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for problem, names in closest.items()
            if names
        ]
        raise ValueError(f"{source} does not fit the network, so nothing was loaded; tensors: {', '.join(problems)}")

    # Rename, and note each exception.
    (prefix,) = complete
    matched = {name: tensors[prefix + name] for name in wanted if prefix + name in tensors}
    notes = [f"prefix {prefix} removed"] if prefix else []
    if ignored := [name for name in tensors if name in {prefix + head for head in heads}]:
        notes.append(f"classifier {' and '.join(ignored)} ignored")
    if outside := [name for name in tensors if not name.startswith(prefix)]:
        notes.append(f"{len(outside)} tensors outside the backbone ignored, such as {outside[0]}")
    if counts := [name for name in wanted if name not in matched]:
        notes.append(f"{len(counts)} batch counts set to 0")
        matched |= {name: torch.zeros_like(wanted[name]) for name in counts}
    return matched, "; ".join(notes)


def _mismatch(tensors: Tensors, wanted: Tensors, prefix: str, heads: set[str]) -> dict[str, list[str]]:
    """Names under `prefix` that do not fit the model's, by problem; those in `heads` are optional."""
    present = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    reshaped = [name for name in wanted if name in present and present[name].shape != wanted[name].shape]
    return {
        "missing": [name for name in wanted if name not in present and not name.endswith(".num_batches_tracked")],
        "unexpected": [name for name in present if name not in wanted and name not in heads],
        "of another shape": [f"{name}: {_shape(present[name])} for {_shape(wanted[name])}" for name in reshaped],
    }


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _load_tensors(model: nn.Module, tensors: Tensors, recipe: Recipe, source: str) -> LoadedBackbone:
    """The model with these tensors in eval mode; ValueError unless they fit and are finite floats."""
    matched, notes = match_names(tensors, model, source=source)
    for name, wanted in model.state_dict().items():
        if wanted.is_floating_point() and not matched[name].is_floating_point():
            raise ValueError(f"{source} holds integers ({matched[name].dtype}) instead of weights, first in {name}")
    if bad := [name for name, tensor in matched.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{source} holds nan or inf in {len(bad)} tensors, first {bad[0]}: its training diverged")
    model.load_state_dict(matched)
    summary = f"all {len(matched)} tensors of {source}, a {recipe.backbone.name} {recipe.resolution}"
    return LoadedBackbone(model.eval(), recipe, f"{summary} ({notes})" if notes else summary)


def read_state_dict(path: Path) -> tuple[Tensors, Recipe | None, str | None]:
    """Tensors of a file, and its recorded recipe or architecture; pickled code never runs."""
    if path.suffix == ".safetensors":
        tensors, metadata = checkpoint.read_safetensors(path)
        try:
            return tensors, fields.from_json(json.loads(metadata["recipe"])) if "recipe" in metadata else None, None
        except ValueError as error:
            raise ValueError(f"{path} records an invalid recipe: {error}") from error
    if path.suffix not in PICKLED:
        raise ValueError(f"{path} is not a file of weights: these end in .safetensors, {', '.join(PICKLED)}")

    # Read the pickle without running code from it.
    try:
        with warnings.catch_warnings(action="ignore"):  # torch would advise to allow code
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a parser of foreign files may raise anything
        risk = "it is torn, or holds objects that could run code when read"
        raise ValueError(f"{path} was refused: {risk}; if you trust it, save its state dict as .safetensors") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; want a state dict, names with their tensors")

    # Training scripts may record timm's name of the architecture.
    architecture = content.get("arch") or content.get("architecture")
    architecture = architecture if isinstance(architecture, str) and timm.is_model(architecture) else None

    # Tensors at the top, or under one key.
    if not all(isinstance(value, Tensor) for value in content.values()):
        inner = [name for name in NESTED if isinstance(content.get(name), dict)]
        if len(inner) != 1:
            keys = ", ".join(map(str, list(content)[:8]))
            raise ValueError(f"{path} holds {keys} instead of one state dict; save the one you want as .safetensors")
        content = content[inner[0]]
    if not content or not all(isinstance(key, str) and isinstance(x, Tensor) for key, x in content.items()):
        raise ValueError(f"{path} holds no state dict: want names with their tensors")
    return content, None, architecture


def _load_timm_folder(folder: Path, size: int | None) -> LoadedBackbone:
    """A backbone from config.json and model.safetensors, as on timm's hub and in an exported folder."""
    if not (file := folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} has a config.json but no model.safetensors beside it")
    tensors, recipe, _ = read_state_dict(file)
    if recipe is not None:  # an export of ours
        return _load_tensors(build_backbone(recipe.backbone, size=recipe.size), tensors, recipe, str(folder))

    # Any other network of timm.
    config = run_folder.read_json(folder / "config.json")
    name = config.get("architecture", "")
    if not timm.is_model(name):
        raise ValueError(f"{folder / 'config.json'} names the architecture {name!r}, unknown to timm")
    spec = {**config, **config.get("pretrained_cfg", {})}
    spec = {name: spec[name] for name in ("input_size", "mean", "std") if spec.get(name)}
    model = timm.create_model(name, **{**config.get("model_args", {}), "num_classes": 0})
    return _load_tensors(model, tensors, _timm_recipe(Backbone(name=name), size, PretrainedCfg(**spec)), str(folder))


def _load_timm(name: str, size: int | None) -> LoadedBackbone:
    """A network with timm's pretrained weights, downloaded or from timm's cache."""
    config = _timm_config(name)
    recipe = _timm_recipe(Backbone(name=name), size, config)
    if not config.hf_hub_id and not config.url:
        raise ValueError(f"timm has no pretrained weights for {name}; see timm.list_pretrained()")
    _check_reachable(name, config)
    options: dict[str, Any] = {"img_size": recipe.size} if config.fixed_input_size else {}
    model = timm.create_model(name, pretrained=True, num_classes=0, **options)
    count = len(model.state_dict())
    return LoadedBackbone(model.eval(), recipe, f"all {count} tensors of timm's {name} at {recipe.size} px")


def _check_reachable(name: str, config: PretrainedCfg) -> None:
    """Raise ConnectionError at once; timm would retry for most of a minute."""
    hub = config.hf_hub_id
    files = (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin")
    if not hub or any(isinstance(try_to_load_from_cache(hub, file), str) for file in files if file):
        return
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # the hub answers
    except OSError as error:
        problem = f"timm's weights {name} are not on this machine and {constants.ENDPOINT} does not answer"
        raise ConnectionError(f"{problem}: go online, or name a file of weights") from error


def _timm_config(name: str) -> PretrainedCfg:
    """timm's record of a network and its weights; ValueError if timm has no such network or weights."""
    check_name(name)
    try:
        return timm.get_pretrained_cfg(name) or PretrainedCfg()
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*")[:6])
        raise ValueError(f"timm has no weights {name!r}; it has {tags}") from error


def _timm_recipe(backbone: Backbone, size: int | None, config: PretrainedCfg) -> Recipe:
    """A recipe with the input size, mean and std of a timm network; `size` overrides its own."""
    side = size or config.input_size[-1]
    mean, std = tuple(config.mean), tuple(config.std)
    return Recipe(size=side, cache_side=side * 8 // 7, mean=mean, std=std, backbone=backbone)  # type: ignore[arg-type]
