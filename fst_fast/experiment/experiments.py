"""Each experiment: which runs it makes, which numbers it takes from them, which claims of the method these numbers bear on.

An experiment is a function of a Lab; it asks for runs (those that another experiment has asked for are there already) and returns a
Result. Claims are judged here, by the code, never typed in: `holds` is True or False, None where the runs cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fst_fast.experiment import figures, statistics
from fst_fast.experiment.curves import AXES, Curve, read, stage_ends
from fst_fast.experiment.lab import Lab
from fst_fast.experiment.methods import made, main_runs, peak_level, stands, strongest_rl
from fst_fast.experiment.result import Claim, Result, Table, over_seeds, plus_minus
from fst_fast.experiment.runs import METHODS, Changes, Run
from fst_fast.experiment.statistics import Interval

BEFORE = "star_graph"
"""plasticity: trained on this first, then fresh RL on each of the others."""


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
            "final": {method: _final(several) for method, several in methods.items()},
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


def _final(curves: Sequence[Curve]) -> dict[str, Any]:
    return {
        "reward": over_seeds([float(c.cells["both"].mean or 0.0) for c in curves]),
        **{axis: over_seeds([float(c.at[axis][-1]) for c in curves]) for axis in AXES},
        "kl": over_seeds([float(c.kl[-1]) for c in curves]),
    }


def _finals(curves: dict[str, dict[str, list[Curve]]]) -> Table:
    rows = []
    for family, methods in curves.items():
        for method, several in methods.items():
            numbers = _final(several)
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
        if np.mean(gain) > 2 * statistics.standard_error(gain):
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


def plasticity(lab: Lab) -> Result:
    """Can the weights still learn another task by RL, after RL and after FST?"""
    tuned = strongest_rl(lab)
    others = [family for family in lab.families if family != BEFORE]
    if BEFORE not in lab.families or not others:
        return Result(plasticity.__doc__ or "", {"left out": f"needs the family {BEFORE} and another"})
    first = {
        method: [Run(BEFORE, method, seed, tuned[BEFORE] if method == "rl" else ()) for seed in lab.seeds]
        for method in ("rl", "fst")
    }
    lab.make([run for several in first.values() for run in several])
    runs = {}
    for family in others:
        runs[family] = {"base": [Run(family, "rl", seed, tuned[family]) for seed in lab.seeds]}
        for method, several in first.items():
            runs[family][f"after {method}"] = [
                Run(family, "rl", run.seed, tuned[family], after=run) for run in several
            ]
    curves = made(lab, runs)
    if lab.dry:
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
            numbers[family][name] = over_seeds(values.tolist())
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
    return Result(plasticity.__doc__ or "", numbers, [table], claims, {"plasticity": figures.starts(curves)})


STAGES = ("linked_facts", "list_programs", "formula_choice")
"""continual: the paper's HoVer, CodeIO, Physics."""
DISTIL_SHARE = 5
"""One step in so many is distillation, in the arm that distils."""
STALLED = 0.5
"""RL stalls on a stage where it ends below this share of the best method."""


def continual(lab: Lab) -> Result:
    """One run through three tasks, weights and contexts going on: who learns the later ones, and what is left of the earlier?"""
    tuned = strongest_rl(lab)
    if not set(STAGES) <= set(lab.families):
        return Result(continual.__doc__ or "", {"left out": f"needs the families {', '.join(STAGES)}"})
    each = lab.budget.steps // 2
    stages = "[" + ", ".join(f"{{task: {task}, steps: {each}}}" for task in STAGES) + "]"
    common: Changes = (
        ("stages", stages),
        ("slow.steps", each * len(STAGES)),
        ("rollout.max_response_tokens", 40),
    )
    arms: dict[str, list[Run]] = {
        "rl": [Run(STAGES[0], "rl", s, (*tuned[STAGES[0]], *common), "continual") for s in lab.seeds],
        "fst": [Run(STAGES[0], "fst", s, common, "continual") for s in lab.seeds],
        "fst, distilled": [
            Run(
                STAGES[0],
                "fst",
                s,
                (*common, ("slow.distill_steps", each // DISTIL_SHARE)),
                "continual-distilled",
            )
            for s in lab.seeds
        ],
    }
    lab.make([run for several in arms.values() for run in several])
    if lab.dry:
        return Result(continual.__doc__ or "", {})
    curves = {arm: [read(lab.folder(run)) for run in several] for arm, several in arms.items()}
    ends = {arm: [stage_ends(lab.folder(run)) for run in several] for arm, several in arms.items()}
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
            "own": [over_seeds(values) for values in at_end],
            "after_the_last": [over_seeds(values) for values in left],
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
    picture = figures.staircase(curves, list(STAGES), each)
    return Result(continual.__doc__ or "", numbers, [own_table, left_table], claims, {"continual": picture})


def distill(lab: Lab) -> Result:
    """Can what the contexts know be moved into the weights, and what is it worth there?"""
    runs = main_runs(lab)
    steps = lab.budget.steps // DISTIL_SHARE // 2
    arms = {
        family: {
            **{m: several for m, several in methods.items() if m != "gepa"},
            "fst, distilled": [Run(family, "fst", s, (("slow.distill_steps", steps),)) for s in lab.seeds],
        }
        for family, methods in runs.items()
    }
    curves = made(lab, arms)
    table = Table(
        f"Trained weights under the seed context alone, per cent (the last {steps} of {lab.budget.steps} steps distil)",
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
            **{arm: over_seeds(values) for arm, values in bare.items()},
            "with contexts": over_seeds(both),
            "kl": over_seeds(moved),
        }
        row = [
            plus_minus(numbers[family][arm], 100, 1)
            for arm in ("rl", "fst", "fst, distilled", "with contexts")
        ]
        table.rows.append([family, *row, plus_minus(numbers[family]["kl"], 1, 3)])
        if np.mean(bare["fst, distilled"]) >= 0.9 * np.mean(both):
            good.append(family)
    claims = [] if lab.dry else [
        Claim("after distillation the weights alone reach 90 % of weights and contexts together", ", ".join(good) or "none", len(good) == len(curves))
    ]  # fmt: skip
    return Result(distill.__doc__ or "", numbers, [table], claims)


ABLATIONS: dict[str, Changes] = {
    "as configured": (),
    "one context": (("fast.population", 1),),
    "2 contexts": (("fast.population", 2),),
    "8 contexts": (("fast.population", 8),),
    "cycle of 3 steps": (("fast.cycle_steps", 3),),
    "cycle of 12 steps": (("fast.cycle_steps", 12),),
    "anchor set of 16": (("fast.anchor_size", 16),),
    "anchor set of 64": (("fast.anchor_size", 64),),
    "no reuse": (("fast.reuse_rollouts", "false"),),
    "adaptive fast phase": (("fast.adaptive", "true"),),
    "baseline by context": (("slow.advantage_group", "context"),),
    "no KL": (("slow.kl", "none"),),
    "reverse KL": (("slow.kl", "reverse"),),
    "forward KL": (("slow.kl", "forward"),),
    "KL x 10": (("slow.kl_coef", "1e-2"),),
}
ABLATED = "linked_facts"
LEVEL = 0.9


def ablation(lab: Lab) -> Result:
    """Which parts matter, and what do the defaults rest on?"""
    family = ABLATED if ABLATED in lab.families else lab.families[0]
    steps = lab.budget.steps // 2
    runs = {
        name: [
            Run(
                family,
                "fst",
                s,
                (*changes, ("slow.steps", steps), ("eval.every", max(3, lab.budget.eval_every // 2))),
            )
            for s in lab.seeds
        ]
        for name, changes in ABLATIONS.items()
    }
    curves = made(lab, {family: runs}).get(family, {})
    table = Table(
        f"FST on {family}, {steps} steps: what it takes to {LEVEL:.0%} (median over seeds, 95 % interval) and where it ends",
        ["variant", "steps", "rollouts", "tokens", "reward at the end, %", "rollouts in all", "KL"],
        [],
    )
    numbers: dict[str, Any] = {}
    for name, several in curves.items():
        to = {
            axis: statistics.bootstrap([stands(c, axis, LEVEL) for c in several], statistics.median)
            for axis in ("steps", "rollouts", "tokens")
        }
        final = _final(several)
        numbers[name] = {"to_level": {axis: value.json() for axis, value in to.items()}, "final": final}
        table.rows.append([
            name, *(value.text(0) for value in to.values()), plus_minus(final["reward"], 100, 1), plus_minus(final["rollouts"]), plus_minus(final["kl"], 1, 3),
        ])  # fmt: skip
    pictures = {"ablation": figures.bars(curves, LEVEL)} if curves else {}
    return Result(ablation.__doc__ or "", numbers, [table], [], pictures)


EXPERIMENTS: dict[str, Callable[[Lab], Result]] = {
    "efficiency": efficiency,
    "drift": drift,
    "channels": channels,
    "generalisation": generalisation,
    "plasticity": plasticity,
    "continual": continual,
    "distill": distill,
    "ablation": ablation,
}
