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
    """figure: what was measured, as text. holds: None where the runs cannot tell."""

    text: str
    figure: str
    holds: bool | None

    @classmethod
    def counted(cls, text: str, good: Sequence[str], needed: int, known: int) -> Claim:
        """Holds if at least `needed` of the `known` families or stages are good; fewer known ones cannot tell."""
        return cls(text, ", ".join(good) or "none", len(good) >= needed if known >= needed else None)


@dataclass(frozen=True)
class Table:
    title: str
    head: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """numbers: everything measured, as JSON; the rest is for reading."""

    numbers: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    pictures: dict[str, Figure] = field(default_factory=dict)


def mean_stderr(values: Sequence[float]) -> dict[str, float | None]:
    """mean: None where one of the values was not measured (NaN); stderr: then, and for a single value."""
    numbers = {"mean": float(np.mean(values)), "stderr": statistics.standard_error(values)}
    return {name: number if np.isfinite(number) else None for name, number in numbers.items()}


def plus_minus(value: dict[str, float | None], times: float = 1.0, digits: int = 0) -> str:
    """`mean ± standard error` of what mean_stderr returns."""
    mean, error = value["mean"], value["stderr"]
    if mean is None:
        return "not measured"
    return f"{mean * times:,.{digits}f}" + ("" if error is None else f" ± {error * times:,.{digits}f}")


def per_cent(value: dict[str, float | None]) -> str:
    return plus_minus(value, 100, 1)
