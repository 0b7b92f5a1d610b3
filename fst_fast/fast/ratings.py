"""TrueSkill (Herbrich et al. 2006): a normal belief about the strength of each player, updated by the order in which they end a match.

A player's performance is their strength plus noise of deviation BETA. Of neighbours in the order, the better one's performance exceeds the
other's by more than a margin, or, in a tie, differs by less. The posterior is found by expectation propagation over these neighbours. The
constants are TrueSkill's usual ones, which E-SPL's code takes over.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import erfcx, ndtri

BETA = 25 / 6
TAU = 25 / 300
"""Deviation of what a strength changes by between two matches."""
DRAW_PROBABILITY = 0.10
MARGIN = float(ndtri((DRAW_PROBABILITY + 1) / 2)) * math.sqrt(2) * BETA
SWEEPS, CONVERGED = 50, 1e-9


class Rating(NamedTuple):
    """Mean and deviation of the belief about a strength."""

    mean: float = 25.0
    deviation: float = 25 / 3


def rate(ratings: Sequence[Rating], scores: Sequence[float], *, tie: float) -> list[Rating]:
    """The ratings after a match in which the players had these scores; neighbours within `tie` of each other tie."""
    order = sorted(range(len(ratings)), key=lambda i: -scores[i])
    prior = [(ratings[i].mean, ratings[i].deviation ** 2 + TAU**2) for i in order]
    performance = [_Normal.of(mean, variance + BETA**2) for mean, variance in prior]
    ties = [scores[a] - scores[b] <= tie for a, b in itertools.pairwise(order)]
    messages = [(_Normal(), _Normal()) for _ in ties]  # to the better and to the worse neighbour
    for _ in range(SWEEPS):
        moved = 0.0
        for sweep in (range(len(ties)), reversed(range(len(ties)))):
            for i in sweep:
                better, worse = performance[i] / messages[i][0], performance[i + 1] / messages[i][1]
                new = _compared(better, worse, tied=ties[i])
                moved = max(moved, *(_distance(a, b) for a, b in zip(new, messages[i], strict=True)))
                messages[i] = new
                performance[i], performance[i + 1] = better * new[0], worse * new[1]
        if moved < CONVERGED:
            break
    found = list(ratings)
    for i, (mean, variance), after in zip(order, prior, performance, strict=True):
        share = variance / (variance + BETA**2)  # of the performance's variance that is the strength's
        spread = variance - share**2 * (variance + BETA**2 - after.variance)
        found[i] = Rating(mean + share * (after.mean - mean), math.sqrt(spread))
    return found


class _Normal(NamedTuple):
    """A normal factor by precision and precision x mean; the empty one says nothing."""

    precision: float = 0.0
    weighted: float = 0.0

    @classmethod
    def of(cls, mean: float, variance: float) -> _Normal:
        return cls(1 / variance, mean / variance)

    @property
    def mean(self) -> float:
        return self.weighted / self.precision

    @property
    def variance(self) -> float:
        return 1 / self.precision

    def __mul__(self, other: _Normal) -> _Normal:  # type: ignore[override]
        return _Normal(self.precision + other.precision, self.weighted + other.weighted)

    def __truediv__(self, other: _Normal) -> _Normal:
        return _Normal(self.precision - other.precision, self.weighted - other.weighted)


def _distance(a: _Normal, b: _Normal) -> float:
    return max(abs(a.precision - b.precision), abs(a.weighted - b.weighted))


def _compared(better: _Normal, worse: _Normal, *, tied: bool) -> tuple[_Normal, _Normal]:
    """What the order of two performances says of each, given all else (moment matching)."""
    variance = better.variance + worse.variance
    deviation = math.sqrt(variance)
    t, margin = (better.mean - worse.mean) / deviation, MARGIN / deviation
    if tied:  # the moments of a normal cut to [low, high], relative to the density at `high`
        low, high = -margin - abs(t), margin - abs(t)
        ratio = math.exp((high**2 - low**2) / 2)
        mass = _mills(high) - ratio * _mills(low)
        v = (ratio - 1) / mass
        w = v**2 + (high - low * ratio) / mass
        v = math.copysign(v, -t) if t else 0.0
    else:
        v = 1 / _mills(t - margin)
        w = v * (v + t - margin)
    found = []
    for one, sign in ((better, 1.0), (worse, -1.0)):
        share = one.variance / variance
        matched = _Normal.of(
            one.mean + sign * share * deviation * v, max(one.variance * (1 - share * w), 1e-12)
        )
        found.append(matched / one)
    return found[0], found[1]


def _mills(x: float) -> float:
    """Distribution over density of the standard normal, exact in the tail."""
    return math.sqrt(math.pi / 2) * float(erfcx(-x / math.sqrt(2)))
