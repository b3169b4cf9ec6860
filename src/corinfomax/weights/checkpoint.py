"""The state of a run in one safetensors file: weights, moments, optimiser, step, recipe; no pickle anywhere."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from corinfomax.network import Network, network_for
from corinfomax.recipes import fields
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import Facts

CHECKPOINT_FORMAT = "corinfomax-3"
TENSORS = ("network", "criterion", "optimizer", "loop")  # the fields of a checkpoint that hold tensors


class DamagedError(ValueError):
    """A file that is torn or was changed."""


class Checkpoint(NamedTuple):
    """The content of a checkpoint file."""

    recipe: Recipe
    step: int
    facts: Facts
    network: dict[str, Tensor]
    criterion: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # by `name/parameter`, such as `momentum_buffer/backbone.conv1.weight`
    loop: dict[str, Tensor] = {}  # noqa: RUF012 (never written to)
    """`numbers` of the steps since the last row of metrics, float16's gradient `scale`, a failed step's batch."""


def save_checkpoint(path: Path, saved: Checkpoint) -> None:
    """Write a checkpoint to `path`, whole or not at all; OSError with the path on failure."""
    # All tensors, by section and name.
    state = {section: getattr(saved, section) for section in TENSORS}
    tensors = {f"{section}/{name}": tensor for section, content in state.items() for name, tensor in content.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    # The rest as JSON, and a checksum of everything.
    rest = {"recipe": fields.to_json(saved.recipe), "facts": saved.facts.to_json()}
    about = json.dumps({"format": CHECKPOINT_FORMAT, "step": saved.step, **rest})
    metadata = {"corinfomax": about, "digest": digest(tensors, about)}

    try:
        run_folder.write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    except SafetensorError as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise OSError(None, f"cannot write {path}: {error} ({size / 1e6:,.0f} MB)") from error


def load_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint on the CPU; FileNotFoundError, DamagedError, or ValueError for other files."""
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; name a run folder or one of its checkpoints")
    tensors, metadata = read_safetensors(path)

    # Refuse any file that is not ours, not intact or of another format.
    if "corinfomax" not in metadata:
        raise ValueError(f"{path} holds weights, but is not a checkpoint of this package")
    if metadata.get("digest") != digest(tensors, metadata["corinfomax"]):
        raise DamagedError(f"{path} is damaged: its checksum does not match its content")
    about = json.loads(metadata["corinfomax"])
    if about["format"] != CHECKPOINT_FORMAT:
        raise ValueError(f"{path} is of format {about['format']}; this version reads {CHECKPOINT_FORMAT}")

    # Tensors by section and name.
    state: dict[str, dict[str, Tensor]] = {section: {} for section in TENSORS}
    for full_name, tensor in tensors.items():
        section, _, name = full_name.partition("/")
        state[section][name] = tensor
    return Checkpoint(fields.from_json(about["recipe"]), about["step"], Facts.from_json(about["facts"]), **state)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file; DamagedError with its name if it is torn."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedError(f"{path} is not a whole safetensors file: {error}") from error


def load_resumable(run: Path) -> Checkpoint:
    """The last whole checkpoint of a run, or step 0 without tensors before the first; errors as of `load_last`."""
    if run_folder.checkpoints(run) or not (run / "recipe.json").exists():
        return load_last(run)[1]
    recipe, facts = recorded(run)
    return Checkpoint(recipe, 0, facts, {}, {}, {})


def recorded(run: Path) -> tuple[Recipe, Facts]:
    """Recipe and facts of a run, from its recipe.json; ValueError if a run did not write that file."""
    about = run / "recipe.json"
    content = run_folder.read_json(about)
    if not isinstance(content, dict) or not {"recipe", "facts"} <= set(content):
        raise ValueError(f"{about} has no recipe or no facts: a run did not write it")
    return fields.from_json(content["recipe"]), Facts.from_json(content["facts"])


def load_network(weights: Path) -> tuple[Network, Checkpoint]:
    """Network in eval mode and checkpoint: the one at the path, or the last of a run folder."""
    weights, loaded = load_last(weights) if weights.is_dir() else (weights, load_checkpoint(weights))
    network = network_for(loaded.recipe)
    try:
        network.load_state_dict(loaded.network)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit its own recipe: {error}") from error
    return network.eval(), loaded


def load_last(run: Path) -> tuple[Path, Checkpoint]:
    """The last whole checkpoint of a run folder and its path; damaged ones are named on stderr.

    Raises FileNotFoundError if there is none, DamagedError if all are damaged, ValueError for one of another version.
    """
    saved = run_folder.checkpoints(run)
    if not saved:
        if run_folder.checkpoints(run.absolute().parent):
            raise FileNotFoundError(f"{run} is a folder inside a run; name the run: {run.parent}")
        raise FileNotFoundError(f"{run} holds no checkpoint: it is not a run folder, or nothing has been saved yet")

    # An earlier one would throw good work away, so only damage leads to it.
    damage: DamagedError | FileNotFoundError | None = None
    for path in reversed(saved):
        try:
            return path, load_checkpoint(path)
        except (DamagedError, FileNotFoundError) as error:  # the latter for a broken link, or a folder
            damage = damage or error
            if path != saved[0]:
                print(f"{error}; trying the one before", file=sys.stderr)
    remedy = "put a good copy back, or remove them to start again"
    raise DamagedError(f"{damage}; none of the {len(saved)} checkpoints in {saved[0].parent} is whole: {remedy}")


def digest(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """A checksum of tensors, by name, type, shape and every byte, and of `about`."""
    checksum = hashlib.blake2b(about.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        checksum.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        checksum.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return checksum.hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """State of the optimiser by `name/parameter`, not copied."""
    names = {id(p): name for name, p in network.named_parameters()}
    return {
        f"{key}/{names[id(parameter)]}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None  # SGD's momentum before its first step
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor], network: nn.Module) -> None:
    """Restore the optimiser from a checkpoint's tensors; ValueError if they do not fit the network's parameters."""
    parameters = dict(network.named_parameters())
    optimizer.state.clear()
    for name, tensor in saved.items():
        key, _, parameter_name = name.partition("/")
        parameter = parameters.get(parameter_name)
        if parameter is None or (tensor.ndim and tensor.shape != parameter.shape):
            raise ValueError(f"the checkpoint's optimiser state {name} {tuple(tensor.shape)} fits no parameter")

        # Counts and flags stay on the CPU; a tensor like its parameter takes its device and memory layout.
        like = tensor.shape == parameter.shape
        value = torch.empty_like(parameter).copy_(tensor) if like else tensor.clone()
        optimizer.state[parameter][key] = bool(tensor) if tensor.dtype == torch.bool else value
