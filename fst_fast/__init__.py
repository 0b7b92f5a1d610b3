"""fst-fast: Fast-Slow Training of language models (arXiv 2605.12484).

    import fst_fast
    result = fst_fast.train(task="star_graph", slow={"steps": 20}, run_dir="runs/mine")

Names are loaded when they are first used: `import fst_fast` itself loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fst_fast.commands.train import Result, train
    from fst_fast.config import Config
    from fst_fast.contracts import (
        Context,
        Environment,
        EpisodeState,
        Problem,
        Rollout,
        ScoredRollout,
        Task,
        Verdict,
    )  # fmt: skip
    from fst_fast.errors import UserError
    from fst_fast.run.callbacks import Callback
    from fst_fast.verify.run_code import run_code

_HOMES = {
    "train": "commands.train",
    "Result": "commands.train",
    "Config": "config",
    "Context": "contracts",
    "Environment": "contracts",
    "EpisodeState": "contracts",
    "Problem": "contracts",
    "Rollout": "contracts",
    "ScoredRollout": "contracts",
    "Task": "contracts",
    "Verdict": "contracts",
    "UserError": "errors",
    "Callback": "run.callbacks",
    "run_code": "verify.run_code",
}

__all__ = [
    "Callback",
    "Config",
    "Context",
    "Environment",
    "EpisodeState",
    "Problem",
    "Result",
    "Rollout",
    "ScoredRollout",
    "Task",
    "UserError",
    "Verdict",
    "run_code",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fst_fast' has no attribute {name!r}")
    value = getattr(import_module(f"fst_fast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
