"""Argument checks shared by the operations: an error names the argument, its value and what is allowed.

Shapes, dtypes and devices are always checked. Values are checked on the CPU; on other devices, where looking at a value waits for the
device, only with FST_CHECK=1. Whether large inputs are finite is checked only with FST_CHECK=1, on every device: without it, NaN goes in
and comes out, and the trainer's own guard answers for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int64, torch.int32)


def once(prepared: dict[Any, Any], key: Any, make: Callable[[], T]) -> T:
    """What is prepared under the key, made where it is not there yet."""
    if key not in prepared:
        prepared[key] = make()
    found: T = prepared[key]
    return found


def look_at_values(device: torch.device) -> bool:
    return device.type == "cpu" or os.environ.get("FST_CHECK") == "1"


def check_tensor(
    name: str,
    x: Tensor,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """`shape` holds sizes that must match and letters that stand for any size."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; a tensor is needed")
    if x.ndim != len(shape) or any(
        isinstance(s, int) and s != n for s, n in zip(shape, x.shape, strict=True)
    ):
        wanted = ", ".join(str(s) for s in shape)
        raise ValueError(f"{name} has shape {list(x.shape)}; allowed: [{wanted}]")
    if x.dtype not in dtypes:
        raise ValueError(
            f"{name} has dtype {_short(x.dtype)}; allowed: {', '.join(_short(d) for d in dtypes)}"
        )
    if device is not None and x.device != device:
        raise ValueError(f"{name} is on {x.device}; it must be on {device} like the other tensors")


def adjacent(x: Tensor) -> Tensor:
    """x itself where the elements of its last dimension lie side by side in memory, as kernels that take pointers read them; else a copy."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def check_finite(name: str, x: Tensor, where: Tensor) -> None:
    """Every x[where] is finite; `where` holds indices. Waits for the device."""
    bad = where[~torch.isfinite(x[where])]
    if bad.numel():
        first = int(bad[0])
        raise ValueError(f"{name}[{first}]={float(x[first])} under a live label; it must be finite")


def check_rows_finite(name: str, x: Tensor, rows: Tensor) -> None:
    """Every x[rows] [n, H] is finite; only with FST_CHECK=1. Waits for the device."""
    if os.environ.get("FST_CHECK") != "1":
        return
    bad = rows[~torch.isfinite(x[rows]).all(1)]
    if bad.numel():
        raise ValueError(f"{name}[{int(bad[0])}] holds NaN or Inf under a live label; it must be finite")


def check_range(name: str, x: Tensor, low: int, high: int, also: str = "") -> None:
    """low <= x < high everywhere. Waits for the device."""
    bad = ((x < low) | (x >= high)).nonzero()
    if bad.numel():
        first = int(bad[0, 0])
        raise ValueError(f"{name}[{first}]={int(x[first])}; allowed: {low} <= {name} < {high}{also}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
