"""One training step: the learner (network, loss, optimiser, scaler), its update, its checks, its copies."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corinfomax.network import Network, autocast, choose_precision, freeze, has_fixed_size, match_dtype, network_for
from corinfomax.objective.covariance import CorInfoMaxLoss, NotFiniteInputError, Terms
from corinfomax.objective.kernel import KernelLoss
from corinfomax.recipes.fields import Recipe
from corinfomax.runtime import processes
from corinfomax.runtime.records import Facts
from corinfomax.runtime.seeds import key
from corinfomax.training import micro_batch, optimizer
from corinfomax.weights import checkpoint
from corinfomax.weights.checkpoint import Checkpoint

NUMBERS = ("loss", "attraction", "big_bang", "gradient_norm")
"""The numbers of a step, in this order."""
CURE = "a lower learning rate or a larger batch usually helps"


class NotFiniteError(FloatingPointError):
    """Loss, gradient or weights became nan or infinite in `step`, counted from 0."""

    def __init__(self, step: int, problem: str, *details: str) -> None:
        super().__init__("; ".join((problem, CURE, *details)))
        self.step, self.problem = step, problem


class Learner(NamedTuple):
    """Everything that training changes."""

    network: Network
    criterion: nn.Module
    """`criterion(*projections)` gives Terms; its `floor` is the big bang's lower bound, None without a big bang."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Scales the gradient of a float16 run; passes everything through in other precisions."""
    start: Mapping[nn.Parameter, Tensor] = {}
    """Values that pull the weights of the backbone; empty without a pull."""


def build(
    recipe: Recipe,
    device: torch.device,
    *,
    compiled: bool = False,
    criterion: nn.Module | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> Learner:
    """The learner before the first step; its weights follow from the recipe's seed, those in `start` replace them.

    `compiled` sends the network through torch.compile, once for each shape of its input. A `criterion` replaces the
    recipe's own. ValueError for float16 without CUDA, and for a test size of its own on a backbone of fixed input size.
    """
    half = recipe.precision == "float16"
    if half and device.type != "cuda":
        raise ValueError(f"precision float16 needs CUDA, the device is {device.type}: try --precision bfloat16")
    if recipe.test_side != recipe.size and has_fixed_size(recipe.backbone):
        raise ValueError(f"{recipe.backbone.name} has one input size and cannot be tested at another: --test-scale 1")

    # The network: weights first, then device, memory format and shared BatchNorm.
    torch.manual_seed(key(recipe.seed, "weights"))
    network = network_for(recipe)
    if start is not None:
        network.load_state_dict({**network.state_dict(), **start})
    network = network.to(device, torch.float64 if recipe.precision == "float64" else None)
    network = network.to(memory_format=torch.channels_last)
    freeze(network.backbone, recipe.tuning)
    processes.share_batch_norm(network)
    freeze(network.backbone, recipe.tuning)  # sharing replaces modules on a GPU
    if compiled:
        network.compile(dynamic=False)

    # Loss, optimiser and scaler.
    criterion = (build_criterion(recipe) if criterion is None else criterion).to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    lower = torch.bfloat16 if choose_precision(recipe, device) == "bfloat16" else None
    optim, anchors = optimizer.build(network, recipe.optim, lower, tuning=recipe.tuning), {}
    if recipe.tuning.pull:
        anchors = {p: p.detach().clone() for p in network.backbone.parameters() if p.requires_grad}
    return Learner(network, criterion, optim, scaler, anchors)


def build_criterion(recipe: Recipe) -> CorInfoMaxLoss | KernelLoss:
    """The recipe's loss; ValueError that names an impossible setting."""
    loss, dim = recipe.loss, recipe.projector.widths[-1]
    shared: dict[str, Any] = {"alpha": loss.alpha, "eps": loss.shift, "normalize": loss.normalize}
    if loss.name == "kernel":
        return KernelLoss(dim, temperature=loss.temperature, **shared)
    past = {"cov_decay": loss.cov_decay, "mean_decay": loss.mean_decay, "cov_init": loss.cov_init}
    return CorInfoMaxLoss(dim, views=recipe.n_views, **shared | past)


def update(
    recipe: Recipe,
    learner: Learner,
    views: Sequence[Float[Tensor, "n c s s"]],
    step: int,
    device: torch.device,
    lap: Callable[[str], object] = lambda part: None,
    *,
    projector_alone: bool = False,
) -> Float[Tensor, " 4"]:
    """One update from the views of a batch: forward, loss, backward, clip, optimiser. Returns NUMBERS on the device.

    The gradient norm is that of the whole batch before clipping. A float16 update with an overflowing gradient is
    skipped; the scaler reads one number from the device to know. `lap` is called with the name of each part at its
    end. NotFiniteError when the loss rejects its input, which it checks on a CPU in a single process only.
    """
    network, criterion, optim, scaler, start = learner

    def project(x: Tensor, pass_number: int) -> Tensor:
        # Dropout and stochastic depth get random numbers of their own in each process and forward pass.
        torch.manual_seed(key(recipe.seed, f"network {processes.rank()} {pass_number}", step))
        with autocast(recipe, device):
            return network(match_dtype(x, network), projector_alone=projector_alone)

    # Forward, loss and backward, all at once or in micro-batches.
    optim.zero_grad(set_to_none=True)
    n = len(views[0])
    chunk_size = n if recipe.micro_batch is None else min(recipe.micro_batch, n)
    terms: Terms
    try:
        if chunk_size < n:
            terms = micro_batch.backward(project, network, criterion, views, chunk_size, scaler.scale)
        else:
            z = [project(x, v) for v, x in enumerate(views)]  # one forward per view: BatchNorm sees one view at a time
            lap("forward")
            terms = criterion(*z)
            lap("loss")
            scaler.scale(terms.loss).backward()
    except NotFiniteInputError as error:
        lr, smallest = optim.param_groups[0]["lr"], (f"{name} {x:.3g}" for name, x in _eigenvalue(criterion))
        raise NotFiniteError(step, "; ".join((f"step {step} at learning rate {lr:.3g}: {error}", *smallest))) from error

    # The gradient of the global batch, then the step.
    processes.average_gradients(network.parameters())
    lap("backward")
    scaler.unscale_(optim)
    norm = optimizer.clip(network.parameters(), recipe.optim.clip)
    optimizer.pull(optim, start, recipe.tuning.pull)
    scaler.step(optim)
    scaler.update()
    lap("optimizer")
    return torch.stack([*(term.detach() for term in terms), norm.to(terms.loss.dtype)])


@torch.no_grad()
def average(network: nn.Module, start: Mapping[str, Tensor], share: float) -> None:
    """Replace weights by start + share · (weights − start), where there is a start (WiSE-FT, arXiv 2109.01903)."""
    for name, tensor in network.state_dict().items():
        if name in start and tensor.is_floating_point():
            tensor.lerp_(start[name].to(tensor), 1 - share)


def find_fault(learner: Learner, numbers: Float[Tensor, "k 4"], done: int) -> NotFiniteError | None:
    """The first value that is not finite in the NUMBERS of the last k of `done` steps, or in the weights.

    Makes the host wait. With float16 an overflowing gradient halves the scale; only a scale below 1 is a fault.
    """
    network, scaler = learner.network, learner.scaler
    numbers = numbers.cpu()
    finite = numbers.isfinite()
    if scaler.is_enabled():
        finite[:, 3] = True
        finite[-1:, 3] = scaler.get_scale() >= 1

    # The numbers of the steps.
    bad = (~finite.all(1)).nonzero()[:, 0]
    if len(bad):
        first = int(bad[0])
        step, (loss, *_, norm) = done - len(numbers) + first, numbers[first].tolist()
        what = f"loss became {loss:.3g}" if not finite[first, :3].all() else f"gradient norm became {norm:.3g}"
        checked = f"checked every {len(numbers)} steps, last good after step {done - len(numbers)}"
        return NotFiniteError(step, f"the {what} in step {step} ({_terms(numbers[first], learner)}; {checked})")

    # The weights.
    floats = [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
    if not bool(torch.nn.utils.get_total_norm(floats).isfinite()):
        terms = f" ({_terms(numbers[-1], learner)})" if len(numbers) else ""
        return NotFiniteError(done - 1, f"the weights became infinite in step {done - 1}{terms}")
    return None


def _terms(numbers: Float[Tensor, " 4"], learner: Learner) -> str:
    """The terms of a step in words, with the learning rate and the covariances' smallest eigenvalue."""
    loss, attraction, big_bang, norm = numbers.tolist()
    terms = [("loss", loss), ("attraction", attraction)]
    if getattr(learner.criterion, "floor", None) is not None:
        terms.append(("big bang", big_bang))
    terms += [
        *_eigenvalue(learner.criterion),
        ("gradient norm", norm),
        ("learning rate", learner.optimizer.param_groups[0]["lr"]),
    ]
    return ", ".join(f"{name} {value:.3g}" for name, value in terms)


def _eigenvalue(criterion: nn.Module) -> list[tuple[str, float]]:
    """Name and value of the covariances' smallest eigenvalue; empty for a criterion without covariances."""
    if not isinstance(criterion, CorInfoMaxLoss):
        return []
    return [("smallest eigenvalue of the covariances", float(torch.linalg.eigvalsh(criterion.R.cpu()).min()))]


def state_of(
    learner: Learner, step: int, recipe: Recipe, facts: Facts = Facts(), loop: Mapping[str, Tensor] | None = None
) -> Checkpoint:
    """The learner after `step` steps, with these facts and further tensors of the loop; nothing is copied."""
    network, criterion, optim, *_ = learner
    states = network.state_dict(), criterion.state_dict(), checkpoint.optimizer_tensors(optim, network)
    return Checkpoint(recipe, step, facts, *states, {**(loop or {}), **_scaler_state(learner)})


def capture(learner: Learner, step: int, recipe: Recipe) -> Checkpoint:
    """A copy of the learner after `step` steps, on its device; as large as the weights and the optimiser's state."""
    state = state_of(learner, step, recipe)
    tensors = {section: getattr(state, section) for section in checkpoint.TENSORS}
    copies = {section: {name: x.detach().clone() for name, x in xs.items()} for section, xs in tensors.items()}
    return state._replace(**copies)  # type: ignore[arg-type]


def put_back(learner: Learner, saved: Checkpoint) -> None:
    """Restore the learner from a copy or a checkpoint; ValueError when the optimiser's state fits other parameters."""
    network, criterion, optim, scaler, _ = learner
    network.load_state_dict(saved.network)
    criterion.load_state_dict(saved.criterion)
    checkpoint.restore_optimizer(optim, saved.optimizer, network)
    if scaler.is_enabled():
        state = {"scale": float(saved.loop["scale"]), "_growth_tracker": int(saved.loop["growth_tracker"])}
        scaler.load_state_dict(scaler.state_dict() | state)


def _scaler_state(learner: Learner) -> dict[str, Tensor]:
    """The state of a float16 run's scaler, which makes the host wait; empty in other precisions."""
    if not learner.scaler.is_enabled():
        return {}
    state = learner.scaler.state_dict()
    return {"scale": torch.tensor(state["scale"]), "growth_tracker": torch.tensor(state["_growth_tracker"])}
