"""How a run identifies itself, in its summary and its checkpoints."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from fst_fast import __version__, distributed
from fst_fast.config import Config
from fst_fast.config.load import config_hash


def identity(config: Config) -> dict[str, Any]:
    return {
        "method": config.method,
        "seed": config.seed,
        "task": config.task,
        "model": config.model.path,
        **({"revision": config.model.revision} if config.model.revision else {}),
        "config_hash": config_hash(config),
    }


def writer(config: Config) -> dict[str, Any]:
    """What a checkpoint's manifest records about the run that writes it."""
    return {"config_hash": config_hash(config), "processes": distributed.world_size(), "versions": versions()}


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "deepspeed", "numpy")
    return {
        "python": platform.python_version(),
        "fst-fast": __version__,
        **{name: version(name) for name in names},
    }
