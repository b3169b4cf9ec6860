"""Backbones from weights of any make, whole or not at all: our runs and exports, timm's own, any state dict."""

from __future__ import annotations

import dataclasses
import json
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from corinfomax import network as networks
from corinfomax.recipes import fields
from corinfomax.recipes.fields import Backbone, Recipe
from corinfomax.runtime import run_folder
from corinfomax.weights import checkpoint

TIMM = "timm:"
PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt")
NESTED = ("state_dict", "model_state_dict", "model", "backbone", "encoder", "network", "net")
"""Where training scripts put the tensors inside the file."""


class Weights(NamedTuple):
    """A backbone in eval mode with trained weights."""

    backbone: nn.Module
    recipe: Recipe
    """What the backbone sees of an image: size, mean, std, precision; for ours, also how it was trained."""
    said: str
    """What was loaded, with the number of tensors, for people."""


class Named(NamedTuple):
    """A state dict as it was found, and what its file tells of the network it belongs to."""

    tensors: dict[str, Tensor]
    recipe: Recipe | None = None
    architecture: str | None = None


def load(name: str, *, architecture: str | None = None, small_stem: bool = False, size: int | None = None) -> Weights:
    """The backbone of `name`: `timm:NETWORK` for timm's pretrained weights, else a path.

    A path is a run folder or checkpoint of ours, an exported folder or any folder in timm's layout, a state dict in
    .safetensors, or one that `torch.save` wrote, of which nothing but tensors is read. `architecture` is the timm
    network of a state dict that does not tell its own, `small_stem` its 3×3 first convolution without max-pool. `size`
    is the side of the images that foreign weights see; timm's own unless given. Only `timm:` may use the network.
    Raises ValueError or OSError with the name, the reason and what to do; nothing is ever loaded in part.
    """
    if name.startswith(TIMM):
        return _from_timm(name.removeprefix(TIMM), size)
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return _from_timm_folder(path, size)
    if path.is_dir() or _is_checkpoint(path):
        network, saved = checkpoint.load_network(path)
        count, where = len(network.backbone.state_dict()), f"step {saved.step} of {path}"
        return Weights(network.backbone, saved.recipe, f"all {count} tensors of the backbone, {where}")
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; name a run folder, a file of weights, or timm:NETWORK")
    found = _read(path)
    if found.recipe is not None:
        recipe = found.recipe
    elif chosen := architecture or found.architecture:
        recipe = _timm_recipe(Backbone(name=chosen, small_stem=small_stem), size)
    else:
        raise ValueError(
            f"{path} does not say which network it is of; add --architecture, a timm name such as resnet18"
        )
    return _into(networks.build_backbone(recipe.backbone, size=recipe.size), found.tensors, recipe, str(path))


def fit(tensors: dict[str, Tensor], model: nn.Module, *, what: str) -> tuple[dict[str, Tensor], str]:
    """The tensors under the model's own names, and what was done to get there in words ("" for nothing).

    Every tensor of the model must be there in its own shape, and there must be no other, with three exceptions, all of
    them said: a prefix, such as `module.` or `backbone.`, that is before all of the model's names, and then other
    parts of the file, such as a projector, stay out; the classifier of a timm network; BatchNorm's counts of batches,
    which old files lack. Raises ValueError that names the first tensors that do not fit.
    """
    wanted = model.state_dict()
    anchor = next(iter(wanted))
    prefixes = sorted({name[: -len(anchor)] for name in tensors if name == anchor or name.endswith(f".{anchor}")})
    misfits = {prefix: _misfit(tensors, wanted, prefix, _heads(model)) for prefix in prefixes or [""]}
    whole = [prefix for prefix, (missing, _, unlike) in misfits.items() if not missing and not unlike]
    if len(whole) > 1:
        under = ", ".join(prefix or "no prefix" for prefix in whole)
        raise ValueError(f"{what} holds several such networks, under {under}; save the one you mean alone")
    if not whole or misfits[whole[0]].extra:
        missing, extra, unlike = min(misfits.values(), key=lambda misfit: sum(map(len, misfit)))
        problems = [
            f"{len(names)} {words} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for names, words in ((missing, "missing"), (extra, "that it has no place for"), (unlike, "of another size"))
            if names
        ]
        raise ValueError(f"{what} does not fit the network, so nothing was loaded: tensors {'; '.join(problems)}")
    (prefix,) = whole
    chosen, notes = {name: tensors[prefix + name] for name in wanted if prefix + name in tensors}, []
    if prefix:
        notes.append(f"names without {prefix}")
    if heads := [name for name in tensors if name in {prefix + head for head in _heads(model)}]:
        notes.append(f"classifier {' and '.join(heads)} left out")
    if outside := [name for name in tensors if not name.startswith(prefix)]:
        notes.append(f"{len(outside)} tensors of other parts left out, such as {outside[0]}")
    if counts := [name for name in wanted if name not in chosen]:
        notes.append(f"{len(counts)} counts of batches set to 0")
        chosen |= {name: torch.zeros_like(wanted[name]) for name in counts}
    return chosen, "; ".join(notes)


class Misfit(NamedTuple):
    """Names of tensors that do not fit."""

    missing: list[str]
    extra: list[str]
    unlike: list[str]
    """Of another size, with both sizes."""


def _misfit(tensors: dict[str, Tensor], wanted: dict[str, Tensor], prefix: str, heads: set[str]) -> Misfit:
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    missing = [name for name in wanted if name not in found and not name.endswith(".num_batches_tracked")]
    extra = [name for name in found if name not in wanted and name not in heads]
    unlike = [
        f"{name}: {_size(found[name])} for {_size(tensor)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    return Misfit(missing, extra, unlike)


def _size(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"


def _heads(model: nn.Module) -> set[str]:
    """Names that a timm network's classifier has, which ours are built without."""
    classifier = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr,operator]
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return {f"{name}.{part}" for name in names for part in ("weight", "bias")}


def _into(model: nn.Module, tensors: dict[str, Tensor], recipe: Recipe, what: str) -> Weights:
    chosen, notes = fit(tensors, model, what=what)
    own = model.state_dict()
    if whole := [name for name, x in chosen.items() if own[name].is_floating_point() and not x.is_floating_point()]:
        raise ValueError(f"{what} holds whole numbers ({chosen[whole[0]].dtype}) where weights are, first {whole[0]}")
    if bad := [name for name, tensor in chosen.items() if tensor.is_floating_point() and not tensor.isfinite().all()]:
        raise ValueError(
            f"{what} holds nan or inf in {len(bad)} tensors, first {bad[0]}; the run that made it diverged"
        )
    model.load_state_dict(chosen)
    said = f"all {len(chosen)} tensors of {what}, a {recipe.backbone.name} {fields.sides(recipe)}"
    return Weights(model.eval(), recipe, f"{said} ({notes})" if notes else said)


def _read(path: Path) -> Named:
    """The tensors of one file; of a pickled one nothing but tensors and plain values is ever built."""
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        recipe = metadata.get("recipe")
        return Named(tensors, None if recipe is None else _recipe(path, recipe))
    if path.suffix not in PICKLED:
        raise ValueError(f"{path} is no file of weights: they end in .safetensors, or {', '.join(PICKLED)}")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's advice is to read what could run code
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign parser on a file from anywhere: it may raise anything
        raise ValueError(
            f"{path} was refused: it is torn, or holds more than tensors, which could run code when read; where you "
            "trust it, save its state dict as .safetensors"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; wanted a state dict, names with their tensors")
    architecture = content.get("arch") or content.get("architecture")
    architecture = architecture if isinstance(architecture, str) and timm.is_model(architecture) else None
    if not all(isinstance(value, Tensor) for value in content.values()):
        inner = [name for name in NESTED if isinstance(content.get(name), dict)]
        if len(inner) != 1:
            keys = ", ".join(map(str, list(content)[:8]))
            raise ValueError(f"{path} holds no one state dict but {keys}; save the one you mean as .safetensors")
        content = content[inner[0]]
    if not content or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise ValueError(f"{path} holds no state dict: wanted names with their tensors")
    return Named(content, architecture=architecture)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a .safetensors file; ValueError with its name when it is torn."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def _is_checkpoint(path: Path) -> bool:
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "corinfomax" in (file.metadata() or {})
    except SafetensorError:
        return True  # torn: reading it as a checkpoint says so


def _recipe(path: Path, text: str) -> Recipe:
    """What a file of weights says of its recipe; ValueError with the file's name when that is none."""
    try:
        return fields.from_json(json.loads(text))
    except ValueError as error:
        raise ValueError(f"{path} says of its recipe what is none: {error}") from error


def _from_timm_folder(folder: Path, size: int | None) -> Weights:
    """A folder with config.json and model.safetensors, as timm's hub keeps them and `export` writes them."""
    file = folder / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has a config.json but no model.safetensors beside it")
    tensors, metadata = read_safetensors(file)
    if "recipe" in metadata:
        recipe = _recipe(file, metadata["recipe"])
        return _into(networks.build_backbone(recipe.backbone, size=recipe.size), tensors, recipe, str(folder))
    config = run_folder.read_json(folder / "config.json")
    name = config.get("architecture", "")
    if not timm.is_model(name):
        raise ValueError(f"{folder / 'config.json'} names the architecture {name!r}, which timm does not know")
    recipe = _timm_recipe(Backbone(name=name), size, {**config, **config.get("pretrained_cfg", {})})
    model = timm.create_model(name, **{**config.get("model_args", {}), "num_classes": 0})
    return _into(model, tensors, recipe, str(folder))


def _from_timm(name: str, size: int | None) -> Weights:
    recipe = _timm_recipe(Backbone(name=name), size)
    config = _timm_config(name)
    if not config.get("hf_hub_id") and not config.get("url"):
        raise ValueError(f"timm has no pretrained weights for {name}; see timm.list_pretrained()")
    _check_reachable(name, config)
    options: dict[str, Any] = {"img_size": recipe.size} if config.get("fixed_input_size") else {}
    model = timm.create_model(name, pretrained=True, num_classes=0, **options)
    count = len(model.state_dict())
    return Weights(model.eval(), recipe, f"all {count} tensors of timm's {name} at {recipe.size} px")


def _check_reachable(name: str, config: dict[str, Any]) -> None:
    """ConnectionError at once, where timm would try again for most of a minute."""
    hub = config.get("hf_hub_id")
    files = (config.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin")
    if not hub or any(isinstance(try_to_load_from_cache(hub, file), str) for file in files if file):
        return
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        raise ConnectionError(
            f"timm's weights {name} are not on this machine and {constants.ENDPOINT} does not answer: go online, or "
            "name a file of weights"
        ) from error


def _timm_config(name: str) -> dict[str, Any]:
    """What timm knows of a network and its weights; ValueError when it knows no such network or no such weights."""
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.partition('.')[0]}*")[:6]) or "nothing; timm.list_models() has all"
        raise ValueError(f"timm knows no network {name!r}; near it: {near}")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*")[:6])
        raise ValueError(f"timm has no weights {name!r}; it has {known}") from error
    return {} if config is None else dataclasses.asdict(config)


def _timm_recipe(backbone: Backbone, size: int | None, config: dict[str, Any] | None = None) -> Recipe:
    """What a timm network sees: its own size unless `size` is given, its own mean and std."""
    config = _timm_config(backbone.name) if config is None else config
    side = size or int((config.get("input_size") or (3, 224, 224))[-1])
    mean, std = (config.get(key) or usual for key, usual in zip(("mean", "std"), fields.IMAGENET_STATS, strict=True))
    return Recipe(size=side, cache_side=side * 8 // 7, mean=tuple(mean), std=tuple(std), backbone=backbone)
