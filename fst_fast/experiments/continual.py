"""Several tasks in one run, weights and contexts carried over: three families, and one family whose right context turns around."""

from __future__ import annotations

from collections.abc import Mapping
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
REVERSED = "star_graph"
"""The family whose answer is asked for in both orders."""
DISTIL_SHARE = 5
"""One step in so many is distillation, in the arm that distils."""
STALLED = 0.5
"""RL stalls on a stage where it ends below this share of the best method."""


def continual(runner: Runner) -> Result:
    """One run through three tasks, weights and contexts carried over: who learns the later ones, and what is left of the earlier?"""
    tuned = strongest_rl(runner)
    if not set(STAGES) <= set(runner.families):
        return Result({"skipped": f"needs the families {', '.join(STAGES)}"})
    longest: Changes = {"rollout.max_response_tokens": 40}
    arms = {
        "rl": ("rl", {**tuned[STAGES[0]], **longest}),
        "fst": ("fst", longest),
        "fst, distilled": (
            "fst",
            {"slow.distill_steps": runner.budget.steps // 2 // DISTIL_SHARE, **longest},
        ),
    }
    return _through_stages(runner, "continual", {task: {"task": task} for task in STAGES}, arms)


def reversal(runner: Runner) -> Result:
    """The same problems, the path asked for forward, then backward, then forward again: who follows when the right context turns around?"""
    tuned = strongest_rl(runner)
    if REVERSED not in runner.families:
        return Result({"skipped": f"needs the family {REVERSED}"})
    stages = {
        name: {
            "task": REVERSED,
            "task_args": {"form": "mini", "arms": 5, "path": 4, "ids": 40, "order": name.split()[0]},
        }
        for name in ("forward", "backward", "forward again")
    }
    return _through_stages(runner, "reversal", stages, {"rl": ("rl", tuned[REVERSED]), "fst": ("fst", {})})


def _through_stages(
    runner: Runner, name: str, stages: Mapping[str, Changes], arms: Mapping[str, tuple[str, Changes]]
) -> Result:
    """Train each arm (method, changes) through the stages, half as many steps in each as other runs have, and compare them at their ends."""
    each = runner.budget.steps // 2
    common: Changes = {
        "stages": [{**stage, "steps": each} for stage in stages.values()],
        "slow.steps": each * len(stages),
    }
    first = next(iter(stages.values()))["task"]
    runs = {
        arm: [
            Run(first, method, seed, {**changes, **common}, arm.replace(method, name).replace(", ", "-"))
            for seed in runner.seeds
        ]
        for arm, (method, changes) in arms.items()
    }
    runner.train([run for of_arm in runs.values() for run in of_arm])
    if runner.dry_run:
        return Result({})
    curves = {arm: [load_curve(runner.folder(run)) for run in of_arm] for arm, of_arm in runs.items()}
    title = "Reward at each stage's end on its own task, per cent, mean over seeds ± standard error"
    own_table = Table(title, ["method", *stages])
    last_table = Table("After the last stage, on every task", ["method", *stages])
    numbers: dict[str, Any] = {}
    own: dict[str, list[float]] = {}  # arm -> at each stage's end the reward on its own task, mean over seeds
    count = range(len(stages))
    for arm, of_arm in runs.items():
        ends = [stage_ends(runner.folder(run)) for run in of_arm]
        at_end = [mean_stderr([end[i, i] for end in ends]) for i in count]
        after_last = [mean_stderr([end[count[-1], i] for end in ends]) for i in count]
        numbers[arm] = {"own": at_end, "after_the_last": after_last}
        own[arm] = [float(np.mean([end[i, i] for end in ends])) for i in count]
        own_table.rows.append([arm, *map(per_cent, at_end)])
        last_table.rows.append([arm, *map(per_cent, after_last)])
    best = [max(rewards[i] for rewards in own.values()) for i in count]
    share = [own["fst"][i] / best[i] if best[i] else 0.0 for i in count]
    stalled = [stage for i, stage in enumerate(stages) if own["rl"][i] < STALLED * best[i]]
    shares = ", ".join(f"{x:.0%}" for x in share)
    text = f"RL stalls (below {STALLED:.0%} of the best) on at least one stage"
    claims = [
        Claim("FST ends each stage at 90 % or more of the best method", shares, min(share) >= 0.9),
        Claim.counted(text, stalled, 1, len(stages)),
        Claim(
            "FST ends each stage at a reward of 90 % or more",
            ", ".join(f"{reward:.1%}" for reward in own["fst"]),
            min(own["fst"]) >= 0.9,
        ),
    ]
    picture = figures.stages(curves, list(stages), each)
    return Result(numbers, [own_table, last_table], claims, {name: picture})
