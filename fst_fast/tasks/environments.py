"""Which tasks are played over several turns: environments, tasks whose answers may call tools, and mixtures that have such a part."""

from __future__ import annotations

from typing import Any

from fst_fast.contracts import Problem
from fst_fast.tasks.mixture import Mixture


def is_environment(task: Any) -> bool:
    """Whether it is an Environment, and not a Task of one turn."""
    return callable(getattr(task, "step", None))


def parts_of(task: Any) -> list[Any]:
    """The tasks of a mixture; any other task alone."""
    return [p for part in task.parts for p in parts_of(part)] if isinstance(task, Mixture) else [task]


def part_of(task: Any, problem: Problem) -> tuple[Any, Problem]:
    """The task that a problem is of, and the problem as that task knows it."""
    while isinstance(task, Mixture):
        task, problem = task.own(problem)
    return task, problem


def has_turns(task: Any) -> bool:
    """Whether its responses may be followed by further turns."""
    return any(is_environment(part) or bool(getattr(part, "tools", None)) for part in parts_of(task))
