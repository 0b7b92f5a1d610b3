"""Is FST sooner than RL on every seed, not only in the median, on all four axes; and is its first fast phase enough?"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

import fst_fast.mini
from fst_fast.experiments import statistics
from fst_fast.experiments.comparison import cost_ratios, end_table, final_figures
from fst_fast.experiments.curves import AXES
from fst_fast.experiments.methods import main_runs, train_and_load
from fst_fast.experiments.result import Claim, Result, Table
from fst_fast.experiments.runner import Runner

MOST = {"steps": 0.25, "rollouts": 0.5, "tokens": 1.0, "seconds": 1.0}
"""The most that FST may cost to reach RL's peak, in the median over seeds, RL's own cost = 1."""


def good_level(family: str) -> float:
    """The reward of a good context under the base, at temperature 1 as on an anchor set: halfway from the seed context to the best of the
    hand-written ones, as measured when the base was built."""
    built = json.loads((fst_fast.mini.path() / "build.json").read_text())
    measured = built["scores_at_temperature_1"][family]
    return float(measured["seed"]["mean"] + max(score["mean"] for score in measured.values())) / 2


def certainty(runner: Runner) -> Result:
    """Is FST sooner than RL on every seed, and does its first fast phase find a good context?"""
    runs = {
        family: {method: runs[method] for method in ("rl", "fst")}
        for family, runs in main_runs(runner).items()
    }
    curves = train_and_load(runner, runs)
    if runner.dry_run:
        return Result({})
    costs = Table(
        "FST's cost to reach RL's peak, RL's own = 1: median over seeds, 95 % interval, and seeds on which it is below 1",
        ["family", *AXES.values(), *(f"below 1, {axis}" for axis in MOST)],
    )
    first = Table(
        "After the first fast phase: the best mean reward on the anchor problems, and seeds with a good context (half of the best hand-written one's gain)",
        ["family", "a good context has", "best, mean over seeds", "lowest", "seeds with a good one"],
    )
    numbers: dict[str, Any] = {}
    for family, methods in curves.items():
        rl, fst = methods["rl"], methods["fst"]
        by_seed = {axis: cost_ratios(rl, fst, axis) for axis in AXES}
        ratios = {axis: statistics.bootstrap(values, statistics.median) for axis, values in by_seed.items()}
        below = {axis: sum(ratio < 1 for ratio in by_seed[axis]) for axis in MOST}
        level, found = good_level(family), [c.first_search or 0.0 for c in fst]
        numbers[family] = {
            "rl_settings": dict(runs[family]["rl"][0].changes),
            "ratio": {axis: ratio.json() for axis, ratio in ratios.items()},
            "ratio_by_seed": {a: [None if np.isinf(r) else r for r in v] for a, v in by_seed.items()},
            "good_level": level,
            "first_phase_best": found,
            "final": {method: final_figures(each) for method, each in methods.items()},
        }
        shown = [ratio.text() for ratio in ratios.values()]
        costs.rows.append([family, *shown, *(f"{n} of {len(fst)}" for n in below.values())])
        hits = sum(f >= level for f in found)
        first.rows.append(
            [family, f"{level:.2f}", f"{np.mean(found):.2f}", f"{min(found):.2f}", f"{hits} of {len(found)}"]
        )
    ends = end_table({family: of["final"] for family, of in numbers.items()})
    return Result(numbers, [costs, first, ends], _claims(numbers))


def _claims(numbers: dict[str, Any]) -> list[Claim]:
    claims = []
    for axis, most in MOST.items():
        for key, limit, what in (
            ("value", most, f"in the median at most {most:g}"),
            ("high", 1.0, "the upper end of the interval below 1"),
        ):
            values = {family: of_family["ratio"][axis][key] for family, of_family in numbers.items()}
            good = [
                f
                for f, v in values.items()
                if v is not None and (v <= limit if key == "value" else v < limit)
            ]
            text = f"{AXES[axis]} to RL's peak: {what}, on all four families"
            claims.append(Claim.counted(text, good, 4, len(numbers)))
    hits = [f >= n["good_level"] for n in numbers.values() for f in n["first_phase_best"]]
    text = "the first fast phase finds a good context on 95 % of the runs"
    return [*claims, Claim(text, f"{sum(hits)} of {len(hits)}", sum(hits) >= 0.95 * len(hits))]
