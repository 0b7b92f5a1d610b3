"""What a grader may return, read as a Verdict: graders are written against numpy, torch, Decimal or nothing at all.

A number is taken where its value is plain: a bool, an int, a float, a Fraction, a Decimal, a scalar of any array library, an array or tensor
of one element. Text and lists are not numbers, whatever they spell. No array library is imported for it: an object with `shape` and `item`
is an array.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np

from fst_fast.contracts import Verdict


def plain_number(value: Any) -> float | None:
    """The number that a value is, NaN and the infinities included; None where it is none."""
    if isinstance(value, numbers.Real | np.bool_ | Decimal):
        return _as_float(value)
    try:
        if math.prod(value.shape) != 1:
            return None
        inner = value.item()
    except Exception:  # noqa: BLE001 - somebody else's object: no shape, no item, no value, whatever it says
        return None
    return _as_float(inner) if isinstance(inner, numbers.Real | np.bool_ | Decimal) else None


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except ValueError:  # a signalling NaN of Decimal
        return math.nan


def as_verdict(value: Any) -> Verdict:
    """What a grader function may return, as a Verdict; its values are checked later, by the verifying process. Raises TypeError."""
    if isinstance(value, Verdict):
        return value
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in ("reward", "feedback", "metrics")]
        if "reward" not in value or unknown:
            raise TypeError(
                f"the grader returned the keys {list(value)}; allowed are reward (needed), feedback, metrics"
            )
        return Verdict(value["reward"], value.get("feedback", ""), value.get("metrics", {}))
    number = plain_number(value)
    if number is None:
        raise TypeError(
            f"the grader returned a {type(value).__name__}; allowed are Verdict, a number, a bool, or a dict with reward"
        )
    return Verdict(number)
