"""A GPU that is not there, CUDA's or a Mac's: its tensors have shape, type and device and no values.

So a machine without one can tell what would go wrong on it: tensors of two devices in one operation, a generator of the
wrong device, a host that waits for a number, float64 on a Mac. It says nothing about values or speed; for those are the
tests marked gpu.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
import yaml
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
GIB = 1 << 30
_to = nn.Module.to


class WaitsError(AssertionError):
    """The host asked for what the GPU has not computed yet."""


class Gpu(TorchDispatchMode):
    """Operations on a device without the device, all others as they are.

    A host that waits is a WaitsError or, with `answers`, gets a half, one or True for each number, and all there is
    where it selects.
    """

    def __init__(self, *, answers: bool, device: torch.device) -> None:
        super().__init__()
        self.answers, self.device = answers, device
        self.busy = False
        self.launched = 0
        """Operations so far, but for those that only look at a tensor otherwise; one for each tensor of lists that
        torch cannot take together."""
        self.operations: set[str] = set()
        """Their names."""
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        absent = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        if not absent and not any(isinstance(leaf, torch.device) and leaf.type == self.device.type for leaf in leaves):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if any(isinstance(leaf, torch.Generator) and leaf.device.type != self.device.type for leaf in leaves):
            raise RuntimeError(f"{func}: a generator of the CPU draws on {self.device.type}")
        if func is aten._local_scalar_dense.default:
            return self._number(func, args[0])
        if func is aten.nonzero.default:
            self._wait(func)
            return torch.zeros((args[0].numel(), args[0].dim()), dtype=torch.int64, device=self.device)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self._wait(func)
            return args[0]
        if func in (aten._unique2.default, aten.bincount.default):  # as many as there are elements, for nobody knows
            self._wait(func)
            found = torch.zeros(args[0].numel(), dtype=torch.int64, device=self.device)
            return (
                found if func is aten.bincount.default else (found.to(args[0].dtype), torch.zeros_like(args[0]), found)
            )
        if func in (aten.index.Tensor, aten.index_put_.default):
            args = (args[0], self._places(func, *args[:2]), *args[2:])
        if func is aten._to_copy.default and not absent:
            if self.device.type == "mps":  # its copies wait, without the other way
                _check_blocks(kwargs)
            elif not kwargs.get("non_blocking"):
                self._wait(func)  # for what the GPU is at before the copy
            # FakeTensorMode would compute with a known number itself
            asked = kwargs.get("memory_format") or torch.preserve_format
            order = suggest_memory_format(args[0]) if asked == torch.preserve_format else asked
            known = {"dtype": kwargs.get("dtype") or args[0].dtype, "device": kwargs["device"], "memory_format": order}
            func, args, kwargs = aten.empty.memory_format, (list(args[0].shape),), known
        self.launched += _launches(func, args)
        if func.namespace != "prim":
            self.operations.add(func.name().removeprefix("aten::"))
        self.busy = True
        try:
            with self.fake:
                out = func(*args, **kwargs)
        finally:
            self.busy = False
        if self.device.type == "mps":
            _check_known_to_metal(func, out)
        if isinstance(out, FakeTensor) and out.device.type == "cpu":
            self._wait(func)
            with _disable_current_modes():
                return torch.full(out.shape, _answer(out.dtype), dtype=out.dtype)
        return out

    def _wait(self, func: Any) -> None:
        if not self.answers:
            raise WaitsError(f"{func} makes the host wait")

    def _number(self, func: Any, x: Tensor) -> float | bool:
        self._wait(func)
        return _answer(x.dtype)

    def _places(self, func: Any, x: Tensor, places: list[Tensor | None]) -> list[Tensor | None]:
        """Indices in place of masks, as many as there are elements, for how many are set nobody knows."""
        found: list[Tensor | None] = []
        for place in places:
            if place is not None and place.device.type == self.device.type and x.device.type == "cpu":
                raise RuntimeError(f"{func}: a tensor of the CPU is indexed by one of the GPU")
            if place is not None and place.dtype == torch.bool:
                self._wait(func)
                found += [torch.zeros(place.numel(), dtype=torch.int64, device=place.device)] * place.dim()
            else:
                found.append(place)
        return found


def _check_blocks(kwargs: Any) -> None:
    if kwargs.get("non_blocking"):
        raise AssertionError("on MPS a copy that does not block may read memory that is freed by then")


def _check_known_to_metal(func: Any, out: Any) -> None:
    for x in tree_leaves(out):
        if isinstance(x, FakeTensor) and x.device.type == "mps" and x.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{func} makes {x.dtype} on MPS, which has none")


def without_mps(operations: Iterable[str]) -> set[str]:
    """Those of the operations that torch's own table gives no kernel for MPS."""
    table = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    rows = yaml.load(table.read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    kernels = {row["func"].partition("(")[0]: row for row in rows}

    def found(name: str) -> bool:
        row = kernels[name]
        if "structured_delegate" in row:
            return found(row["structured_delegate"])
        keys = ", ".join(row.get("dispatch", ["Composite"])).split(", ")  # without a kernel it is made of others
        return any(key == "MPS" or key.startswith("Composite") for key in keys)

    return {name for name in operations if not found(name)}


def _launches(func: Any, args: Any) -> int:
    if func.namespace == "prim" or func.is_view or func is aten._unsafe_view.default:
        return 0
    lists = [arg for arg in args if isinstance(arg, list) and arg and isinstance(arg[0], Tensor)]
    together = all(len({x.stride() for x in row}) == 1 for row in zip(*lists, strict=True))
    return 1 if together or "_foreach_" not in func.__name__ else len(lists[0])


def _answer(dtype: torch.dtype) -> float | bool:
    return True if dtype == torch.bool else 0.5 if dtype.is_floating_point else 1


def backward(loss: Tensor, gradient: Tensor | None = None) -> None:
    """The gradients of the leaves, node by node in Python: torch's own engine asks CUDA for its driver."""
    assert loss.grad_fn is not None
    reached: dict[Node, dict[int, Tensor]] = {loss.grad_fn: {loss.output_nr: torch.ones_like(loss)}}
    if gradient is not None:
        reached[loss.grad_fn][loss.output_nr] = gradient
    with torch.no_grad():
        for node in reversed(_inputs_first(loss.grad_fn)):
            given = reached.pop(node, {})
            if isinstance(leaf := getattr(node, "variable", None), Tensor):
                leaf.grad = given[0] if leaf.grad is None else leaf.grad + given[0]
                continue
            metas = node._input_metadata
            every = [given.get(i) for i in range(len(metas))]
            after = [(below, i) for below, i in node.next_functions if below is not None]
            if hasattr(node, "apply"):  # written in Python: zeros for no gradient, and one result for each argument
                out = node.apply(*(_zeros(meta) if g is None else g for g, meta in zip(every, metas, strict=True)))
                out = out if isinstance(out, tuple) else (out,)
                out = [g for g, needed in zip(out, node.needs_input_grad, strict=True) if needed]
            else:
                out = node(*every)
                out = out if isinstance(out, tuple) else (out,)
                out = [g for g, (below, _) in zip(out, node.next_functions, strict=True) if below is not None]
            for (below, i), g in zip(after, out, strict=True):
                if g is not None:
                    g = _fitted(g, below._input_metadata[i])
                    there = reached.setdefault(below, {})
                    there[i] = there[i] + g if i in there else g


def _inputs_first(last: Node) -> list[Node]:
    order: list[Node] = []
    seen = {last}
    path = [(last, iter(last.next_functions))]
    while path:
        node, rest = path[-1]
        for after, _ in rest:
            if after is not None and after not in seen:
                seen.add(after)
                path.append((after, iter(after.next_functions)))
                break
        else:
            order.append(node)
            path.pop()
    return order


def _zeros(meta: Any) -> Tensor:
    return torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device)


def _fitted(gradient: Tensor, meta: Any) -> Tensor:
    """As torch's engine hands it on: summed over what was broadcast, in the value's own type."""
    if gradient.device != meta.device:
        raise RuntimeError(f"a gradient on {gradient.device} of a value on {meta.device}")
    return gradient.sum_to_size(tuple(meta.shape)).to(meta.dtype)


def _move(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`Module.to`, which would swap a parameter with values for one without."""
    device, dtype, _, order = torch._C._nn._parse_to(*args, **kwargs)
    on_cuda = device is not None and device.type == "cuda"
    if not on_cuda and not list(module.parameters()):
        return _to(module, *args, **kwargs)

    def moved(x: Tensor) -> Tensor:
        own = dtype if dtype is not None and x.is_floating_point() else x.dtype
        laid = order if order is not None and x.ndim == 4 else torch.preserve_format
        return x.detach().to(device or x.device, own, non_blocking=on_cuda, memory_format=laid)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(moved(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = moved(buffer)
    return module


def _guard_mps() -> None:
    """Let autograd take tensors of MPS in a torch without it: torch asks the guard of a device for nothing else."""
    meta, mps = 14, 13  # c10::DeviceType; meta tensors have a guard that does nothing
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    guards[mps] = guards[meta]


@contextlib.contextmanager
def gpu(patch: pytest.MonkeyPatch, *, answers: bool = False, kind: str = "cuda") -> Iterator[Gpu]:
    """One such GPU, with room for everything and bfloat16, for what is called within.

    For MPS name the device with its number, mps:0: torch would ask the driver for one.
    """
    mode = Gpu(answers=answers, device=torch.device(kind, 0))
    if kind == "mps":
        _guard_mps()
    else:
        torch._C._ensureCUDADeviceGuardSet()
    patch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
    patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    cuda = {
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "none",
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "mem_get_info": (80 * GIB, 80 * GIB),
        "max_memory_allocated": GIB,
        "synchronize": None,
    }
    if kind == "cuda":
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
        # within, FakeTensorMode would look for a driver
        patch.setattr(torch.cuda, "is_available", lambda: not mode.busy)
    patch.setattr(nn.Module, "to", _move)
    patch.setattr(Tensor, "backward", lambda self, gradient=None, **kwargs: backward(self, gradient))
    patch.setattr(Tensor, "pin_memory", lambda self, device=None: self)
    grads: list[torch.no_grad] = []

    def enter(_: object) -> None:
        grads.append(torch.no_grad())
        grads[-1].__enter__()

    # In inference mode operations come whole, as `to` instead of what it is made of.
    patch.setattr(torch.inference_mode, "__enter__", enter)
    patch.setattr(torch.inference_mode, "__exit__", lambda self, *args: grads.pop().__exit__(*args))
    mode.busy = True
    with mode.fake, mode:
        mode.busy = False
        yield mode
