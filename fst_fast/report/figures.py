"""The pictures. Every function takes runs and gives a matplotlib Figure, or a sentence that says why there is nothing to draw.

A run keeps its colour and marker through all figures (Okabe and Ito's palette, which colour-blind readers can tell apart). Figures are
made without pyplot, so a report drawn inside a training process leaves its matplotlib state alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
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

from fst_fast.report import curves
from fst_fast.report.load import CELLS, Cell, Run

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PHASE_COLOURS = ("#0072B2", "#56B4E9", "#CC79A7", "#D55E00", "#009E73", "#E69F00", "#BBBBBB")
CELL_NAMES = {
    "neither": "base weights\nseed context",
    "context": "base weights\nevolved contexts",
    "weights": "trained weights\nseed context",
    "both": "trained weights\nevolved contexts",
}
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


def _label_x(ax: Axes, axis: str) -> None:
    ax.set_xlabel(curves.AXES[axis])
    ax.set_xlim(left=0)
    if axis == "steps":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.xaxis.set_major_locator(MaxNLocator(6))


def _line(ax: Axes, x: Floats, y: Floats, **style: Any) -> None:
    """A line with gaps where y is NaN; a point between two gaps, which a line does not show, is a dot."""
    ax.plot(x, y, **style)
    gap = np.concatenate([[True], np.isnan(y), [True]])
    alone = ~gap[1:-1] & gap[:-2] & gap[2:]
    ax.plot(x[alone], y[alone], ls="", marker=".", **{key: style[key] for key in style if key != "lw"})


def _legend(figure: Figure, handles: list[Any], columns: int = 3) -> None:
    longest = max((len(str(handle.get_label())) for handle in handles), default=0)
    figure.legend(
        handles=handles, loc="outside upper center", ncols=min(len(handles), columns if longest < 45 else 2)
    )


@mpl.rc_context(STYLE)
def cells(runs: Sequence[Run], final: Sequence[dict[str, Cell]]) -> Drawn:
    """Four-cell figure: mean reward of each combination, one point with its standard error per run."""
    if not any(cell.mean is not None for channels in final for cell in channels.values()):
        return "No evaluation has been written yet."
    figure = blank(8.4, 3.6)
    ax = figure.subplots()
    width = 0.8 / len(runs)
    values = [0.0]
    for i, (run, channels) in enumerate(zip(runs, final, strict=True)):
        found = [(at, channels[cell]) for at, cell in enumerate(CELLS) if cell in channels]
        points = [(at, cell.mean, cell.stderr or 0.0) for at, cell in found if cell.mean is not None]
        x = [at + (i - (len(runs) - 1) / 2) * width for at, _, _ in points]
        y = [mean for _, mean, _ in points]
        error = [stderr for _, _, stderr in points]
        bars = ax.bar(
            x, y, width * 0.9, yerr=error, capsize=3, color=_colour(i), ecolor="#222222", label=name(run)
        )
        for bar, (cell_at, _, _) in zip(bars, points, strict=True):
            bar.set_alpha(0.3 if CELLS[cell_at] in SAME_CELL.get(run.start.method, {}) else 1.0)
        for at, mean, stderr in zip(x, y, error, strict=True):
            ax.text(
                at,
                mean + stderr,
                f" {mean:.2f}",
                ha="center",
                va="bottom",
                fontsize=9 if len(runs) < 4 else 7,
            )
        values += [mean + stderr for _, mean, stderr in points]
    _reward_limits([ax], values)
    ax.set_ylim(0, ax.get_ylim()[1] * 1.05)
    ax.set_xticks(range(len(CELLS)), [CELL_NAMES[cell] for cell in CELLS])
    ax.grid(False, axis="x")
    ax.set_ylabel("validation reward (mean)")
    squares: dict[str, Any] = {"marker": "s", "ls": "", "ms": 8}
    _legend(figure, [Line2D([], [], color=_colour(i), label=name(r), **squares) for i, r in enumerate(runs)])
    return figure


@mpl.rc_context(STYLE)
def validation(runs: Sequence[Run]) -> Drawn:
    """Validation reward on the four axes: solid `both`, dashed `weights` where that is another cell, dotted the fit."""
    if not any(len(curves.validation(run, "both", "steps")) for run in runs):
        return "No evaluation has been written yet."
    figure = blank(9.6, 7.0)
    panels = figure.subplots(2, 2)
    values: list[float] = []
    second = fitted = False
    for ax, axis in zip(panels.flat, curves.AXES, strict=True):
        for i, run in enumerate(runs):
            colour = _colour(i)
            both = curves.validation(run, "both", axis)
            values += [*(both.y + both.error)]
            ax.plot(both.x, both.y, color=colour, marker=_marker(i), label=name(run))
            ax.fill_between(both.x, both.y - both.error, both.y + both.error, color=colour, alpha=0.15, lw=0)
            if run.start.method == "fst":
                weights = curves.validation(run, "weights", axis)
                values += [*weights.y]
                second = second or len(weights) > 0
                ax.plot(
                    weights.x,
                    weights.y,
                    color=colour,
                    ls="--",
                    lw=1.1,
                    marker=_marker(i),
                    mfc="white",
                    ms=3.5,
                )
            fit = curves.fit(run, axis)
            if not isinstance(fit, str):
                fitted = True
                c = np.linspace(both.x.max() / 200, both.x.max(), 200)
                ax.plot(c, fit.at(c), color=colour, ls=":", lw=1.4)
        _label_x(ax, axis)
        if not any(len(curves.validation(run, "both", axis)) for run in runs):
            ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", color="#777777")
    for ax in panels[:, 0]:
        ax.set_ylabel("validation reward (mean)")
    _reward_limits(list(panels.flat), values)
    handles = _run_handles(runs)
    if second:
        handles.append(
            Line2D([], [], color="#555555", ls="--", lw=1.1, label="trained weights, seed context")
        )
    if fitted:
        handles.append(Line2D([], [], color="#555555", ls=":", lw=1.4, label="sigmoid fit"))
    _legend(figure, handles)
    return figure


def _run_handles(runs: Sequence[Run]) -> list[Line2D]:
    return [
        Line2D([], [], color=_colour(i), marker=_marker(i), label=name(run)) for i, run in enumerate(runs)
    ]


@mpl.rc_context(STYLE)
def training(runs: Sequence[Run]) -> Drawn:
    """Reward of the training rollouts on the four axes: faint as measured, strong as a running mean."""
    shown = [(i, run) for i, run in enumerate(runs) if len(curves.training(run, "steps"))]
    if not shown:
        return "No run has slow steps with a reward."
    figure = blank(9.6, 7.0)
    panels = figure.subplots(2, 2)
    values: list[float] = []
    for ax, axis in zip(panels.flat, curves.AXES, strict=True):
        for i, run in shown:
            series = curves.training(run, axis)
            values += [*series.y]
            _line(ax, series.x, series.y, color=_colour(i), lw=0.8, alpha=0.35)
            smooth = curves.smooth(series.y, max(3, len(series) // 12))
            _line(ax, series.x, smooth, color=_colour(i), lw=1.8)
        _label_x(ax, axis)
        if not any(len(curves.training(run, axis)) for _, run in shown):
            ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", color="#777777")
    for ax in panels[:, 0]:
        ax.set_ylabel("training reward (mean)")
    _reward_limits(list(panels.flat), values)
    _legend(figure, [Line2D([], [], color=_colour(i), lw=1.8, label=name(run)) for i, run in shown])
    return figure


@mpl.rc_context(STYLE)
def kl_against_reward(runs: Sequence[Run]) -> Drawn:
    """How far the weights had to move for what they earn: up and to the left is better."""
    if not any(len(curves.kl_against_reward(run, cell)) for run in runs for cell in ("both", "weights")):
        return "KL(train‖base) has not been measured yet."
    figure = blank(8.4, 4.6)
    ax = figure.subplots()
    values: list[float] = []
    second = False
    for i, run in enumerate(runs):
        both = curves.kl_against_reward(run, "both")
        style: dict[str, Any] = {"color": _colour(i), "marker": _marker(i)}
        ax.errorbar(both.x, both.y, yerr=both.error, lw=1.4, elinewidth=0.8, **style)
        known = both.measured()
        if len(known) and known.x[-1] > 0:
            ax.annotate(
                "end",
                (known.x[-1], known.y[-1]),
                (5, 9),
                textcoords="offset points",
                color=_colour(i),
                fontsize=9,
            )
        values += [*(both.y + both.error)]
        if run.start.method == "fst":
            seed = curves.kl_against_reward(run, "weights")
            second = second or len(seed) > 0
            ax.plot(seed.x, seed.y, lw=1.1, ls="--", mfc="white", **style)
            values += [*seed.y]
    _reward_limits([ax], values)
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, -0.02 * high), max(high, 1e-6) * 1.03)
    ax.set_xlabel("KL(train‖base) on validation problems (nats/token)")
    ax.set_ylabel("validation reward (mean)")
    handles = _run_handles(runs)
    if second:
        handles.append(
            Line2D([], [], color="#555555", ls="--", lw=1.1, label="trained weights, seed context")
        )
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
    shown: set[int] = set()
    for ax, key in zip(panels.flat, found, strict=False):
        for i, run in enumerate(runs):
            series = curves.diagnostic(run, key)
            if len(series):
                shown.add(i)
                _line(ax, series.x, series.y, color=_colour(i), lw=1.2)
        ax.set_title(DIAGNOSTICS[key], loc="left")
        ax.set_xlabel(curves.AXES["steps"])
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 4))
        if key in ("kept", "clipped_fraction"):
            _low, high = ax.get_ylim()
            ax.set_ylim(0, min(1.04, high) if high > 0 else 1)
    _legend(figure, [Line2D([], [], color=_colour(i), lw=1.8, label=name(runs[i])) for i in sorted(shown)])
    return figure


@mpl.rc_context(STYLE)
def time_split(runs: Sequence[Run]) -> Drawn:
    """Where the time went: seconds by phase, one bar per run."""
    split = [(run, curves.time_split(run)) for run in runs if run.timing]
    if not split:
        return "No timing has been written yet."
    figure = blank(8.4, 1.3 + 0.55 * len(split))
    ax = figure.subplots()
    names = [phase for phase in split[0][1] if any(spent[phase] > 0 for _, spent in split)]
    left = np.zeros(len(split))
    longest = max(sum(spent.values()) for _, spent in split)
    for phase in names:
        colour = PHASE_COLOURS[list(split[0][1]).index(phase)]
        spent = np.array([spent[phase] for _, spent in split])
        ax.barh(range(len(split)), spent, left=left, color=colour, label=phase, height=0.62)
        for at, (seconds, start) in enumerate(zip(spent, left, strict=True)):
            if seconds > 0.06 * longest:
                share = seconds / sum(split[at][1].values())
                ax.text(
                    start + seconds / 2,
                    at,
                    f"{share:.0%}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color=_ink(colour),
                )
        left += spent
    ax.set_yticks(range(len(split)), [name(run) for run, _ in split])
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel("time (s)")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(loc="outside upper center", ncols=len(names) if len(names) < 5 else 4)
    return figure


def _ink(colour: str) -> str:
    """Black or white, whichever reads better on the colour."""
    r, g, b = mpl.colors.to_rgb(colour)
    return "white" if 0.3 * r + 0.59 * g + 0.11 * b < 0.5 else "#222222"


@mpl.rc_context(STYLE)
def fast_phase(runs: Sequence[Run]) -> Drawn:
    """What the fast phase sees: anchor-set reward of the best context and of the seed, cycle by cycle."""
    shown = [
        (i, run) for i, run in enumerate(runs) if any(cycle.best_mean is not None for cycle in run.cycles)
    ]
    if not shown:
        return "No run has a fast phase with scores."
    figure = blank(8.4, 3.4)
    ax = figure.subplots()
    values: list[float] = []
    for i, run in shown:
        for key, style in (("best_mean", "-"), ("seed_mean", "--")):
            points = [
                (cycle.cycle, np.nan if (value := getattr(cycle, key)) is None else value) for cycle in run.cycles
            ]
            values += [value for _, value in points]
            hollow = "white" if style == "--" else None
            x, y = [at for at, _ in points], [value for _, value in points]
            ax.plot(x, y, color=_colour(i), ls=style, marker=_marker(i), mfc=hollow)
    _reward_limits([ax], values)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("cycle")
    ax.set_ylabel("anchor-set reward (mean)")
    handles = [
        Line2D([], [], color=_colour(i), marker=_marker(i), label=f"{name(run)}: best context")
        for i, run in shown
    ]
    handles.append(Line2D([], [], color="#555555", ls="--", marker="o", mfc="white", label="seed context"))
    _legend(figure, handles, columns=2)
    return figure


FIGURES: dict[str, tuple[Callable[[Sequence[Run]], Drawn], str]] = {
    "validation": (validation, "Validation reward against steps, rollouts, tokens and seconds"),
    "training": (training, "Training reward against steps, rollouts, tokens and seconds"),
    "kl": (kl_against_reward, "KL from the base model against validation reward"),
    "diagnostics": (diagnostics, "Training diagnostics against steps"),
    "time": (time_split, "Time by phase"),
    "fast_phase": (fast_phase, "Anchor-set reward of the contexts by cycle"),
}
