"""The process's environment: settings that libraries read when they are loaded, and the C library's allocator.

By default glibc returns what is freed at the top of the heap, and maps every block above a threshold anew. A forward pass frees and asks
for the same megabytes hundreds of times, and each time the system clears the pages again: on small models a tenth of the CPU time of a run.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # that glibc takes


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next allocations. True if the C library is one that can be told (glibc)."""
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
    """Settings that libraries read when they are loaded; what the user has set stays. Call before torch and deepspeed are imported.

    No network look-ups of models; quiet libraries; processes of one machine share its cores; DeepSpeed told that there is no GPU, which
    it would otherwise find out with a page of warnings.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
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


def usable_cores() -> int:
    """Cores this process may run on, which a container or taskset can make fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
