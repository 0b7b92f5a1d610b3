"""What an experiment returns, and figures over seeds as numbers and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fst_fast.experiments import statistics


@dataclass(frozen=True)
class Claim:
    text: str
    figure: str
    holds: bool | None


@dataclass(frozen=True)
class Table:
    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Result:
    """numbers: everything measured, as JSON; the rest is for reading."""

    question: str
    numbers: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    pictures: dict[str, Figure] = field(default_factory=dict)


def mean_stderr(values: Sequence[float]) -> dict[str, float | None]:
    error = statistics.standard_error(values)
    return {"mean": float(np.mean(values)), "stderr": error if np.isfinite(error) else None}


def plus_minus(value: dict[str, float | None], times: float = 1.0, digits: int = 0) -> str:
    mean, error = value["mean"], value["stderr"]
    assert mean is not None
    return f"{mean * times:,.{digits}f}" + ("" if error is None else f" ± {error * times:,.{digits}f}")
