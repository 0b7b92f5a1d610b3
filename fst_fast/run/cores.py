"""How many cores there are, and how many of them the helpers of a process may take."""

from __future__ import annotations

import os

MOST_SPARE_CORES = 16


def usable_cores() -> int:
    """Number of cores that this process may use; a container or taskset can restrict it below the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spare_cores() -> int:
    """Cores for the helpers of this process: its share of the usable ones, one of which stays free; at least 1 and at most MOST_SPARE_CORES."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    return min(MOST_SPARE_CORES, max(1, usable_cores() // processes - 1))
