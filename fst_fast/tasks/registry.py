"""Which task a name stands for, and the check that its grader can be trusted before anything is trained on it.

A spec is a built-in name, `file.py:Class`, or `data.jsonl` (then args["verify"] names the grader). A new built-in task is one file
and one line in BUILT_IN; modules are imported only when their task is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fst_fast.contracts import Problem, Task
from fst_fast.errors import UserError
from fst_fast.tasks.jsonl import JsonlTask, find_message_error
from fst_fast.tasks.user import call_user, load_object, make_task

if TYPE_CHECKING:
    from fst_fast.tasks.verify import VerifierPool

BUILT_IN = {
    "star_graph": "fst_fast.tasks.star_graph:StarGraph",
    "list_programs": "fst_fast.tasks.list_programs:ListPrograms",
    "linked_facts": "fst_fast.tasks.linked_facts:LinkedFacts",
    "formula_choice": "fst_fast.tasks.formula_choice:FormulaChoice",
    "mixture": "fst_fast.tasks.mixture:Mixture",
}

SPLITS = ("train", "validation")
_IDS_CHECKED = 20_000


def load_task(spec: str, args: Mapping[str, Any], *, problems: bool = True) -> Task:
    """The task that `spec` names, made with `args`. Raises UserError on everything wrong.

    problems=False: only `verify` will be used (in a verifying child), so a JSONL file need not be read."""
    where = f"task={spec}"
    if spec in BUILT_IN:
        module, _, name = BUILT_IN[spec].partition(":")
        return make_task(getattr(importlib.import_module(module), name), args, where)
    if spec.endswith(".jsonl"):
        _refuse_unknown_args(args, where)
        return JsonlTask(spec, **args, read=problems)
    if ".py" in spec:
        return make_task(load_object(spec, "task"), args, where)
    near = difflib.get_close_matches(spec, BUILT_IN, n=1)
    hint = (
        f"did you mean {near[0]}?"
        if near
        else f"allowed are {', '.join(BUILT_IN)}, file.py:Class, or data.jsonl"
    )
    raise UserError(f"task={spec!r} is not known; {hint}")


def _refuse_unknown_args(args: Mapping[str, Any], where: str) -> None:
    allowed = [name for name in inspect.signature(JsonlTask).parameters if name not in ("path", "read")]
    for name in args:
        if name not in allowed:
            raise UserError(
                f"{where}: task_args.{name} is not known for a JSONL task; allowed are {', '.join(allowed)}"
            )


def check_gold(task: Task, pool: VerifierPool, n: int = 8) -> None:
    """Refuse (UserError) a task that cannot be trained on: an empty split, two problems with one id, a malformed problem, or a grader
    that does not give its own gold response reward 1.

    The gold response is `task.gold(problem)` where the task has it; else str(problem.answer) where problem.meta["check_gold"] asks for
    it; else there is none and the grader is trusted. `n` problems of each split are tried, evenly spaced, in the verifying children.
    Ids are compared over the first 20,000 problems of each split: a generator may have millions."""
    seen: dict[str, str] = {}
    items: list[tuple[Problem, str]] = []
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
            _check_shape(problem, place)
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
                f"the grader cannot judge the gold response {gold[:200]!r} of problem {problem.id!r}{said}"
            )
        if verdict.reward != 1:
            raise UserError(
                f"the grader fails its own gold: it gives the gold response {gold[:200]!r} of problem {problem.id!r} "
                f"reward {verdict.reward:g} instead of 1{said}; a JSONL task says what its gold looks like with task_args.gold"
            )


def _gold(task: Task, problem: Problem) -> str | None:
    if hasattr(task, "gold"):
        gold = call_user(lambda: task.gold(problem), f"gold() of the task failed on problem {problem.id!r}")
        if gold is not None and not isinstance(gold, str):
            raise UserError(
                f"gold() of the task returned a {type(gold).__name__} for problem {problem.id!r}; it must be a text or None"
            )
        return gold
    return str(problem.answer) if problem.meta.get("check_gold") else None


def _check_shape(problem: Any, place: str) -> None:
    if not isinstance(problem, Problem):
        raise UserError(f"{place} is a {type(problem).__name__}; it must be a fst_fast.contracts.Problem")
    if not isinstance(problem.id, str) or not problem.id:
        raise UserError(f"{place} has the id {problem.id!r}; it must be a text that is not empty")
    wrong = find_message_error(problem.messages)
    if wrong:
        raise UserError(f"{place} (id {problem.id!r}): {wrong}")
