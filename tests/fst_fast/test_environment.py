"""The process keeps freed memory if the C library is glibc."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

from fst_fast.run.environment import keep_freed_memory

# Two thousand times two blocks of 4 MB, touched and freed; the page faults of that.
CHURN = """
import resource, sys
import numpy as np
from fst_fast.run.environment import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(2000):
    a = np.ones(2**19); b = a * 2
    del a, b
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_pages_are_cleared_once_and_not_at_every_allocation() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", CHURN, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < faults("leave") / 4
    assert keep_freed_memory()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt > 0
