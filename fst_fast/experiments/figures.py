"""The pictures of the experiments, in the style of the report's: lines are means over seeds, bands one standard error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from fst_fast.contracts import CELLS
from fst_fast.experiments import statistics
from fst_fast.experiments.curves import AXES, Curve, Floats
from fst_fast.experiments.methods import Curves
from fst_fast.report.curves import FIGURE_AXES
from fst_fast.report.figures import COLOURS, STYLE, blank, format_x

METHODS = {"fst": "FST", "rl": "RL", "gepa": "contexts only (GEPA)"}
COLOUR = {
    **dict(zip(("fst", "rl", "gepa", "fst, distilled"), COLOURS[:4], strict=True)),
    **dict(zip(CELLS, ("#BBBBBB", COLOURS[2], COLOURS[1], COLOURS[0]), strict=True)),
    **{"base": "#777777", "after rl": COLOURS[1], "after fst": COLOURS[0]},
}
SEED = "#222222"


def _band(ax: Axes, x: Floats, y: Floats, colour: str, **line: Any) -> None:
    """Mean over seeds and its standard error. x: [P]; y: [seeds, P]."""
    mean = y.mean(axis=0)
    error = y.std(axis=0, ddof=1) / np.sqrt(len(y)) if len(y) > 1 else np.zeros_like(mean)
    ax.plot(x, mean, color=colour, **line)
    ax.fill_between(x, mean - error, mean + error, color=colour, alpha=0.18, lw=0)


def _mean_curve(ax: Axes, curves: Sequence[Curve], axis: str, colour: str) -> None:
    """The seeds' evaluations lie at different costs, so they are interpolated to the same ones, as far as all of them go."""
    grid = np.linspace(0, min(c.cost[axis][-1] for c in curves), 60)
    _band(ax, grid, np.stack([np.interp(grid, c.cost[axis], c.reward) for c in curves]), colour)


def _row(
    names: Iterable[str], width: float, height: float, extra: float, x: str, y: str
) -> tuple[Figure, list[Axes]]:
    """One panel of `width` for each name, side by side, with one scale of rewards."""
    titles = [name.replace("_", " ") for name in names]
    figure = blank(width * len(titles) + extra, height)
    panels = list(figure.subplots(1, len(titles), squeeze=False, sharey=True)[0])
    for ax, title in zip(panels, titles, strict=True):
        ax.set_title(title, loc="left")
        ax.set_xlabel(x)
        ax.set_ylim(0, 1.02)
    panels[0].set_ylabel(y)
    return figure, panels


def _bars(families: Iterable[str], width: float, y: str) -> tuple[Figure, Axes]:
    """A panel for groups of bars, one for each family."""
    names = [family.replace("_", " ") for family in families]
    figure = blank(width * len(names) + 1.6, 3.5)
    ax = figure.subplots()
    ax.set_xticks(range(len(names)), names)
    ax.grid(False, axis="x")
    ax.set_ylim(0, 1.04)
    ax.set_ylabel(y)
    return figure, ax


def _legend(figure: Figure, labels: dict[str, str], columns: int, **line: Any) -> None:
    """labels: method, cell or start -> label."""
    handles = [Line2D([], [], color=COLOUR[key], label=label, **line) for key, label in labels.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)


def _grid(figure: Figure, curves: Curves, axes: Sequence[str], colours: dict[str, str]) -> None:
    """Rows: families; columns: axes. A line for each method."""
    panels = figure.subplots(len(curves), len(axes), squeeze=False, sharey=True)
    for row, (family, methods) in zip(panels, curves.items(), strict=True):
        for ax, axis in zip(row, axes, strict=True):
            for method, each in methods.items():
                if (method, axis) != ("gepa", "steps"):  # it takes none
                    _mean_curve(ax, each, axis, colours[method])
            format_x(ax, axis, (5, 4))
            ax.set_ylim(0, 1.02)
        row[0].set_ylabel(f"{family.replace('_', ' ')}\nvalidation reward")
    for ax, axis in zip(panels[-1], axes, strict=True):
        ax.set_xlabel(AXES[axis])


@mpl.rc_context(STYLE)
def efficiency(curves: Curves) -> Figure:
    """By family, against steps, rollouts, tokens, seconds."""
    figure = blank(3.0 * len(FIGURE_AXES), 2.3 * len(curves) + 0.6)
    _grid(figure, curves, FIGURE_AXES, COLOUR)
    _legend(figure, METHODS, 3, lw=2)
    return figure


@mpl.rc_context(STYLE)
def drift(curves: Curves) -> Figure:
    """KL(train||base) against reward: every evaluation of every seed."""
    figure, panels = _row(curves, 3.1, 3.3, 0.4, "KL(train‖base), nats per token", "validation reward")
    for ax, methods in zip(panels, curves.values(), strict=True):
        for method in ("rl", "fst"):
            for c in methods[method]:
                ax.plot(c.kl, c.reward, color=COLOUR[method], marker="o", ms=2.5, lw=0.8, alpha=0.7)
        ax.set_xlim(left=0)
    _legend(figure, {method: METHODS[method] for method in ("rl", "fst")}, 2, marker="o")
    return figure


@mpl.rc_context(STYLE)
def channels(curves: Curves) -> Figure:
    """The four cells of FST by family: bars are means over seeds, dots the seeds."""
    figure, ax = _bars(curves, 2.2, "validation reward")
    for i, methods in enumerate(curves.values()):
        for j, name in enumerate(CELLS):
            values = [c.cell(name) for c in methods["fst"]]
            x = i + (j - 1.5) * 0.2
            ax.bar(x, np.mean(values), 0.18, color=COLOUR[name])
            ax.plot([x] * len(values), values, ".", color=SEED, ms=4)
    _legend(figure, CELLS, 2, marker="s", ls="", ms=8)
    return figure


@mpl.rc_context(STYLE)
def generalisation(curves: Curves, other: dict[str, dict[str, list[float]]], split: str) -> Figure:
    """Each method at its end, by family: on validation problems and, hatched, on those of the other split. Dots are seeds.

    other: family -> method -> reward on that split, by seed."""
    figure, ax = _bars(curves, 2.4, "reward at the end")
    for i, (family, methods) in enumerate(curves.items()):
        for j, method in enumerate(METHODS):
            for side, values in enumerate(([c.cell("both") for c in methods[method]], other[family][method])):
                x = i + (j - 1) * 0.28 + (side - 0.5) * 0.12
                style: dict[str, Any] = {"alpha": 0.45, "hatch": "///"} if side else {}
                ax.bar(x, np.mean(values), 0.11, color=COLOUR[method], edgecolor="white", lw=0, **style)
                ax.plot([x] * len(values), values, ".", color=SEED, ms=3)
    handles: list[Artist] = [Patch(color=COLOUR[m], label=label) for m, label in METHODS.items()]
    hatched: dict[str, Any] = {"facecolor": "#999999", "alpha": 0.45, "hatch": "///", "edgecolor": "white"}
    handles.append(Patch(label=f"on {split} problems", **hatched))
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return figure


@mpl.rc_context(STYLE)
def plasticity(curves: Curves) -> Figure:
    """Fresh RL from different weights, a panel for each task."""
    figure, panels = _row(curves, 3.2, 3.4, 0.6, AXES["steps"], "validation reward")
    for ax, starts in zip(panels, curves.values(), strict=True):
        for start, each in starts.items():
            _mean_curve(ax, each, "steps", COLOUR[start])
        format_x(ax, "steps", (5, 4))
    labels = {"base": "from the base", "after rl": "from RL's weights", "after fst": "from FST's weights"}
    _legend(figure, labels, 3, lw=2)
    return figure


@mpl.rc_context(STYLE)
def stages(curves: dict[str, list[Curve]], names: Sequence[str], each: int) -> Figure:
    """Reward on the task of the stage that a run is in, against steps; a panel for each stage. each: steps of a stage."""
    figure, panels = _row(names, 3.2, 3.4, 0.6, AXES["steps"], "validation reward, own task")
    for i, ax in enumerate(panels):
        for arm, runs in curves.items():
            steps = runs[0].cost["steps"]
            inside = (steps > i * each) & (steps <= (i + 1) * each)
            rewards = np.stack([c.reward[inside] for c in runs])
            _band(ax, steps[inside], rewards, COLOUR[arm], marker="o", ms=3)
    labels = {**METHODS, "fst, distilled": "FST, distilled at each stage's end"}
    _legend(figure, {arm: labels[arm] for arm in curves}, 3, lw=2)
    return figure


@mpl.rc_context(STYLE)
def rivals(curves: Curves) -> Figure:
    """By family, against rollouts and tokens."""
    axes = ("rollouts", "tokens")
    figure = blank(3.4 * len(axes) + 0.6, 2.3 * len(curves) + 1.2)
    names = next(iter(curves.values()))
    colours = {name: to_hex(mpl.colormaps["tab10"](i)) for i, name in enumerate(names)}
    _grid(figure, curves, axes, colours)
    handles = [Line2D([], [], color=colour, label=name, lw=2) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


@mpl.rc_context(STYLE)
def ablation(curves: dict[str, list[Curve]], level: float) -> Figure:
    """What each variant takes to the level, in steps and in rollouts: dots are seeds, hollow at the right edge where it was not reached."""
    figure = blank(8.6, 0.33 * len(curves) + 1.2)
    panels = figure.subplots(1, 2, sharey=True)
    for ax, axis in zip(panels, ("steps", "rollouts"), strict=True):
        edge = max(c.cost[axis][-1] for each in curves.values() for c in each) * 1.06
        for row, each in enumerate(curves.values()):
            costs = np.array([c.cost_to_reach(axis, level) for c in each])
            ax.barh(row, min(statistics.median(costs), edge), 0.62, color=COLOURS[5])
            for cost in costs:
                fill = SEED if np.isfinite(cost) else "white"
                ax.plot(min(cost, edge), row, "o", ms=4, color=SEED, mfc=fill)
        ax.set_xlabel(f"{AXES[axis]}, to {level:.0%} (hollow: never)")
        ax.set_xlim(0, edge * 1.03)
        ax.grid(False, axis="y")
        if axis != "steps":
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].set_yticks(range(len(curves)), list(curves))
    panels[0].invert_yaxis()
    return figure
