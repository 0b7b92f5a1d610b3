"""Series, differences and fits: the numbers behind the figures and tables.

A gain per optimiser step can be bought with rollouts of the fast phase, and a gain per rollout with longer prompts, so every curve is
drawn against four axes: steps, rollouts *including the fast phase*, tokens computed, and seconds.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning, curve_fit

from fst_fast.contracts import REWARD_ROUNDING
from fst_fast.report.load import Cell, Eval, Run, Step

AXES = {
    "steps": "optimiser steps",
    "rollouts": "rollouts, fast phase included",
    "tokens": "tokens computed",
    "unshared": "tokens, had no prefix been shared",
    "seconds": "time (s)",
}
FIGURE_AXES = ("steps", "rollouts", "tokens", "seconds")
"""The axes of the figures; the tables of the experiments have all of AXES."""
PHASES = {
    "rollout_s": "rollouts",
    "verify_s": "verification",
    "score_s": "scoring",
    "train_s": "training",
    "fast_s": "fast phase",
    "eval_s": "evaluation",
}
FIT_POINTS = 6  # three parameters are fitted: fewer points would always seem to fit


@dataclass(frozen=True)
class Series:
    """Points in the order of the run; `error` is one standard error, 0 where unknown. NaN in y: a place where nothing was measured, drawn
    as a gap."""

    x: NDArray[np.float64]  # [P]
    y: NDArray[np.float64]  # [P]
    error: NDArray[np.float64]  # [P]

    @classmethod
    def of(cls, points: Sequence[tuple[float | None, float | None, float | None]]) -> Series:
        """The points that have a place; y None is a gap. Nothing where every y is one."""
        kept = [(x, math.nan if y is None else y, error or 0.0) for x, y, error in points if x is not None]
        x, y, error = np.array(kept, dtype=np.float64).reshape(-1, 3).T
        return cls(x, y, error) if np.isfinite(y).any() else cls(x[:0], y[:0], error[:0])

    def measured(self) -> Series:
        """Without the gaps."""
        there = np.isfinite(self.y)
        return Series(self.x[there], self.y[there], self.error[there])

    def __len__(self) -> int:
        return len(self.x)


def position(run: Run, line: Step | Eval, axis: str) -> float | None:
    """Where a line of metrics.jsonl lies on an axis. Seconds come from timing.jsonl: the last row written by then."""
    if axis != "seconds":
        counted: dict[str, float | None] = {
            "steps": line.step,
            "rollouts": line.rollouts,
            "tokens": line.tokens_computed,
            "unshared": line.tokens_unshared,
        }
        return counted[axis]
    at = [row.step for row in run.timing]
    first, after = bisect_left(at, line.step), bisect_right(at, line.step)
    if isinstance(line, Step) and first < after:
        return run.timing[first].seconds  # its own row, not that of the evaluation after it
    if after:
        return run.timing[after - 1].seconds
    return 0.0 if run.timing and line.step == 0 else None


def validation(run: Run, cell: str, axis: str) -> Series:
    """Mean validation reward of one cell, over the evaluations that have it."""
    lines = [(line, line.channels[cell]) for line in run.evals if cell in line.channels]
    return Series.of([(position(run, line, axis), value.mean, value.stderr) for line, value in lines])


def training(run: Run, axis: str) -> Series:
    """Mean reward of the rollouts of each step."""
    return Series.of([(position(run, line, axis), line.reward, None) for line in run.steps])


def diagnostic(run: Run, name: str) -> Series:
    """One number of the step lines against steps; `kept` is the share of groups that carry a gradient."""
    if name == "kept":
        known = [line for line in run.steps if line.groups is not None and line.groups_kept is not None]
        return Series.of(
            [(line.step, line.groups_kept / line.groups if line.groups else None, None) for line in known]  # type: ignore[operator]
        )
    return Series.of([(line.step, getattr(line, name), None) for line in run.steps])


def kl_against_reward(run: Run, cell: str) -> Series:
    """x: KL(train||base) under the cell's context, y: the cell's validation reward, in the order of the evaluations."""
    name = "kl_evolved" if cell == "both" else "kl_seed"
    lines = [(getattr(line, name), line.channels[cell]) for line in run.evals if cell in line.channels]
    return Series.of([(kl, value.mean, value.stderr) for kl, value in lines])


def smooth(y: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Centred running mean over what was measured, the window shrinking at both ends so that no value is invented; a gap stays a gap."""
    there = np.isfinite(y)
    total = np.concatenate([[0.0], np.cumsum(np.where(there, y, 0.0))])
    count = np.concatenate([[0], np.cumsum(there)])
    i = np.arange(len(y))
    half = np.minimum(np.minimum(i, len(y) - 1 - i), width // 2)
    summed, number = (run[i + half + 1] - run[i - half] for run in (total, count))
    return np.asarray(np.where(there, summed / np.maximum(number, 1), np.nan))


def phases_overlap(run: Run) -> bool:
    """Whether the phases add up to more than the time that passed."""
    claimed = sum(getattr(row, key) or 0.0 for row in run.timing for key in PHASES)
    return bool(run.timing) and claimed > 1.01 * run.timing[-1].seconds


def time_split(run: Run) -> dict[str, float]:
    """Seconds by phase. `other` is the rest: start-up, checkpoints, work done again after a resume."""
    if not run.timing:
        return {}
    spent = {name: sum(getattr(row, key) or 0.0 for row in run.timing) for key, name in PHASES.items()}
    spent["other"] = max(0.0, run.timing[-1].seconds - sum(spent.values()))
    return spent


@dataclass(frozen=True)
class Difference:
    """Difference of two cells; `sigmas` is the difference in standard errors, None where there is no error to divide by."""

    value: float
    sigmas: float | None


def difference(a: Cell, b: Cell) -> Difference | None:
    """a - b. The two errors are added as if independent; the cells share their problems, so this overstates the error."""
    if a.mean is None or b.mean is None:
        return None
    error = math.hypot(a.stderr, b.stderr) if a.stderr is not None and b.stderr is not None else 0.0
    value = a.mean - b.mean
    return Difference(value, value / error if error > REWARD_ROUNDING else None)


@dataclass(frozen=True)
class Fit:
    """R - R0 = (A - R0) / (1 + (Cmid / C)^B), by least squares; `rmse` in units of reward."""

    asymptote: float
    asymptote_error: float | None
    exponent: float
    midpoint: float
    start: float
    rmse: float
    points: int
    note: str = ""

    def at(self, c: NDArray[np.float64]) -> NDArray[np.float64]:
        """Reward at compute c > 0."""
        return np.asarray(
            self.start + (self.asymptote - self.start) / (1 + (self.midpoint / c) ** self.exponent)
        )


def fit_sigmoid(series: Series, start: float | None) -> Fit | str:
    """Fit the paper's saturation curve; a sentence with the reason where that would mean nothing.

    R0 is `start`, the reward of the untouched base model, not a free parameter. Points at C = 0 are R0 itself and do not enter.
    """
    series = series.measured()
    used = series.x > 0
    if used.sum() < FIT_POINTS:
        return f"not fitted: {used.sum()} evaluations after the start, at least {FIT_POINTS} are needed"
    if start is None:
        return "not fitted: the reward of the base model with the seed context was not evaluated"
    x, y = series.x[used], series.y[used]
    if np.ptp(x) == 0:
        return "not fitted: all evaluations lie at the same place of this axis"
    if np.ptp(np.append(y, start)) < 1e-9:
        return "not fitted: the reward never changed"
    top = x.max()

    def curve(c: NDArray[np.float64], a: float, b: float, mid: float) -> NDArray[np.float64]:
        return np.asarray(start + (a - start) / (1 + (mid / c) ** b))

    low, high = (0.0, 0.1, 1e-3), (1.0, 10.0, 10.0)  # A is a reward; Cmid in units of the largest C
    best: tuple[float, NDArray[np.float64], NDArray[np.float64]] | None = None
    for mid in (0.1, 0.3, 1.0):  # least squares finds the nearest valley: start from three places
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # no covariance: asymptote_error is then None
            try:
                guess = (float(np.clip(y[-1], 0.01, 0.99)), 1.0, mid)
                values, covariance = curve_fit(curve, x / top, y, p0=guess, bounds=(low, high), max_nfev=5000)
            except RuntimeError:
                continue
        rmse = float(np.sqrt(np.mean((curve(x / top, *values) - y) ** 2)))
        if best is None or rmse < best[0]:
            best = rmse, values, covariance
    if best is None:
        return "not fitted: least squares did not converge"
    rmse, values, covariance = best
    a, b, mid = (float(value) for value in values)
    error = float(np.sqrt(covariance[0, 0]))
    limits = zip(("A", "B", "Cmid"), values, low, high, strict=True)
    bounded = [name for name, value, lo, hi in limits if _at(value, lo, hi)]
    if bounded:
        note = f"{', '.join(bounded)} at the limit of what is allowed: the data do not determine the curve"
    elif mid > 1:
        note = "half of the gain lies beyond the last evaluation: A is extrapolated"
    else:
        note = ""
    asymptote_error = error if math.isfinite(error) and not bounded else None
    return Fit(a, asymptote_error, b, mid * float(top), start, rmse, len(x), note)


def _at(value: float, low: float, high: float) -> bool:
    margin = 1e-3 * (high - low) if high <= 1 else 1e-3 * high
    return value - low < min(margin, 1e-3) or high - value < margin


def fit(run: Run, axis: str) -> Fit | str:
    """Fit of the validation reward with trained weights and evolved contexts."""
    first = run.evals[0].channels.get("neither", Cell()).mean if run.evals else None
    return fit_sigmoid(validation(run, "both", axis), first)


@dataclass(frozen=True)
class Reached:
    """First evaluation of a run at or above a target, on each axis; empty where it was never reached."""

    label: str
    at: dict[str, float | None]


def cost_to_reach(runs: Sequence[Run], target: float) -> list[Reached]:
    """The first evaluation of each run whose `both` cell is at the target or above. gepa takes no optimiser steps: None on that axis."""
    table = []
    for run in runs:
        line = next((line for line, mean in _both(run) if mean >= target), None)
        at = {axis: position(run, line, axis) for axis in FIGURE_AXES} if line else {}
        if line and run.start.method == "gepa":
            at["steps"] = None
        table.append(Reached(run.label, at))
    return table


def peak(run: Run) -> float | None:
    """Best validation reward of the `both` cell over the run."""
    return max((mean for _, mean in _both(run)), default=None)


def _both(run: Run) -> list[tuple[Eval, float]]:
    """The evaluations that measured the cell `both`, with its mean."""
    means = [(line, line.channels.get("both", Cell()).mean) for line in run.evals]
    return [(line, mean) for line, mean in means if mean is not None]
