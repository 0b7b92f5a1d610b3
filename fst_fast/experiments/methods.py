"""The runs that most experiments share: on each family RL, made strong first, contexts only, and FST; and their curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fst_fast.errors import UserError
from fst_fast.experiments.curves import Curve, load_curve
from fst_fast.experiments.runner import Runner
from fst_fast.experiments.runs import METHODS, Changes, Run

RL_RATES = (1e-4, 3e-4, 1e-3)
RL_KL = (0.0, 1e-2)  # besides the configuration's own, 1e-3
SWEEP_SEEDS = 2
AT_PEAK = 0.95

Runs = dict[str, dict[str, list[Run]]]
"""Family -> method or variant -> one run for each seed."""
Curves = dict[str, dict[str, list[Curve]]]


def strongest_rl(runner: Runner) -> dict[str, Changes]:
    """The changes with which RL does best on each family: its learning rate first, then, at that rate, the weight of the KL penalty.

    Best: highest peak, mean over SWEEP_SEEDS seeds, with the steps that every run has. FST is not tuned: it keeps the rate and penalty
    of its configuration. With runner.rl_settings those, without a sweep."""
    if runner.rl_settings is not None:
        return dict(runner.rl_settings)

    def best(options: dict[str, list[Changes]]) -> dict[str, Changes]:
        seeds = runner.seeds[:SWEEP_SEEDS]
        sweeps: Runs = {
            family: {str(i): [Run(family, "rl", s, c) for s in seeds] for i, c in enumerate(changes)}
            for family, changes in options.items()
        }
        curves = train_and_load(runner, sweeps)
        if runner.dry_run:
            return {family: changes[0] for family, changes in options.items()}
        means = {f: [np.mean([c.peak() for c in each]) for each in curves[f].values()] for f in options}
        # What was not judged is not the strongest.
        means = {f: np.nan_to_num(of_family, nan=-np.inf) for f, of_family in means.items()}
        return {family: changes[int(np.argmax(means[family]))] for family, changes in options.items()}

    rates = best({family: [{"slow.lr": rate} for rate in RL_RATES] for family in runner.families})
    return best(
        {
            family: [rate, *({**rate, "slow.kl_coef": coef} for coef in RL_KL)]
            for family, rate in rates.items()
        }
    )


def rl_settings(results: Path, families: Sequence[str]) -> dict[str, Changes]:
    """RL's settings on each family as a suite found them. results: its results.json. Raises UserError."""
    try:
        experiments = json.loads(results.read_text())["experiments"]
        numbers = next(
            experiments[name]["numbers"] for name in ("efficiency", "rivals") if name in experiments
        )
        return {
            family: {key: float(value) for key, value in numbers[family]["rl_settings"].items()}
            for family in families
        }
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--rl-settings: {results} cannot be read ({error})") from error
    except (ValueError, TypeError, AttributeError, KeyError, StopIteration, RecursionError) as error:
        raise UserError(f"--rl-settings: {results} holds no RL settings of {', '.join(families)}") from error


def main_runs(runner: Runner) -> Runs:
    """The runs that most experiments share."""
    tuned = strongest_rl(runner)
    return {
        family: {
            method: [Run(family, method, s, tuned[family] if method == "rl" else {}) for s in runner.seeds]
            for method in METHODS
        }
        for family in runner.families
    }


def train_and_load(runner: Runner, runs: Runs) -> Curves:
    """Train all of them; their curves, or nothing in a dry run."""
    runner.train([run for methods in runs.values() for each in methods.values() for run in each])
    if runner.dry_run:
        return {}
    return {
        family: {method: [load_curve(runner.folder(run)) for run in each] for method, each in methods.items()}
        for family, methods in runs.items()
    }


def peak_level(rl: Curve) -> float:
    """The reward that counts as reaching RL's peak: all but a twentieth of it. The highest point itself lies anywhere on a plateau."""
    return AT_PEAK * rl.peak()
