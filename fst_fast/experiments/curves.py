"""A finished run as a curve on the axes: optimiser steps, rollouts with the fast phase's, tokens computed, seconds of training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fst_fast.report import curves
from fst_fast.report.load import Cell, Run, load_runs
from fst_fast.run.metrics import METRICS

AXES = {**curves.AXES, "seconds": "seconds of training"}
"""The report's axes, except that evaluations do not count in the seconds."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """One run. All arrays: [P], its evaluations in order, the untouched base first."""

    method: str
    seed: int
    cost: dict[str, Floats]  # by axis
    reward: Floats  # under the method's own contexts: the cell `both`
    kl: Floats  # KL(train||base) under the method's own contexts, nats per token
    seed_kl: Floats  # under the seed context; NaN where it was not measured (eval.cells)
    cells: dict[str, Cell]  # of the last evaluation
    reflections: float = 0.0  # asked of the reflector in the whole run
    fast_rollouts: tuple[int, ...] = ()  # of each cycle's fast phase
    admitted: int = 0  # contexts, of all fast phases
    # best mean reward on the anchor problems of the first fast phase that sampled; None without one
    first_search: float | None = None

    def smooth(self) -> Floats:
        """Centred mean of three evaluations, of two at the ends: the error of one is as large as a step of the curve. What was not measured is
        left out; NaN where that is all."""
        y = np.concatenate([[np.nan], self.reward, [np.nan]])
        near = np.stack([y[:-2], y[1:-1], y[2:]])
        there = np.isfinite(near)
        total, count = np.where(there, near, 0.0).sum(axis=0), there.sum(axis=0)
        return np.asarray(np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0))

    def peak(self) -> float:
        """Highest point of the smoothed reward; NaN where nothing was measured."""
        known = self.smooth()[np.isfinite(self.smooth())]
        return float(known.max()) if len(known) else float("nan")

    def cell(self, name: str) -> float:
        """Mean reward of a cell in the last evaluation; NaN where nothing could be judged."""
        return as_float(self.cells[name].mean)

    def mean_reward(self, axis: str, cost: float) -> float:
        """Mean reward from nothing spent to `cost`, at every point that of the last evaluation before it."""
        known = np.isfinite(self.reward)
        at, reward = np.minimum(self.cost[axis][known], cost), self.reward[known]
        return float((np.diff([*at, cost]) * reward).sum() / cost)

    def cost_to_reach(self, axis: str, level: float) -> float:
        """Cost of the first evaluation with reward >= level; inf if never.

        The evaluation of the base does not count, and nothing is interpolated: all that came before an evaluation, such as a whole fast
        phase, was needed for it."""
        reached = np.flatnonzero(self.reward[1:] >= level)
        return float(self.cost[axis][1 + reached[0]]) if len(reached) else float("inf")


def load_curve(folder: Path) -> Curve:
    """The curve of a run folder. Raises UserError where it is none."""
    [run] = load_runs([folder])
    seconds = _training_seconds(run)
    cost = {
        axis: np.array([curves.position(run, line, axis) or 0 for line in run.evals], dtype=float)
        for axis in AXES
    }
    final = [line.channels for line in run.evals if line.final]
    searches = [line.best_mean for line in run.cycles if line.fast_rollouts]
    return Curve(
        method=run.start.method,
        seed=run.start.seed,
        cost={**cost, "seconds": np.array([seconds.get(line.step, 0.0) for line in run.evals])},
        reward=np.array([line.channels.get("both", Cell()).mean for line in run.evals], dtype=float),
        kl=np.array([line.kl_evolved for line in run.evals], dtype=float),
        seed_kl=np.array([line.kl_seed for line in run.evals], dtype=float),
        cells=final[-1] if final else {},
        reflections=float(sum(line.proposed or 0 for line in run.cycles)),
        fast_rollouts=tuple(line.fast_rollouts or 0 for line in run.cycles),
        admitted=sum(line.admitted or 0 for line in run.cycles),
        first_search=searches[0] if searches else None,
    )


def stage_ends(folder: Path) -> dict[tuple[int, int], float]:
    """(stage that ended, stage whose task it was measured on) -> mean reward under the run's own contexts."""
    with (folder / METRICS).open(encoding="utf-8") as lines:
        found = [line for line in map(json.loads, lines) if line["kind"] == "stage"]
    return {
        (line["after_stage"], line["stage"]): as_float(line["channels"]["both"]["mean"]) for line in found
    }


def as_float(value: float | None) -> float:
    """A number of a run's files; NaN where it was not measured."""
    return float("nan") if value is None else float(value)


def _training_seconds(run: Run) -> dict[int, float]:
    """Step -> seconds that training to that step took: since the first row, without evaluations."""
    found: dict[int, float] = {}
    evaluating = 0.0
    for row in run.timing:
        evaluating += row.eval_s or 0.0
        found[row.step] = row.seconds - evaluating
    start = min(found.values(), default=0.0)
    return {step: value - start for step, value in found.items()}
