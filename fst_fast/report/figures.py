"""The pictures. Every function takes runs and gives a matplotlib Figure, or a sentence that says why there is nothing to draw.

A run keeps its colour and marker through all figures (Okabe and Ito's palette, which colour-blind readers can tell apart). Figures are
made without pyplot, so a report drawn inside a training process leaves its matplotlib state alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from fst_fast.contracts import CELLS
from fst_fast.report import curves
from fst_fast.report.load import Cell, Run

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PHASE_COLOURS = ("#0072B2", "#56B4E9", "#CC79A7", "#D55E00", "#009E73", "#E69F00", "#BBBBBB")
SAME_CELL = {  # cells of a method that are another cell by construction
    "rl": {"context": "neither", "both": "weights"},
    "gepa": {"weights": "neither", "both": "context"},
}
DIAGNOSTICS = {
    "kl": "KL to base (nats/token)",
    "entropy": "entropy (nats/token)",
    "grad_norm": "gradient norm",
    "ratio_mean": "mean importance ratio",
    "clipped_fraction": "clipped tokens (share)",
    "mismatch_kl": "rollout/trainer KL (nats/token)",
    "response_tokens": "response length (tokens)",
    "kept": "groups with gradient (share)",
}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#222222",
    "grid.color": "#e4e4e4",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.markersize": 4.5,
    "figure.facecolor": "white",
}
DPI = 140

Drawn = Figure | str
Floats = NDArray[np.float64]


def png(figure: Figure) -> bytes:
    """The figure as a PNG file. The same figure gives the same bytes: no date, no version inside."""
    out = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def blank(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06))
    FigureCanvasAgg(figure)
    return figure


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]


def name(run: Run) -> str:
    """The run in a legend or a heading."""
    method = "" if run.start.method == run.label else f"{run.start.method}, "
    return f"{run.label} ({method}seed {run.start.seed})"


def _reward_limits(axes: Sequence[Axes], values: Sequence[float]) -> None:
    """One scale from 0 for all panels: rewards lie in [0, 1], and a cut axis makes a small gain look large."""
    top = min(1.04, max([0.05, *(value for value in values if not np.isnan(value))]) * 1.12)
    for ax in axes:
        ax.set_ylim(0, top)


def format_x(ax: Axes, axis: str, ticks: tuple[int, int]) -> None:
    """From 0, with at most so many ticks: on the axis of steps, which are whole, and on the others, which are shortened (k, M)."""
    ax.set_xlim(left=0)
    if axis == "steps":
        ax.xaxis.set_major_locator(MaxNLocator(ticks[0], integer=True))
    else:
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.xaxis.set_major_locator(MaxNLocator(ticks[1]))


def _line(ax: Axes, x: Floats, y: Floats, **style: Any) -> None:
    """A line with gaps where y is NaN; a point between two gaps, which a line does not show, is a dot."""
    ax.plot(x, y, **style)
    gap = np.concatenate([[True], np.isnan(y), [True]])
    alone = ~gap[1:-1] & gap[:-2] & gap[2:]
    if alone.any():
        ax.plot(x[alone], y[alone], ls="", marker=".", **{key: style[key] for key in style if key != "lw"})


def _handles(runs: Iterable[tuple[int, Run]], *, suffix: str = "", **style: Any) -> list[Line2D]:
    """A line of the legend for each (number, run), with the run's marker where the style has none."""
    return [
        Line2D([], [], label=name(run) + suffix, **{"color": _colour(i), "marker": _marker(i), **style})
        for i, run in runs
    ]


def _grey(label: str, **style: Any) -> Line2D:
    """A line of the legend that holds for all runs."""
    return Line2D([], [], color="#555555", label=label, **style)


def _legend(figure: Figure, handles: list[Line2D], columns: int = 3) -> None:
    longest = max((len(str(handle.get_label())) for handle in handles), default=0)
    columns = min(len(handles), columns if longest < 45 else 2)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)


@mpl.rc_context(STYLE)
def cells(runs: Sequence[Run], final: Sequence[dict[str, Cell]]) -> Drawn:
    """Four-cell figure: mean reward of each combination, one bar with its standard error per run."""
    if not any(cell.mean is not None for channels in final for cell in channels.values()):
        return "No evaluation has been written yet."
    figure = blank(8.4, 3.6)
    ax = figure.subplots()
    width, size = 0.8 / len(runs), 9 if len(runs) < 4 else 7
    values = [0.0]
    for i, (run, channels) in enumerate(zip(runs, final, strict=True)):
        style: dict[str, Any] = {"color": _colour(i), "capsize": 3, "ecolor": "#222222"}
        for at, key in enumerate(CELLS):
            cell = channels.get(key, Cell())
            if cell.mean is None:
                continue
            x, error = at + (i - (len(runs) - 1) / 2) * width, cell.stderr or 0.0
            alpha = 0.3 if key in SAME_CELL.get(run.start.method, {}) else 1.0
            ax.bar(x, cell.mean, width * 0.9, yerr=error, alpha=alpha, **style)
            ax.text(x, cell.mean + error, f" {cell.mean:.2f}", ha="center", va="bottom", fontsize=size)
            values.append(cell.mean + error)
    _reward_limits([ax], values)
    ax.set_ylim(0, ax.get_ylim()[1] * 1.05)
    ax.set_xticks(range(len(CELLS)), [label.replace(", ", "\n") for label in CELLS.values()])
    ax.grid(False, axis="x")
    ax.set_ylabel("validation reward (mean)")
    _legend(figure, _handles(enumerate(runs), marker="s", ls="", ms=8))
    return figure


def _four_panels(draw: Callable[[Axes, str], list[float]], label: str) -> Figure:
    """A panel for each of the four axes. draw: draws one and returns the rewards in it."""
    figure = blank(9.6, 7.0)
    panels = figure.subplots(2, 2)
    values = []
    for ax, axis in zip(panels.flat, curves.FIGURE_AXES, strict=True):
        drawn = draw(ax, axis)
        if not drawn:
            ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", color="#777777")
        values += drawn
        ax.set_xlabel(curves.AXES[axis])
        format_x(ax, axis, (10, 6))
    for ax in panels[:, 0]:
        ax.set_ylabel(label)
    _reward_limits(list(panels.flat), values)
    return figure


@mpl.rc_context(STYLE)
def validation(runs: Sequence[Run]) -> Drawn:
    """Validation reward on the four axes: solid `both`, dashed `weights` where that is another cell, dotted the fit."""
    if not any(len(curves.validation(run, "both", "steps")) for run in runs):
        return "No evaluation has been written yet."
    notes: dict[str, Line2D] = {}

    def draw(ax: Axes, axis: str) -> list[float]:
        values: list[float] = []
        for i, run in enumerate(runs):
            style: dict[str, Any] = {"color": _colour(i), "marker": _marker(i)}
            both = curves.validation(run, "both", axis)
            values += [*(both.y + both.error)]
            ax.plot(both.x, both.y, label=name(run), **style)
            band = both.y - both.error, both.y + both.error
            ax.fill_between(both.x, *band, color=_colour(i), alpha=0.15, lw=0)
            if run.start.method == "fst":
                weights = curves.validation(run, "weights", axis)
                values += [*weights.y]
                ax.plot(weights.x, weights.y, ls="--", lw=1.1, mfc="white", ms=3.5, **style)
                if len(weights):
                    notes["weights"] = _grey(CELLS["weights"], ls="--", lw=1.1)
            fit = curves.fit(run, axis)
            if not isinstance(fit, str):
                c = np.linspace(both.x.max() / 200, both.x.max(), 200)
                ax.plot(c, fit.at(c), color=_colour(i), ls=":", lw=1.4)
                notes["fit"] = _grey("sigmoid fit", ls=":", lw=1.4)
        return values

    figure = _four_panels(draw, "validation reward (mean)")
    _legend(figure, [*_handles(enumerate(runs)), *(notes[key] for key in ("weights", "fit") if key in notes)])
    return figure


@mpl.rc_context(STYLE)
def training(runs: Sequence[Run]) -> Drawn:
    """Reward of the training rollouts on the four axes: faint as measured, strong as a running mean."""
    shown = [(i, run) for i, run in enumerate(runs) if len(curves.training(run, "steps"))]
    if not shown:
        return "No run has slow steps with a reward."

    def draw(ax: Axes, axis: str) -> list[float]:
        values: list[float] = []
        for i, run in shown:
            series = curves.training(run, axis)
            values += [*series.y]
            _line(ax, series.x, series.y, color=_colour(i), lw=0.8, alpha=0.35)
            smooth = curves.smooth(series.y, max(3, len(series) // 12))
            _line(ax, series.x, smooth, color=_colour(i), lw=1.8)
        return values

    figure = _four_panels(draw, "training reward (mean)")
    _legend(figure, _handles(shown, lw=1.8, marker=""))
    return figure


@mpl.rc_context(STYLE)
def kl_against_reward(runs: Sequence[Run]) -> Drawn:
    """Reward against the distance from the base model: up and to the left is better."""
    if not any(len(curves.kl_against_reward(run, cell)) for run in runs for cell in ("both", "weights")):
        return "KL(train‖base) has not been measured yet."
    figure = blank(8.4, 4.6)
    ax = figure.subplots()
    values: list[float] = []
    handles = _handles(enumerate(runs))
    for i, run in enumerate(runs):
        both = curves.kl_against_reward(run, "both")
        style: dict[str, Any] = {"color": _colour(i), "marker": _marker(i)}
        ax.errorbar(both.x, both.y, yerr=both.error, lw=1.4, elinewidth=0.8, **style)
        known = both.measured()
        if len(known) and known.x[-1] > 0:
            text: dict[str, Any] = {"textcoords": "offset points", "color": _colour(i), "fontsize": 9}
            ax.annotate("end", (known.x[-1], known.y[-1]), (5, 9), **text)
        values += [*(both.y + both.error)]
        if run.start.method == "fst":
            seed = curves.kl_against_reward(run, "weights")
            ax.plot(seed.x, seed.y, lw=1.1, ls="--", mfc="white", **style)
            values += [*seed.y]
            if len(seed) and len(handles) == len(runs):
                handles.append(_grey(CELLS["weights"], ls="--", lw=1.1))
    _reward_limits([ax], values)
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, -0.02 * high), max(high, 1e-6) * 1.03)
    ax.set_xlabel("KL(train‖base) on validation problems (nats/token)")
    ax.set_ylabel("validation reward (mean)")
    _legend(figure, handles)
    return figure


@mpl.rc_context(STYLE)
def diagnostics(runs: Sequence[Run]) -> Drawn:
    """Health of the slow phase; a number that no run has recorded gets no panel."""
    found = [key for key in DIAGNOSTICS if any(len(curves.diagnostic(run, key)) for run in runs)]
    if not found:
        return "No run has slow steps."
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = blank(3.3 * columns, 2.3 * rows + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False)
    for ax in panels.flat[len(found) :]:
        ax.remove()
    shown: dict[int, Run] = {}
    for ax, key in zip(panels.flat, found, strict=False):
        for i, run in enumerate(runs):
            series = curves.diagnostic(run, key)
            if len(series):
                shown[i] = run
                _line(ax, series.x, series.y, color=_colour(i), lw=1.2)
        ax.set_title(DIAGNOSTICS[key], loc="left")
        ax.set_xlabel(curves.AXES["steps"])
        format_x(ax, "steps", (5, 5))
        ax.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 4))
        if key in ("kept", "clipped_fraction"):
            high = ax.get_ylim()[1]
            ax.set_ylim(0, min(1.04, high) if high > 0 else 1)
    _legend(figure, _handles(sorted(shown.items()), lw=1.8, marker=""))
    return figure


@mpl.rc_context(STYLE)
def time_split(runs: Sequence[Run]) -> Drawn:
    """Seconds by phase, one bar per run."""
    split = [(run, curves.time_split(run)) for run in runs if run.timing]
    if not split:
        return "No timing has been written yet."
    figure = blank(8.4, 1.3 + 0.55 * len(split))
    ax = figure.subplots()
    left = np.zeros(len(split))
    totals = np.array([sum(spent.values()) for _, spent in split])
    phases = list(zip(split[0][1], PHASE_COLOURS, strict=True))
    shown = [(p, c) for p, c in phases if any(spent[p] > 0 for _, spent in split)]
    for phase, colour in shown:
        spent = np.array([spent[phase] for _, spent in split])
        ax.barh(range(len(split)), spent, left=left, color=colour, label=phase, height=0.62)
        for at in map(int, np.flatnonzero(spent > 0.06 * totals.max())):
            text: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9, "color": _ink(colour)}
            ax.text(left[at] + spent[at] / 2, at, f"{spent[at] / totals[at]:.0%}", **text)
        left += spent
    ax.set_yticks(range(len(split)), [name(run) for run, _ in split])
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel("time (s)")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(loc="outside upper center", ncols=len(shown) if len(shown) < 5 else 4)
    return figure


def _ink(colour: str) -> str:
    """Black or white, whichever reads better on the colour."""
    r, g, b = mpl.colors.to_rgb(colour)
    return "white" if 0.3 * r + 0.59 * g + 0.11 * b < 0.5 else "#222222"


@mpl.rc_context(STYLE)
def fast_phase(runs: Sequence[Run]) -> Drawn:
    """Anchor-set reward of the best context and of the seed, cycle by cycle."""
    shown = [(i, r) for i, r in enumerate(runs) if any(c.best_mean is not None for c in r.cycles)]
    if not shown:
        return "No run has a fast phase with scores."
    figure = blank(8.4, 3.4)
    ax = figure.subplots()
    values: list[float] = []
    styles: dict[str, dict[str, Any]] = {"best_mean": {"ls": "-"}, "seed_mean": {"ls": "--", "mfc": "white"}}
    for i, run in shown:
        for key, style in styles.items():
            scored = [(c.cycle, np.nan if getattr(c, key) is None else getattr(c, key)) for c in run.cycles]
            values += [value for _, value in scored]
            ax.plot(*np.reshape(scored, (-1, 2)).T, color=_colour(i), marker=_marker(i), **style)
    _reward_limits([ax], values)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("cycle")
    ax.set_ylabel("anchor-set reward (mean)")
    handles = _handles(shown, suffix=": best context")
    _legend(figure, [*handles, _grey("seed context", ls="--", marker="o", mfc="white")], columns=2)
    return figure


FIGURES: dict[str, tuple[Callable[[Sequence[Run]], Drawn], str]] = {
    "validation": (validation, "Validation reward against steps, rollouts, tokens and seconds"),
    "training": (training, "Training reward against steps, rollouts, tokens and seconds"),
    "kl": (kl_against_reward, "KL from the base model against validation reward"),
    "diagnostics": (diagnostics, "Training diagnostics against steps"),
    "time": (time_split, "Time by phase"),
    "fast_phase": (fast_phase, "Anchor-set reward of the contexts by cycle"),
}
