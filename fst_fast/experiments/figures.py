"""The pictures of the experiments, in the style of the report's: lines are means over seeds, bands one standard error."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

from fst_fast.contracts import CELLS
from fst_fast.experiments import statistics
from fst_fast.experiments.curves import AXES, Curve
from fst_fast.report.curves import FIGURE_AXES
from fst_fast.report.figures import COLOURS, STYLE, blank

METHOD_COLOURS = {"fst": COLOURS[0], "rl": COLOURS[1], "gepa": COLOURS[2], "fst, distilled": COLOURS[3]}
METHOD_NAMES = {"fst": "FST", "rl": "RL", "gepa": "contexts only (GEPA)"}
CELL_COLOURS = ("#BBBBBB", COLOURS[2], COLOURS[1], COLOURS[0])


def _band(
    ax: Axes, curves: Sequence[Curve], axis: str, colour: str, *, what: str = "reward", style: str = "-"
) -> None:
    """Mean over seeds. On axes where runs stand at different places, they are read at the same places, as far as all of them go."""
    grid = np.linspace(0, min(c.cost[axis][-1] for c in curves), 60)
    y = np.stack([np.interp(grid, c.cost[axis], getattr(c, what)) for c in curves])
    mean = y.mean(axis=0)
    error = y.std(axis=0, ddof=1) / np.sqrt(len(y)) if len(y) > 1 else np.zeros_like(mean)
    ax.plot(grid, mean, color=colour, ls=style)
    ax.fill_between(grid, mean - error, mean + error, color=colour, alpha=0.18, lw=0)


def _x(ax: Axes, axis: str) -> None:
    ax.set_xlim(left=0)
    if axis == "steps":
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))


@mpl.rc_context(STYLE)
def efficiency(curves: dict[str, dict[str, list[Curve]]]) -> Figure:
    """Rows: families; columns: steps, rollouts, tokens, seconds."""
    figure = blank(3.0 * len(FIGURE_AXES), 2.3 * len(curves) + 0.6)
    panels = figure.subplots(len(curves), len(FIGURE_AXES), squeeze=False, sharey=True)
    for number, (family, methods) in enumerate(curves.items()):
        for ax, axis in zip(panels[number], FIGURE_AXES, strict=True):
            for method, several in methods.items():
                if method == "gepa" and axis == "steps":
                    continue  # it takes none
                _band(ax, several, axis, METHOD_COLOURS[method])
            _x(ax, axis)
            ax.set_ylim(0, 1.02)
            if axis == FIGURE_AXES[0]:
                ax.set_ylabel(f"{family.replace('_', ' ')}\nvalidation reward")
            if number == len(curves) - 1:
                ax.set_xlabel(AXES[axis])
    handles = [Line2D([], [], color=METHOD_COLOURS[m], lw=2, label=METHOD_NAMES[m]) for m in METHOD_NAMES]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


@mpl.rc_context(STYLE)
def drift(curves: dict[str, dict[str, list[Curve]]]) -> Figure:
    """KL(train||base) against reward: every evaluation of every seed."""
    figure = blank(3.1 * len(curves) + 0.4, 3.3)
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for ax, (family, methods) in zip(panels, curves.items(), strict=True):
        for method in ("rl", "fst"):
            for c in methods[method]:
                ax.plot(c.kl, c.reward, color=METHOD_COLOURS[method], marker="o", ms=2.5, lw=0.8, alpha=0.7)
        ax.set_title(family.replace("_", " "), loc="left")
        ax.set_xlabel("KL(train‖base), nats per token")
        ax.set_xlim(left=0)
        ax.set_ylim(0, 1.02)
    panels[0].set_ylabel("validation reward")
    handles = [
        Line2D([], [], color=METHOD_COLOURS[m], marker="o", label=METHOD_NAMES[m]) for m in ("rl", "fst")
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


@mpl.rc_context(STYLE)
def channels(curves: dict[str, dict[str, list[Curve]]]) -> Figure:
    """The four cells of FST by family: bars are means over seeds, dots the seeds."""
    figure = blank(2.2 * len(curves) + 1.6, 3.5)
    ax = figure.subplots()
    for i, methods in enumerate(curves.values()):
        for j, name in enumerate(CELLS):
            values = [float(c.cells[name].mean or 0.0) for c in methods["fst"]]
            at = i + (j - 1.5) * 0.2
            ax.bar(at, np.mean(values), 0.18, color=CELL_COLOURS[j])
            ax.plot([at] * len(values), values, ".", color="#222222", ms=4)
    ax.set_xticks(range(len(curves)), [family.replace("_", " ") for family in curves])
    ax.grid(False, axis="x")
    ax.set_ylim(0, 1.04)
    ax.set_ylabel("validation reward")
    handles = [
        Line2D([], [], marker="s", ls="", ms=8, color=colour, label=label)
        for label, colour in zip(CELLS.values(), CELL_COLOURS, strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


@mpl.rc_context(STYLE)
def generalisation(
    curves: dict[str, dict[str, list[Curve]]],
    cells: dict[str, dict[str, list[dict[str, float]]]],
    other: str,
) -> Figure:
    """Each method at its end, by family: on validation problems and, hatched, on those of the other split. Dots are seeds."""
    methods = list(METHOD_NAMES)
    figure = blank(2.4 * len(curves) + 1.6, 3.5)
    ax = figure.subplots()
    for i, family in enumerate(curves):
        for j, method in enumerate(methods):
            pair = (
                [float(c.cells["both"].mean or 0.0) for c in curves[family][method]],
                [found["both"] for found in cells[family][method]],
            )
            for side, values in enumerate(pair):
                at = i + (j - 1) * 0.28 + (side - 0.5) * 0.12
                ax.bar(
                    at, np.mean(values), 0.11, color=METHOD_COLOURS[method],
                    alpha=0.45 if side else 1.0, hatch="///" if side else None, edgecolor="white", lw=0,
                )  # fmt: skip
                ax.plot([at] * len(values), values, ".", color="#222222", ms=3)
    ax.set_xticks(range(len(curves)), [family.replace("_", " ") for family in curves])
    ax.grid(False, axis="x")
    ax.set_ylim(0, 1.04)
    ax.set_ylabel("reward at the end")
    handles: list[Artist] = [
        *(Patch(color=METHOD_COLOURS[m], label=METHOD_NAMES[m]) for m in methods),
        Patch(facecolor="#999999", alpha=0.45, hatch="///", edgecolor="white", label=f"on {other} problems"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return figure


@mpl.rc_context(STYLE)
def plasticity(curves: dict[str, dict[str, list[Curve]]]) -> Figure:
    """Fresh RL from different weights, one part of the figure for each task."""
    figure = blank(3.2 * len(curves) + 0.6, 3.4)
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    colours = {"base": "#777777", "after rl": METHOD_COLOURS["rl"], "after fst": METHOD_COLOURS["fst"]}
    names = {"base": "from the base", "after rl": "from RL's weights", "after fst": "from FST's weights"}
    for ax, (family, by_start) in zip(panels, curves.items(), strict=True):
        for name, several in by_start.items():
            _band(ax, several, "steps", colours[name])
        _x(ax, "steps")
        ax.set_title(family.replace("_", " "), loc="left")
        ax.set_xlabel(AXES["steps"])
        ax.set_ylim(0, 1.02)
    panels[0].set_ylabel("validation reward")
    figure.legend(
        handles=[Line2D([], [], color=colours[n], lw=2, label=names[n]) for n in names],
        loc="outside upper center",
        ncols=3,
    )
    return figure


@mpl.rc_context(STYLE)
def continual(curves: dict[str, list[Curve]], stages: Sequence[str], each: int) -> Figure:
    """Reward on the task of the stage that a run is in, against steps; one part of the figure for each stage."""
    figure = blank(3.2 * len(stages) + 0.6, 3.4)
    panels = figure.subplots(1, len(stages), squeeze=False, sharey=True)[0]
    for i, (ax, task) in enumerate(zip(panels, stages, strict=True)):
        for arm, several in curves.items():
            inside = (several[0].cost["steps"] > i * each) & (several[0].cost["steps"] <= (i + 1) * each)
            y = np.stack([c.reward[inside] for c in several])
            x = several[0].cost["steps"][inside]
            mean = y.mean(axis=0)
            error = y.std(axis=0, ddof=1) / np.sqrt(len(y)) if len(y) > 1 else np.zeros_like(mean)
            ax.plot(x, mean, color=METHOD_COLOURS[arm], marker="o", ms=3)
            ax.fill_between(x, mean - error, mean + error, color=METHOD_COLOURS[arm], alpha=0.18, lw=0)
        ax.set_title(task.replace("_", " "), loc="left")
        ax.set_xlabel(AXES["steps"])
        ax.set_ylim(0, 1.02)
    panels[0].set_ylabel("validation reward, own task")
    names = {**METHOD_NAMES, "fst, distilled": "FST, distilled at each stage's end"}
    figure.legend(
        handles=[Line2D([], [], color=METHOD_COLOURS[a], lw=2, label=names[a]) for a in curves],
        loc="outside upper center",
        ncols=3,
    )
    return figure


@mpl.rc_context(STYLE)
def ablation(curves: dict[str, list[Curve]], level: float) -> Figure:
    """What each variant takes to the level, in steps and in rollouts: dots are seeds, hollow at the right edge where it was not reached."""
    figure = blank(8.6, 0.33 * len(curves) + 1.2)
    panels = figure.subplots(1, 2, sharey=True)
    for ax, axis in zip(panels, ("steps", "rollouts"), strict=True):
        edge = max(c.cost[axis][-1] for several in curves.values() for c in several) * 1.06
        for row, several in enumerate(curves.values()):
            places = [statistics.reach(c.cost[axis], c.reward, level) for c in several]
            ax.barh(row, min(statistics.median(np.array(places)), edge), 0.62, color=COLOURS[5])
            for place in places:
                hollow = not np.isfinite(place)
                ax.plot(
                    min(place, edge), row, "o", ms=4, color="#222222", mfc="white" if hollow else "#222222"
                )
        ax.set_xlabel(f"{AXES[axis]}, to {level:.0%} (hollow: never)")
        ax.set_xlim(0, edge * 1.03)
        ax.grid(False, axis="y")
        if axis != "steps":
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].set_yticks(range(len(curves)), list(curves))
    panels[0].invert_yaxis()
    return figure
