"""A step that failed, once more: its terms, the first output that is not finite, each layer's gradient."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from corinfomax.training import optimizer
from corinfomax.training.batches import cut_views, make_views
from corinfomax.training.prefetch import Batch
from corinfomax.training.step import NUMBERS, NotFiniteError, build, find_fault, put_back, smallest_eigenvalue, update
from corinfomax.weights import checkpoint


class Replay(NamedTuple):
    """What a step gives when it is done again."""

    step: int
    then: str
    """Why the run stopped."""
    failed: bool
    """Whether it is not finite again."""
    numbers: dict[str, float]
    """The step's NUMBERS, nan where it came to none."""
    smallest_eigenvalue: float
    """Of the covariances before the step."""
    first: str | None
    """The first module whose output is not finite, and in which view or part of it."""
    layers: list[tuple[str, float, float]]
    """Name, norm of the weight before the step, norm of its gradient before clipping; nan without one."""


def replay(path: Path, device: torch.device) -> Replay:
    """The step that `path`, a run's failed-step-N.safetensors, holds, once more in one process.

    ValueError when the file is a damaged or another one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; --replay takes a run's failed-step-N.safetensors")
    saved = checkpoint.load(path)
    if "indices" not in saved.loop:
        raise ValueError(f"{path} is a checkpoint, no failed step; --replay takes a run's failed-step-N.safetensors")
    recipe = replace(saved.recipe, optim=replace(saved.recipe.optim, clip=None))
    learner = build(recipe, device)
    put_back(learner, saved)
    optimizer.set_learning_rate(learner.optimizer, saved.facts["lr"])
    network = learner.network
    weights = {name: float(p.detach().norm()) for name, p in network.named_parameters()}
    least = smallest_eigenvalue(learner.criterion)
    seen = replace(recipe, size=saved.facts.get("size", recipe.size))
    sizes = saved.loop["sizes"]
    if "pixels" in saved.loop:
        crops = make_views(seen, saved.loop["pixels"], sizes, saved.step, device)
    else:  # each crop as it was cut from its file
        cuts = [Batch(*(saved.loop[f"{name}{crop}"] for name in Batch._fields)) for crop in range(recipe.crops)]
        crops = cut_views(seen, cuts, sizes, saved.step, device)
    order, micro_batch = as_one(len(crops[0]), saved.facts.get("processes", 1), recipe.micro_batch)
    recipe, crops = replace(recipe, micro_batch=micro_batch), [view[order] for view in crops]
    values = [float("nan")] * len(NUMBERS)
    failed = True
    with first_not_finite(network) as found, contextlib.suppress(NotFiniteError):
        numbers = update(recipe, learner, crops, saved.step, device)
        values, failed = numbers.tolist(), find_fault(learner, numbers[None], saved.step + 1) is not None
    return Replay(
        step=saved.step,
        then=saved.facts["failure"],
        failed=failed,
        numbers=dict(zip(NUMBERS, values, strict=True)),
        smallest_eigenvalue=least,
        first=next(iter(found), None),
        layers=[
            (name, weights[name], float("nan") if p.grad is None else float(p.grad.norm()))
            for name, p in network.named_parameters()
        ],
    )


def as_one(batch: int, processes: int, micro_batch: int | None) -> tuple[Int[Tensor, " n"], int | None]:
    """In which order, and in parts of how many, one process sees the same images together that `processes` did.

    Their BatchNorm takes its statistics over the same part of each process's share.
    """
    shares = torch.arange(batch).view(processes, -1)
    if micro_batch is None or micro_batch >= shares.shape[1]:
        return shares.flatten(), None
    return torch.cat([part.flatten() for part in shares.split(micro_batch, 1)]), micro_batch * processes


@contextlib.contextmanager
def first_not_finite(network: nn.Module) -> Iterator[list[str]]:
    """A list that gets the name of each module as its output is not finite, the first one first."""
    found: list[str] = []
    forwards = 0

    def count(module: nn.Module, inputs: Any) -> None:
        nonlocal forwards
        forwards += 1

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(f"{name or 'the network'} in forward pass {forwards}")

        return look

    hooks = [network.register_forward_pre_hook(count)]
    hooks += [module.register_forward_hook(watch(name)) for name, module in network.named_modules()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def as_text(seen: Replay) -> str:
    """A table of layers under what was found."""
    width = max(len(name) for name, _, _ in seen.layers)
    least = seen.smallest_eigenvalue
    lines = [
        f"step {seen.step} failed: {seen.then}",
        "once more: " + ", ".join(f"{name} {value:.4g}" for name, value in seen.numbers.items()),
        "" if math.isnan(least) else f"smallest eigenvalue of the covariances before it: {least:.3g}",
        f"first output that is not finite: {seen.first or 'none'}",
        "" if seen.failed else "it did not fail again: other hardware, or an order of sums that changes by the run",
        f"{'':<{width}}  {'weight':>9}  {'gradient':>9}   (norms)",
    ]
    lines += [f"{name:<{width}}  {weight:9.3g}  {gradient:9.3g}" for name, weight, gradient in seen.layers]
    return "\n".join(line for line in lines if line)
