"""The process's environment: settings that libraries read at import, and the allocators of the C library and of torch.

By default glibc returns freed memory at the top of the heap to the system, and maps every block above a threshold
separately. A forward pass frees and allocates the same megabytes hundreds of times, and the kernel clears the pages
each time: a tenth of a run's CPU time on small models.
"""

from __future__ import annotations

import ctypes
import os
import sys
from datetime import datetime

from fst_fast.run.cores import usable_cores

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_set_here: set[str] = set()  # variables that only this process is to have
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # the largest that glibc accepts


def keep_freed_memory() -> bool:
    """Stop glibc from returning freed memory to the system (mallopt). True if the C library supports it (glibc)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library, such as musl
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1)) and bool(
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    )


def prepare_environment() -> None:
    """Set environment variables that libraries read at import; values that the user has set stay. Call before importing
    torch and deepspeed.

    No telemetry, quiet libraries, the cores of a machine divided among its processes, and
    DS_ACCELERATOR=cpu without a GPU, which DeepSpeed would otherwise detect with a page of warnings."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    keep_freed_memory()
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging

    logging.disable_progress_bar()


def grow_segments(*, shares_memory: bool = False) -> None:
    """On a GPU, unless the user says how torch's allocator works: let it grow a segment instead of taking another (expandable_segments). Call
    before CUDA starts.

    The pool of keys and values has another size in every call; in fixed segments what smaller ones leave free is of no use to a larger one, though
    the engine counts it as free. shares_memory: this process hands tensors to another one by CUDA IPC, which such segments allow only where the
    system lets processes trace each other (pytorch/pytorch#165685): nothing is set."""
    import torch

    if not shares_memory and torch.cuda.is_available() and not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
        _set_here.add(ALLOCATOR[0])


def for_others() -> dict[str, str | None]:
    """What a program that this one starts must not inherit: vLLM's all-reduce needs ordinary segments (vllm-project/vllm#42609)."""
    return dict.fromkeys(_set_here)


def wall_clock() -> datetime:
    """The date and time, for people and prompts: names of folders, dates that a chat template shows. It may jump; durations come
    from time.monotonic."""
    return datetime.now()
