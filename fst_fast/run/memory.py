"""How much of the memory a run has taken: of the GPU, else of the machine or of the container, whichever is nearer to its limit."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from fst_fast import distributed

CGROUP = Path("/sys/fs/cgroup")


def memory_share() -> float:
    """The largest share of memory in use on any process. GPU: the peak since `restart_peak`. All processes call it."""
    return max(distributed.all_gather(_gpu_share() if torch.cuda.is_available() else _host_share()))


def restart_peak() -> None:
    """Measure the GPU's peak from here: sampling fills what is free on purpose, an update must not."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats(distributed.device())


def _gpu_share() -> float:
    device = distributed.device()
    return torch.cuda.max_memory_allocated(device) / torch.cuda.mem_get_info(device)[1]


def _host_share() -> float:
    machine = psutil.virtual_memory()
    shares = [1 - machine.available / machine.total]
    try:  # a container's limit (cgroup v2); "max" is none
        used, limit = (int((CGROUP / name).read_text()) for name in ("memory.current", "memory.max"))
        kept = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        shares.append((used - int(kept["inactive_file"])) / limit)
    except (OSError, ValueError, KeyError, ZeroDivisionError):
        pass
    return min(max(shares), 1.0)
