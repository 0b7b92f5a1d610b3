"""The tree of contexts as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D

from fst_fast.report.figures import STYLE, Drawn, blank
from fst_fast.report.lineage import Node

LINEAGE_ROWS = 60  # past this only what was admitted is drawn, and no names


@mpl.rc_context(STYLE)
def draw(nodes: Sequence[Node]) -> Drawn:
    """The tree of contexts: across, the cycle of birth; colour, the latest mean; a ring marks the final population."""
    kept = [node for node in nodes if not node.folded]
    drawn = list(nodes) if len(nodes) <= LINEAGE_ROWS else kept
    if len(drawn) < 2:
        return "No context has been proposed yet." if len(nodes) < 2 else "No proposal was admitted."
    rows = {node.id: row for row, node in enumerate(drawn)}
    at = _columns(drawn)
    few = len(drawn) <= LINEAGE_ROWS
    figure = blank(8.4, min(1.6 + (0.26 if few else 0.06) * len(drawn), 12))
    ax = figure.subplots()
    means = [node.mean for node in drawn if node.mean is not None]
    scale = ScalarMappable(Normalize(0, max([*means, 0.05])), mpl.colormaps["viridis"])
    for node in drawn:
        if node.parent in rows:
            x, y = at[node.parent], rows[node.parent]
            colour = "#cccccc" if node.admitted is False else "#777777"
            ax.plot([x, x, at[node.id]], [y, rows[node.id], rows[node.id]], color=colour, lw=0.9, zorder=1)
    for node in drawn:
        place = at[node.id], rows[node.id]
        if node.admitted is False:
            ax.scatter(*place, s=22, marker="x", color="#999999", lw=1.1, zorder=3)
        else:
            face = "white" if node.mean is None else scale.to_rgba(np.array(node.mean))
            ax.scatter(*place, s=46, color=[face], edgecolor="#555555", lw=0.7, zorder=3)
        if node.copies:
            ax.scatter(*place, s=130, facecolor="none", edgecolor="#D55E00", lw=1.8, zorder=2)
        if few:
            mean = "" if node.mean is None else f"  {node.mean:.2f}"
            text: dict[str, Any] = {"va": "center", "fontsize": 8, "color": "#333333"}
            ax.annotate(node.id[:8] + mean, place, (11, 0), textcoords="offset points", **text)
    ax.invert_yaxis()
    ax.set_yticks([])
    ax.grid(False)
    ax.spines["left"].set_visible(False)
    cycles = sorted({node.born for node in drawn if node.parent in rows})
    ticks = cycles[:: max(1, -(-len(cycles) // 15))]
    ax.set_xticks([min(at.values()), *ticks], ["seed", *map(str, ticks)])
    ax.set_xlabel("cycle of birth")
    if few:  # room for the last names
        ax.set_xlim(right=max(at.values()) + 0.18 * np.ptp(list(at.values())))
    shrink = min(1.0, 3.0 / figure.get_figheight())
    figure.colorbar(scale, ax=ax, label="latest mean reward", shrink=shrink, aspect=16, anchor=(0, 1))
    ring: dict[str, Any] = {"ms": 10, "mfc": "none", "mec": "#D55E00", "mew": 1.8}
    handles = [
        Line2D([], [], marker="o", ls="", ms=7, color="#6a9", mec="#555555", label="admitted"),
        Line2D([], [], marker="x", ls="", color="#999999", label="not admitted"),
        Line2D([], [], marker="o", ls="", label="in the final population", **ring),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def _columns(nodes: Sequence[Node]) -> dict[str, float]:
    """Across: the cycle of birth, and within a cycle a step to the right of a parent born in the same one; roots before all."""
    born = {node.id: node.born for node in nodes}
    first = min((node.born for node in nodes if node.parent in born), default=1)
    within: dict[str, int] = {}
    for node in nodes:  # parents come before their children
        same = node.parent in born and born[node.parent] == node.born and node.parent in within
        within[node.id] = within[node.parent] + 1 if same and node.parent else 0
    width = 1 + max(within.values())
    return {
        node.id: first - 0.7 if node.parent not in born else node.born + within[node.id] / width
        for node in nodes
    }
