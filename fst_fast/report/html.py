"""The page: one HTML file that needs nothing else, beside a folder `figures/` with the same pictures as PNG files.

All text of contexts, problems and responses was written by models or users: jinja2 escapes it, and no script runs on the page. Numbers
are rounded for reading; the full value stays in the `<data value=...>` around it.
"""

from __future__ import annotations

import base64
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import fst_fast
from fst_fast.contracts import CELLS
from fst_fast.errors import UserError
from fst_fast.report import curves, figures, lineage_figure
from fst_fast.report.lineage import Node, lineage, population
from fst_fast.report.load import Cell, Example, Run, load_runs

SHOWN = 4000  # characters of one prompt or response; longer ones lose their middle
WINDOW = 32  # rollouts at either end of a run among which the examples are chosen


@dataclass(frozen=True)
class Outcome:
    """The last known figures of a run and where they were read."""

    source: str
    channels: dict[str, Cell]
    k: int | None
    steps: int
    rollouts: int | None
    fast_rollouts: int | None
    reused_rollouts: int | None
    tokens_computed: int | None
    tokens_unshared: int | None
    seconds: float | None
    kl_seed: float | None
    kl_evolved: float | None
    peak_memory_bytes: int | None

    @property
    def sharing(self) -> float | None:
        """Tokens that an unshared batch would have computed, for each token computed."""
        return (
            self.tokens_unshared / self.tokens_computed
            if self.tokens_unshared and self.tokens_computed
            else None
        )


@dataclass(frozen=True)
class Picture:
    """A figure, or the reason why there is none."""

    file: str
    alt: str
    data: str | None
    why: str


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
    examples: list[tuple[str, str, list[Example]]]


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Read the run folders, write the page and its pictures, in `figures/` beside it; returns the path of the page.

    `out` is a folder, made if need be, for `report.html`, or the page's own name where it ends in .html. Every file appears whole or
    not at all, the page last. Raises UserError for folders that are not runs, damaged files and a place that cannot be written.
    """
    out = Path(out)
    out = out if out.suffix == ".html" else out / "report.html"
    loaded = load_runs(runs)
    try:
        (out.parent / "figures").mkdir(
            parents=True, exist_ok=True
        )  # first: better no drawing than no place to put it
        page, pngs = render(loaded)
        for name, data in pngs.items():
            _replace(out.parent / "figures" / name, data)
        _replace(out, page.encode())
    except OSError as error:
        raise UserError(
            f"cannot write the report to {out}: {error.strerror or error}; name a folder that can be written"
        ) from error
    return out


def _replace(path: Path, data: bytes) -> None:
    """Write beside the target, then rename: a reader sees the old file or the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def render(runs: Sequence[Run]) -> tuple[str, dict[str, bytes]]:
    """The page and its pictures by file name."""
    pngs: dict[str, bytes] = {}
    outcomes = [outcome(run) for run in runs]
    shared = {
        "cells": _picture(
            "cells",
            "Validation reward of the four cells",
            pngs,
            figures.cells(runs, [o.channels for o in outcomes]),
        )
    }
    for key, (draw, alt) in figures.FIGURES.items():
        shared[key] = _picture(key, alt, pngs, draw(runs))
    pages = [_run_page(i, run, out, pngs) for i, (run, out) in enumerate(zip(runs, outcomes, strict=True))]
    rl = next((run for run in runs if run.start.method == "rl"), None)
    target = curves.peak(rl) if rl else None
    html = (
        _environment()
        .from_string(files("fst_fast.report").joinpath("template.html.j2").read_text(encoding="utf-8"))
        .render(
            pages=pages,
            origins=origins(runs),
            pictures=shared,
            axes={axis: curves.AXES[axis] for axis in curves.FIGURE_AXES},
            fits=[
                (figures.name(run), curves.AXES[axis], curves.fit(run, axis))
                for run in runs
                for axis in curves.FIGURE_AXES
            ],
            target_run=figures.name(rl) if rl else None,
            target=target,
            reached=curves.reaching(runs, target) if target is not None and len(runs) > 1 else [],
            overlapping=[run.label for run in runs if curves.phases_overlap(run)],
            version=fst_fast.__version__,
        )
    )
    return html, pngs


def _run_page(i: int, run: Run, out: Outcome, pngs: dict[str, bytes]) -> RunPage:
    nodes = lineage(run)
    by_id = {node.id: node for node in nodes}
    refused: Counter[str] = Counter()
    for cycle in run.cycles:
        refused.update(cycle.refused)
    tree = "This run has no evolved contexts." if run.start.method == "rl" else lineage_figure.draw(nodes)
    return RunPage(
        run=run,
        name=figures.name(run),
        outcome=out,
        differences=differences(run.start.method, out.channels),
        nodes=nodes,
        final=[by_id[id] for id in dict.fromkeys(population(run)) if id in by_id],
        tree=_picture(
            f"lineage-{i + 1}-{_slug(run.label)}", f"Lineage of the contexts of {run.label}", pngs, tree
        ),
        refused=dict(refused.most_common()),
        examples=examples(run),
    )


def _picture(file: str, alt: str, pngs: dict[str, bytes], drawn: figures.Drawn) -> Picture:
    name = f"{file}.png"
    if isinstance(drawn, str):
        return Picture(name, alt, None, drawn)
    pngs[name] = figures.png(drawn)
    return Picture(name, alt, base64.b64encode(pngs[name]).decode(), "")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "run"


def outcome(run: Run) -> Outcome:
    """summary.json where the run has ended, else the last evaluation and the last counters in metrics.jsonl."""
    last_eval = run.evals[-1] if run.evals else None
    lines = [
        line
        for line in (last_eval, run.steps[-1] if run.steps else None)
        if line and line.rollouts is not None
    ]
    counted = run.summary or max(lines, key=lambda line: line.step, default=None)
    measured = run.summary or last_eval
    seconds = run.summary.seconds if run.summary else None
    if run.summary:
        source = "summary.json"
    else:
        source = f"evaluation after step {last_eval.step}" if last_eval else "no evaluation yet"
    return Outcome(
        source=source,
        channels=measured.channels if measured else {},
        k=measured.k if measured else None,
        steps=0 if run.start.method == "gepa" else run.last_step,
        rollouts=counted.rollouts if counted else None,
        fast_rollouts=counted.fast_rollouts if counted else None,
        reused_rollouts=counted.reused_rollouts if counted else None,
        tokens_computed=counted.tokens_computed if counted else None,
        tokens_unshared=counted.tokens_unshared if counted else None,
        seconds=seconds if seconds is not None else run.timing[-1].seconds if run.timing else None,
        kl_seed=measured.kl_seed if measured else None,
        kl_evolved=measured.kl_evolved if measured else None,
        peak_memory_bytes=run.summary.peak_memory_bytes if run.summary else None,
    )


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


def _environment() -> Environment:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(value=_value, count=_count, duration=_duration, cut=_cut)
    environment.globals.update(same_cell=figures.SAME_CELL, cells=CELLS)
    return environment


DASH = "–"


def _value(value: float | None, digits: int = 3, sign: bool = False, exponent: bool = False) -> Markup:
    """A rounded number that carries its full value."""
    if value is None:
        return Markup(DASH)
    small = exponent and value != 0 and abs(value) < 10 ** -(digits - 1)
    text = f"{value:.2e}" if small else f"{value:{'+' if sign else ''}.{digits}f}"
    return Markup('<data value="{}">{}</data>').format(value, text.replace("-", "−"))


def _count(value: float | None) -> Markup:
    """A whole number with thousands apart; millions and more shortened."""
    if value is None:
        return Markup(DASH)
    text = f"{value:,.0f}".replace(",", "\u202f")
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if abs(value) >= 10 * size or (unit == "G" and abs(value) >= size):
            text = f"{value / size:.1f}{unit}"
            break
    return Markup('<data value="{}">{}</data>').format(value, text)


def _duration(seconds: float | None) -> Markup:
    if seconds is None:
        return Markup(DASH)
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        text = f"{hours} h {minutes:02d} min"
    else:
        text = f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.1f} s"
    return Markup('<data value="{}">{}</data>').format(seconds, text)


def _cut(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    half = SHOWN // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"


def _plain(value: Any) -> str:
    """A value of unknown shape (hardware, versions) on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return str(value)
