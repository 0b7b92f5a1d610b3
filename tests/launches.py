"""Counts what the device code asks of a GPU that is not there: kernels launched, and operations for which the host waits.

Tensors are torch's fake ones on the device "cuda": they have shapes, types and strides and no memory, so the very code of a GPU runs, without its
kernels. A Triton kernel is one launch, an operation of torch at least one; views and allocations are none.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime import JITFunction

ALLOCATIONS = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
    "_local_scalar_dense",
)
# Their results, or the sizes of these, depend on numbers that the device has to compute first.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "unique_dim", "_unique2", "equal", "is_nonzero")  # fmt: skip
CUDA = torch.device("cuda", 0)


class Launches(TorchDispatchMode):
    """launches: by the name of the kernel or operation. waits: names of what the host waits for, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: list[str] = []

    @property
    def total(self) -> int:
        return sum(self.launches.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self._note_wait(name, args, kwargs or {}, given)
        if func is torch.ops.aten.mm.dtype:  # these two have a kernel for CUDA alone
            out = args[0].new_empty(args[0].shape[0], args[1].shape[1], dtype=args[2])
        elif func is torch.ops.aten.addmm.dtype_out:
            out = kwargs["out"]
        else:
            out = _shapes(func, args, kwargs or {})
        on_device = any(x.is_cuda for x in (*given, *tree_leaves(out)) if isinstance(x, Tensor))
        if on_device and not func.is_view and name not in ALLOCATIONS:
            self.launches[name] += 1
        return out

    def _note_wait(self, name: str, args: Any, kwargs: Any, given: list[Tensor]) -> None:
        if not any(x.is_cuda for x in given):
            return
        indexed = name.startswith("index") and any(x.dtype in (torch.bool, torch.uint8) for x in given)
        if name in WAITS or indexed or (name == "repeat_interleave" and len(given) == 1):
            self.waits.append(name)
        if name in ("copy_", "_to_copy"):
            blocking = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] and args[2]))
            places = {x.device.type for x in given} | {torch.device(kwargs.get("device") or CUDA).type}
            if blocking and "cpu" in places:
                self.waits.append(name)


def _shapes(func: Any, args: Any, kwargs: Any) -> Any:
    """What func gives, by the shapes alone. Some operations look for the device itself; these are asked on "meta" instead."""
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        if "not linked with support for cuda" not in str(error):
            raise
    if func._schema.is_mutable:
        return kwargs.get("out", args[0])

    def to_meta(x: Any) -> Any:
        if isinstance(x, Tensor):
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return torch.device("meta") if isinstance(x, torch.device) else x

    with unset_fake_temporarily():
        out = func(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))
    return tree_map(lambda x: stand_in(x) if isinstance(x, Tensor) else x, out)


@contextlib.contextmanager
def on_a_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[Launches]:
    """While open, tensors are fake ones and a device of this capability is there."""
    counter = Launches()

    def launched(kernel: JITFunction, *_: Any, **__: Any) -> None:
        counter.launches[kernel.fn.__name__] += 1

    class Properties:
        multi_processor_count = 132
        shared_memory_per_block_optin = 227 * 1024

    cuda: Any = torch.cuda
    patched = [
        (JITFunction, "run", launched),
        (cuda, "get_device_capability", lambda *_: capability),
        (cuda, "get_device_properties", lambda *_: Properties()),
        (cuda, "device_of", lambda *_: contextlib.nullcontext()),
        (Tensor, "pin_memory", lambda x: x),
    ]
    before = [getattr(owner, name) for owner, name, _ in patched]
    try:
        for owner, name, value in patched:
            setattr(owner, name, value)
        with FakeTensorMode(), counter:
            yield counter
    finally:
        for (owner, name, _), value in zip(patched, before, strict=True):
            setattr(owner, name, value)


def module_on_gpu(module: nn.Module) -> nn.Module:
    """Inside `on_a_gpu`: the module with stand-ins for its weights, in its place. Weights that are one tensor stay one."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                made[id(p)] = made.get(id(p)) or nn.Parameter(stand_in(p), requires_grad=False)
                part._parameters[name] = made[id(p)]
        for name, b in part._buffers.items():
            part._buffers[name] = None if b is None else stand_in(b)
    return module


def stand_in(x: Tensor) -> Tensor:
    """Inside `on_a_gpu`: a tensor on the GPU with the shape, the strides and the type of x."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)
