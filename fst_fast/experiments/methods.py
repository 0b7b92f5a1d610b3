"""The runs that most experiments share, RL (made strong first), contexts only, and FST on each family, and where a run stands at RL's peak."""

from __future__ import annotations

import numpy as np

from fst_fast.experiments import statistics
from fst_fast.experiments.curves import Curve, load_curve
from fst_fast.experiments.runner import Runner
from fst_fast.experiments.runs import METHODS, Changes, Run

RL_RATES = (1e-4, 3e-4, 1e-3)
RL_KL = (0.0, 1e-2)  # besides the configuration's own, 1e-3
SWEEP_SEEDS = 2
AT_PEAK = 0.95


def strongest_rl(runner: Runner) -> dict[str, Changes]:
    """The changes under which RL does best on each family: its learning rate first, then, at that rate, the weight of the KL penalty.

    Best: highest peak of the smoothed validation reward, mean over SWEEP_SEEDS seeds, with the steps that every run has. FST is not tuned:
    it keeps the rate and penalty of its configuration."""

    def best(options: dict[str, list[Changes]]) -> dict[str, Changes]:
        seeds = range(min(SWEEP_SEEDS, runner.budget.seeds))
        runner.train(
            [Run(f, "rl", s, changes) for f, several in options.items() for changes in several for s in seeds]
        )
        if runner.dry_run:
            return {family: several[0] for family, several in options.items()}
        chosen = {}
        for family, several in options.items():
            heights = [
                np.mean([peak_height(runner, Run(family, "rl", s, changes)) for s in seeds])
                for changes in several
            ]
            chosen[family] = several[int(np.argmax(heights))]
        return chosen

    rates = best({family: [{"slow.lr": rate} for rate in RL_RATES] for family in runner.families})
    return best(
        {
            family: [rate, *({**rate, "slow.kl_coef": coef} for coef in RL_KL)]
            for family, rate in rates.items()
        }
    )


def peak_height(runner: Runner, run: Run) -> float:
    found = load_curve(runner.folder(run))
    return statistics.peak(found.cost["steps"], found.smooth())[1]


def main_runs(runner: Runner) -> dict[str, dict[str, list[Run]]]:
    """family -> method -> its runs, one for each seed: those that most experiments share."""
    tuned = strongest_rl(runner)
    return {
        family: {
            method: [
                Run(family, method, seed, tuned[family] if method == "rl" else {}) for seed in runner.seeds
            ]
            for method in METHODS
        }
        for family in runner.families
    }


def train_and_load(
    runner: Runner, runs: dict[str, dict[str, list[Run]]]
) -> dict[str, dict[str, list[Curve]]]:
    runner.train([run for methods in runs.values() for several in methods.values() for run in several])
    if runner.dry_run:
        return {}
    return {
        family: {
            method: [load_curve(runner.folder(run)) for run in several] for method, several in methods.items()
        }
        for family, methods in runs.items()
    }


def cost_to_reach(curve: Curve, axis: str, level: float) -> float:
    """Where a run first stands at a level, the untouched base left out."""
    return statistics.reach(curve.cost[axis][1:], curve.reward[1:], level)


def peak_level(rl: Curve) -> float:
    """What counts as standing at RL's peak, for RL and for FST: all but a twentieth of the highest point of RL's smoothed curve. The highest
    point itself lies anywhere on a plateau, by chance."""
    return AT_PEAK * float(max(rl.smooth()))
