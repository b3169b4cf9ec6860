"""Backbones from trained weights, whole or not at all: our runs and exports, timm's weights, any state dict."""

import json
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from timm.models import PretrainedCfg, load_model_config_from_hf
from torch import Tensor, nn

from corinfomax.images.files import listed
from corinfomax.network import backbone_for, check_name, has_fixed_size, measure, smallest_side
from corinfomax.recipes import fields
from corinfomax.recipes.fields import Backbone, Recipe
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Facts, Start, WeightsOptions
from corinfomax.weights import checkpoint
from corinfomax.weights.match import Tensors, check_values, identify, match_names

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # of a folder in timm's layout
PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt")
NO_NETWORKS = ("optimizer", "optim", "scheduler", "scaler")  # keys under which training scripts keep optimiser state


class LoadedBackbone(NamedTuple):
    """A backbone in eval mode with trained weights."""

    backbone: nn.Module
    recipe: Recipe  # size, mean, std and precision of its input; for a run of ours, its whole training
    summary: str  # source and number of the tensors, any that were ignored, and what was assumed of the input
    run: Path | None = None  # folder of the run that the weights lie in
    facts: Facts | None = None  # of a run of ours
    config: PretrainedCfg = PretrainedCfg()  # timm's record of the weights: licence, source, paper
    assumed_input: bool = False  # mean and std were typed, or are timm's for a network whose file records none

    def start(self, name: str, *words: str) -> Start:
        """The record of these weights, loaded from `name` with these words, in a run that continues from them."""
        path = Path(name).expanduser()
        before = Start("", "") if self.facts is None or self.facts.start is None else self.facts.start
        papers = self.config.paper_ids or ()
        return Start(
            name=str(path.absolute()) if path.exists() else name,
            digest=checkpoint.digest(self.backbone.state_dict()),
            license=_line(self.config.license) or before.license,
            source=_line(self.config.origin_url) or before.source,
            paper=_line(papers if isinstance(papers, str) else ", ".join(papers)) or before.paper,
            words=words,
            assumed_input=self.assumed_input,
        )


def _line(text: str | None) -> str | None:
    """Text of a foreign file on one line."""
    return " ".join(text.split()) if text else None


def load_backbone(name: str, options: WeightsOptions = WeightsOptions(), *, last: bool = False) -> LoadedBackbone:
    """The backbone of `name`: a path, or `timm:NETWORK` for timm's pretrained weights.

    A path is a run folder or its checkpoint, a folder in timm's layout such as an export, or a state dict in
    .safetensors or a pickle, from which only tensors and plain values are read. A run that started from other weights
    and did not improve on them gives those, unless `last` asks for its last checkpoint. Only `timm:` may connect to the
    internet. Raises ValueError or OSError; ValueError too for options that weights of ours do not take.
    """
    path = Path(name).expanduser()
    if name.startswith("timm:"):
        return _load_timm(name.removeprefix("timm:"), options)
    if (path / "config.json").is_file():
        return _load_timm_folder(path, options)

    # A run or a checkpoint.
    suffix = path.suffix.lower()
    is_tensors = suffix == ".safetensors" and path.is_file()
    if path.is_dir() or (is_tensors and "corinfomax" in checkpoint.read_safetensors(path)[1]):
        _refuse_options(options, path)
        if not last and path.is_dir() and run_folder.read_results(path).keep_start:
            return load_start(path)
        network, saved = checkpoint.load_network(path)
        summary = f"all {len(network.backbone.state_dict())} tensors of the backbone, step {saved.step} of {path}"
        run = path if path.is_dir() else path.absolute().parent.parent
        return LoadedBackbone(network.backbone, saved.recipe, summary, run, saved.facts)

    # A state dict.
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; name a run folder, a file of weights, or timm:NETWORK")
    tensors, recipe, recorded, origin = read_state_dict(path)
    if recipe is not None:
        _refuse_options(options, path)
        loaded = _load_tensors(backbone_for(recipe), tensors, recipe, str(path))
        return loaded._replace(config=origin)
    if (architecture := options.architecture or recorded) is None:
        likely = identify(tensors)
        hint = f"its tensors are those of {likely}" if likely else "a timm name such as resnet18"
        raise ValueError(f"{path} does not record its network; add --architecture {likely or 'NETWORK'} ({hint})")
    backbone = Backbone(name=architecture, small_stem=options.small_stem)
    recipe = _timm_recipe(backbone, options, _timm_config(architecture))
    model = backbone_for(recipe)
    loaded = _load_tensors(model, tensors, recipe, str(path), options.prefix)
    assumed = [name for name in ("mean", "std", "interpolation") if getattr(options, name) is None]
    flags = listed([f"--{name}" for name in assumed])
    note = f"; these are timm's values for {architecture}: change them with {flags}" if assumed else ""
    return loaded._replace(summary=f"{loaded.summary}, {_input(recipe)}{note}", assumed_input=True)


def load_start(run: Path) -> LoadedBackbone:
    """The starting weights of a run; FileNotFoundError if it started from random ones."""
    saved, path = checkpoint.load_resumable(run), run_folder.start_path(run)
    if not path.is_file():
        lost = f"{path}, the weights that the run started from, is missing"
        raise FileNotFoundError(f"{lost}: put it back, or name a checkpoint in {run / 'checkpoints'}")
    tensors, own, _, _ = read_state_dict(path)
    recipe, start = own or saved.recipe, saved.facts.start
    loaded = _load_tensors(backbone_for(recipe), tensors, recipe, str(path))
    if start is not None and checkpoint.digest(loaded.backbone.state_dict()) != start.digest:
        raise checkpoint.DamagedError(f"{path} was changed: it is not what the run started from")
    origin = "" if start is None else f", which continued from {start.name}"
    summary = f"{loaded.summary}: the weights before {run}{origin}"
    return loaded._replace(summary=summary, run=run, facts=saved.facts)


def with_input_of(recipe: Recipe, other: Recipe) -> Recipe:
    """`recipe` with the size and the normalisation of the images of `other`."""
    names = ("size", "test_scale", "cache_side", "mean", "std", "interpolation")
    return replace(recipe, **{name: getattr(other, name) for name in names})


class RecordedError(ValueError):
    """Options for weights that record their network and input themselves."""


def _refuse_options(options: WeightsOptions, source: str | Path, recorded: str = "network and input") -> None:
    for name, value in vars(options).items():
        if value not in (None, False):
            flag = name.replace("_", "-")
            raise RecordedError(f"{source} records its {recorded}: --{flag} is for weights that do not")


def _input(recipe: Recipe) -> str:
    """Statistics and interpolation of the input in words."""
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (recipe.mean, recipe.std))
    return f"mean {mean}, std {std}, {recipe.interpolation}"


def _load_tensors(
    model: nn.Module, tensors: Tensors, recipe: Recipe, source: str, prefix: str | None = None
) -> LoadedBackbone:
    """The model with these tensors in eval mode; ValueError unless they fit and are trained weights."""
    matched, notes = match_names(tensors, model, source=source, prefix=prefix)
    check_values(matched, model, source=source)
    model.load_state_dict(matched)
    summary = f"all {len(matched)} tensors of {source}, a {recipe.backbone.name} {recipe.resolution}"
    return LoadedBackbone(model.eval(), recipe, f"{summary} ({notes})" if notes else summary)


class StateDict(NamedTuple):
    """The content of a file of weights, with what it records of them."""

    tensors: Tensors
    recipe: Recipe | None = None
    architecture: str | None = None
    origin: PretrainedCfg = PretrainedCfg()  # licence, source and paper of the weights that they began as


def read_state_dict(path: Path) -> StateDict:
    """The content of a file of weights; pickled code never runs."""
    if path.suffix.lower() == ".safetensors":
        tensors, metadata = checkpoint.read_safetensors(path)
        try:
            if "recipe" not in metadata:
                return StateDict(tensors)
            origin = PretrainedCfg(**json.loads(metadata.get("origin", "{}")))
            return StateDict(tensors, fields.from_json(json.loads(metadata["recipe"])), origin=origin)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} records an invalid recipe: {error}") from error
    if path.suffix.lower() not in PICKLED:
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

    # Tensors at the top and in dictionaries, as training scripts save several networks.
    tensors = dict(_flatten(content))
    if not tensors:
        raise ValueError(f"{path} holds no state dict: want names with their tensors")
    tops = {name.partition(".")[0] for name in tensors}
    if len(tops) == 1 and isinstance(content.get(top := next(iter(tops))), dict):
        tensors = {name.removeprefix(f"{top}."): tensor for name, tensor in tensors.items()}
    return StateDict(tensors, architecture=architecture)


def _flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested dictionaries, under the names joined by dots."""
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            yield prefix + key, value
        elif isinstance(key, str) and isinstance(value, Mapping) and key not in NO_NETWORKS:
            yield from _flatten(value, f"{prefix}{key}.")


def _load_timm_folder(folder: Path, options: WeightsOptions) -> LoadedBackbone:
    """A backbone from config.json and model.safetensors, as on timm's hub and in an exported folder."""
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{folder} has a config.json but no {' or '.join(WEIGHT_FILES)} beside it")
    tensors, recipe, _, _ = read_state_dict(file)
    config = run_folder.read_json(folder / "config.json")
    spec = {**config, **config.get("pretrained_cfg", {})}
    source, papers = spec.get("origin_url"), spec.get("paper_ids")
    record = PretrainedCfg(license=spec.get("license"), origin_url=source, paper_ids=papers)
    if recipe is not None:  # an export of ours
        _refuse_options(options, folder)
        loaded = _load_tensors(backbone_for(recipe), tensors, recipe, str(folder))
        return loaded._replace(config=record)

    # Any other network of timm.
    network = WeightsOptions(architecture=options.architecture, small_stem=options.small_stem)
    _refuse_options(network, folder, "network")
    name = config.get("architecture", "")
    if not timm.is_model(name):
        raise ValueError(f"{folder / 'config.json'} names the architecture {name!r}, unknown to timm")

    # its arguments and its input
    arguments = {**config.get("model_args", {}), "num_classes": 0}
    if side := arguments.get("img_size"):  # a number, or height and width
        spec["input_size"] = [3, *(side if isinstance(side, list) else (side, side))]
    if (channels := arguments.get("in_chans", spec.get("input_size", (3,))[0])) != 3:
        raise ValueError(f"{folder} takes images of {channels} channels, not 3: name its file of weights instead")
    stated = {name: spec[name] for name in ("input_size", "mean", "std", "interpolation") if spec.get(name)}
    model = timm.create_model(name, **arguments)
    recipe = _timm_recipe(Backbone(name=name), options, PretrainedCfg(**stated))
    loaded = _load_tensors(model, tensors, recipe, str(folder), options.prefix)
    if has_fixed_size(recipe.backbone) and options.size is not None:
        loaded.backbone.set_input_size(img_size=recipe.size)  # type: ignore[operator]
    summary, typed = f"{loaded.summary}, {_input(recipe)}", bool(options.mean or options.std)
    return loaded._replace(summary=summary, config=record, assumed_input=typed)


def _load_timm(name: str, options: WeightsOptions) -> LoadedBackbone:
    """A network with timm's pretrained weights, or those of a hub's repository, downloaded or from timm's cache."""
    network = replace(options, size=None, mean=None, std=None, interpolation=None)
    _refuse_options(network, f"timm:{name}", "network")
    source, _, repository = name.partition(":")
    if source in ("hf-hub", "hf_hub"):
        config, architecture = _hub_config(repository)
    else:
        config, architecture = _timm_config(name), name
        if not config.hf_hub_id and not config.url:
            raise ValueError(f"timm has no pretrained weights for {name}; see timm.list_pretrained()")
        _check_reachable(name, config)

    # timm builds the network and fills it
    recipe = _timm_recipe(Backbone(name=architecture), options, config)
    side: dict[str, Any] = {"img_size": recipe.size} if config.fixed_input_size else {}
    model = timm.create_model(name, pretrained=True, num_classes=0, **side)
    count = len(model.state_dict())
    summary = f"all {count} tensors of timm's {name} at {recipe.size} px, {_input(recipe)}"
    typed = bool(options.mean or options.std)
    return LoadedBackbone(model.eval(), recipe, summary, config=config, assumed_input=typed)


def _hub_config(repository: str) -> tuple[PretrainedCfg, str]:
    """timm's record of a repository of the hub, and its network; ValueError for one that is not timm's."""
    _check_reachable(repository, PretrainedCfg(hf_hub_id=repository))
    try:
        described, architecture, _ = load_model_config_from_hf(repository)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{repository} is no network of timm on the hub: {reason}") from error
    field_names = PretrainedCfg.__dataclass_fields__
    return PretrainedCfg(**{key: value for key, value in described.items() if key in field_names}), architecture


def _check_reachable(name: str, config: PretrainedCfg) -> None:
    """Raise ConnectionError if the hub is silent for 10 s; timm would retry much longer."""
    hub = config.hf_hub_id
    files = (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin")
    if not hub or any(isinstance(try_to_load_from_cache(hub, file), str) for file in files if file):
        return
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # the hub answers
    except OSError as error:
        problem = f"timm's weights of {name} are not on this machine and {constants.ENDPOINT} does not answer"
        raise ConnectionError(f"{problem}: go online, or name a file of weights") from error


def _timm_config(name: str) -> PretrainedCfg:
    """timm's record of a network and its weights; ValueError if timm has no such network or weights."""
    check_name(name)
    return timm.get_pretrained_cfg(name) or PretrainedCfg()


def _timm_recipe(backbone: Backbone, options: WeightsOptions, config: PretrainedCfg) -> Recipe:
    """A recipe with the typed input of a timm network, or else its own; ValueError for a side that it cannot take."""
    side = config.input_size[-1] if options.size is None else options.size
    if options.size is not None and measure(backbone, side) is None:
        near = smallest_side(backbone, side)
        raise ValueError(f"{backbone.name} cannot take images of {side} px: try --size {near}")
    interpolation = options.interpolation or ("bilinear" if config.interpolation == "bilinear" else "bicubic")
    return Recipe(
        size=side,
        cache_side=side * 8 // 7,
        mean=options.mean or tuple(config.mean),
        std=options.std or tuple(config.std),
        interpolation=interpolation,
        backbone=backbone,
    )
