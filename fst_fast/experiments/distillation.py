"""Contexts distilled into the weights by the last steps of a run."""

from __future__ import annotations

from typing import Any

import numpy as np

from fst_fast.experiments.continual import DISTIL_SHARE
from fst_fast.experiments.methods import main_runs, train_and_load
from fst_fast.experiments.result import Claim, Result, Table, mean_stderr, per_cent, plus_minus
from fst_fast.experiments.runner import Runner
from fst_fast.experiments.runs import Run

REACHED = 0.95
"""Share of the reward of weights and contexts together that the weights alone are to reach."""


def distill(runner: Runner) -> Result:
    """Can what the contexts know be moved into the weights, and what is it worth there?"""
    steps = runner.budget.steps // DISTIL_SHARE
    arms = {
        family: {
            "rl": methods["rl"],
            "fst": methods["fst"],
            "fst, distilled": [Run(family, "fst", s, {"slow.distill_steps": steps}) for s in runner.seeds],
        }
        for family, methods in main_runs(runner).items()
    }
    curves = train_and_load(runner, arms)
    if runner.dry_run:
        return Result({})
    table = Table(
        f"Trained weights under the seed context alone, per cent (the last {steps} of {runner.budget.steps} steps distil)",
        ["family", "RL", "FST", "FST, distilled", "FST with its contexts", "KL to the base, distilled"],
    )
    numbers: dict[str, Any] = {}
    good = []
    for family, methods in curves.items():
        alone = {arm: [c.cell("weights") for c in each] for arm, each in methods.items()}
        both = [c.cell("both") for c in methods["fst"]]
        rewards = {arm: mean_stderr(values) for arm, values in {**alone, "with contexts": both}.items()}
        kl = mean_stderr([float(c.seed_kl[-1]) for c in methods["fst, distilled"]])
        numbers[family] = {**rewards, "kl": kl}
        table.rows.append([family, *map(per_cent, rewards.values()), plus_minus(kl, 1, 3)])
        if np.mean(alone["fst, distilled"]) >= REACHED * np.mean(both):
            good.append(family)
    text = (
        f"after distillation the weights alone reach {100 * REACHED:.0f} % of weights and contexts together"
    )
    return Result(numbers, [table], [Claim.counted(text, good, len(curves), len(curves))])
