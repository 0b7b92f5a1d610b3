"""RL, FST and contexts alone from the same base on the same task: efficiency, drift, channels, generalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fst_fast.contracts import REWARD_ROUNDING
from fst_fast.experiment import figures, statistics
from fst_fast.experiment.curves import AXES, Curve
from fst_fast.experiment.lab import Lab
from fst_fast.experiment.methods import made, main_runs, peak_level, stands
from fst_fast.experiment.result import Claim, Result, Table, over_seeds, plus_minus
from fst_fast.experiment.runs import METHODS
from fst_fast.experiment.statistics import Interval


def efficiency(lab: Lab) -> Result:
    """How much sooner does FST stand where RL stands at its best, and how much higher does it end?"""
    runs = main_runs(lab)
    curves = made(lab, runs)
    numbers: dict[str, Any] = {}
    table = Table(
        "What FST needs to reach RL's peak, RL's own need = 1 (median over seeds, 95 % interval; never: not within its steps)",
        ["family", "RL's peak", *(AXES[axis] for axis in AXES)],
        [],
    )
    ceilings = Table(
        "Ceiling of the fitted sigmoid against steps (95 % interval)", ["family", "RL", "FST", "FST - RL"], []
    )
    ratios: dict[str, dict[str, Interval]] = {}
    higher: list[str] = []
    for family, methods in curves.items():
        rl, fst = methods["rl"], methods["fst"]
        ratios[family] = {axis: _ratio(rl, fst, axis) for axis in AXES}
        peaks = statistics.bootstrap([max(c.smooth()) for c in rl], statistics.mean)
        fits = statistics.ceiling_difference(_series(fst), _series(rl))
        numbers[family] = {
            "rl_settings": dict(runs[family]["rl"][0].changes),
            "rl_peak": peaks.json(),
            "ratio": {axis: interval.json() for axis, interval in ratios[family].items()},
            "ceiling": None
            if fits is None
            else dict(zip(("fst", "rl", "difference"), (f.json() for f in fits), strict=True)),
            "final": {method: final(several) for method, several in methods.items()},
        }
        table.rows.append([family, peaks.text(), *(ratios[family][axis].text() for axis in AXES)])
        if fits:
            ceilings.rows.append([family, fits[1].text(), fits[0].text(), fits[2].text()])
            if fits[2].low > 0:
                higher.append(family)
        else:
            ceilings.rows.append([family, "not determined", "not determined", "-"])
    claims = []
    if curves:
        claims = [
            _at_most(
                ratios,
                "steps",
                1 / 3,
                2,
                "FST reaches RL's peak with at most 1/3 of the steps on two families",
            ),
            _at_most(ratios, "steps", 1 / 2, 3, "... and with at most 1/2 on a third"),
            _at_most(
                ratios,
                "rollouts",
                1 / 2,
                2,
                "counted in rollouts, the fast phase's included, at most 1/2 on two families",
            ),
            Claim(
                "its fitted ceiling is above RL's (95 % interval) on two families",
                ", ".join(higher) or "none",
                len(higher) >= 2,
            ),
        ]
    pictures = {} if lab.dry else {"efficiency": figures.efficiency(curves)}
    return Result(efficiency.__doc__ or "", numbers, [table, ceilings, _finals(curves)], claims, pictures)


def _series(curves: Sequence[Curve]) -> list[tuple[Any, Any]]:
    return [(c.at["steps"], c.reward) for c in curves]


def _ratio(rl: Sequence[Curve], fst: Sequence[Curve], axis: str) -> Interval:
    """What fst needs to stand at rl's peak over what rl needs for it, seed by seed."""
    ratios = []
    for a, b in zip(rl, fst, strict=True):
        mine, other = (stands(c, axis, peak_level(a)) for c in (a, b))
        ratios.append(other / mine)
    return statistics.bootstrap(ratios, statistics.median)


def _at_most(
    ratios: dict[str, dict[str, Interval]], axis: str, most: float, families: int, text: str
) -> Claim:
    good = [family for family, by_axis in ratios.items() if by_axis[axis].value <= most]
    return Claim(text, ", ".join(good) or "none", len(good) >= families if len(ratios) >= families else None)


def final(curves: Sequence[Curve]) -> dict[str, Any]:
    """Where runs end, over their seeds: reward, KL and what they cost by every axis."""
    return {
        "reward": over_seeds([float(c.cells["both"].mean or 0.0) for c in curves]),
        **{axis: over_seeds([float(c.at[axis][-1]) for c in curves]) for axis in AXES},
        "kl": over_seeds([float(c.kl[-1]) for c in curves]),
    }


def _finals(curves: dict[str, dict[str, list[Curve]]]) -> Table:
    rows = []
    for family, methods in curves.items():
        for method, several in methods.items():
            numbers = final(several)
            rows.append(
                [
                    family,
                    method,
                    plus_minus(numbers["reward"], 100, 1),
                    *(plus_minus(numbers[axis]) for axis in AXES),
                    plus_minus(numbers["kl"], 1, 3),
                ]
            )
    return Table(
        "At the end: mean over seeds ± standard error",
        ["family", "method", "reward, %", *AXES.values(), "KL(train‖base)"],
        rows,
    )


def drift(lab: Lab) -> Result:
    """How far from the base do the weights have to move for the same reward?"""
    curves = made(lab, main_runs(lab))
    numbers: dict[str, Any] = {}
    table = Table(
        "KL(train‖base) where both stand at RL's peak (mean nats per token) and their ratio (median over seeds, 95 % interval)",
        ["family", "RL", "FST, evolved contexts", "FST / RL"],
        [],
    )
    good, known = [], 0
    for family, methods in curves.items():
        pairs = [_kl_at_peak(a, b) for a, b in zip(methods["rl"], methods["fst"], strict=True)]
        ratio = statistics.bootstrap([b / a if a > 0 else float("inf") for a, b in pairs], statistics.median)
        numbers[family] = {
            "pairs": [[a, None if np.isinf(b) else b] for a, b in pairs],
            "ratio": ratio.json(),
        }
        reached = [b for _, b in pairs if np.isfinite(b)]
        fst = f"{np.mean(reached):.3f} ({len(reached)} of {len(pairs)} seeds)" if reached else "never"
        table.rows.append([family, f"{np.mean([a for a, _ in pairs]):.3f}", fst, ratio.text()])
        known += 1
        if ratio.value <= 0.3:
            good.append(family)
    claims = [] if lab.dry else [
        Claim("KL at matched accuracy is at most 0.3 of RL's on two families", ", ".join(good) or "none", len(good) >= 2 if known >= 2 else None)
    ]  # fmt: skip
    return Result(
        drift.__doc__ or "", numbers, [table], claims, {} if lab.dry else {"drift": figures.drift(curves)}
    )


def _kl_at_peak(rl: Curve, fst: Curve) -> tuple[float, float]:
    """(RL's KL where it first stands at its peak, FST's where it first stands there; infinity where it never does)."""
    mine, other = (stands(c, "steps", peak_level(rl)) for c in (rl, fst))
    own = float(rl.kl[rl.at["steps"] == mine][0])
    return own, float(fst.kl[fst.at["steps"] == other][0]) if np.isfinite(other) else float("inf")


def channels(lab: Lab) -> Result:
    """Do weights and contexts each carry a part, and do they add up?"""
    curves = made(lab, main_runs(lab))
    names = ("neither", "context", "weights", "both")
    table = Table(
        "The four cells of FST, per cent, mean over seeds ± standard error",
        ["family", *names, "both - better of the two"],
        [],
    )
    numbers: dict[str, Any] = {}
    good = []
    for family, methods in curves.items():
        cells = {name: [float(c.cells[name].mean or 0.0) for c in methods["fst"]] for name in names}
        gain = [
            b - max(c, w) for b, c, w in zip(cells["both"], cells["context"], cells["weights"], strict=True)
        ]
        numbers[family] = {
            **{name: over_seeds(values) for name, values in cells.items()},
            "gain": over_seeds(gain),
        }
        table.rows.append([family, *(plus_minus(numbers[family][name], 100, 1) for name in (*names, "gain"))])
        if np.mean(gain) > max(2 * statistics.standard_error(gain), REWARD_ROUNDING):
            good.append(family)
    claims = [] if lab.dry else [
        Claim("both channels beat each alone on three families by more than two standard errors", ", ".join(good) or "none",
              len(good) >= 3 if len(curves) >= 3 else None)
    ]  # fmt: skip
    return Result(
        channels.__doc__ or "",
        numbers,
        [table],
        claims,
        {} if lab.dry else {"channels": figures.cells(curves)},
    )


OTHER = "ood"
"""generalisation: the split whose problems are of a form that training never shows."""


def generalisation(lab: Lab) -> Result:
    """Does what was learnt hold on problems longer than any that training showed?"""
    runs = main_runs(lab)
    curves = made(lab, runs)
    lab.evaluate([run for methods in runs.values() for several in methods.values() for run in several], OTHER)
    cells: dict[str, dict[str, list[dict[str, float]]]] = {}  # family -> method -> by seed: cell -> mean
    if curves:
        cells = {
            family: {
                method: [
                    {
                        name: float(cell["mean"])
                        for name, cell in lab.evaluated(run, OTHER)["channels"].items()
                    }
                    for run in several
                ]
                for method, several in methods.items()
            }
            for family, methods in runs.items()
        }
    table = Table(
        "Under each method's own contexts and weights, per cent, mean over seeds ± standard error",
        ["family", *(f"{method}, {split}" for method in METHODS for split in ("validation", OTHER))],
        [],
    )
    names = ("neither", "context", "weights", "both")
    fst_table = Table(f"The four cells of FST on {OTHER}, per cent", ["family", *names], [])
    numbers: dict[str, Any] = {}
    for family, methods in cells.items():
        numbers[family] = {"fst_cells": {}}
        row = [family]
        for method in METHODS:
            pair = (
                over_seeds([float(c.cells["both"].mean or 0.0) for c in curves[family][method]]),
                over_seeds([found["both"] for found in methods[method]]),
            )
            numbers[family][method] = dict(zip(("validation", OTHER), pair, strict=True))
            row += [plus_minus(value, 100, 1) for value in pair]
        table.rows.append(row)
        of_fst = {name: over_seeds([found[name] for found in methods["fst"]]) for name in names}
        numbers[family]["fst_cells"] = of_fst
        fst_table.rows.append([family, *(plus_minus(of_fst[name], 100, 1) for name in names)])
    pictures = {} if lab.dry else {"generalisation": figures.splits(curves, cells, OTHER)}
    return Result(generalisation.__doc__ or "", numbers, [table, fst_table], [], pictures)
