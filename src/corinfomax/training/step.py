"""What training changes, network, loss, optimiser and scaler: built, updated, judged, copied and put back."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from corinfomax.network import Network, arithmetic, fixed_size, precision, ready
from corinfomax.objective.baselines import Baseline
from corinfomax.objective.covariance import CorInfoMaxLoss, NotFiniteInputError, Terms
from corinfomax.objective.kernel import KernelLoss
from corinfomax.recipes.fields import OWN, Recipe, check_objective
from corinfomax.runtime import processes
from corinfomax.runtime.seeds import key
from corinfomax.training import micro_batch
from corinfomax.training import optimizer as optim
from corinfomax.weights import checkpoint
from corinfomax.weights.checkpoint import Checkpoint

NUMBERS = ("loss", "attraction", "big_bang", "gradient_norm")
"""What a step is told by, in this order."""
CURE = "a lower learning rate or a larger batch is the usual cure"


class NotFiniteError(FloatingPointError):
    """Loss, gradient or weights became nan or infinite in `step`, counted from 0."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


Criterion = CorInfoMaxLoss | KernelLoss | Baseline


class Learner(NamedTuple):
    """The network, the loss with its moments, the optimiser with its state, the scale of a float16 gradient, and the
    network's teacher."""

    network: Network
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Passes everything through as it is unless the precision is float16."""
    teacher: Network | None = None
    """The moving average of the network, where the recipe wants one."""


def build(recipe: Recipe, device: torch.device, *, compiled: bool = False) -> Learner:
    """The learner before the first step; the weights follow from the recipe's seed.

    With `compiled` a call of the whole network goes through torch.compile, anew for each shape of its input.

    ValueError for float16 elsewhere than on CUDA, and for an early size where the backbone takes one size alone.
    """
    half = recipe.precision == "float16"
    if half and device.type != "cuda":
        raise ValueError(f"precision float16 trains on CUDA alone, this is {device.type}: --precision bfloat16")
    if {*recipe.early_sizes, recipe.test_side} - {recipe.size} and fixed_size(recipe.backbone):
        raise ValueError(
            f"{recipe.backbone.name} takes views of one size, and --early-sizes or --test-scale asks for others"
        )
    torch.manual_seed(key(recipe.seed, "weights"))
    network = Network(recipe.backbone, recipe.projector, size=recipe.size)
    network = network.to(device, torch.float64 if recipe.precision == "float64" else None)
    network = network.to(memory_format=torch.channels_last)
    processes.share_batch_norm(network)
    teacher = None if recipe.teacher is None else copy.deepcopy(network).requires_grad_(False)
    for model in (network, teacher):
        if compiled and model is not None:
            model.compile(dynamic=False)
    criterion = build_criterion(recipe).to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    lower = torch.bfloat16 if precision(recipe, device) == "bfloat16" else None
    return Learner(network, criterion, optim.build(network, recipe.optim, lower), scaler, teacher)


def build_criterion(recipe: Recipe) -> Criterion:
    """The recipe's objective. ValueError for one to compare with in several processes, or with knobs or weights that
    are not its own, and where it needs lightly and that is not here."""
    check_objective(recipe)
    dim = recipe.projector.widths[-1]
    own = {name: getattr(recipe.loss, name) for name in OWN.get(recipe.loss.name, ())} | {"eps": recipe.loss.shift}
    if recipe.loss.name == "corinfomax":
        return CorInfoMaxLoss(dim, views=recipe.crops, **own)
    if recipe.loss.name == "kernel":
        return KernelLoss(dim, **own)
    if processes.size() > 1:
        raise ValueError(f"objective {recipe.loss.name} is there to compare with, in one process")
    return Baseline(recipe.loss)


def update(
    recipe: Recipe,
    learner: Learner,
    crops: Sequence[Float[Tensor, "n 3 s s"]],
    step: int,
    device: torch.device,
    lap: Callable[[str], object] = lambda part: None,
) -> Float[Tensor, " 4"]:
    """One update on ready views: forward, loss, backward, clipping, optimiser; gives its NUMBERS, on the device.

    `lap` is told of each part when it is done. The gradient's norm is that before clipping, of the whole batch. With
    float16 the scaler leaves out an update whose gradient is not finite, and reads one number from the device to know.
    NotFiniteError where the loss looks at its input: on the CPU, in a single process.
    """
    network, criterion, optimizer, scaler, teacher = learner

    def project(x: Tensor, part: int, model: Network = network) -> Tensor:
        # For dropout and stochastic depth, where a backbone has them; each process and part its own.
        torch.manual_seed(key(recipe.seed, f"network {processes.rank()} {part}", step))
        with arithmetic(recipe, device):
            return model(ready(x, model))

    optimizer.zero_grad(set_to_none=True)
    part = len(crops[0]) if recipe.micro_batch is None else min(recipe.micro_batch, len(crops[0]))
    judge: Callable[..., Terms] = criterion
    if teacher is not None:
        taught = micro_batch.projections(functools.partial(project, model=teacher), crops, part)
        judge = functools.partial(criterion, teacher=taught)
    try:
        if part < len(crops[0]):
            terms = micro_batch.backward(project, network, judge, crops, part, scaler.scale)
        else:
            z = [project(x, v) for v, x in enumerate(crops)]  # apart: each view has its own BatchNorm statistics
            lap("forward")
            terms = judge(*z)
            lap("loss")
            scaler.scale(terms.loss).backward()
    except NotFiniteInputError as error:
        known = f"in step {step}, at learning rate {optimizer.param_groups[0]['lr']:.3g}: {error}"
        if isinstance(criterion, CorInfoMaxLoss):
            known += f" (smallest eigenvalue of the covariances before {smallest_eigenvalue(criterion):.3g})"
        raise NotFiniteError(step, f"{known}; {CURE}") from error
    processes.average_gradients(network.parameters())
    lap("backward")
    scaler.unscale_(optimizer)
    norm = optim.clip(network.parameters(), recipe.optim.clip)
    scaler.step(optimizer)
    scaler.update()
    if teacher is not None and recipe.teacher is not None:
        optim.follow(teacher, network, past=recipe.teacher, step=step)
    lap("optimizer")
    return torch.stack([*(term.detach() for term in terms), norm.to(terms.loss.dtype)])


def find_fault(learner: Learner, numbers: Float[Tensor, "k 4"], done: int) -> NotFiniteError | None:
    """What is not finite in the NUMBERS of the last k of `done` steps or in the weights; makes the host wait.

    With float16 a gradient that overflows is left out and its scale halved; a scale below 1 is a fault.
    """
    network, scaler = learner.network, learner.scaler
    numbers = numbers.cpu()
    finite = numbers.isfinite()
    if scaler.is_enabled():
        finite[:, 3] = True
        finite[-1:, 3] = scaler.get_scale() >= 1
    bad = (~finite.all(1)).nonzero()[:, 0]
    if len(bad):
        at = done - len(numbers) + int(bad[0])
        loss, *_, norm = numbers[bad[0]].tolist()
        what = f"loss became {loss:.3g}" if not finite[bad[0], :3].all() else f"gradient's norm became {norm:.3g}"
        return NotFiniteError(
            at,
            f"the {what} in step {at} ({_known(numbers[bad[0]], learner)}; looked at every {len(numbers)} steps, last "
            f"good look after step {done - len(numbers)}); {CURE}",
        )
    floats = [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
    if not bool(torch.nn.utils.get_total_norm(floats).isfinite()):
        known = f" ({_known(numbers[-1], learner)})" if len(numbers) else ""
        return NotFiniteError(done - 1, f"the weights became infinite in step {done - 1}{known}; {CURE}")
    return None


def _known(numbers: Float[Tensor, " 4"], learner: Learner) -> str:
    """A step's terms, and what else tells why it failed."""
    loss, attraction, big_bang, norm = numbers.tolist()
    known = [("loss", loss), ("attraction", attraction), ("gradient's norm", norm)]
    if learner.criterion.floor is not None:
        known.insert(2, ("big bang", big_bang))
    if isinstance(learner.criterion, CorInfoMaxLoss):
        known.insert(3, ("smallest eigenvalue of the covariances", smallest_eigenvalue(learner.criterion)))
    known.append(("learning rate", learner.optimizer.param_groups[0]["lr"]))
    return ", ".join(f"{name} {value:.3g}" for name, value in known)


def smallest_eigenvalue(criterion: Criterion) -> float:
    """Of all views' running covariances; nan for an objective that has none."""
    if not isinstance(criterion, CorInfoMaxLoss):
        return float("nan")
    return float(torch.linalg.eigvalsh(criterion.R.cpu()).min())


def capture(learner: Learner, step: int, recipe: Recipe) -> Checkpoint:
    """A copy of the learner after `step` steps, on its device: once more the weights and the optimiser's state."""
    network, criterion, optimizer, *_ = learner
    parts = (network.state_dict(), criterion.state_dict(), checkpoint.optimizer_tensors(optimizer, network))
    weights, moments, state = ({name: tensor.detach().clone() for name, tensor in part.items()} for part in parts)
    loop = {name: tensor.clone() for name, tensor in extras(learner).items()}
    return Checkpoint(recipe, step, {}, weights, moments, state, loop)


def put_back(learner: Learner, saved: Checkpoint) -> None:
    """The learner becomes what it was. ValueError when the optimiser's state is of other parameters."""
    network, criterion, optimizer, scaler, teacher = learner
    network.load_state_dict(saved.network)
    criterion.load_state_dict(saved.criterion)
    checkpoint.restore_optimizer(optimizer, saved.optimizer, network)
    if scaler.is_enabled():
        known = {"scale": float(saved.loop["scale"]), "_growth_tracker": int(saved.loop["growth_tracker"])}
        scaler.load_state_dict(scaler.state_dict() | known)
    if teacher is not None:
        teacher.load_state_dict({name: saved.loop[f"{TEACHER}{name}"] for name in teacher.state_dict()})


TEACHER = "teacher/"


def extras(learner: Learner) -> dict[str, Tensor]:
    """What a checkpoint needs of the learner beside network, moments and optimiser: the state of a scaler that is on,
    which makes the host wait, and the teacher's tensors; not copied."""
    found: dict[str, Tensor] = {}
    if learner.scaler.is_enabled():
        state = learner.scaler.state_dict()
        found |= {"scale": torch.tensor(state["scale"]), "growth_tracker": torch.tensor(state["_growth_tracker"])}
    if learner.teacher is not None:
        found |= {f"{TEACHER}{name}": tensor.detach() for name, tensor in learner.teacher.state_dict().items()}
    return found
