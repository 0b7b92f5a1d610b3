"""The page: one HTML file that needs nothing else, beside a folder `figures/` with the same pictures as PNG files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fst_fast
from fst_fast.contracts import CELLS
from fst_fast.report import curves, figures, lineage_figure, pages
from fst_fast.report.lineage import Node, lineage, population
from fst_fast.report.load import Cell, Counters, Eval, Example, Run, Step, Summary, load_runs
from fst_fast.report.problems import compare, present
from fst_fast.run.folder import disk_errors, write_atomic
from fst_fast.run.troubles import KINDS

WINDOW = 32  # rollouts at either end of a run among which the examples are chosen


class Outcome(Summary):
    """The last known figures of a run, the file or evaluation that they come from, and its optimiser steps."""

    source: str
    steps: int

    @property
    def sharing(self) -> float | None:
        """Tokens that an unshared batch would have computed, for each token computed."""
        computed, unshared = self.tokens_computed, self.tokens_unshared
        return unshared / computed if unshared and computed else None


@dataclass(frozen=True)
class Picture:
    """drawn: a PNG file, or the reason why there is none."""

    file: str
    alt: str
    drawn: bytes | str


@dataclass(frozen=True)
class RunPage:
    """What the template shows of one run."""

    run: Run
    name: str
    outcome: Outcome
    differences: list[tuple[str, str, curves.Difference | str | None]]
    nodes: list[Node]
    final: list[Node]
    tree: Picture
    refused: dict[str, int]
    troubles: list[tuple[str, Mapping[str, int]]]
    examples: list[tuple[str, str, list[Example]]]


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Read the run folders, write the page and its pictures, in `figures/` beside it; returns the path of the page.

    `out` is a folder, made if need be, for `report.html`, or the page's own name where it ends in .html. Every file appears whole or
    not at all, the page last. Raises UserError for folders that are not runs, damaged files and a place that cannot be written.
    """
    out = Path(out)
    out = out if out.suffix == ".html" else out / "report.html"
    loaded = load_runs(runs)
    with disk_errors(f"cannot write the report to {out}"):
        (out.parent / "figures").mkdir(parents=True, exist_ok=True)  # before the work of drawing
        page, pictures = render(loaded)
        for picture in pictures:
            if isinstance(picture.drawn, bytes):
                write_atomic(out.parent / "figures" / picture.file, picture.drawn)
        write_atomic(out, page.encode())
    return out


def render(runs: Sequence[Run]) -> tuple[str, list[Picture]]:
    """The page and its pictures."""
    outcomes = [outcome(run) for run in runs]
    drawn = figures.cells(runs, [o.channels for o in outcomes])
    shared = {"cells": _picture("cells", "Validation reward of the four cells", drawn)}
    for key, (draw, alt) in figures.FIGURES.items():
        shared[key] = _picture(key, alt, draw(runs))
    shown = [_run_page(i, run, out) for i, (run, out) in enumerate(zip(runs, outcomes, strict=True), start=1)]
    rl = next((run for run in runs if run.start.method == "rl"), None)
    target = curves.peak(rl) if rl else None
    page = pages.render(
        "report/template.html.j2",
        pages=shown,
        origins=origins(runs),
        pictures=shared,
        axes={axis: curves.AXES[axis] for axis in curves.FIGURE_AXES},
        cells=CELLS,
        same_cell=figures.SAME_CELL,
        fits=[
            (figures.name(run), curves.AXES[axis], curves.fit(run, axis))
            for run in runs
            for axis in curves.FIGURE_AXES
        ],
        target_run=figures.name(rl) if rl else None,
        target=target,
        reached=curves.cost_to_reach(runs, target) if target is not None and len(runs) > 1 else [],
        comparison=compare(runs) if len(runs) > 1 else None,
        kinds=KINDS,
        overlapping=[run.label for run in runs if curves.phases_overlap(run)],
        version=fst_fast.__version__,
    )
    return page, [*shared.values(), *(each.tree for each in shown)]


def _run_page(number: int, run: Run, out: Outcome) -> RunPage:
    nodes = lineage(run)
    by_id = {node.id: node for node in nodes}
    refused: Counter[str] = Counter()
    for cycle in run.cycles:
        refused.update(cycle.refused)
    tree = "This run has no evolved contexts." if run.start.method == "rl" else lineage_figure.draw(nodes)
    file = f"lineage-{number}-{_slug(run.label)}"
    return RunPage(
        run=run,
        name=figures.name(run),
        outcome=out,
        differences=differences(run.start.method, out.channels),
        nodes=nodes,
        final=[by_id[id] for id in dict.fromkeys(population(run)) if id in by_id],
        tree=_picture(file, f"Lineage of the contexts of {run.label}", tree),
        refused=dict(refused.most_common()),
        troubles=[(kind, where) for kind, where in present(run) if kind in KINDS],
        examples=examples(run),
    )


def _picture(file: str, alt: str, drawn: figures.Drawn) -> Picture:
    return Picture(f"{file}.png", alt, drawn if isinstance(drawn, str) else figures.png(drawn))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "run"


def outcome(run: Run) -> Outcome:
    """summary.json where the run has ended, else the last evaluation and the last counters in metrics.jsonl."""
    found: dict[str, Any] = {"channels": {}, "seconds": run.timing[-1].seconds if run.timing else None}
    source = "no evaluation yet"
    if run.summary:
        source = "summary.json"
        found |= {key: value for key, value in run.summary if value is not None}
    else:
        lines: list[Eval | Step] = [*run.evals[-1:], *run.steps[-1:]]
        counted = max((x for x in lines if x.rollouts is not None), key=lambda x: x.step, default=None)
        if run.evals:
            source = f"evaluation after step {run.evals[-1].step}"
            found |= dict(run.evals[-1])
        found |= {key: getattr(counted, key, None) for key in Counters.model_fields}
    steps = 0 if run.start.method == "gepa" else run.last_step
    return Outcome(**found, source=source, steps=steps)


def origins(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(hardware and versions, labels of the runs made with them); said once for runs that share them."""
    made: dict[str, list[str]] = {}
    for run in runs:
        hardware = run.start.hardware or (run.summary.hardware if run.summary else None)
        parts = [f"Hardware: {_plain(hardware)}."] if hardware else []
        parts += [f"Versions: {_plain(run.start.versions)}."] if run.start.versions else []
        if parts:
            made.setdefault(" ".join(parts), []).append(run.label)
    return list(made.items())


def differences(
    method: str, channels: dict[str, Cell]
) -> list[tuple[str, str, curves.Difference | str | None]]:
    """(name, what it says, difference); a sentence where the two cells are one by construction."""
    why = {"rl": "the same cell: no evolved contexts", "gepa": "the same cell: weights frozen"}.get(
        method, ""
    )
    same = figures.SAME_CELL.get(method, {})
    rows = [
        ("both", "weights", "what the contexts add to the trained weights"),
        ("both", "context", "what the training adds to the evolved contexts"),
        ("weights", "neither", "the weights alone"),
        ("context", "neither", "the contexts alone"),
    ]
    return [
        (
            f"{a} − {b}",
            says,
            why if same.get(a) == b else curves.difference(channels.get(a, Cell()), channels.get(b, Cell())),
        )
        for a, b, says in rows
    ]


def examples(run: Run) -> list[tuple[str, str, list[Example]]]:
    """(when, what, rollouts): the best and the worst rollout of the first and of the last ones written.

    From the slow phase where there is one, then the fast phase, then evaluation. Rollouts without a verdict are not chosen.
    """
    for phase in ("slow", "fast", "eval"):
        if phase not in run.examples:
            continue
        head, tail = run.examples[phase]
        judged = [example for example in tail if example.reward is not None]
        start = [example for example in head if example.reward is not None][:WINDOW]
        windows = [("start", start), ("end", judged[-WINDOW:])]
        if start and judged and start[-1] == judged[-1]:  # a short file: one half each
            windows = [("start", start[: -(-len(start) // 2)]), ("end", start[-(-len(start) // 2) :])]
        return [(when, phase, _extremes(window, late=when == "end")) for when, window in windows if window]
    return []


def _extremes(window: Sequence[Example], *, late: bool) -> list[Example]:
    """The best rollout, and the worst if it is worse; the earliest of equals at the start of a run, the latest at its end."""
    order = list(reversed(window)) if late else list(window)
    best = max(order, key=lambda example: example.reward or 0.0)
    worst = min(order, key=lambda example: example.reward or 0.0)
    return [best] if best.reward == worst.reward else [best, worst]


def _plain(value: Any) -> str:
    """A value of unknown shape (hardware, versions) on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return str(value)
