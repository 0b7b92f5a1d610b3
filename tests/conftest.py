"""Settings that every test starts from: a quiet, offline, reproducible machine. Set before torch is imported, inherited by subprocesses."""

import importlib.util
import os
import sys
import types
from typing import Any

import pytest

_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(4, (os.cpu_count() or 1) // _workers))))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in ("FST_KERNELS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
    os.environ.pop(_name, None)


def _without_hypothesis() -> types.ModuleType:
    """A module in its place: property tests are skipped, visibly, and the other tests of their files run (GPU machines lack packages)."""
    module: Any = types.ModuleType("hypothesis")

    def strategy(name: str) -> Any:
        if name.startswith("__"):  # inspect asks every module for its __file__
            raise AttributeError(name)
        return lambda *_, **__: module.strategies

    module.strategies = types.ModuleType("hypothesis.strategies")
    module.strategies.__getattr__ = strategy
    module.given = lambda *_, **__: pytest.mark.skip(reason="the package hypothesis is not installed")
    module.settings = module.example = module.assume = lambda *_, **__: lambda test: test
    sys.modules["hypothesis.strategies"] = module.strategies
    return module  # type: ignore[no-any-return]


if importlib.util.find_spec("hypothesis") is None:
    sys.modules["hypothesis"] = _without_hypothesis()
else:
    from hypothesis import HealthCheck, settings

    # A busy machine is no defect: hypothesis measures time unless it is told not to.
    settings.register_profile("fst", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("fst")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))
