"""The allocator's habit of giving memory back to the system at once, and its end.

By default glibc returns what is freed at the top of the heap, and maps every block above a threshold anew. A forward pass frees and asks
for the same megabytes hundreds of times, and each time the system clears the pages again: on small models a tenth of the CPU time of a run.
"""

from __future__ import annotations

import ctypes
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
