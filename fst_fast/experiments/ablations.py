"""FST with one thing changed at a time."""

from __future__ import annotations

from typing import Any

from fst_fast.experiments import figures, statistics
from fst_fast.experiments.comparison import final_figures
from fst_fast.experiments.methods import train_and_load
from fst_fast.experiments.result import Result, Table, per_cent, plus_minus
from fst_fast.experiments.runner import Runner
from fst_fast.experiments.runs import Changes, Run

IN_FULL: Changes = {"fast.parents": "front", "fast.first_generations": 4, "fast.generations": 2}
ABLATIONS: dict[str, Changes] = {
    "as configured": {},
    "one context": {"fast.population": 1},
    "2 contexts": {"fast.population": 2},
    "8 contexts": {"fast.population": 8},
    "cycle of 3 steps": {"fast.cycle_steps": 3},
    "cycle of 12 steps": {"fast.cycle_steps": 12},
    "anchor set of 16": {"fast.anchor_size": 16},
    "anchor set of 64": {"fast.anchor_size": 64},
    "no reuse": {"fast.reuse_rollouts": False},
    "adaptive fast phase": {"fast.adaptive": True},
    "baseline by context": {"slow.advantage_group": "context"},
    "no KL": {"slow.kl": "none"},
    "reverse KL": {"slow.kl": "reverse"},
    "forward KL": {"slow.kl": "forward"},
    "KL x 10": {"slow.kl_coef": 1e-2},
    "children in full": {**IN_FULL, "fast.children": 4},
    "children in full, race of 16": {**IN_FULL, "fast.children": 16, "fast.rungs": 4},
    "plain GEPA": {"fast.evolver": "gepa", "fast.samples": 1},
    "deeper first search": {"fast.search_budget": 1440},
    "seed keeps its share": {"fast.keep_seed": True},
    "8 children": {"fast.children": 8},
    "crossover": {"fast.crossover": 0.25},
    "no margin to be admitted": {"fast.admit_z": 0.0},
}
FAMILY = "linked_facts"
LEVEL = 0.9


def ablation(runner: Runner) -> Result:
    """Which parts matter, and what do the defaults rest on?"""
    family = FAMILY if FAMILY in runner.families else runner.families[0]
    steps = runner.budget.steps // 2
    budget = {"slow.steps": steps, "eval.every": max(3, runner.budget.eval_every // 2)}
    runs = {
        name: [Run(family, "fst", seed, {**changes, **budget}) for seed in runner.seeds]
        for name, changes in ABLATIONS.items()
    }
    curves = train_and_load(runner, {family: runs}).get(family, {})
    if runner.dry_run:
        return Result({})
    table = Table(
        f"FST on {family}, {steps} steps: what it takes to {LEVEL:.0%} (median over seeds, 95 % interval) and where it ends",
        ["variant", "steps", "rollouts", "tokens", "reward at the end, %", "rollouts in all", "KL"],
    )
    numbers: dict[str, Any] = {}
    for name, each in curves.items():
        cost = {
            axis: statistics.bootstrap([c.cost_to_reach(axis, LEVEL) for c in each], statistics.median)
            for axis in ("steps", "rollouts", "tokens")
        }
        final = final_figures(each)
        numbers[name] = {"to_level": {axis: value.json() for axis, value in cost.items()}, "final": final}
        ends = (per_cent(final["reward"]), plus_minus(final["rollouts"]), plus_minus(final["kl"], 1, 3))
        table.rows.append([name, *(value.text(0) for value in cost.values()), *ends])
    return Result(numbers, [table], [], {"ablation": figures.ablation(curves, LEVEL)})
