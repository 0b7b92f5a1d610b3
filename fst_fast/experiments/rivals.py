"""FST and its rivals from the same base, on the same problems, every cost counted for all alike (docs/experiments.md says where each departs
from its paper)."""

from __future__ import annotations

from typing import Any

from fst_fast.errors import UserError
from fst_fast.experiments import figures, statistics
from fst_fast.experiments.certainty import good_level
from fst_fast.experiments.comparison import end_gap, end_table, final_figures
from fst_fast.experiments.curves import AXES, Curve
from fst_fast.experiments.methods import Runs, strongest_rl, train_and_load
from fst_fast.experiments.result import Claim, Result, Table, mean_stderr
from fst_fast.experiments.runner import Runner
from fst_fast.experiments.runs import Budget, Changes, Run
from fst_fast.experiments.statistics import Interval
from fst_fast.mini import world

OURS = "fst"
CEILING = "rl, best context"
"""RL under the context that the world's law makes best, which nobody is given: what a search that costs nothing would reach. Not a rival."""
EQUAL = ("rollouts", "tokens")
"""The axes on which the methods are compared at equal cost."""
EVOLUTION_SHARE = 0.3
"""Rollouts of evolution for each rollout of RL, where the contexts evolve once or twice."""
GEPA: Changes = {"fast.evolver": "gepa", "fast.samples": 1, "fast.reuse_rollouts": False}
DIFFERENCES = (0.05, 0.1, 0.2, 0.3)
"""The differences in reward of the power table."""


def arms(family: world.Kind, budget: Budget, tuned: Changes) -> dict[str, tuple[str, Changes]]:
    """Name -> method and changes of the configuration. tuned: RL's settings on this family."""
    given = list(hand_written(family).values())
    per_step = 16 * 8  # problems_per_step x group_size of every family
    evolution = int(EVOLUTION_SHARE * budget.steps * per_step)
    frozen: Changes = {"fast.population": 1}
    return {
        "rl": ("rl", tuned),
        "rl, hand-written contexts": (
            "fst",
            {
                **frozen,
                "fast.phases": "first",
                "fast.parents": "front",
                "fast.reflector": "given",
                "fast.reflector_args": {"contexts": given},
                "fast.children": len(given),
                "fast.first_generations": 1,
            },
        ),
        "gepa, then rl": (
            "fst",
            {**frozen, **GEPA, "fast.phases": "first", "fast.rollout_budget": evolution},
        ),
        "better together": (
            "fst",
            {**frozen, **GEPA, "fast.phases": "first_and_last", "fast.rollout_budget": evolution // 2},
        ),
        "e-spl": (
            "fst",
            {"fast.evolver": "e_spl", "fast.crossover": 0.2, "slow.advantage_group": "context"},
        ),
        "fst, plain gepa": ("fst", GEPA),
        OURS: ("fst", {}),
        CEILING: ("rl", {**tuned, "fast.seed_context": world.best_context(family)}),
    }


def hand_written(family: world.Kind) -> dict[str, str]:
    """The contexts of a person who knows some of the sentences and neither their effect nor the strongest of them all together."""
    measured = world.measured_contexts(family)
    names = ("useless", "method", "box", "check", "method+box", "box+check", "all, weaker words")
    return {name: measured[name] for name in names}


def rivals(runner: Runner) -> Result:
    """Is FST better than its rivals at equal cost?"""
    if runner.budget.seeds > statistics.MOST_SIGNS:
        raise UserError(
            f"--seeds {runner.budget.seeds}: the sign-flip test of rivals takes at most {statistics.MOST_SIGNS}"
        )
    tuned = strongest_rl(runner)
    runs: Runs = {}
    for family in runner.families[: runner.budget.rival_families]:
        assert family in world.KINDS
        runs[family] = {}
        for name, (method, changes) in arms(family, runner.budget, tuned[family]).items():
            label = "" if name in ("rl", OURS) else name.replace(", ", "-").replace(" ", "-")
            runs[family][name] = [Run(family, method, seed, changes, label) for seed in runner.seeds]
    curves = train_and_load(runner, runs)
    if runner.dry_run:
        return Result({})
    names = [name for name in next(iter(curves.values())) if name not in (OURS, CEILING)]
    differences = Table(
        "Mean reward of FST over a rival's on the way to the same cost, seed by seed: difference and 95 % interval; p of a sign-flip test",
        ["family", "rival", *(AXES[axis] for axis in EQUAL), "p, rollouts", "reward at the end"],
    )
    first = Table(
        "Runs whose first fast phase found a good context: half of the best context's gain over the seed context, on its anchor problems",
        ["family", *_searching(curves)],
    )
    power = Table(
        "Seeds for a power of 80 % (two-sided paired t-test at 5 %), by the difference in mean reward at equal rollouts",
        ["family", "rival", "spread over seeds", *(f"{d:g}" for d in DIFFERENCES)],
    )
    numbers: dict[str, Any] = {}
    gaps: dict[str, dict[str, dict[str, Interval]]] = {}  # family -> axis -> rival
    for family, methods in curves.items():
        numbers[family] = {"rl_settings": dict(tuned[family]), "methods": {}, "difference": {}}
        for name, each in methods.items():
            end = {**final_figures(each), "reflections": mean_stderr([c.reflections for c in each])}
            numbers[family]["methods"][name] = end
        gaps[family] = {axis: {} for axis in EQUAL}
        for rival in names:
            by_axis = {axis: paired_gain(methods, rival, axis) for axis in EQUAL}
            found = {axis: statistics.bootstrap(v, statistics.mean) for axis, v in by_axis.items()}
            at_end = end_gap(methods[OURS], methods[rival])
            p = statistics.sign_flip_test(by_axis["rollouts"])
            spread = statistics.standard_deviation(by_axis["rollouts"])
            for axis in EQUAL:
                gaps[family][axis][rival] = found[axis]
            numbers[family]["difference"][rival] = {
                **{axis: found[axis].json() for axis in EQUAL},
                **{"p": p, "spread": spread, "end": at_end.json()},
                "by_seed": {axis: by_axis[axis] for axis in EQUAL},
            }
            shown = [found[axis].text() for axis in EQUAL]
            differences.rows.append([family, rival, *shown, f"{p:.3f}", at_end.text()])
            needed = [statistics.seeds_needed(spread, d) for d in DIFFERENCES]
            power.rows.append(
                [family, rival, f"{spread:.2f}", *("-" if n is None else str(n) for n in needed)]
            )
        level = good_level(family)
        hits = {name: [(c.first_search or 0.0) >= level for c in each] for name, each in methods.items()}
        numbers[family]["first_phase_good"] = {name: hits[name] for name in _searching(curves)}
        first.rows.append(
            [family, *(f"{sum(hits[name])} of {len(hits[name])}" for name in _searching(curves))]
        )
    picture = figures.rivals(curves)
    ends = end_table({family: of["methods"] for family, of in numbers.items()}, "reflections")
    return Result(numbers, [ends, differences, first, power], _claims(gaps, numbers), {"rivals": picture})


def _searching(curves: dict[str, dict[str, list[Curve]]]) -> list[str]:
    """The methods that evolve contexts in fast phases of their own."""
    methods = next(iter(curves.values()))
    return [name for name, each in methods.items() if each[0].first_search is not None]


def paired_gain(methods: dict[str, list[Curve]], rival: str, axis: str) -> list[float]:
    """Seed by seed, the mean reward of FST minus the rival's, from nothing spent to the cost that both have spent."""
    gains = []
    for ours, other in zip(methods[OURS], methods[rival], strict=True):
        cost = min(float(c.cost[axis][-1]) for c in (ours, other))
        gains.append(ours.mean_reward(axis, cost) - other.mean_reward(axis, cost))
    return gains


def _claims(gaps: dict[str, dict[str, dict[str, Interval]]], numbers: dict[str, Any]) -> list[Claim]:
    claims = []
    for axis in EQUAL:
        behind = [
            f"{rival} on {family}"
            for family, by_axis in gaps.items()
            for rival, gap in by_axis[axis].items()
            if gap.high < 0
        ]
        text = f"at equal {AXES[axis]} FST is below no rival on any family by more than the interval"
        claims.append(Claim(text, ", ".join(behind) or "none", not behind))
        ahead = [f for f, by_axis in gaps.items() if all(gap.low > 0 for gap in by_axis[axis].values())]
        text = f"... and above every rival, the interval included, on at least three families ({AXES[axis]})"
        claims.append(Claim.counted(text, ahead, 3, len(gaps)))
    hits = [hit for of_family in numbers.values() for hit in of_family["first_phase_good"][OURS]]
    text = "FST finds a good context in its first fast phase on 95 % of the runs"
    claims.append(Claim(text, f"{sum(hits)} of {len(hits)}", sum(hits) >= 0.95 * len(hits)))
    return claims
