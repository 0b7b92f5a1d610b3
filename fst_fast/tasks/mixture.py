"""Several tasks combined into one: used to verify a run with several stages (config: `stages`), and as a task (`task: mixture`).

Every problem id is prefixed with the index of its part. So ids stay unique if two parts are the same task, and a
verdict comes from the part that the problem belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fst_fast.contracts import Problem, Task, Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.generated import LazyProblems


class Mixture:
    """Task `mixture`: the problems of all parts, concatenated (batches are drawn at random from them).

    tasks: [{task: NAME, task_args: {...}}, ...]. Raises UserError if one of them cannot be created."""

    def __init__(self, tasks: Sequence[Mapping[str, Any]]) -> None:
        from fst_fast.tasks.registry import load_task

        if not tasks:
            raise UserError(
                "mixture: tasks is empty; name at least one, such as {task: star_graph, task_args: {}}"
            )
        self.parts: list[Task] = []
        for i, part in enumerate(tasks):
            unknown = set(part) - {"task", "task_args"}
            if "task" not in part or unknown:
                raise UserError(
                    f"mixture: tasks.{i}={dict(part)} must have the key task and may have task_args"
                )
            self.parts.append(load_task(part["task"], part.get("task_args") or {}, problems=False))

    def part(self, number: int, split: str) -> Sequence[Problem]:
        """The problems of one part, with their ids in the mixture."""
        return _Numbered(self.parts[number].problems(split), number)

    def problems(self, split: str) -> Sequence[Problem]:
        return _Joined([self.part(i, split) for i in range(len(self.parts))])

    @property
    def notes(self) -> list[str]:
        """What the parts say of their data."""
        return [note for part in self.parts for note in getattr(part, "notes", ())]

    def verify(self, problem: Problem, response: str) -> Verdict:
        task, own = self.own(problem)
        return task.verify(own, response)

    def gold(self, problem: Problem) -> Any:
        """The part's own gold response; str(answer) for parts without `gold`, as in the registry, but None for an environment."""
        task, own = self.own(problem)
        gold = getattr(task, "gold", None)
        if gold is None:
            return None if hasattr(task, "step") else str(own.answer)
        return gold(own)

    def own(self, problem: Problem) -> tuple[Task, Problem]:
        """The part that a problem is of, and the problem with its id there."""
        number, _, own_id = problem.id.partition("/")
        return self.parts[int(number)], replace(problem, id=own_id)


def in_memory(problems: Sequence[Problem]) -> bool:
    """Whether looking at every problem of a split costs nothing but the looking: they are not made or read anew."""
    return bool(getattr(problems, "in_memory", isinstance(problems, list | tuple)))


class _Numbered(LazyProblems):
    """The problems of one part, with the part's number prefixed to their ids."""

    def __init__(self, problems: Sequence[Problem], number: int) -> None:
        self._problems, self._number = problems, number
        self.in_memory = in_memory(problems)

    def __len__(self) -> int:
        return len(self._problems)

    def _get(self, index: int) -> Problem:
        problem = self._problems[index]
        return replace(problem, id=f"{self._number}/{problem.id}")


class _Joined(LazyProblems):
    """The concatenation of several sequences."""

    def __init__(self, parts: Sequence[Sequence[Problem]]) -> None:
        self._parts = parts
        self.in_memory = all(map(in_memory, parts))

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def _get(self, index: int) -> Problem:
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)
