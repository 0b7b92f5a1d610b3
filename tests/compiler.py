"""Tests of the C++ kernels are skipped, visibly, where nothing can compile them. On Linux a compiler that fails is a failure."""

import sys

import pytest

from fst_kernels import cpu
from fst_kernels.library import missing


def why_not() -> str | None:
    return missing("cpu") or (None if sys.platform == "linux" else cpu.why_not())


def needs_a_compiler(backend: str) -> None:
    if backend == "cpu" and (reason := why_not()) is not None:
        pytest.skip(f"backend=cpu: {reason}")
