"""The whole state of a run in one safetensors file: weights, moments, optimiser, step, recipe; no pickle anywhere."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from corinfomax.network import Network
from corinfomax.recipes import fields
from corinfomax.runtime import run_folder

FORMAT = "corinfomax-3"
BEFORE = "corinfomax-2"  # with the moments of two views by their names


class DamagedError(ValueError):
    """A file that is torn, cut short or changed."""


class Checkpoint(NamedTuple):
    """What a checkpoint file holds."""

    recipe: fields.Recipe
    step: int
    facts: dict[str, Any]
    """What else was known of the run: data, fingerprint, versions."""
    network: dict[str, Tensor]
    criterion: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """`name/parameter`, such as `momentum_buffer/backbone.conv1.weight`."""
    loop: dict[str, Tensor] = {}  # noqa: RUF012 (never written to)
    """What the loop had in hand: `numbers` of the steps since the last row of metrics, a float16 gradient's `scale`,
    the tensors of a `teacher/`; of a step that failed its batch (`indices`, `pixels`)."""


def save(
    path: Path,
    *,
    network: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    recipe: fields.Recipe,
    facts: dict[str, Any],
    loop: dict[str, Tensor] | None = None,
) -> None:
    """Write the state after `step` steps to `path`, whole or not at all. OSError with the path where it cannot be."""
    tensors = {f"network/{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"criterion/{name}": tensor for name, tensor in criterion.state_dict().items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer_tensors(optimizer, network).items()}
    tensors |= {f"loop/{name}": tensor for name, tensor in (loop or {}).items()}
    about = json.dumps({"format": FORMAT, "step": step, "recipe": fields.to_json(recipe), "facts": facts})
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"corinfomax": about, "digest": _digest(about, dense)}

    def write(temporary: Path) -> None:
        try:
            save_file(dense, temporary, metadata=metadata)
        except SafetensorError as error:
            size = sum(tensor.nbytes for tensor in dense.values())
            raise OSError(f"{error} ({size / 1e6:,.0f} MB)") from error

    run_folder.write_whole(path, write)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    ValueError or FileNotFoundError with the file's name when it is none, torn, or not what was written (a checksum
    tells).
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; name a run folder or one of its checkpoints")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise DamagedError(f"{path} is no whole safetensors file: {error}") from error
    if "corinfomax" not in metadata:
        raise ValueError(f"{path} holds weights, but is no checkpoint of this package")
    if metadata.get("digest") != _digest(metadata["corinfomax"], tensors):
        raise DamagedError(f"{path} is damaged: its checksum is not that of its content")
    about = json.loads(metadata["corinfomax"])
    if about["format"] not in (BEFORE, FORMAT):
        raise ValueError(f"{path} is of format {about['format']}; this version reads {FORMAT}")
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "criterion": {}, "optimizer": {}, "loop": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    if about["format"] == BEFORE:
        old = parts["criterion"]
        parts["criterion"] = {name: torch.stack((old[f"{name}1"], old[f"{name}2"])) for name in ("R", "mu")}
    return Checkpoint(fields.from_json(about["recipe"]), about["step"], about["facts"], **parts)


def load_begun(run: Path) -> Checkpoint:
    """What there is to go on with in a run folder: the last whole checkpoint, or the recipe alone before the first one.

    The latter is of step 0 and without tensors. Errors as of `load_last`.
    """
    about = run / "recipe.json"
    if run_folder.checkpoints(run) or not about.exists():
        return load_last(run)[1]
    content = run_folder.read_json(about)
    if not isinstance(content, dict) or not {"recipe", "facts"} <= set(content):
        raise ValueError(f"{about} is not what a run writes: it has no recipe or no facts")
    return Checkpoint(fields.from_json(content["recipe"]), 0, content["facts"], {}, {}, {})


def load_network(weights: Path) -> tuple[Network, Checkpoint]:
    """The trained network in eval mode, from a checkpoint or from a run folder's last one; every tensor must fit.

    ValueError or FileNotFoundError with the path when there is none, or when it is torn.
    """
    weights, loaded = load_last(weights) if weights.is_dir() else (weights, load(weights))
    network = Network(loaded.recipe.backbone, loaded.recipe.projector, size=loaded.recipe.size)
    try:
        network.load_state_dict(loaded.network)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit its own recipe: {error}") from error
    return network.eval(), loaded


def last(run: Path) -> Path:
    """The last checkpoint of a run folder; FileNotFoundError when there is none."""
    saved = run_folder.checkpoints(run)
    if not saved:
        raise FileNotFoundError(f"{run} holds no checkpoint: it is no run folder, or the run saved none yet")
    return saved[-1]


def load_last(run: Path) -> tuple[Path, Checkpoint]:
    """The last checkpoint of a run folder that is whole, and what it holds; a damaged one is named on stderr.

    FileNotFoundError when there is none, DamagedError of the last one when all are damaged, ValueError for what is
    whole and of another version: going back from it would throw good work away.
    """
    last(run)
    damaged: DamagedError | None = None
    saved = run_folder.checkpoints(run)
    for path in reversed(saved):
        try:
            loaded = load(path)
        except (DamagedError, FileNotFoundError) as error:  # the latter of a link to nothing, or a folder
            damaged = damaged or DamagedError(str(error))
            if path != saved[0]:
                print(f"{error}; trying the one before", file=sys.stderr)
        else:
            return path, loaded
    raise DamagedError(
        f"{damaged}; no other of the {len(saved)} in {saved[0].parent} is whole: put a good copy back, or take them "
        "away to begin again"
    )


def _digest(about: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state by `name/parameter`, not copied."""
    names = {id(p): name for name, p in network.named_parameters()}
    return {
        f"{key}/{names[id(parameter)]}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None  # SGD's momentum before its first step
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor], network: nn.Module) -> None:
    """Put a checkpoint's optimiser tensors back. ValueError when they do not belong to this network's parameters."""
    parameters = dict(network.named_parameters())
    optimizer.state.clear()
    for name, tensor in saved.items():
        key, _, parameter_name = name.partition("/")
        parameter = parameters.get(parameter_name)
        if parameter is None or (tensor.ndim and tensor.shape != parameter.shape):
            raise ValueError(f"the checkpoint's optimiser state {name} {tuple(tensor.shape)} fits no parameter")
        # Counts and marks stay on the CPU; everything else lives where its parameter does, laid out like it.
        like = tensor.shape == parameter.shape
        value: Tensor | bool = torch.empty_like(parameter).copy_(tensor) if like else tensor.clone()
        if tensor.dtype == torch.bool:
            value = bool(tensor)
        optimizer.state[parameter][key] = value
