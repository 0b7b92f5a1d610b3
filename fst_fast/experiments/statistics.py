"""Numbers with intervals. Seeds are the unit that is resampled; methods are compared seed by seed, since a seed fixes problems and order.

"Not reached" is a value (infinity), never a gap: a mean over the runs that did get there would flatter the method that often does not.
So the middle of a set of ratios is their median.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fst_fast.report.curves import Series, fit_sigmoid

Floats = NDArray[np.float64]
DRAWS = 2000
FIT_DRAWS = 200  # each is a fit


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % percentile bootstrap interval; `n` seeds. Infinity: not reached."""

    value: float
    low: float
    high: float
    n: int

    def json(self) -> dict[str, Any]:
        return {
            k: (None if isinstance(v, float) and not np.isfinite(v) else v) for k, v in asdict(self).items()
        }

    def text(self, digits: int = 2) -> str:
        def one(x: float) -> str:
            return f"{x:.{digits}f}" if np.isfinite(x) else "never"

        return f"{one(self.value)} [{one(self.low)}, {one(self.high)}]"


def bootstrap(values: Sequence[float], of: Callable[[Floats], float], seed: int = 0) -> Interval:
    """`of` (such as np.mean) of one value per seed, with its interval. Raises ValueError without values or with NaN among them."""
    x = np.asarray(values, dtype=float)
    if not len(x) or np.isnan(x).any():
        raise ValueError(f"bootstrap of {x.tolist()}: at least one value, and no NaN")
    rng = np.random.default_rng(seed)
    drawn = [of(x[rng.integers(len(x), size=len(x))]) for _ in range(DRAWS)]
    low, high = _percentiles(np.array(drawn))
    return Interval(float(of(x)), low, high, len(x))


def _percentiles(drawn: Floats) -> tuple[float, float]:
    """The 2.5 and 97.5 per cent points; by rank, since infinity cannot be interpolated."""
    ordered = np.sort(drawn)
    return float(ordered[int(0.025 * (len(ordered) - 1))]), float(
        ordered[int(np.ceil(0.975 * (len(ordered) - 1)))]
    )


def reach(x: Floats, y: Floats, level: float) -> float:
    """The place of the first evaluation at `level` or above; infinity where there is none. Nothing is read between evaluations: what led to
    one (a whole fast phase, say) was needed in full."""
    over = np.flatnonzero(y >= level)
    return float(x[over[0]]) if len(over) else float("inf")


def peak(x: Floats, y: Floats) -> tuple[float, float]:
    """(place, height) of the highest point; of equals the first."""
    i = int(np.argmax(y))
    return float(x[i]), float(y[i])


def ceiling(curves: Sequence[tuple[Floats, Floats]]) -> float | None:
    """A of the sigmoid fitted to the mean of the curves (x the same for all, the base's point first); None where it is not determined."""
    x = curves[0][0]
    y = np.mean([c for _, c in curves], axis=0)
    found = fit_sigmoid(Series(x, y, np.zeros_like(y)), float(y[0]))
    return None if isinstance(found, str) else found.asymptote


def ceiling_difference(
    a: Sequence[tuple[Floats, Floats]], b: Sequence[tuple[Floats, Floats]], seed: int = 0
) -> tuple[Interval, Interval, Interval] | None:
    """Ceilings of a and of b and their difference, seeds resampled in pairs. None where more than a tenth of the fits are undetermined."""
    rng = np.random.default_rng(seed)
    n = len(a)
    whole = (ceiling(a), ceiling(b))
    drawn = []
    for _ in range(FIT_DRAWS):
        picked = rng.integers(n, size=n)
        drawn.append((ceiling([a[i] for i in picked]), ceiling([b[i] for i in picked])))
    good = np.array([(p, q) for p, q in drawn if p is not None and q is not None])
    if whole[0] is None or whole[1] is None or len(good) < 0.9 * FIT_DRAWS:
        return None

    def interval(value: float, values: Floats) -> Interval:
        return Interval(value, *_percentiles(values), n)

    return (
        interval(whole[0], good[:, 0]),
        interval(whole[1], good[:, 1]),
        interval(whole[0] - whole[1], good[:, 0] - good[:, 1]),
    )


def median(x: Floats) -> float:
    """Of an even number the lower middle one: halfway to infinity is no number."""
    return float(np.sort(x)[(len(x) - 1) // 2])


def mean(x: Floats) -> float:
    return float(x.mean())


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; infinite for a single value, which says nothing of its spread."""
    x = np.asarray(values, dtype=float)
    return float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("inf")
