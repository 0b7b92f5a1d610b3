"""Several tasks as one: what a run through stages (config: `stages`) verifies with, and a task of its own (`task: mixture`).

Every problem id is prefixed with the number of its part, so that ids stay unique where two parts are the same task, and so that a verdict
comes from the part that the problem is of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

from fst_fast.contracts import Problem, Task, Verdict
from fst_fast.errors import UserError


class Mixture:
    """Task `mixture`: the problems of all parts, one part after the other (batches are drawn at random from them).

    tasks: [{task: NAME, task_args: {...}}, ...]. Raises UserError where one of them cannot be made."""

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
            self.parts.append(load_task(part["task"], part.get("task_args") or {}))

    def part(self, number: int, split: str) -> Sequence[Problem]:
        """The problems of one part, under their ids in the mixture."""
        return _Numbered(self.parts[number].problems(split), number)

    def problems(self, split: str) -> Sequence[Problem]:
        return _Joined([self.part(i, split) for i in range(len(self.parts))])

    def verify(self, problem: Problem, response: str) -> Verdict:
        task, own = self._own(problem)
        return task.verify(own, response)

    def gold(self, problem: Problem) -> str:
        """The part's own gold response. Parts without one: str(answer), as the registry does for a task that has none."""
        task, own = self._own(problem)
        gold = getattr(task, "gold", None)
        return str(gold(own) if gold is not None else own.answer)

    def _own(self, problem: Problem) -> tuple[Task, Problem]:
        number, _, own_id = problem.id.partition("/")
        return self.parts[int(number)], replace(problem, id=own_id)


def in_memory(problems: Sequence[Problem]) -> bool:
    """Whether looking at every problem of a split costs nothing but the looking: they are not made or read anew."""
    return bool(getattr(problems, "in_memory", isinstance(problems, list | tuple)))


class _Numbered(Sequence[Problem]):
    def __init__(self, problems: Sequence[Problem], number: int) -> None:
        self._problems, self._number = problems, number
        self.in_memory = in_memory(problems)

    def __len__(self) -> int:
        return len(self._problems)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        if isinstance(index, slice):
            return [self._named(p) for p in self._problems[index]]
        return self._named(self._problems[index])

    def __iter__(self) -> Iterator[Problem]:
        return map(self._named, self._problems)

    def _named(self, problem: Problem) -> Problem:
        return replace(problem, id=f"{self._number}/{problem.id}")


class _Joined(Sequence[Problem]):
    def __init__(self, parts: Sequence[Sequence[Problem]]) -> None:
        self._parts = parts
        self.in_memory = all(map(in_memory, parts))

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        for part in self._parts:
            if 0 <= at < len(part):
                return part[at]
            at -= len(part)
        raise IndexError(index)

    def __iter__(self) -> Iterator[Problem]:
        return (problem for part in self._parts for problem in part)
