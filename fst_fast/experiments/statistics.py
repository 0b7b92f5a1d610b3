"""Numbers with intervals. Seeds are resampled; methods are compared seed by seed, since a seed fixes the problems and their order.

"Never reached" is a value, infinity: leaving such runs out would flatter a method that often fails. So ratios are summed up by their
median.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fst_fast.report.curves import Series, fit_sigmoid

Floats = NDArray[np.float64]
DRAWS = 2000
FIT_DRAWS = 200  # each is a fit
MOST_SIGNS = 20


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % percentile bootstrap interval; `n` seeds, of a single one the figure thrice. Infinity: not reached."""

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

        return one(self.value) + (f" [{one(self.low)}, {one(self.high)}]" if self.n > 1 else "")


def bootstrap(values: Sequence[float], of: Callable[[Floats], Any], seed: int = 0) -> Interval:
    """of(values) and its interval, one value per seed. of: reduces the last axis, as `mean` and `median` do.

    Raises ValueError without values or with NaN among them."""
    x = np.asarray(values, dtype=float)
    if not len(x) or np.isnan(x).any():
        raise ValueError(f"bootstrap of {x.tolist()}: at least one value, and no NaN")
    drawn = of(x[np.random.default_rng(seed).integers(len(x), size=(DRAWS, len(x)))])
    return Interval(float(of(x)), *percentiles(drawn), len(x))


def percentiles(drawn: Floats) -> tuple[float, float]:
    """The 2.5 and 97.5 per cent points, each one of the values: infinity cannot be interpolated."""
    low, high = np.quantile(drawn, 0.025, method="lower"), np.quantile(drawn, 0.975, method="higher")
    return float(low), float(high)


def ceiling(curves: Sequence[tuple[Floats, Floats]]) -> float | None:
    """A of the sigmoid fitted to the mean of the curves (x the same for all, the base's point first); None where it is not determined."""
    x = curves[0][0]
    y = np.mean([c for _, c in curves], axis=0)
    found = fit_sigmoid(Series(x, y, np.zeros_like(y)), float(y[0]))
    return None if isinstance(found, str) else found.asymptote


def ceiling_difference(
    a: Sequence[tuple[Floats, Floats]], b: Sequence[tuple[Floats, Floats]], seed: int = 0
) -> tuple[Interval, ...] | None:
    """Ceilings of a and of b and their difference, seeds resampled in pairs. None where more than a tenth of the fits are undetermined."""
    rng, n = np.random.default_rng(seed), len(a)

    def ceilings(seeds: Iterable[int]) -> tuple[float | None, float | None]:
        picked = list(seeds)
        return ceiling([a[i] for i in picked]), ceiling([b[i] for i in picked])

    of_a, of_b = ceilings(range(n))
    drawn = [ceilings(rng.integers(n, size=n)) for _ in range(FIT_DRAWS)]
    fitted = np.array([pair for pair in drawn if None not in pair], dtype=float)
    if of_a is None or of_b is None or len(fitted) < 0.9 * FIT_DRAWS:
        return None
    values = ((of_a, fitted[:, 0]), (of_b, fitted[:, 1]), (of_a - of_b, fitted[:, 0] - fitted[:, 1]))
    return tuple(Interval(value, *percentiles(draws), n) for value, draws in values)


def median(x: Floats) -> Any:
    """Over the last axis; of an even number of values the lower middle one, since halfway to infinity is no number."""
    return np.quantile(x, 0.5, axis=-1, method="lower")


def mean(x: Floats) -> Any:
    return x.mean(axis=-1)


def standard_deviation(values: Sequence[float]) -> float:
    """Of the sample, n - 1 in the variance; infinite for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("inf")


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided p of paired differences under the hypothesis that their signs are chance: the share of all sign patterns whose mean is at
    least as far from 0. Exact, so with n seeds never below 2 / 2^n. Raises ValueError with more than MOST_SIGNS values."""
    x = np.asarray(differences, dtype=float)
    if len(x) > MOST_SIGNS:
        raise ValueError(f"{len(x)} differences have too many sign patterns; at most {MOST_SIGNS}")
    signs = 1.0 - 2.0 * ((np.arange(2 ** len(x))[:, None] >> np.arange(len(x))) & 1)  # [2^n, n]
    means = np.abs(signs @ x)
    return float((means >= abs(x.sum()) - 1e-12).mean())


def seeds_needed(spread: float, difference: float, power: float = 0.8, most: int = 1000) -> int | None:
    """The fewest seeds with which a two-sided paired t-test at 5 % finds a mean difference with this power. spread: standard deviation of the
    paired differences. None where more than `most` are needed or the spread is not known. The test takes the differences as normal; runs that
    either find a context or do not are not, so these are rough."""
    if not np.isfinite(spread):
        return None
    found = bisect.bisect_left(
        range(2, most + 1), power, key=lambda n: _power(n, difference / max(spread, 1e-9))
    )
    return found + 2 if found < most - 1 else None


def _power(n: int, effect: float) -> float:
    """Of the paired t-test of n differences whose mean is `effect` standard deviations: averaged over quantiles of the sample's deviation."""
    from scipy import stats  # slow to import

    quantiles = (np.arange(2000) + 0.5) / 2000
    deviation = np.sqrt(stats.chi2.ppf(quantiles, n - 1) / (n - 1))
    shift, critical = effect * np.sqrt(n), stats.t.ppf(0.975, n - 1) * deviation
    return float((stats.norm.cdf(shift - critical) + stats.norm.cdf(-shift - critical)).mean())


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; infinite for a single value, which says nothing of its spread."""
    return float(standard_deviation(values) / np.sqrt(len(values)))
