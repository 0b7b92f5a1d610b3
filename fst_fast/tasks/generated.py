"""Tasks whose problems are generated, not stored: each is a function of (seed, split, index), created on demand.

The splits draw from different random streams, and a duplicate instance is redrawn, so none occurs twice within a split
or across splits. Only hashes of the instances are stored. A subclass defines how to draw an instance, what makes two of
them equal, and how to word one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np

from fst_fast.contracts import Problem, Verdict
from fst_fast.errors import UserError

STREAM = {"train": 0, "validation": 1, "ood": 2}
"""The splits and their random streams. `ood`: out of distribution, instances of a form that training never contains."""
_MAX_DRAWS = 200

Instance = TypeVar("Instance")


class GeneratedTask(ABC, Generic[Instance]):
    """A task with generated problems. `name` prefixes every problem id; `sizes` are the numbers of problems per split."""

    name: str

    def __init__(self, *, train: int, validation: int, ood: int, seed: int) -> None:
        least = {"train": (train, 1), "validation": (validation, 1), "ood": (ood, 0), "seed": (seed, 0)}
        for name, (value, low) in least.items():
            self._check(name, value, low)
        self.seed = seed
        # Validation first: its problems do not depend on the size of another split.
        self.sizes = {"validation": validation, "train": train, "ood": ood}
        self._attempts: dict[str, list[int]] = {}

    def _check(self, name: str, value: object, low: int) -> None:
        if not isinstance(value, int) or value < low:
            raise UserError(f"{self.name}: {name}={value!r} must be a whole number of at least {low}")

    @abstractmethod
    def _draw(self, rng: np.random.Generator, split: str) -> Instance: ...

    @abstractmethod
    def _key(self, instance: Instance) -> Hashable:
        """Equal for instances of the same problem. Made of ints and their tuples, whose hashes are the same in every process."""

    @abstractmethod
    def _problem(self, instance: Instance, id: str) -> Problem: ...

    @abstractmethod
    def _settings(self) -> str:
        """The settings that determine how many different instances there are, for the error that there are too few."""

    def problems(self, split: str) -> Sequence[Problem]:
        """The problems of `train`, `validation` or `ood`, each created when it is indexed. Raises UserError for another split."""
        if split not in self.sizes:
            raise UserError(f"{self.name}: there is no split {split!r}; allowed are {', '.join(STREAM)}")
        return _Split(self, split, self._first_attempts(split))

    def _at(self, split: str, index: int, attempt: int) -> Instance:
        return self._draw(np.random.default_rng([self.seed, STREAM[split], index, attempt]), split)

    def _first_attempts(self, split: str) -> list[int]:
        """For every problem of the split, the first attempt whose instance is new. Almost always 0."""
        if split not in self._attempts:
            # `ood` has its own form, so it cannot repeat other splits and is drawn separately.
            together = ("ood",) if split == "ood" else ("validation", "train")
            seen: set[int] = set()
            for name in together:
                self._attempts[name] = [self._first_new(name, i, seen) for i in range(self.sizes[name])]
        return self._attempts[split]

    def _first_new(self, split: str, index: int, seen: set[int]) -> int:
        for attempt in range(_MAX_DRAWS):
            key = hash(self._key(self._at(split, index, attempt)))
            if key not in seen:
                seen.add(key)
                return attempt
        raise UserError(
            f"{self.name}: {self._settings()} have too few different problems for number {index} of the {split} split; "
            "ask for fewer"
        )


class LazyProblems(Sequence[Problem]):
    """A sequence that creates each problem when it is indexed. Subclasses define `__len__` and `_get`."""

    @abstractmethod
    def _get(self, index: int) -> Problem:
        """The problem at 0 <= index < len(self)."""

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        if isinstance(index, slice):
            return [self._get(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"problem {index} does not exist; there are {len(self)}")
        return self._get(index % len(self))

    def __iter__(self) -> Iterator[Problem]:
        return map(self._get, range(len(self)))


class _Split(LazyProblems):
    """One split of a generated task. Lazy, because a paper problem's text is 4 kB and most are used once."""

    def __init__(self, task: GeneratedTask[Instance], split: str, attempts: list[int]) -> None:
        self._task, self._split, self._attempts = task, split, attempts

    def __len__(self) -> int:
        return len(self._attempts)

    def _get(self, index: int) -> Problem:
        instance = self._task._at(self._split, index, self._attempts[index])
        return self._task._problem(instance, f"{self._task.name}/{self._split}/{index}")


class MiniTask(GeneratedTask[Instance]):
    """A task of the mini world at one of two levels. level: `easy` or `hard`.

    An instance is a dataclass, stored in the problem's meta. Its size is `sizes_by_level[level]`, one more in the
    split `ood`. A subclass sets the class attributes and defines `_key` and `_answer`."""

    instance_type: type[Instance]
    sizes_by_level: Mapping[str, int]
    _sample: Callable[[np.random.Generator, int], Instance]  # of a size
    _question: Callable[[Instance], str]  # the user message
    _judge: Callable[[Instance, str], Verdict]  # of a response

    def __init__(
        self,
        level: Literal["easy", "hard"] = "hard",
        train: int = 2000,
        validation: int = 256,
        seed: int = 0,
        ood: int = 256,
    ) -> None:
        super().__init__(train=train, validation=validation, ood=ood, seed=seed)
        if level not in self.sizes_by_level:
            allowed = ", ".join(self.sizes_by_level)
            raise UserError(f"{self.name}: level={level!r} is not known; allowed are {allowed}")
        self.level = level

    @abstractmethod
    def _answer(self, instance: Instance) -> int | str: ...

    def _draw(self, rng: np.random.Generator, split: str) -> Instance:
        return self._sample(rng, self.sizes_by_level[self.level] + (split == "ood"))

    def _settings(self) -> str:
        return f"level={self.level}"

    def _problem(self, instance: Instance, id: str) -> Problem:
        meta = {field.name: _lists(getattr(instance, field.name)) for field in fields(self.instance_type)}  # type: ignore[arg-type]
        message = {"role": "user", "content": self._question(instance)}
        return Problem(id=id, messages=(message,), answer=self._answer(instance), meta=meta)

    def verify(self, problem: Problem, response: str) -> Verdict:
        """Judge the last \\boxed{} of the response."""
        return self._judge(self.instance(problem), response)

    def instance(self, problem: Problem) -> Instance:
        """The instance that a problem was made of."""
        return self.instance_type(**{name: _tuples(value) for name, value in problem.meta.items()})

    def gold(self, problem: Problem) -> str:
        """A response that gets reward 1."""
        return f"\\boxed{{ {problem.answer} }}"


def _lists(value: Any) -> Any:
    """Tuples as lists, at all depths: meta holds JSON values."""
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    """The inverse of `_lists`."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
