"""What this machine can do, which kernel path is taken and why the others are not, and what `make train` will use.

Diagnosis only: it never fails because something is missing, it says so.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants

from fst_fast.config import Config
from fst_fast.config import load as config_load
from fst_fast.mini import default_config
from fst_fast.run.cores import usable_cores
from fst_fast.verify.run_code import isolation
from fst_fast.verify.supervisor import MAX_PROCESSES, unlimited_reason

PACKAGES = (
    "torch", "transformers", "huggingface_hub", "deepspeed", "accelerate", "triton", "flash-attn", "gguf", "numpy", "pydantic"
)  # fmt: skip
GIB = 2**30


def findings() -> Iterator[str]:
    """The report, line by line."""
    yield from _section("machine", _machine())
    yield from _section("packages", (f"{name:16} {_version(name)}" for name in PACKAGES))
    yield from _section("kernels", _kernels())
    yield from _section("verification", _verification())
    yield from _section("make train", _default_run(config_load.load(default_config())))


def _section(title: str, lines: Iterator[str]) -> Iterator[str]:
    yield title
    for line in lines:
        yield f"  {line}"


def _machine() -> Iterator[str]:
    memory = psutil.virtual_memory()
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield f"{usable_cores()} of {os.cpu_count()} cores usable; torch uses {torch.get_num_threads()} threads"
    yield f"memory {memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB available"
    yield from _gpus()
    yield f"nvcc {_nvcc()}"
    looked_up = (
        "not looked up (HF_HUB_OFFLINE)" if constants.is_offline_mode() else "looked up when it is named"
    )
    yield f"models of the Hugging Face Hub: {looked_up}, kept in {constants.HF_HUB_CACHE}"


def _gpus() -> Iterator[str]:
    if torch.version.cuda is None and torch.version.hip is None:
        yield f"GPU none: torch {torch.__version__} was built without CUDA"
    elif not torch.cuda.is_available():
        yield f"GPU none: torch {torch.__version__} was built for CUDA but finds no device"
    else:
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            yield f"GPU {i} {gpu.name}, {gpu.total_memory / GIB:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "not found (not needed, unless you build csrc/)"
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    release = next(
        (line for line in answer.stdout.splitlines() if "release" in line),
        "answers nothing about its release",
    )
    return f"{path}: {release.strip()} (not needed, unless you build csrc/)"


def _kernels() -> Iterator[str]:
    import fst_kernels

    try:
        report = fst_kernels.backends()
    except (ValueError, RuntimeError) as refusal:  # FST_KERNELS asks for what cannot run here
        yield str(refusal)
        return
    for op, found in report.items():
        yield f"{op}: {found['taken']}"
        for name, why in found["others"].items():
            yield f"  not {name}: {why}"


def _verification() -> Iterator[str]:
    yield f"programs run by run_code: {isolation()}"
    yield f"processes of a grader: {unlimited_reason() or f'at most {MAX_PROCESSES} at a time, all ended with it'}"


def _default_run(config: Config) -> Iterator[str]:
    gpu = torch.cuda.is_available()
    yield f"{_shown(default_config())}: method {config.method}, task {config.task}, model {config.model.path}"
    yield f"on {'one GPU' if gpu else f'the CPU, {torch.get_num_threads()} threads'}, weights in {config.model.dtype}"
    yield f"packing {config.policy.packing}, attention {config.policy.attention}, DeepSpeed ZeRO {config.policy.zero_stage}"
    yield f"reflector {config.fast.reflector}; no network is used"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _shown(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
