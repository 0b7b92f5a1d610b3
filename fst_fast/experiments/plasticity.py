"""Fresh RL on another task, from the weights that a first task left."""

from __future__ import annotations

from typing import Any

import numpy as np

from fst_fast.experiments import figures, statistics
from fst_fast.experiments.methods import Runs, strongest_rl, train_and_load
from fst_fast.experiments.result import Claim, Result, Table, mean_stderr, per_cent
from fst_fast.experiments.runner import Runner
from fst_fast.experiments.runs import Run

FIRST = "star_graph"
"""Trained on this first, then fresh RL on each of the others."""


def plasticity(runner: Runner) -> Result:
    """Can the weights still learn another task by RL, after RL and after FST?"""
    tuned = strongest_rl(runner)
    others = [family for family in runner.families if family != FIRST]
    if FIRST not in runner.families or not others:
        return Result({"skipped": f"needs the family {FIRST} and another"})
    first = {
        method: [Run(FIRST, method, seed, tuned[FIRST] if method == "rl" else {}) for seed in runner.seeds]
        for method in ("rl", "fst")
    }
    runner.train([run for runs in first.values() for run in runs])
    later: Runs = {}
    for family in others:
        later[family] = {"base": [Run(family, "rl", seed, tuned[family]) for seed in runner.seeds]}
        for method, runs in first.items():
            later[family][f"after {method}"] = [
                Run(family, "rl", run.seed, tuned[family], after=run) for run in runs
            ]
    curves = train_and_load(runner, later)
    if runner.dry_run:
        return Result({})
    peaks = {
        family: {start: np.array([c.peak() for c in each]) for start, each in starts.items()}
        for family, starts in curves.items()
    }
    # Per seed, the mean over the tasks: the last row's interval is over seeds too.
    peaks["mean of them"] = {
        start: np.mean([peaks[family][start] for family in others], axis=0) for start in peaks[others[0]]
    }
    table = Table(
        "Fresh RL on another task than the first (highest smoothed reward, per cent, mean over seeds ± standard error)",
        ["task", "starting from", "peak", "difference to the base (95 % interval)"],
    )
    numbers: dict[str, Any] = {}
    # start -> task -> mean difference to the base
    gains: dict[str, dict[str, float]] = {"after rl": {}, "after fst": {}}
    for family, starts in peaks.items():
        numbers[family] = {"difference": {}}
        for start, values in starts.items():
            numbers[family][start] = mean_stderr(values.tolist())
            row = [family, start, per_cent(numbers[family][start])]
            if start == "base":
                table.rows.append([*row, "-"])
                continue
            difference = statistics.bootstrap((values - starts["base"]).tolist(), statistics.mean)
            numbers[family]["difference"][start] = difference.json()
            gains[start][family] = difference.value
            table.rows.append([*row, difference.text()])

    shown = {
        start: ", ".join(f"{task} {gain:+.2f}" for task, gain in of.items()) for start, of in gains.items()
    }
    text = f"fresh RL from the FST checkpoint of {FIRST} reaches at least the base's result, in the mean over tasks"
    claims = [
        Claim(text, shown["after fst"], gains["after fst"]["mean of them"] >= 0),
        Claim("from the RL checkpoint less", shown["after rl"], gains["after rl"]["mean of them"] < 0),
    ]
    return Result(numbers, [table], claims, {"plasticity": figures.plasticity(curves)})
