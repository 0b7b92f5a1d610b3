"""Check a task before training: its problems are well formed and its grader accepts its own gold responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fst_fast.contracts import FULL_REWARD, Problem, Task
from fst_fast.errors import UserError
from fst_fast.tasks.environments import has_turns
from fst_fast.tasks.jsonl import find_message_error, is_text
from fst_fast.tasks.user import call_user
from fst_fast.verify.pool import VerifierPool

SPLITS = ("train", "validation")
_IDS_CHECKED = 20_000


def check_gold(task: Task, pool: VerifierPool, n: int = 8) -> None:
    """Raise UserError for a task that cannot be trained on: an empty split, duplicate ids, a malformed problem, or a
    grader that does not give its own gold response reward 1.

    The gold response is `task.gold(problem)` if the task has that method, else str(problem.answer) if
    problem.meta["check_gold"] is set; otherwise the grader is trusted. `n` evenly spaced problems of each split are
    verified in the child processes. Ids are compared over the first 20,000 problems of each split, since a generator may have millions."""
    seen: dict[str, str] = {}
    items: list[tuple[Problem, Any]] = []
    for split in SPLITS:
        problems = call_user(lambda s=split: task.problems(s), f"problems({split!r}) of the task failed")  # type: ignore[misc]
        if not isinstance(problems, Sequence):
            raise UserError(
                f"problems({split!r}) of the task returned a {type(problems).__name__}; it must be a sequence of Problem"
            )
        if not len(problems):
            raise UserError(f"the split {split!r} of the task is empty; it needs at least one problem")
        for index in range(min(len(problems), _IDS_CHECKED)):
            problem = problems[index]
            place = f"problem {index} of {split!r}"
            _check_shape(problem, place, alone=not pool.has_turns)
            if problem.id in seen:
                raise UserError(
                    f"{place} has the id {problem.id!r}, which {seen[problem.id]} already has; ids must be unique"
                )
            seen[problem.id] = place
        step = max(len(problems) // n, 1)
        for problem in (problems[index] for index in range(0, min(len(problems), n * step), step)):
            gold = _gold(task, problem)
            if gold is not None:
                items.append((problem, gold))
    for (problem, gold), verdict in zip(items, pool.verify(items), strict=True):
        said = f", saying: {verdict.feedback[:300]}" if verdict.feedback else ""
        if verdict.reward is None:
            raise UserError(
                f"the grader cannot judge the gold response {str(gold)[:200]!r} of problem {problem.id!r}{said}"
            )
        if verdict.reward < FULL_REWARD:
            raise UserError(
                f"the grader fails its own gold: it gives the gold response {str(gold)[:200]!r} of problem {problem.id!r} "
                f"reward {verdict.reward:g} instead of 1{said}; a JSONL task says what its gold looks like with task_args.gold"
            )


def _gold(task: Task, problem: Problem) -> Any:
    """A text or None; of an environment also a list of texts."""
    if hasattr(task, "gold"):
        gold = call_user(lambda: task.gold(problem), f"gold() of the task failed on problem {problem.id!r}")
        several = isinstance(gold, list) and bool(gold) and all(isinstance(text, str) for text in gold)
        if gold is not None and not isinstance(gold, str) and not (several and has_turns(task)):
            raise UserError(
                f"gold() of the task returned a {type(gold).__name__} for problem {problem.id!r}; it must be a text or None"
            )
        return gold
    return str(problem.answer) if problem.meta.get("check_gold") else None


def _check_shape(problem: Any, place: str, *, alone: bool) -> None:
    """alone: the problem's messages are the whole prompt; an environment may do without."""
    if not isinstance(problem, Problem):
        raise UserError(f"{place} is a {type(problem).__name__}; it must be a fst_fast.contracts.Problem")
    if not isinstance(problem.id, str) or not problem.id:
        raise UserError(f"{place} has the id {problem.id!r}; it must be a text that is not empty")
    if not is_text(problem.id):
        raise UserError(f"{place} has the id {problem.id!r}, which holds half a surrogate pair")
    wrong = find_message_error(problem.messages) if alone or problem.messages else ""
    if wrong:
        raise UserError(f"{place} (id {problem.id!r}): {wrong}")
