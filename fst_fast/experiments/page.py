"""Run experiments; write results.json, report.html and the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import fst_fast
from fst_fast.errors import UserError
from fst_fast.experiments.experiments import EXPERIMENTS
from fst_fast.experiments.result import Result
from fst_fast.experiments.runner import Runner
from fst_fast.report.figures import png
from fst_fast.report.pages import render
from fst_fast.run.folder import disk_errors, write_atomic, write_json

QUESTIONS = {name: experiment.__doc__ or "" for name, experiment in EXPERIMENTS.items()}
VERDICT = {True: "holds", False: "does not hold", None: "cannot be told from these runs"}


def run(names: Sequence[str], runner: Runner) -> dict[str, Result]:
    """Run the experiments in order and write the results into runner.out after each. Raises UserError on an unknown name, where runs
    failed and where nothing can be written."""
    for name in names:
        if name not in EXPERIMENTS:
            raise UserError(f"experiment {name!r} is not known; allowed are all, {', '.join(EXPERIMENTS)}")
    results = {}
    for name in names:
        results[name] = EXPERIMENTS[name](runner)
        if runner.budget.seeds == 1:  # no interval, and chance alone could say either
            claims = [replace(claim, holds=None) for claim in results[name].claims]
            results[name] = replace(results[name], claims=claims)
        if not runner.dry_run:
            write(runner, results)
    return results


def write(runner: Runner, results: dict[str, Result]) -> None:
    """results.json, the figures as PNG files, and report.html: one page without scripts, the figures inside."""
    pngs = {name: png(figure) for result in results.values() for name, figure in result.pictures.items()}
    page = render(
        "experiments/page.html.j2",
        budget=asdict(runner.budget),
        results=results,
        questions=QUESTIONS,
        pngs=pngs,
        verdict=VERDICT,
        version=fst_fast.__version__,
    )
    with disk_errors(f"{runner.out} cannot be written"):
        (runner.out / "figures").mkdir(parents=True, exist_ok=True)
    for name, data in pngs.items():
        write_atomic(runner.out / "figures" / f"{name}.png", data)
    write_json(runner.out / "results.json", to_json(runner, results))
    write_atomic(runner.out / "report.html", page.encode())


def to_json(runner: Runner, results: dict[str, Result]) -> dict[str, Any]:
    return {
        "version": fst_fast.__version__,
        "libraries": {name: version(name) for name in ("torch", "transformers", "deepspeed")},
        "budget": asdict(runner.budget),
        "families": list(runner.families),
        "experiments": {
            name: {
                "question": QUESTIONS[name],
                "numbers": result.numbers,
                "claims": [asdict(claim) for claim in result.claims],
            }
            for name, result in results.items()
        },
    }


def markdown(result: Result) -> str:
    """Tables and claims, to be pasted."""
    parts = []
    for table in result.tables:
        if table.rows:
            rows = [table.head, ["---"] * len(table.head), *table.rows]
            parts.append("\n".join([f"{table.title}:", "", *(f"| {' | '.join(row)} |" for row in rows)]))
    parts.append("\n".join(f"- {c.text}: **{VERDICT[c.holds]}** ({c.figure})" for c in result.claims))
    return "\n\n".join(parts).strip()
