"""RL, FST and contexts alone from the same base on the same task: efficiency, drift, channels, generalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fst_fast.contracts import CELLS, REWARD_ROUNDING
from fst_fast.experiments import figures, statistics
from fst_fast.experiments.curves import AXES, Curve, Floats, as_float
from fst_fast.experiments.methods import main_runs, peak_level, train_and_load
from fst_fast.experiments.result import Claim, Result, Table, mean_stderr, per_cent, plus_minus
from fst_fast.experiments.runner import Runner
from fst_fast.experiments.runs import METHODS
from fst_fast.experiments.statistics import Interval


def efficiency(runner: Runner) -> Result:
    """How much sooner does FST reach RL's peak, and how much higher does it end?"""
    runs = main_runs(runner)
    curves = train_and_load(runner, runs)
    if runner.dry_run:
        return Result({})
    numbers: dict[str, Any] = {}
    costs = Table(
        "What FST needs to reach RL's peak, RL's own need = 1 (median over seeds, 95 % interval; never: not within its steps)",
        ["family", "RL's peak", *AXES.values()],
    )
    title = "Ceiling of the fitted sigmoid against steps (95 % interval)"
    ceilings = Table(title, ["family", "RL", "FST", "FST - RL"])
    ratios: dict[str, dict[str, Interval]] = {}
    higher = []
    for family, methods in curves.items():
        rl, fst = methods["rl"], methods["fst"]
        peak = statistics.bootstrap([c.peak() for c in rl], statistics.mean)
        ratios[family] = {
            axis: statistics.bootstrap(cost_ratios(rl, fst, axis), statistics.median) for axis in AXES
        }
        fitted = statistics.ceiling_difference(_reward_by_step(fst), _reward_by_step(rl))
        fits = dict(zip(("fst", "rl", "difference"), fitted, strict=True)) if fitted else {}
        final = {method: final_figures(each) for method, each in methods.items()}
        numbers[family] = {
            "rl_settings": dict(runs[family]["rl"][0].changes),
            "rl_peak": peak.json(),
            "ratio": {axis: ratio.json() for axis, ratio in ratios[family].items()},
            "ceiling": {name: fit.json() for name, fit in fits.items()} or None,
            "final": final,
        }
        costs.rows.append([family, peak.text(), *(ratio.text() for ratio in ratios[family].values())])
        shown = [fits[name].text() if fits else "not determined" for name in ("rl", "fst", "difference")]
        ceilings.rows.append([family, *shown])
        if fits and fits["difference"].low > 0:
            higher.append(family)

    def sooner(text: str, axis: str, most: float, needed: int) -> Claim:
        good = [family for family, by_axis in ratios.items() if by_axis[axis].value <= most]
        return Claim.counted(text, good, needed, len(ratios))

    in_rollouts = "counted in rollouts, the fast phase's included, at most 1/2 on two families"
    ceiling = "its fitted ceiling is above RL's (95 % interval) on two families"
    claims = [
        sooner("FST reaches RL's peak with at most 1/3 of the steps on two families", "steps", 1 / 3, 2),
        sooner("... and with at most 1/2 on a third", "steps", 1 / 2, 3),
        sooner(in_rollouts, "rollouts", 1 / 2, 2),
        Claim.counted(ceiling, higher, 2, len(curves)),
    ]
    tables = [costs, ceilings, end_table({family: of["final"] for family, of in numbers.items()})]
    return Result(numbers, tables, claims, {"efficiency": figures.efficiency(curves)})


def _reward_by_step(curves: Sequence[Curve]) -> list[tuple[Floats, Floats]]:
    return [(c.cost["steps"], c.reward) for c in curves]


def cost_ratios(rl: Sequence[Curve], fst: Sequence[Curve], axis: str) -> list[float]:
    """FST's cost to reach RL's peak over RL's own, seed by seed; infinity where it does not."""
    costs = [[c.cost_to_reach(axis, peak_level(a)) for c in (a, b)] for a, b in zip(rl, fst, strict=True)]
    return [other / own if np.isfinite(other) else float("inf") for own, other in costs]


def end_gap(ours: Sequence[Curve], others: Sequence[Curve]) -> Interval:
    """By how much `ours` end above `others` of the same seeds: mean difference of the final rewards."""
    gains = [a.cell("both") - b.cell("both") for a, b in zip(ours, others, strict=True)]
    return statistics.bootstrap(gains, statistics.mean)


def final_figures(curves: Sequence[Curve]) -> dict[str, Any]:
    """At the end of the runs, over their seeds: reward, KL and cost on every axis."""
    return {
        "reward": mean_stderr([c.cell("both") for c in curves]),
        **{axis: mean_stderr([float(c.cost[axis][-1]) for c in curves]) for axis in AXES},
        "kl": mean_stderr([float(c.kl[-1]) for c in curves]),
    }


def end_table(ends: dict[str, dict[str, dict[str, Any]]], *more: str) -> Table:
    """A table of final figures. ends: family -> method -> final_figures. more: what else they tell."""
    head = ["family", "method", "reward, %", *AXES.values(), *more, "KL(train‖base)"]
    table = Table("At the end: mean over seeds ± standard error", head)
    for family, methods in ends.items():
        for method, end in methods.items():
            spent = [plus_minus(end[name]) for name in (*AXES, *more)]
            table.rows.append([family, method, per_cent(end["reward"]), *spent, plus_minus(end["kl"], 1, 3)])
    return table


def drift(runner: Runner) -> Result:
    """How far from the base do the weights have to move for the same reward?"""
    curves = train_and_load(runner, main_runs(runner))
    if runner.dry_run:
        return Result({})
    numbers: dict[str, Any] = {}
    table = Table(
        "KL(train‖base) where each first reaches RL's peak (mean nats per token) and their ratio (median over seeds, 95 % interval)",
        ["family", "RL", "FST, evolved contexts", "FST / RL"],
    )
    good = []
    for family, methods in curves.items():
        pairs = [_kl_at_peak(a, b) for a, b in zip(methods["rl"], methods["fst"], strict=True)]
        ratio = statistics.bootstrap(
            [b / a if 0 < a < np.inf else float("inf") for a, b in pairs], statistics.median
        )
        numbers[family] = {
            "pairs": [[None if np.isinf(kl) else kl for kl in pair] for pair in pairs],
            "ratio": ratio.json(),
        }
        table.rows.append([family, *(_where_reached(kls) for kls in zip(*pairs, strict=True)), ratio.text()])
        if ratio.value <= 0.3:
            good.append(family)
    text = "KL at matched accuracy is at most 0.3 of RL's on two families"
    claim = Claim.counted(text, good, 2, len(curves))
    return Result(numbers, [table], [claim], {"drift": figures.drift(curves)})


def _kl_at_peak(rl: Curve, fst: Curve) -> tuple[float, float]:
    """KL of RL and of FST, each at its first evaluation at RL's peak; infinity where there is none."""

    def kl(curve: Curve) -> float:
        step = curve.cost_to_reach("steps", peak_level(rl))
        return float(curve.kl[curve.cost["steps"] == step][0]) if np.isfinite(step) else float("inf")

    return kl(rl), kl(fst)


def _where_reached(kls: Sequence[float]) -> str:
    reached = [kl for kl in kls if np.isfinite(kl)]
    return f"{np.mean(reached):.3f} ({len(reached)} of {len(kls)} seeds)" if reached else "never"


def channels(runner: Runner) -> Result:
    """Do weights and contexts each carry a part, and do they add up?"""
    curves = train_and_load(runner, main_runs(runner))
    if runner.dry_run:
        return Result({})
    title = "The four cells of FST, per cent, mean over seeds ± standard error"
    table = Table(title, ["family", *CELLS, "both - better of the two"])
    numbers: dict[str, Any] = {}
    good = []
    for family, methods in curves.items():
        fst = methods["fst"]
        gain = [c.cell("both") - max(c.cell("context"), c.cell("weights")) for c in fst]
        numbers[family] = {name: mean_stderr([c.cell(name) for c in fst]) for name in CELLS}
        numbers[family]["gain"] = mean_stderr(gain)
        table.rows.append([family, *map(per_cent, numbers[family].values())])
        if np.mean(gain) > max(2 * statistics.standard_error(gain), REWARD_ROUNDING):
            good.append(family)
    text = "both channels beat each alone on three families by more than two standard errors"
    claim = Claim.counted(text, good, 3, len(curves))
    return Result(numbers, [table], [claim], {"channels": figures.channels(curves)})


OTHER = "ood"
"""generalisation: the split whose problems are of a form that training never shows."""


def generalisation(runner: Runner) -> Result:
    """Does what was learnt hold on problems longer than any that training showed?"""
    runs = main_runs(runner)
    curves = train_and_load(runner, runs)
    runner.evaluate([run for methods in runs.values() for each in methods.values() for run in each], OTHER)
    if runner.dry_run:
        return Result({})
    table = Table(
        "Under each method's own contexts and weights, per cent, mean over seeds ± standard error",
        ["family", *(f"{method}, {split}" for method in METHODS for split in ("validation", OTHER))],
    )
    fst_table = Table(f"The four cells of FST on {OTHER}, per cent", ["family", *CELLS])
    numbers: dict[str, Any] = {}
    other: dict[str, dict[str, list[float]]] = {}  # family -> method -> reward on the other split, by seed
    for family, methods in runs.items():
        found = {m: [runner.evaluation(run, OTHER)["channels"] for run in methods[m]] for m in METHODS}
        other[family] = {m: [as_float(cells["both"]["mean"]) for cells in found[m]] for m in METHODS}
        row = [family]
        for m in METHODS:
            own = mean_stderr([c.cell("both") for c in curves[family][m]])
            numbers.setdefault(family, {})[m] = {"validation": own, OTHER: mean_stderr(other[family][m])}
            row += map(per_cent, numbers[family][m].values())
        table.rows.append(row)
        cells = {name: mean_stderr([as_float(each[name]["mean"]) for each in found["fst"]]) for name in CELLS}
        numbers[family]["fst_cells"] = cells
        fst_table.rows.append([family, *map(per_cent, cells.values())])
    picture = figures.generalisation(curves, other, OTHER)
    return Result(numbers, [table, fst_table], [], {"generalisation": picture})
