"""The family with a tool: contexts of components and weights, alone and together, and components against one text."""

from __future__ import annotations

from typing import Any

from fst_fast.experiments import statistics
from fst_fast.experiments.comparison import end_gap, final_figures
from fst_fast.experiments.curves import AXES
from fst_fast.experiments.methods import Runs, train_and_load
from fst_fast.experiments.result import Claim, Result, Table, per_cent, plus_minus
from fst_fast.experiments.rivals import OURS, paired_gain
from fst_fast.experiments.runner import Runner
from fst_fast.experiments.runs import Changes, Run

FAMILY = "hidden_facts"
ONE_TEXT: Changes = {
    "fast.components": {},
    "fast.component_selector": "round_robin",
    "fast.merge": False,
    "fast.max_context_tokens": 192,  # three components of 64
}
ARMS: dict[str, tuple[str, Changes]] = {
    "rl": ("rl", {}),
    "rl, lr=1e-3": ("rl", {"slow.lr": 1e-3}),
    "gepa": ("gepa", {}),
    "gepa, one text": ("gepa", ONE_TEXT),
    "fst": ("fst", {}),
    "fst, one text": ("fst", ONE_TEXT),
}
ALONE = ("rl", "rl, lr=1e-3", "gepa")


def tools(runner: Runner) -> Result:
    """With a tool and contexts of components, do both channels beat each alone, and components one text?"""
    labels = {name: name.partition(", ")[2].replace(" ", "-") for name in ARMS}
    runs: Runs = {
        FAMILY: {
            name: [Run(FAMILY, method, seed, changes, labels[name]) for seed in runner.seeds]
            for name, (method, changes) in ARMS.items()
        }
    }
    curves = train_and_load(runner, runs)
    if runner.dry_run:
        return Result({})
    arms = curves[FAMILY]
    ends = Table(
        "At the end: mean over seeds ± standard error",
        ["method", "reward, %", *AXES.values(), "KL(train‖base)"],
    )
    final = {name: final_figures(each) for name, each in arms.items()}
    for name, end in final.items():
        spent = [plus_minus(end[axis]) for axis in AXES]
        ends.rows.append([name, per_cent(end["reward"]), *spent, plus_minus(end["kl"], 1, 3)])
    higher = {name: end_gap(arms["fst"], arms[name]) for name in ALONE}
    at_cost = {}
    for method in ("gepa", "fst"):
        pair = {OURS: arms[method], "one text": arms[f"{method}, one text"]}
        at_cost[method] = statistics.bootstrap(paired_gain(pair, "one text", "rollouts"), statistics.mean)
    claims = [
        Claim(f"FST ends above {name} (95 % interval over seeds)", gap.text(), gap.low > 0)
        for name, gap in higher.items()
    ]
    equal = "the mean reward of components on the way to equal rollouts is at least that of one text"
    claims += [Claim(f"{method}: {equal}", gap.text(), gap.value >= 0) for method, gap in at_cost.items()]
    numbers: dict[str, Any] = {
        "final": final,
        "fst_minus": {name: interval.json() for name, interval in higher.items()},
        "components_minus_one_text": {name: interval.json() for name, interval in at_cost.items()},
    }
    return Result(numbers, [ends], claims)
