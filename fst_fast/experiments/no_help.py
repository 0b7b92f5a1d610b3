"""A control: problems on which no context helps, so that the fast phase can only cost."""

from __future__ import annotations

from typing import Any

import numpy as np

from fst_fast.experiments import statistics
from fst_fast.experiments.comparison import cost_ratios, end_gap, final_figures
from fst_fast.experiments.curves import AXES, Curve
from fst_fast.experiments.methods import Runs, train_and_load
from fst_fast.experiments.result import Claim, Result, Table, per_cent, plus_minus
from fst_fast.experiments.runner import Runner
from fst_fast.experiments.runs import Changes, Run

FAMILY = "formula_choice"
FIXED: Changes = {"task_args": {"level": "hard", "fixed": "c"}}
"""One letter is right whatever the question: weights can learn that, and no sentence says it."""
ARMS: dict[str, tuple[str, Changes]] = {
    "rl": ("rl", {}),
    "fst": ("fst", {}),
    "fst, adaptive": ("fst", {"fast.adaptive": True}),
}


def no_help(runner: Runner) -> Result:
    """Where no context helps, does FST lose to RL no more than its fast phases cost, and does fast.adaptive notice?"""
    steps = runner.budget.steps // 2
    runs: Runs = {
        FAMILY: {
            arm: [
                Run(
                    FAMILY,
                    method,
                    seed,
                    {**FIXED, **changes, "slow.steps": steps},
                    arm.replace(method, "no-help").replace(", ", "-"),
                )
                for seed in runner.seeds
            ]
            for arm, (method, changes) in ARMS.items()
        }
    }
    curves = train_and_load(runner, runs)
    if runner.dry_run:
        return Result({})
    arms = curves[FAMILY]
    costs = Table(
        "Cost to reach RL's peak, RL's own = 1: median over seeds, 95 % interval", ["method", *AXES.values()]
    )
    head = [
        "method",
        "reward, %",
        *AXES.values(),
        "rollouts of the first fast phase + later ones",
        "contexts admitted",
    ]
    ends = Table("At the end: mean over seeds ± standard error", head)
    numbers: dict[str, Any] = {}
    for arm, each in arms.items():
        ratios = {
            axis: statistics.bootstrap(cost_ratios(arms["rl"], each, axis), statistics.median)
            for axis in AXES
        }
        end = final_figures(each)
        first, later = [sum(c.fast_rollouts[:1]) for c in each], [_later(c) for c in each]
        admitted = [c.admitted for c in each]
        numbers[arm] = {
            "ratio": {axis: ratio.json() for axis, ratio in ratios.items()},
            "final": end,
            "rollouts_of_first_phase": first,
            "rollouts_of_later_phases": later,
            "admitted": admitted,
        }
        if arm != "rl":
            costs.rows.append([arm, *(ratio.text() for ratio in ratios.values())])
        spent = [plus_minus(end[axis]) for axis in AXES]
        phases = f"{np.mean(first):,.0f} + {np.mean(later):,.0f}"
        ends.rows.append([arm, per_cent(end["reward"]), *spent, phases, f"{np.mean(admitted):.1f}"])
    return Result(numbers, [costs, ends], _claims(arms))


def _claims(arms: dict[str, list[Curve]]) -> list[Claim]:
    claims = []
    for arm in ("fst", "fst, adaptive"):
        gap = end_gap(arms[arm], arms["rl"])
        claims.append(
            Claim(
                f"at equal steps {arm} does not end below RL by more than the interval",
                gap.text(),
                gap.high >= 0,
            )
        )
        steps = statistics.bootstrap(cost_ratios(arms["rl"], arms[arm], "steps"), statistics.median)
        claims.append(
            Claim(
                f"{arm} needs no more steps than RL to reach RL's peak: the interval of the ratio reaches 1 or below",
                steps.text(),
                steps.low <= 1,
            )
        )
    shares = [_later(b) / _later(a) for a, b in zip(arms["fst"], arms["fst, adaptive"], strict=True)]
    text = "fast.adaptive notices: after the first, its fast phases take at most half of the rollouts, on average"
    return [*claims, Claim(text, f"{np.mean(shares):.0%}", bool(np.mean(shares) <= 0.5))]


def _later(curve: Curve) -> int:
    return sum(curve.fast_rollouts[1:])
