"""Counts what the device code asks of a GPU that is not there: kernels launched, and operations for which the host waits.

Tensors on torch's device "meta" stand for those on a GPU: they have shapes, types and strides and no memory, so the very code of a GPU runs, without its
kernels. A Triton kernel is one launch, an operation of torch at least one; views and allocations are none. What the host reads is zeros.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import JITFunction

backends = importlib.import_module("fst_kernels.backends")  # the package exports a function of this name
ALLOCATIONS = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
)
# Their results, or the sizes of these, depend on numbers that the device has to compute first.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "unique_dim", "_unique2", "equal", "is_nonzero")  # fmt: skip
DEVICE = torch.device("meta")


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
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        if name == "to":  # in inference mode it arrives whole
            with self:
                return func.decompose(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self._note_wait(name, args, kwargs, given)
        if func is torch.ops.aten.mm.dtype:  # these two have a kernel for CUDA alone
            out = args[0].new_empty(args[0].shape[0], args[1].shape[1], dtype=args[2])
        elif func is torch.ops.aten.addmm.dtype_out:
            out = kwargs["out"]
        elif (
            name == "_to_copy"
            and given[0].device == DEVICE
            and torch.device(kwargs.get("device") or DEVICE).type == "cpu"
        ):
            out = torch.zeros(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
        else:
            out = func(*args, **kwargs)
        on_device = any(x.device == DEVICE for x in (*given, *tree_leaves(out)) if isinstance(x, Tensor))
        if on_device and not func.is_view and name not in ALLOCATIONS:
            self.launches[name] += 1
        return out

    def _note_wait(self, name: str, args: Any, kwargs: Any, given: list[Tensor]) -> None:
        if not any(x.device == DEVICE for x in given):
            return
        indices = [x for x in tree_leaves(args[1:2]) if isinstance(x, Tensor)]
        indexed = name.startswith("index") and any(x.dtype in (torch.bool, torch.uint8) for x in indices)
        if name in WAITS or indexed or (name == "repeat_interleave" and len(given) == 1):
            self.waits.append(name)
        if name in ("copy_", "_to_copy"):
            blocking = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] and args[2]))
            places = {x.device.type for x in given} | {torch.device(kwargs.get("device") or DEVICE).type}
            if blocking and "cpu" in places:
                self.waits.append(name)


@contextlib.contextmanager
def on_a_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[Launches]:
    """While open, tensors on DEVICE are taken for those of a GPU of this capability."""
    counter = Launches()

    def launched(kernel: JITFunction, *_: Any, **__: Any) -> None:
        counter.launches[kernel.fn.__name__] += 1

    class Properties:
        multi_processor_count = 132

    cuda: Any = torch.cuda
    there = {"triton": lambda *_: None, "cpu": lambda *_: "not on a GPU"}
    patched = [
        (JITFunction, "run", launched),
        (Tensor, "is_cuda", property(lambda x: x.device == DEVICE)),
        (backends, "CANNOT", backends.CANNOT | there),
        (backends, "_unfit", lambda *_: None),
        (cuda, "get_device_capability", lambda *_: capability),
        (cuda, "get_device_properties", lambda *_: Properties()),
        (cuda, "device", lambda *_: contextlib.nullcontext()),
        (cuda, "device_of", lambda *_: contextlib.nullcontext()),
        (torch, "autocast", lambda *_, **__: contextlib.nullcontext()),
    ]
    before = [getattr(owner, name) for owner, name, _ in patched]
    try:
        for owner, name, value in patched:
            setattr(owner, name, value)
        with counter:
            yield counter
    finally:
        for (owner, name, _), value in zip(patched, before, strict=True):
            setattr(owner, name, value)


def stand_in(x: Tensor) -> Tensor:
    """A tensor on the device with the shape, the strides and the type of x."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
