"""Several processes that act as one: torchrun's group, sums over it, and BatchNorm over the whole batch.

The only file that knows torch.distributed. In a single process none of it changes anything.
"""

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

STEP_TIMEOUT = timedelta(minutes=10)  # for a process's share of a step, a checkpoint included; then it counts as lost
WAIT_TIMEOUT = timedelta(hours=12)  # in `wait`, while one process decodes images or scores
_waiting_group: list[Any] = []  # empty, or the same processes as a second group, whose timeout is WAIT_TIMEOUT


class LostProcessError(ConnectionError):
    """Another process of the group has ended, or did not answer in time."""


def started() -> int:
    """Number of processes that torchrun started, before they join."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[torch.device]:
    """Join torchrun's processes until the end of the block; yields this process's device."""
    if started() == 1 or dist.is_initialized():
        yield device
        return

    device = own_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # two groups: each has one timeout, and a step must not take hours
    with _name_lost_process():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=STEP_TIMEOUT)
        _waiting_group[:] = [dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)]

    # Leaving NCCL's group is a collective too, and after an error the other processes do not come to it.
    leaves = device.type != "cuda"
    try:
        yield device
        leaves = True
    finally:
        if leaves:
            dist.destroy_process_group()


@contextlib.contextmanager
def _name_lost_process() -> Iterator[None]:
    """Turn torch's error about a process that does not answer into a LostProcessError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        silence = f"did not answer for {STEP_TIMEOUT.total_seconds() / 60:g} minutes"
        reason = str(error).partition("\n")[0]
        raise LostProcessError(f"another process of this run has ended, or {silence} ({reason})") from error


def own_device(device: torch.device) -> torch.device:
    """This process's GPU if torchrun started several, without touching it; ValueError if there are too few."""
    if started() == 1 or device.type != "cuda":
        return device
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= gpus:
        advice = f"start torchrun with --nproc-per-node {gpus}"
        raise ValueError(f"process {local_rank} of this machine has no GPU of its own: there are {gpus}; {advice}")
    return torch.device("cuda", local_rank)


def size() -> int:
    """Number of processes that share the batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Wait until every process has come here, for hours if need be."""
    if size() > 1:
        with _name_lost_process():
            dist.barrier(group=_waiting_group[0] if _waiting_group else None)


@contextlib.contextmanager
def first_of_machine() -> Iterator[None]:
    """Let each machine's first process run the block before its other processes do."""
    # one barrier for all: the others meet it before the block, the first after it
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not first:
        wait()
    yield
    if first:
        wait()


def share(count: int) -> slice:
    """This process's slice of `count` images; ValueError unless all slices are equally long."""
    length, rest = divmod(count, size())
    if rest:
        raise ValueError(f"{count} images a step cannot be shared equally by {size()} processes; choose a multiple")
    return slice(rank() * length, (rank() + 1) * length)


def largest(*numbers: float) -> list[float]:
    """The largest value of each number in any process. Makes the host wait."""
    if size() == 1:
        return list(numbers)
    x = torch.tensor(numbers, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    with _name_lost_process():
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x.tolist()  # on CUDA a lost process shows only when the result is read


def require_same(texts: dict[str, str]) -> None:
    """Raise a ValueError in every process, naming the texts that differ, unless all processes have the same."""
    # 48 bits are exact in float64; the largest negative digest is the smallest one
    digests = [int(hashlib.blake2b(text.encode(), digest_size=6).hexdigest(), 16) for text in texts.values()]
    high, low = largest(*digests), largest(*(-digest for digest in digests))
    different = " and ".join(name for name, most, least in zip(texts, high, low, strict=True) if most != -least)
    if different:
        need = "every machine needs the same images, command and run folder"
        raise ValueError(f"the processes of this run differ in {different}; {need}")


def total(x: Tensor) -> Tensor:
    """Sum over processes, the same bits in each; no gradient passes."""
    if size() == 1:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    with _name_lost_process():
        dist.all_reduce(x)
    return x


def gather_rows(x: Float[Tensor, "v n d"]) -> Float[Tensor, "v m d"]:
    """The rows of every process, one process after another, n from each; no gradient passes."""
    if size() == 1:
        return x.detach()
    gathered = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size())]
    with _name_lost_process():
        dist.all_gather(gathered, x.detach().contiguous())
    return torch.cat(gathered, 1)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over processes, as DistributedDataParallel does, in a single message."""
    if size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = total(torch.cat([gradient.flatten() for gradient in gradients])) / size()
    means = flat.split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view(gradient.shape))


def scale_gradient(x: Tensor) -> Tensor:
    """`x`, its gradient multiplied by the number of processes: the mean over processes is then their sum."""
    return x if size() == 1 else x + (size() - 1) * (x - x.detach())  # x − x is exactly 0


def share_batch_norm(module: nn.Module) -> None:
    """Let every BatchNorm in training mode take its statistics over all processes; ValueError if one cannot."""
    if size() == 1:
        return
    if any(p.device.type == "cuda" for p in module.parameters()):
        # torch's own conversion would lose the activation inside timm's BatchNormAct2d
        from timm.layers.norm_act import convert_sync_batchnorm

        convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return

    for name, child in module.named_modules():
        if not child.training:
            continue
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            child.__class__ = SharedBatchNorm  # parameters, buffers and their names stay
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            kind = type(child).__name__
            raise ValueError(f"{name} is a {kind}; on the CPU several processes can share torch's own BatchNorm only")


class SharedBatchNorm(nn.SyncBatchNorm):
    """BatchNorm that trains as if the batches of all processes were one, on any device."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)

        # mean and variance: two passes, as the mean square less the squared mean would cancel
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        axes, per_channel = (0, *range(2, x.ndim)), (1, -1) + (1,) * (x.ndim - 2)
        sums = _DifferentiableTotal.apply(torch.cat((x.sum(axes), x.new_tensor([x.numel() // x.shape[1]]))))
        n = sums[-1].detach()
        mean = sums[:-1] / n
        centred = x - mean.view(per_channel)
        variance = _DifferentiableTotal.apply(centred.square().sum(axes)) / n

        # running statistics, of the unbiased variance; without momentum their plain average
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach().to(self.running_mean), weight)
            self.running_var.lerp_((variance * n / (n - 1)).detach().to(self.running_var), weight)

        # normalise, scale, shift
        out = centred * (variance + self.eps).rsqrt().view(per_channel)
        if self.affine:
            out = out * self.weight.view(per_channel) + self.bias.view(per_channel)
        return out.to(input.dtype)


class _DifferentiableTotal(torch.autograd.Function):
    """`total` that lets the gradient pass: each process's loss depends on every process's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return total(grads[0])
