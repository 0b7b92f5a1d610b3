"""A finished run as a curve on the four axes: optimiser steps, rollouts with the fast phase's, tokens computed, seconds of training."""

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

    def smooth(self) -> Floats:
        """Centred mean of three evaluations, of two at the ends: a single evaluation's error is of the size of a step of the curve."""
        y = np.concatenate([[np.nan], self.reward, [np.nan]])
        return np.asarray(np.nanmean(np.stack([y[:-2], y[1:-1], y[2:]]), axis=0))


def load_curve(folder: Path) -> Curve:
    """The curve of a run folder. Raises UserError where it is none."""
    [run] = load_runs([folder])
    return curve(run)


def stage_ends(folder: Path) -> dict[tuple[int, int], float]:
    """(stage that ended, stage whose task it was measured on) -> mean reward under the run's own contexts."""
    found = {}
    with (folder / METRICS).open(encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            if line["kind"] == "stage":
                found[line["after_stage"], line["stage"]] = float(line["channels"]["both"]["mean"])
    return found


def curve(run: Run) -> Curve:
    seconds = _training_seconds(run)
    final = [line for line in run.evals if line.final]
    periodic = run.evals
    return Curve(
        method=run.start.method,
        seed=run.start.seed,
        cost={
            "steps": np.array([line.step for line in periodic], dtype=float),
            "rollouts": np.array([line.rollouts or 0 for line in periodic], dtype=float),
            "tokens": np.array([line.tokens_computed or 0 for line in periodic], dtype=float),
            "unshared": np.array([line.tokens_unshared or 0 for line in periodic], dtype=float),
            "seconds": np.array([seconds.get(line.step, 0.0) for line in periodic], dtype=float),
        },
        reward=np.array([_mean(line.channels, "both") for line in periodic]),
        kl=np.array([line.kl_evolved for line in periodic], dtype=float),
        seed_kl=np.array([line.kl_seed for line in periodic], dtype=float),
        cells=final[-1].channels if final else {},
    )


def _mean(channels: dict[str, Cell], name: str) -> float:
    value = channels.get(name, Cell()).mean
    return float("nan") if value is None else value


def _training_seconds(run: Run) -> dict[int, float]:
    """Step -> seconds since the start without evaluations: what training to that step took."""
    found: dict[int, float] = {}
    evaluating = 0.0
    for row in run.timing:
        evaluating += row.eval_s or 0.0
        found[row.step] = row.seconds - evaluating
    if run.timing:
        found = {step: value - min(found.values(), default=0.0) for step, value in found.items()}
    return found
