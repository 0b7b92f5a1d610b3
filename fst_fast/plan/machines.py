"""The machines that a plan knows: makers' figures, the share of them that is reached, and what a launch and a message cost.

GPUs: dense 16-bit FLOP/s, fp32 FLOP/s without TF32, memory and its bandwidth, links in one direction. A share that is not marked as measured is an
assumption of this table. `cpu`: rates per thread, fitted by `python -m benchmarks.plan fit` to steps measured on one core of a shared AMD EPYC virtual
machine (docs/planning.md); another CPU differs by the ratio of its matrix products.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from fst_fast.errors import UserError

GB = 10**9
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": GB, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Rates are what is reached, per device: FLOP/s, bytes/s; seconds of one launch from Python and of one message."""

    name: str
    memory: int
    product: float  # 16-bit matrix products
    product32: float
    attention: float  # tree attention, forward
    attention_backward: float
    bandwidth: float
    operands: float  # bytes/s of what products read and write
    launch: float
    exps: float = 0.0  # exponentials per second where they cost more than the memory that they are read from; 0: nowhere
    link: float = 0.0  # inside a node
    network: float = 0.0  # between nodes, per GPU
    per_node: int = 8
    message: float = 2e-5
    host: float = 25e9  # bytes/s between the host and one device, and of the host's memory per device
    reserve: int = 0  # bytes for the context, libraries and fragmentation
    gpu: bool = True


def _gpu(name: str, gb: int, tflops: float, fp32: float, tb_s: float, link_gb_s: float) -> Machine:
    """Shares reached: products 0.75 (0.80 measured on an H200 at the head's size), attention 0.35 and 0.23, memory 0.9 (measured on an H200),
    links 0.75. A launch from eager transformers: 11.5 us (25 ms for 36 layers of 60)."""
    peak = tflops * 1e12
    return Machine(
        name, gb * GB, product=0.75 * peak, product32=0.75 * fp32 * 1e12, attention=0.35 * peak, attention_backward=0.23 * peak,
        bandwidth=0.9 * tb_s * 1e12, operands=0.9 * tb_s * 1e12, launch=11.5e-6, link=0.75 * link_gb_s * 1e9, network=0.75 * 50e9, reserve=4 * GB,
    )  # fmt: skip


GPUS = (
    _gpu("A100", 80, 312, 19.5, 2.04, 300),
    _gpu("H100", 80, 989, 67, 3.35, 450),
    _gpu("H200", 141, 989, 67, 4.8, 450),
    _gpu("B200", 180, 2250, 75, 8.0, 900),
)
CPU_CORE = Machine(
    "cpu", 0, product=12e9, product32=6.71e10, attention=3.40e10, attention_backward=3.58e10, bandwidth=1.32e10, operands=3.07e09, launch=1.87e-05, exps=4.04e07,
    link=1e9, network=1e9, per_node=1, message=1e-4, gpu=False,
)  # fmt: skip
NAMES = (*(m.name for m in GPUS), "cpu")


def machine(name: str, memory: int | None = None, *, threads: int = 1) -> Machine:
    """The machine of that name, in any case; `cpu` is this machine, its memory shared by the processes on it, with `threads` for each. memory: of
    one device, bytes.

    Raises UserError where the name is not known."""
    found = {m.name.lower(): m for m in (*GPUS, CPU_CORE)}.get(name.lower())
    if found is None:
        raise UserError(f"--machine {name}: not known; known are {', '.join(NAMES)}")
    if not found.gpu:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or "1")
        found = _threads(replace(found, memory=psutil.virtual_memory().total // processes), threads)
    return found if memory is None else replace(found, memory=memory)


def _threads(core: Machine, threads: int) -> Machine:
    """Products and attention divide among threads, memory bandwidth and the calls from Python do not."""
    return replace(
        core,
        **{name: threads * getattr(core, name) for name in ("product", "product32", "attention", "attention_backward", "exps")},
    )  # fmt: skip


def found_here() -> str:
    """The name of the GPU that this machine's driver reports, if the table has it; else `cpu`."""
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        text = file.read_text(errors="replace")
        for gpu in GPUS:
            if gpu.name in text:
                return gpu.name
    return "cpu"


def parse_bytes(text: str) -> int:
    """80GB, 79.5GiB, 85899345920 -> bytes. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE | re.ASCII)
    unit = UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise UserError(f"--memory {text}: a size such as 80GB or 79.5GiB is needed")
    return size
