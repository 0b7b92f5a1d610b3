"""Built-in graders: `task_args.verify` of a task from a file or a data set.

    verify: math                                               a built-in grader with its defaults
    verify: {grader: multiple_choice, choices: ABCD}           with arguments
    verify: my_grader.py:grade                                 a function of (problem, response), plain or async
    verify: [{grader: math, weight: 0.9}, {grader: length, limit: 800, weight: 0.1}]
                                                               several: the reward is the weighted mean, each one is logged

A grader is a function (problem, response) -> Verdict whose feedback says what was wrong: the reflection reads it. A built-in one is a
frozen dataclass; its fields are its arguments, and `gold(problem)` gives a response that must get reward 1, or None where no fixed
response can. A new one is one class in one of the files here and one line in BUILT_IN. Nothing here loads torch.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fst_fast.contracts import Problem, Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.user import load_object
from fst_fast.tasks.verdicts import as_verdict, plain_number

Grade = Callable[[Problem, str], Any]
"""Returns what `as_verdict` of tasks/verdicts.py takes."""

BUILT_IN = {
    "exact": "text:Exact",
    "contains": "text:Contains",
    "regex": "text:Regex",
    "multiple_choice": "text:MultipleChoice",
    "math": "math:Math",
    "json_schema": "json_value:JsonSchema",
    "json_equal": "json_value:JsonEqual",
    "python_tests": "python_tests:PythonTests",
    "instruction_following": "instructions:InstructionFollowing",
    "format": "shaping:Format",
    "length": "shaping:Length",
    "http": "http:Http",
}

KEY = "task_args.verify"


def make_grader(spec: Any, key: str = KEY) -> Grade:
    """The grader that `spec` describes. key: names the place in refusals. Raises UserError."""
    if isinstance(spec, str):
        spec = {"grader": spec}
    if isinstance(spec, Mapping):
        return _one(dict(spec), key)
    if isinstance(spec, Sequence) and spec:
        return _weighted(list(spec), key)
    raise UserError(
        f"{key}={spec!r} is no grader; allowed: {', '.join(BUILT_IN)}, file.py:function, keys with `grader`, or a list of these"
    )


def gold_of(grade: Grade, problem: Problem) -> str | None:
    """A response that must get reward 1, None where the grader knows none."""
    found: Callable[[Problem], str | None] | None = getattr(grade, "gold", None)
    return None if found is None else found(problem)


def _one(spec: dict[str, Any], key: str) -> Grade:
    name = spec.pop("grader", None)
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{key}: the key `grader` is missing; allowed: {', '.join(BUILT_IN)} or file.py:function"
        )
    if name not in BUILT_IN:
        if ".py" not in name:
            raise UserError(f"{key}={name} is not known; allowed: {', '.join(BUILT_IN)}, or file.py:function")
        if spec:
            raise UserError(
                f"{key}={name} takes no arguments, got {', '.join(spec)}; only built-in graders do"
            )
        return Function(name, key)
    module, _, class_name = BUILT_IN[name].partition(":")
    made: type = getattr(importlib.import_module(f"fst_fast.tasks.graders.{module}"), class_name)
    fields = inspect.signature(made).parameters
    for argument in spec:
        if argument not in fields:
            raise UserError(
                f"{key}.{argument} is not known for the grader {name}; allowed: {', '.join(fields) or 'none'}"
            )
    try:
        grader: Grade = made(**spec)
    except TypeError as error:
        raise UserError(f"{key}: the grader {name} needs more: {error}") from None
    except ValueError as error:
        raise UserError(f"{key}: the grader {name}: {error}") from None
    return grader


class Function:
    """A user's function of (problem, response), plain or async."""

    def __init__(self, spec: str, key: str) -> None:
        self._call = load_object(spec, key)
        if not callable(self._call):
            raise UserError(
                f"{key}={spec} is a {type(self._call).__name__}; it must be a function of (problem, response)"
            )

    def __call__(self, problem: Problem, response: str) -> Any:
        value = self._call(problem, response)
        return asyncio.run(value) if inspect.iscoroutine(value) else value


def _weighted(specs: Sequence[Any], key: str) -> Grade:
    parts: list[tuple[str, float, Grade]] = []
    for i, spec in enumerate(specs):
        fields = (
            {"grader": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else None
        )
        where = f"{key}[{i}]"
        if fields is None:
            raise UserError(f"{where}={spec!r} is no grader; it must be a name or keys with `grader`")
        weight = fields.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise UserError(f"{where}.weight={weight!r} is refused; allowed: a number > 0")
        name = fields.pop("name", None) or str(fields.get("grader", "")).rpartition(":")[2]
        if name in (part[0] for part in parts):
            raise UserError(f"{where}: two graders are named {name!r}; give one of them another `name`")
        parts.append((name, float(weight), _one(fields, where)))
    return Weighted(tuple(parts))


class Weighted:
    """Several graders: the reward is the mean of theirs by weight; metrics `reward/NAME` log each. One that cannot judge makes the whole
    unjudged; feedback of all that gave less than 1 is joined."""

    def __init__(self, parts: Sequence[tuple[str, float, Grade]]) -> None:
        self.parts = parts

    def __call__(self, problem: Problem, response: str) -> Verdict:
        verdicts = [
            (name, weight, as_verdict(grade(problem, response))) for name, weight, grade in self.parts
        ]
        rewards: dict[str, float] = {}
        for name, _, verdict in verdicts:
            reward = plain_number(verdict.reward)
            if reward is None or not 0 <= reward <= 1:
                said = (
                    verdict.feedback
                    if verdict.reward is None
                    else f"reward={verdict.reward!r} is not in [0, 1]"
                )
                return Verdict(None, f"{name}: {said}")
            rewards[name] = reward
        total = sum(weight for _, weight, _ in verdicts)
        reward = sum(weight * rewards[name] for name, weight, _ in verdicts) / total
        metrics = {f"reward/{name}": reward for name, reward in rewards.items()}
        for _, _, verdict in verdicts:
            metrics |= verdict.metrics
        feedback = " ".join(v.feedback for name, _, v in verdicts if v.feedback and rewards[name] < 1)
        return Verdict(min(max(reward, 0.0), 1.0), feedback, metrics)

    def gold(self, problem: Problem) -> str | None:
        """A gold response of one of the graders that all of them give reward 1."""
        for _, _, grade in self.parts:
            gold = gold_of(grade, problem)
            if gold is not None and self(problem, gold).reward == 1:
                return gold
        return None
