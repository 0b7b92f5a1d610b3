"""Which backend runs an operation: the argument `backend=`, else the environment variable FST_KERNELS, else the best one there is.

FST_KERNELS is a backend's name, for all operations, or a list such as `tree_attention=flash,sample_tokens=reference`. A backend asked for by
name either runs or raises; it is never replaced by another one.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import TypedDict

import torch

from fst_kernels.library import missing, why_not_compiled

NAMES = ("reference", "triton", "cpu", "cuda", "host", "flex", "flash")

# Operation -> the backends it has, best first.
IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "linear_logprob": ("triton", "reference"),
    "linear_policy_loss": ("triton", "reference"),
    "tree_attention": ("triton", "cpu", "reference", "flex", "flash"),
    "cascade_decode_attention": ("triton", "cpu", "reference"),
    "sample_tokens": ("cuda", "cpu", "reference", "host"),
}


class BackendReport(TypedDict):
    taken: str
    others: dict[str, str]


def triton_interpreted() -> bool:
    """Triton reads TRITON_INTERPRET when a kernel is defined, so it must be set before fst_kernels is used."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache  # a search of the file system: it would cost more than a small operation
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _triton_cannot(device: torch.device, dtype: torch.dtype | None) -> str | None:
    if not _installed("triton"):
        return "the package triton is not installed"
    if dtype == torch.float64:
        return "its kernels sum in float32, the tensors are float64"
    if device.type == "cpu" and triton_interpreted():
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, the tensors are on {device.type} (TRITON_INTERPRET=1 in the environment runs it there, slowly)"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0, this device has {major}.{minor}"


def _cuda_cannot(device: torch.device, dtype: torch.dtype | None) -> str | None:
    if dtype == torch.float64:
        return "its kernels sum in float32, the tensors are float64"
    if device.type != "cuda":
        return f"it needs a CUDA device, the tensors are on {device.type}"
    return missing("cuda")


def _host_cannot(device: torch.device, dtype: torch.dtype | None) -> str | None:
    if dtype == torch.float64:
        return "its kernels sum in float32, the tensors are float64"
    if device.type != "cpu":
        return f"it runs the CUDA sources on the CPU, the tensors are on {device.type}"
    return missing("host")


def _cpu_cannot(device: torch.device, dtype: torch.dtype | None) -> str | None:
    if device.type != "cpu":
        return f"it is C++ for the CPU, the tensors are on {device.type}"
    if dtype not in (None, torch.float32):
        return f"its kernels are for float32, the tensors are {dtype}"
    return why_not_compiled("cpu")


def _flex_cannot(device: torch.device, dtype: torch.dtype | None) -> str | None:
    if dtype == torch.float64:
        return "FlexAttention sums in float32, the tensors are float64"
    return None if device.type == "cpu" else _triton_cannot(device, dtype)


def _flash_cannot(device: torch.device, dtype: torch.dtype | None) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, the tensors are on {device.type}"
    if dtype not in (None, torch.bfloat16, torch.float16):
        return f"FlashAttention-4 is for bfloat16 and float16, the tensors are {dtype}"
    if not _installed("flash_attn") or not _installed("flash_attn.cute"):
        return "the package flash-attn-4 is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        None
        if major in (9, 10, 11)
        else f"it needs compute capability 9 to 11, this device has {major}.{minor}"
    )


# Backend -> why it cannot run on tensors of this device and dtype (None: any); None if it can.
CANNOT: dict[str, Callable[[torch.device, torch.dtype | None], str | None]] = {
    "reference": lambda device, dtype: None,
    "triton": _triton_cannot,
    "cpu": _cpu_cannot,
    "cuda": _cuda_cannot,
    "host": _host_cannot,
    "flex": _flex_cannot,
    "flash": _flash_cannot,
}


def _cannot(op: str, name: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    if name not in IMPLEMENTED[op]:
        return f"there is no {name} implementation of {op}"
    return CANNOT[name](device, dtype)


def _unfit(op: str, name: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why a backend that can run is not taken unless it is named."""
    if name == "triton" and device.type != "cuda":
        return "its interpreter is for tests"
    if name == "triton" and dtype == torch.float32 and op.startswith("linear_"):
        return "full float32 products are faster in cuBLAS"
    if name == "host":
        return "CPU threads play the GPU's there: for tests"
    if name in ("flex", "flash"):
        return "torch's FlexAttention is taken by name only"
    return None


def _forced(op: str) -> str | None:
    """What FST_KERNELS asks for `op`. ValueError: a list that names an operation there is not."""
    value = os.environ.get("FST_KERNELS", "")
    if "=" not in value:
        return value or None
    asked = dict(entry.strip().partition("=")[::2] for entry in value.split(","))
    unknown = [name for name in asked if name not in IMPLEMENTED]
    if unknown:
        raise ValueError(
            f"FST_KERNELS={value!r} names the operation {unknown[0]!r}; there are {', '.join(IMPLEMENTED)}"
        )
    return asked.get(op)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # asked once, at tracing
def choose_backend(
    op: str, backend: str | None, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> str:
    """The backend that runs `op` on tensors of this device (None: the CPU) and dtype (None: any).

    ValueError: no such name. RuntimeError: that backend cannot run `op` here.
    """
    device = torch.device("cpu") if device is None else device
    wanted, source = (backend, "backend") if backend is not None else (_forced(op), "FST_KERNELS")
    if not wanted:
        return next(
            name
            for name in IMPLEMENTED[op]
            if _cannot(op, name, device, dtype) is None and _unfit(op, name, device, dtype) is None
        )
    if wanted not in NAMES:
        raise ValueError(
            f"{source}={wanted!r} is not a backend; allowed: {', '.join(NAMES)}, or unset to choose"
        )
    reason = _cannot(op, wanted, device, dtype)
    if reason is not None:
        able = [name for name in IMPLEMENTED[op] if _cannot(op, name, device, dtype) is None]
        raise RuntimeError(f"{op}: {source}={wanted} cannot run: {reason}; {' or '.join(able)} can")
    return wanted


def backends() -> dict[str, BackendReport]:
    """Operation -> the backend taken on this machine, bf16 on its GPU, float32 where it has none, and, for every other one that the operation has, why it is not."""
    device, dtype = torch.device("cpu"), torch.float32
    if torch.cuda.is_available():
        device, dtype = torch.device("cuda"), torch.bfloat16
    report: dict[str, BackendReport] = {}
    for op in IMPLEMENTED:
        taken = choose_backend(op, None, device, dtype)
        others = {
            name: _cannot(op, name, device, dtype)
            or _unfit(op, name, device, dtype)
            or f"{taken} is preferred"
            for name in IMPLEMENTED[op]
            if name != taken
        }
        report[op] = {"taken": taken, "others": others}
    return report
