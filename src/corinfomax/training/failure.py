"""A failed step: the first layer that went wrong, and a file with everything that the step began with."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corinfomax.images.cache import Images
from corinfomax.images.files import DataError
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import processes
from corinfomax.runtime.records import Facts
from corinfomax.training import batches
from corinfomax.training.step import NUMBERS, Learner, NotFiniteError, find_fault, put_back, state_of
from corinfomax.weights import checkpoint
from corinfomax.weights.checkpoint import Checkpoint

TrainStep = Callable[[int, Recipe], Float[Tensor, " 4"]]
"""Trains one step by a recipe; gives its NUMBERS."""


def explain(
    fault: NotFiniteError, learner: Learner, good: Checkpoint, take: TrainStep, images: Images, run: Path, facts: Facts
) -> NotFiniteError:
    """The same error with the first bad layer and, from rank 0, the file of the failed step.

    Trains again from `good` to the failed step, so every process has to call it. An error on the way joins the message
    and is never raised: the failed step matters more.
    """
    saved: list[str] = []
    try:
        # back to the moment before the failed step
        put_back(learner, good)
        for step in range(good.step, fault.step):
            take(step, good.recipe)

        # the file first: nothing that happens while the step is repeated can cost it
        if processes.rank() == 0:
            saved.append(save_step(run, learner, fault, good.recipe, images, facts))
        reason = first_bad(learner, take, fault.step, good.recipe)
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        reason = f"repeating the step ended with {type(error).__name__}: {first_line}"
    return NotFiniteError(fault.step, f"{fault.problem}; {reason}", *saved)


def save_step(run: Path, learner: Learner, fault: NotFiniteError, recipe: Recipe, images: Images, facts: Facts) -> str:
    """Write the learner before the failed step, and that step's batch; a clause that names the file."""
    path = run / f"failed-step-{fault.step}.safetensors"
    try:
        # the global batch: whole images, or each view's region of a file
        batch = batches.read_batch(recipe, images, fault.step, torch.device("cpu"))
        tensors = {"indices": batch.indices, "sizes": batch.sizes}
        for view, pixels in enumerate(batch.pixels):
            name = "pixels" if pixels.boxes is None else f"pixels{view}"
            tensors[name] = pixels.images
            if pixels.boxes is not None:
                tensors |= {f"sizes{view}": pixels.sizes, f"boxes{view}": pixels.boxes}

        # a checkpoint that has this batch beside the usual state
        state = state_of(learner, fault.step, recipe, facts._replace(failure=str(fault)), tensors)
        checkpoint.save_checkpoint(path, state)
    except (OSError, DataError) as error:
        return f"the batch is not saved: {error}"
    return f"the batch is saved in {path}"


def first_bad(learner: Learner, take: TrainStep, step: int, recipe: Recipe) -> str:
    """Repeat a step with every layer watched; a clause on the first value that is not finite, in any process."""
    network = learner.network
    # without clipping, which would spread a nan norm over all gradients
    unclipped = replace(recipe, optim=replace(recipe.optim, clip=None))
    numbers = torch.full((len(NUMBERS),), math.nan)
    with watched(network) as outputs, contextlib.suppress(NotFiniteError):
        numbers = take(step, unclipped)

    # forward: every process runs the same modules in the same order
    place = next((i for i, (_, finite) in enumerate(outputs) if not finite), math.inf)
    (earliest,) = processes.largest(-place)
    if earliest > -math.inf:
        return f"the first bad output is {outputs[-int(earliest)][0]}"

    # backward: it reaches the parameters from the last one to the first
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    bad = overflowing(gradients)
    if bad:
        return f"every output is finite, and the first bad gradient is that of {bad[-1]}"

    # the update
    bad = overflowing(network.state_dict())
    if bad:
        return f"every output and gradient is finite, and the first bad weight is {bad[0]}"
    if find_fault(learner, numbers[None], step + 1) is None:
        return "it did not fail again"
    return "every output, gradient and weight is finite by itself"


def overflowing(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors whose norm is not finite: with nan, with infinity, or from about 1e19 in float32."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    return [name for name, tensor in floats.items() if not torch.linalg.vector_norm(tensor).isfinite()]


@contextlib.contextmanager
def watched(network: nn.Module) -> Iterator[list[tuple[str, bool]]]:
    """A list that grows by every module's name as it is computed, and True if its output is finite; the host waits."""
    outputs: list[tuple[str, bool]] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.append((name or "the whole network", bool(output.isfinite().all())))

        return record

    hooks = [module.register_forward_hook(watch(name)) for name, module in network.named_modules()]
    try:
        with torch.compiler.set_stance("force_eager"):  # else torch would compile the network again, with its hooks
            yield outputs
    finally:
        for hook in hooks:
            hook.remove()
