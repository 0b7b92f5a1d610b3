"""Three tasks in one run, weights and contexts carried over."""

from __future__ import annotations

from typing import Any

import numpy as np

from fst_fast.experiments import figures
from fst_fast.experiments.curves import load_curve, stage_ends
from fst_fast.experiments.methods import strongest_rl
from fst_fast.experiments.result import Claim, Result, Table, mean_stderr, per_cent
from fst_fast.experiments.runner import Runner
from fst_fast.experiments.runs import Changes, Run

STAGES = ("linked_facts", "list_programs", "formula_choice")
"""In place of the paper's HoVer, CodeIO, Physics."""
DISTIL_SHARE = 5
"""One step in so many is distillation, in the arm that distils."""
STALLED = 0.5
"""RL stalls on a stage where it ends below this share of the best method."""


def continual(runner: Runner) -> Result:
    """One run through three tasks, weights and contexts carried over: who learns the later ones, and what is left of the earlier?"""
    tuned = strongest_rl(runner)
    if not set(STAGES) <= set(runner.families):
        return Result({"skipped": f"needs the families {', '.join(STAGES)}"})
    each = runner.budget.steps // 2
    common: Changes = {
        "stages": [{"task": task, "steps": each} for task in STAGES],
        "slow.steps": each * len(STAGES),
        "rollout.max_response_tokens": 40,
    }

    def arm(method: str, changes: Changes, label: str) -> list[Run]:
        return [Run(STAGES[0], method, seed, {**changes, **common}, label) for seed in runner.seeds]

    arms = {
        "rl": arm("rl", tuned[STAGES[0]], "continual"),
        "fst": arm("fst", {}, "continual"),
        "fst, distilled": arm("fst", {"slow.distill_steps": each // DISTIL_SHARE}, "continual-distilled"),
    }
    runner.train([run for runs in arms.values() for run in runs])
    if runner.dry_run:
        return Result({})
    curves = {name: [load_curve(runner.folder(run)) for run in runs] for name, runs in arms.items()}
    title = "Reward at each stage's end on its own task, per cent, mean over seeds ± standard error"
    own_table = Table(title, ["method", *STAGES])
    last_table = Table("After the last stage, on every task", ["method", *STAGES])
    numbers: dict[str, Any] = {}
    own: dict[str, list[float]] = {}  # arm -> at each stage's end the reward on its own task, mean over seeds
    count = range(len(STAGES))
    for name, runs in arms.items():
        ends = [stage_ends(runner.folder(run)) for run in runs]
        at_end = [mean_stderr([end[i, i] for end in ends]) for i in count]
        after_last = [mean_stderr([end[count[-1], i] for end in ends]) for i in count]
        numbers[name] = {"own": at_end, "after_the_last": after_last}
        own[name] = [float(np.mean([end[i, i] for end in ends])) for i in count]
        own_table.rows.append([name, *map(per_cent, at_end)])
        last_table.rows.append([name, *map(per_cent, after_last)])
    best = [max(rewards[i] for rewards in own.values()) for i in count]
    share = [own["fst"][i] / best[i] if best[i] else 0.0 for i in count]
    stalled = [task for i, task in enumerate(STAGES) if own["rl"][i] < STALLED * best[i]]
    shares = ", ".join(f"{x:.0%}" for x in share)
    text = f"RL stalls (below {STALLED:.0%} of the best) on at least one stage"
    claims = [
        Claim("FST ends each stage at 90 % or more of the best method", shares, min(share) >= 0.9),
        Claim.counted(text, stalled, 1, len(STAGES)),
    ]
    picture = figures.continual(curves, STAGES, each)
    return Result(numbers, [own_table, last_table], claims, {"continual": picture})
