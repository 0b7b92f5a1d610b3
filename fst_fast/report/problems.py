"""Runs compared problem by problem: who solves what, and what each of them answers, from the last evaluation of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fst_fast.contracts import FULL_REWARD
from fst_fast.report.load import Answer, Cycle, Run, Step, Timing

CELL = "both"
SHOWN = 40
SOLVED = 0.5
"""Share of a problem's judged samples that must have the full reward."""


@dataclass(frozen=True)
class Row:
    """A problem as each run answers it, in the order of the runs."""

    id: str
    question: str
    answers: list[Answer]
    solved: list[bool]

    @property
    def spread(self) -> float:
        """Largest difference of two runs' mean rewards."""
        means = [answer.mean or 0.0 for answer in self.answers]
        return max(means) - min(means)


@dataclass(frozen=True)
class Comparison:
    """runs: those that have answers. alone: problems that only this run solves. left_out: problems that not all of them judged, or that are others
    under the same id. rows: the problems on which the runs differ, the largest differences first."""

    runs: list[Run]
    problems: int
    solved: list[int]
    alone: list[int]
    by_all: int
    by_none: int
    left_out: int
    differing: int
    rows: list[Row]


def compare(runs: Sequence[Run]) -> Comparison | str:
    """The comparison, or the reason why there is none."""
    kept = [run for run in runs if run.problems is not None]
    missing = [run.label for run in runs if run.problems is None]
    if len(kept) < 2:
        return f"no problems.json in {', '.join(missing)}: not evaluated yet, or by an earlier version"
    tables = [run.problems.problems for run in kept if run.problems is not None]
    ids = dict.fromkeys(id for table in tables for id in table)
    rows = []
    for id in ids:
        found = [table[id] for table in tables if id in table]
        answers = [problem.cells[CELL] for problem in found if CELL in problem.cells]
        judged = len(answers) == len(kept) and all(answer.mean is not None for answer in answers)
        if judged and len({problem.question for problem in found}) == 1:
            rows.append(Row(id, found[0].question, answers, [_solves(answer) for answer in answers]))
    differing = sorted((row for row in rows if row.spread > 0), key=lambda row: -row.spread)
    return Comparison(
        runs=kept,
        problems=len(rows),
        solved=[sum(row.solved[i] for row in rows) for i in range(len(kept))],
        alone=[sum(row.solved[i] and sum(row.solved) == 1 for row in rows) for i in range(len(kept))],
        by_all=sum(all(row.solved) for row in rows),
        by_none=sum(not any(row.solved) for row in rows),
        left_out=len(ids) - len(rows),
        differing=len(differing),
        rows=differing[:SHOWN],
    )


def _solves(answer: Answer) -> bool:
    judged = [reward for reward in answer.rewards if reward is not None]
    return sum(reward >= FULL_REWARD for reward in judged) >= SOLVED * len(judged)


def present(run: Run) -> list[tuple[str, Mapping[str, int]]]:
    """(kind of trouble, figures) of the whole run: how many records it was in, the first and the last step of them."""
    found: dict[str, dict[str, int]] = {}
    lines: list[Step | Cycle | Timing] = [*run.steps, *run.cycles, *run.timing]
    for line in lines:
        for kind in line.troubles:
            of_kind = found.setdefault(kind, {"records": 0, "first": line.step, "last": line.step})
            of_kind["records"] += 1
            of_kind["last"] = line.step
    return list(found.items())
