"""Run experiments, write results.json and report.html, say the tables and claims."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import fst_fast
from fst_fast.errors import UserError
from fst_fast.experiments.experiments import EXPERIMENTS
from fst_fast.experiments.result import Claim, Result, Table
from fst_fast.experiments.runner import Runner
from fst_fast.report.figures import png
from fst_fast.run.folder import disk_errors, write_atomic

_VERDICT = {True: "holds", False: "does not hold", None: "cannot be told from these runs"}


def run(names: Sequence[str], runner: Runner) -> dict[str, Result]:
    """Make the runs of the experiments, in order, and write what came out into runner.out. Raises UserError on an unknown name, where runs
    failed and where nothing can be written."""
    for name in names:
        if name not in EXPERIMENTS:
            raise UserError(f"experiment {name!r} is not known; allowed are all, {', '.join(EXPERIMENTS)}")
    results = {}
    for name in names:
        results[name] = EXPERIMENTS[name](runner)
        if not runner.dry_run:
            write(runner, results)
    return results


def write(runner: Runner, results: dict[str, Result]) -> None:
    with disk_errors(f"{runner.out} cannot be written"):
        (runner.out / "figures").mkdir(parents=True, exist_ok=True)
        for result in results.values():
            for name, figure in result.pictures.items():
                write_atomic(runner.out / "figures" / f"{name}.png", png(figure))
        write_atomic(
            runner.out / "results.json",
            (json.dumps(to_json(runner, results), indent=1, allow_nan=False) + "\n").encode(),
        )
        write_atomic(runner.out / "report.html", to_html(runner, results).encode())


def to_json(runner: Runner, results: dict[str, Result]) -> dict[str, Any]:
    return {
        "version": fst_fast.__version__,
        "libraries": {name: version(name) for name in ("torch", "transformers", "deepspeed")},
        "budget": asdict(runner.budget),
        "families": list(runner.families),
        "experiments": {
            name: {
                "question": result.question,
                "numbers": result.numbers,
                "claims": [asdict(claim) for claim in result.claims],
            }
            for name, result in results.items()
        },
    }


def markdown(result: Result) -> str:
    """Tables and claims, to be pasted."""
    return "\n\n".join(
        [*(_markdown(table) for table in result.tables if table.rows), _claims(result.claims)]
    ).strip()


def _markdown(table: Table) -> str:
    lines = [f"{table.title}:", "", _row(table.head), _row(["---"] * len(table.head)), *map(_row, table.rows)]
    return "\n".join(lines)


def _row(items: Sequence[str]) -> str:
    return f"| {' | '.join(items)} |"


def _claims(claims: Sequence[Claim]) -> str:
    return "\n".join(f"- {claim.text}: **{_VERDICT[claim.holds]}** ({claim.figure})" for claim in claims)


def to_html(runner: Runner, results: dict[str, Result]) -> str:
    """One page without scripts; figures inside."""
    parts = []
    for name, result in results.items():
        parts.append(f"<h2>{html.escape(name)}</h2><p>{html.escape(result.question)}</p>")
        for picture, figure in result.pictures.items():
            data = base64.b64encode(png(figure)).decode()
            parts.append(f'<img alt="{html.escape(picture)}" src="data:image/png;base64,{data}">')
        for table in result.tables:
            if table.rows:
                head = "".join(f"<th>{html.escape(x)}</th>" for x in table.head)
                body = "".join(
                    "<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in row) + "</tr>"
                    for row in table.rows
                )
                parts.append(
                    f"<table><caption>{html.escape(table.title)}</caption><tr>{head}</tr>{body}</table>"
                )
        if result.claims:
            items = "".join(
                f"<li>{html.escape(c.text)}: <b>{_VERDICT[c.holds]}</b> ({html.escape(c.figure)})</li>"
                for c in result.claims
            )
            parts.append(f"<ul>{items}</ul>")
    budget = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in asdict(runner.budget).items())
    return _PAGE.format(
        body="\n".join(parts), budget=html.escape(budget), version=html.escape(fst_fast.__version__)
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Experiments</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ max-width: 100%; height: auto; display: block; margin: 1rem 0 }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
caption {{ text-align: left; font-weight: 600; padding: .3rem 0 }}
th, td {{ text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #ddd }}
</style></head><body>
<h1>Fast-Slow Training on the mini world</h1>
<p>Every run has: {budget}. fst-fast {version}.</p>
{body}
</body></html>
"""
