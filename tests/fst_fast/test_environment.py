"""The process keeps freed memory if the C library is glibc, and on a GPU its allocator grows segments, unless the user or CUDA IPC says otherwise."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from fst_fast.rollout.managed_server import ManagedServer
from fst_fast.run import environment
from fst_fast.run.environment import for_others, grow_segments, keep_freed_memory

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


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(environment, "_set_here", set())
    for name in environment.ALLOCATOR:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def settings() -> list[str | None]:
    return [os.environ.get(name) for name in environment.ALLOCATOR]


@pytest.mark.usefixtures("_gpu")
def test_segments_grow_on_a_gpu_and_no_other_program_inherits_it() -> None:
    grow_segments()
    assert settings() == ["expandable_segments:True", None]
    grow_segments()
    assert for_others() == {"PYTORCH_CUDA_ALLOC_CONF": None}


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("name", environment.ALLOCATOR)
def test_what_the_user_says_of_the_allocator_stays_and_is_inherited(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:512")
    before = settings()
    grow_segments()
    assert settings() == before
    assert for_others() == {}


@pytest.mark.usefixtures("_gpu")
def test_segments_do_not_grow_where_memory_is_shared_or_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grow_segments(shares_memory=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    grow_segments()
    assert settings() == [None, None]


@pytest.mark.usefixtures("_gpu")
def test_a_vllm_server_that_the_run_starts_has_ordinary_segments() -> None:
    server: Any = SimpleNamespace(
        config=SimpleNamespace(policy=SimpleNamespace(lora=None)),
        args=SimpleNamespace(transfer="file", gpus=None, env={}),
    )
    assert "PYTORCH_CUDA_ALLOC_CONF" not in ManagedServer.environment(server)
    grow_segments()
    assert ManagedServer.environment(server)["PYTORCH_CUDA_ALLOC_CONF"] is None
