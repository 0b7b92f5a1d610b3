"""What comes after a first task: fresh RL from the weights it left, further tasks in one run, contexts distilled into the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fst_fast.experiments import figures, statistics
from fst_fast.experiments.curves import load_curve, stage_ends
from fst_fast.experiments.methods import main_runs, strongest_rl, train_and_load
from fst_fast.experiments.result import Claim, Result, Table, mean_stderr, plus_minus
from fst_fast.experiments.runner import Runner
from fst_fast.experiments.runs import Changes, Run

BEFORE = "star_graph"
"""plasticity: trained on this first, then fresh RL on each of the others."""


def plasticity(runner: Runner) -> Result:
    """Can the weights still learn another task by RL, after RL and after FST?"""
    tuned = strongest_rl(runner)
    others = [family for family in runner.families if family != BEFORE]
    if BEFORE not in runner.families or not others:
        return Result(plasticity.__doc__ or "", {"left out": f"needs the family {BEFORE} and another"})
    first = {
        method: [Run(BEFORE, method, seed, tuned[BEFORE] if method == "rl" else {}) for seed in runner.seeds]
        for method in ("rl", "fst")
    }
    runner.train([run for several in first.values() for run in several])
    runs = {}
    for family in others:
        runs[family] = {"base": [Run(family, "rl", seed, tuned[family]) for seed in runner.seeds]}
        for method, several in first.items():
            runs[family][f"after {method}"] = [
                Run(family, "rl", run.seed, tuned[family], after=run) for run in several
            ]
    curves = train_and_load(runner, runs)
    if runner.dry_run:
        return Result(plasticity.__doc__ or "", {})
    peaks = {
        family: {name: np.array([max(c.smooth()) for c in several]) for name, several in starts.items()}
        for family, starts in curves.items()
    }
    # A seed's mean over the tasks: seeds are what is drawn, so the last row's interval is over seeds as well.
    peaks["mean of them"] = {
        name: np.mean([peaks[family][name] for family in others], axis=0) for name in peaks[others[0]]
    }
    table = Table(
        "Fresh RL on another task than the first (highest smoothed reward, per cent, mean over seeds ± standard error)",
        ["task", "starting from", "peak", "difference to the base (95 % interval)"],
        [],
    )
    numbers: dict[str, Any] = {}
    for family, starts in peaks.items():
        numbers[family] = {"difference": {}}
        for name, values in starts.items():
            numbers[family][name] = mean_stderr(values.tolist())
            against = statistics.bootstrap((values - starts["base"]).tolist(), statistics.mean)
            if name != "base":
                numbers[family]["difference"][name] = against.json()
            table.rows.append([family, name, plus_minus(numbers[family][name], 100, 1), "-" if name == "base" else against.text()])  # fmt: skip

    def claim(text: str, name: str, good: Callable[[float], bool]) -> Claim:
        differences = {
            family: float(np.mean(starts[name] - starts["base"])) for family, starts in peaks.items()
        }
        return Claim(text, ", ".join(f"{family} {value:+.2f}" for family, value in differences.items()), good(differences["mean of them"]))  # fmt: skip

    claims = [
        claim(f"fresh RL from the FST checkpoint of {BEFORE} reaches at least the base's result, in the mean over tasks", "after fst", lambda x: x >= 0),
        claim("from the RL checkpoint less", "after rl", lambda x: x < 0),
    ]  # fmt: skip
    return Result(
        plasticity.__doc__ or "", numbers, [table], claims, {"plasticity": figures.plasticity(curves)}
    )


STAGES = ("linked_facts", "list_programs", "formula_choice")
"""continual: the paper's HoVer, CodeIO, Physics."""
DISTIL_SHARE = 5
"""One step in so many is distillation, in the arm that distils."""
STALLED = 0.5
"""RL stalls on a stage where it ends below this share of the best method."""


def continual(runner: Runner) -> Result:
    """One run through three tasks, weights and contexts going on: who learns the later ones, and what is left of the earlier?"""
    tuned = strongest_rl(runner)
    if not set(STAGES) <= set(runner.families):
        return Result(continual.__doc__ or "", {"left out": f"needs the families {', '.join(STAGES)}"})
    each = runner.budget.steps // 2
    common: Changes = {
        "stages": [{"task": task, "steps": each} for task in STAGES],
        "slow.steps": each * len(STAGES),
        "rollout.max_response_tokens": 40,
    }
    arms: dict[str, list[Run]] = {
        "rl": [Run(STAGES[0], "rl", s, {**tuned[STAGES[0]], **common}, "continual") for s in runner.seeds],
        "fst": [Run(STAGES[0], "fst", s, common, "continual") for s in runner.seeds],
        "fst, distilled": [
            Run(
                STAGES[0],
                "fst",
                s,
                {**common, "slow.distill_steps": each // DISTIL_SHARE},
                "continual-distilled",
            )
            for s in runner.seeds
        ],
    }
    runner.train([run for several in arms.values() for run in several])
    if runner.dry_run:
        return Result(continual.__doc__ or "", {})
    curves = {arm: [load_curve(runner.folder(run)) for run in several] for arm, several in arms.items()}
    ends = {arm: [stage_ends(runner.folder(run)) for run in several] for arm, several in arms.items()}
    last = len(STAGES) - 1
    numbers: dict[str, Any] = {}
    own: dict[str, list[float]] = {}  # arm -> at each stage's end the reward on its own task, mean over seeds
    own_table = Table(
        "Reward at each stage's end on its own task, per cent, mean over seeds ± standard error",
        ["method", *STAGES],
        [],
    )
    left_table = Table("After the last stage, on every task", ["method", *STAGES], [])
    for arm, several in ends.items():
        at_end = [[e[i, i] for e in several] for i in range(len(STAGES))]
        left = [[e[last, i] for e in several] for i in range(len(STAGES))]
        own[arm] = [float(np.mean(values)) for values in at_end]
        numbers[arm] = {
            "own": [mean_stderr(values) for values in at_end],
            "after_the_last": [mean_stderr(values) for values in left],
        }
        own_table.rows.append([arm, *(plus_minus(value, 100, 1) for value in numbers[arm]["own"])])
        left_table.rows.append(
            [arm, *(plus_minus(value, 100, 1) for value in numbers[arm]["after_the_last"])]
        )
    best = [max(own[arm][i] for arm in own) for i in range(len(STAGES))]
    share = [own["fst"][i] / best[i] if best[i] else 0.0 for i in range(len(STAGES))]
    stalled = [task for i, task in enumerate(STAGES) if own["rl"][i] < STALLED * best[i]]
    claims = [
        Claim(
            "FST ends each stage at 90 % or more of the best method",
            ", ".join(f"{x:.0%}" for x in share),
            min(share) >= 0.9,
        ),
        Claim(
            f"RL stalls (below {STALLED:.0%} of the best) on at least one stage",
            ", ".join(stalled) or "none",
            bool(stalled),
        ),
    ]
    picture = figures.continual(curves, list(STAGES), each)
    return Result(continual.__doc__ or "", numbers, [own_table, left_table], claims, {"continual": picture})


def distill(runner: Runner) -> Result:
    """Can what the contexts know be moved into the weights, and what is it worth there?"""
    runs = main_runs(runner)
    steps = runner.budget.steps // DISTIL_SHARE // 2
    arms = {
        family: {
            **{m: several for m, several in methods.items() if m != "gepa"},
            "fst, distilled": [Run(family, "fst", s, {"slow.distill_steps": steps}) for s in runner.seeds],
        }
        for family, methods in runs.items()
    }
    curves = train_and_load(runner, arms)
    table = Table(
        f"Trained weights under the seed context alone, per cent (the last {steps} of {runner.budget.steps} steps distil)",
        ["family", "RL", "FST", "FST, distilled", "FST with its contexts", "KL to the base, distilled"],
        [],
    )
    numbers: dict[str, Any] = {}
    good = []
    for family, methods in curves.items():
        bare = {
            arm: [float(c.cells["weights"].mean or 0.0) for c in several] for arm, several in methods.items()
        }
        both = [float(c.cells["both"].mean or 0.0) for c in methods["fst"]]
        moved = [float(c.seed_kl[-1]) for c in methods["fst, distilled"]]
        numbers[family] = {
            **{arm: mean_stderr(values) for arm, values in bare.items()},
            "with contexts": mean_stderr(both),
            "kl": mean_stderr(moved),
        }
        row = [
            plus_minus(numbers[family][arm], 100, 1)
            for arm in ("rl", "fst", "fst, distilled", "with contexts")
        ]
        table.rows.append([family, *row, plus_minus(numbers[family]["kl"], 1, 3)])
        if np.mean(bare["fst, distilled"]) >= 0.9 * np.mean(both):
            good.append(family)
    claims = [] if runner.dry_run else [
        Claim("after distillation the weights alone reach 90 % of weights and contexts together", ", ".join(good) or "none", len(good) == len(curves))
    ]  # fmt: skip
    return Result(distill.__doc__ or "", numbers, [table], claims)
