"""Which backend runs an operation: the argument `backend=`, else the environment variable FST_KERNELS, else the best one there is.

A backend asked for by name either runs or raises; it is never replaced by another one.
"""

from __future__ import annotations

import os
from typing import TypedDict

NAMES = ("reference", "triton", "cuda", "host")

# Operation -> the backends it has, best first.
IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "linear_logprob": ("reference",),
    "linear_policy_loss": ("reference",),
    "tree_attention": ("reference",),
    "sample_tokens": ("reference",),
}


class BackendReport(TypedDict):
    taken: str
    others: dict[str, str]


def choose_backend(op: str, backend: str | None) -> str:
    """The backend that runs `op`. ValueError: no such name. RuntimeError: `op` has no such backend in this installation."""
    wanted, source = (
        (backend, "backend") if backend is not None else (os.environ.get("FST_KERNELS"), "FST_KERNELS")
    )
    if not wanted:
        return IMPLEMENTED[op][0]
    if wanted not in NAMES:
        raise ValueError(
            f"{source}={wanted!r} is not a backend; allowed: {', '.join(NAMES)}, or unset to choose"
        )
    if wanted not in IMPLEMENTED[op]:
        raise RuntimeError(
            f"{op}: {source}={wanted} cannot run: {_missing(op, wanted)}; {' or '.join(IMPLEMENTED[op])} can"
        )
    return wanted


def _missing(op: str, name: str) -> str:
    return f"this installation has no {name} implementation of {op}"


def backends() -> dict[str, BackendReport]:
    """Operation -> the backend taken on this machine and, for every other one, why it is not."""
    report: dict[str, BackendReport] = {}
    for op, names in IMPLEMENTED.items():
        taken = choose_backend(op, None)
        others = {
            name: f"{taken} is preferred" if name in names else _missing(op, name)
            for name in NAMES
            if name != taken
        }
        report[op] = {"taken": taken, "others": others}
    return report
