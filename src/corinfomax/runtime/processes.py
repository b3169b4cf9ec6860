"""Several processes that act as one: the group that torchrun starts, sums over it, and BatchNorm over its batch.

The only room that knows torch.distributed. In a single process everything here leaves its input as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

PATIENCE = timedelta(hours=12)
"""How long the others wait while one decodes the images or scores."""
ANSWER = timedelta(minutes=10)
"""How long a process may take for its part of a step, a checkpoint with it; then it counts as lost."""
_patient: list[Any] = []
"""The same processes as a second group, for long waits, while there is one."""


class LostProcessError(ConnectionError):
    """Another process of the group is gone, or gave no answer in time."""


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, until the end of the block; gives this one's device.

    NCCL on CUDA, a GPU for each process of a machine; gloo elsewhere. Without torchrun it does nothing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    device = own(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _answers():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=ANSWER)
        _patient.append(dist.new_group(backend="gloo", timeout=PATIENCE))
    try:
        yield device
    except BaseException:
        if device.type == "cuda":
            raise  # NCCL's end is a collective too, and the others do not come to it
        _leave()
        raise
    _leave()


def _leave() -> None:
    _patient.clear()
    dist.destroy_process_group()


@contextlib.contextmanager
def _answers() -> Iterator[None]:
    """What torch says of a process that does not answer, as a LostProcessError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise LostProcessError(
            f"another process of this run is gone, or gave no answer for {ANSWER.total_seconds() / 60:g} minutes "
            f"({reason})"
        ) from error


def own(device: torch.device) -> torch.device:
    """This process's GPU, where torchrun started several; touches none. ValueError where there are too few."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or device.type != "cuda":
        return device
    place, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if place >= count:
        raise ValueError(
            f"process {place} of this machine has no GPU of its own: there are {count}; start torchrun with "
            f"--nproc-per-node {count}"
        )
    return torch.device("cuda", place)


def size() -> int:
    """How many processes share the batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is; the first, 0, is the one that speaks and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Until every process is here, for hours if need be."""
    if size() > 1:
        with _answers():
            dist.barrier(group=_patient[0] if _patient else None)


@contextlib.contextmanager
def first_of_machine() -> Iterator[None]:
    """Each machine's first process runs the block before the others of it do."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not first:
        wait()
    yield
    if first:
        wait()


def share(count: int) -> slice:
    """This process's part of `count` things, all parts equal. ValueError when they cannot be."""
    each, rest = divmod(count, size())
    if rest:
        raise ValueError(f"{count} images a step cannot be shared equally by {size()} processes; choose a multiple")
    return slice(rank() * each, (rank() + 1) * each)


def largest(*here: float) -> list[float]:
    """Each number's largest value in any process. Makes the host wait."""
    if size() == 1:
        return list(here)
    x = torch.tensor(here, dtype=torch.float64, device=_device())
    with _answers():
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x.tolist()


def agree(known: dict[str, str]) -> None:
    """ValueError in every process when they know different things; its sentence names what differs."""
    if size() == 1:
        return
    digests = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big") for text in known.values()]
    x = torch.tensor([*digests, *(-digest for digest in digests)], device=_device())
    with _answers():
        dist.all_reduce(x, dist.ReduceOp.MAX)
    most, least = x.cpu().view(2, -1)
    different = [name for name, one, other in zip(known, most.tolist(), least.tolist(), strict=True) if one != -other]
    if different:
        raise ValueError(
            f"the processes of this run differ in {' and '.join(different)}; every machine needs the same images, "
            "command and run folder"
        )


def total(x: Tensor) -> Tensor:
    """The sum over processes, the same bits in each; no gradient passes."""
    if size() == 1:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    with _answers():
        dist.all_reduce(x)
    return x


def gather(x: Float[Tensor, "v n d"]) -> Float[Tensor, "v m d"]:
    """The rows of every process one after the other, equally many of each; no gradient passes."""
    if size() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size())]
    with _answers():
        dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts, 1)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Every gradient becomes its mean over processes, as DistributedDataParallel's does, in one message a dtype."""
    if size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = total(torch.cat([gradient.flatten() for gradient in gradients])) / size()
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view(gradient.shape))


def share_batch_norm(module: nn.Module) -> nn.Module:
    """The module with every BatchNorm taking its statistics over the batches of all processes; itself if there is one.

    torch's own on CUDA; elsewhere `SharedBatchNorm`, since torch has none there. ValueError for a BatchNorm of another
    kind than torch's, elsewhere than on CUDA.
    """
    if size() == 1:
        return module
    if any(p.device.type == "cuda" for p in module.parameters()):
        from timm.layers.norm_act import (
            convert_sync_batchnorm,
        )  # torch's would lose the activation in timm's BatchNormAct2d

        return convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    for name, child in list(module.named_modules()):
        if not isinstance(child, _BatchNorm):
            continue
        if type(child) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            kind = type(child).__name__
            raise ValueError(f"{name} is a {kind}; on the CPU several processes can share torch's own BatchNorm alone")
        child.__class__ = SharedBatchNorm  # parameters, buffers and their names stay
    return module


class SharedBatchNorm(_BatchNorm):
    """BatchNorm whose statistics in training are those of all processes' batches together."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm takes (n, channels, …); got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """As nn.BatchNorm2d of the concatenated batches: biased variance inside, unbiased in the running statistics."""
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        channels_last = (0, *range(2, input.ndim))
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = x.numel() // x.shape[1]
        sums = _Total.apply(torch.cat((x.sum(channels_last), x.new_tensor([count]))))
        n = sums[-1].detach()
        shape = (1, -1) + (1,) * (x.ndim - 2)
        centred = x - (sums[:-1] / n).view(shape)
        # Two passes over the data, as a sum of squares less a square of the sum cancels.
        variance = _Total.apply(centred.square().sum(channels_last)) / n
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_((sums[:-1] / n).detach().to(self.running_mean), weight)
            self.running_var.lerp_((variance * n / (n - 1)).detach().to(self.running_var), weight)
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)


def scale_gradient(x: Tensor) -> Tensor:
    """`x`, with its gradient times the number of processes: so the mean over processes is the sum."""
    return x if size() == 1 else x + (size() - 1) * (x - x.detach())  # x − x is exactly 0


class _Total(torch.autograd.Function):
    """`total` through which the gradient passes: each process's loss depends on every process's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return total(grads[0])


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
