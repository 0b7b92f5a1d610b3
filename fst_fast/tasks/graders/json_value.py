"""Graders of JSON in a response: json_schema and json_equal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fst_fast.contracts import Problem, Verdict
from fst_fast.tasks.graders.text import quoted
from fst_fast.tasks.readers import import_package


class NoJson(ValueError):
    """There is no JSON value to grade; the text is feedback."""


def read_json(response: str, *, alone: bool) -> Any:
    """The JSON value of a response: all of it if `alone`, else a fenced block or the whole text. Raises NoJson."""
    text = response.strip()
    if not alone:
        fenced = re.findall(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL)
        text = fenced[-1].strip() if fenced else text
    if not text:
        raise NoJson("the response is empty; a JSON value is wanted.")
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except RecursionError:
        raise NoJson("the JSON value is nested too deeply.") from None
    except json.JSONDecodeError as error:
        what = "nothing but a JSON value" if alone else "a JSON value, alone or in a ```json block"
        raise NoJson(
            f"the response must be {what}; it is not JSON at character {error.pos}: {error.msg}."
        ) from None
    except ValueError as error:
        raise NoJson(f"the response is no valid JSON: {error}.") from None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return found


@dataclass(frozen=True)
class JsonSchema:
    """Reward 1 if the response is JSON that satisfies a schema (package jsonschema, extra `tasks`).

    schema: of all problems; without it the problem's answer is the schema. alone: nothing but the JSON value is allowed."""

    schema: Mapping[str, Any] | None = None
    alone: bool = True

    def __post_init__(self) -> None:
        jsonschema = import_package("jsonschema", "the grader json_schema", "tasks")
        if self.schema is not None:
            try:
                jsonschema.validators.validator_for(self.schema).check_schema(self.schema)
            except jsonschema.SchemaError as error:
                raise ValueError(f"schema is not a JSON schema: {error.message}") from None

    def __call__(self, problem: Problem, response: str) -> Verdict:
        import jsonschema

        schema = problem.answer if self.schema is None else self.schema
        try:
            value = read_json(response, alone=self.alone)
        except NoJson as error:
            return Verdict(0.0, str(error))
        try:
            errors = sorted(
                jsonschema.validators.validator_for(schema)(schema).iter_errors(value),
                key=lambda e: list(map(str, e.path)),
            )
        except (jsonschema.SchemaError, TypeError, AttributeError) as error:
            return Verdict(None, f"the schema of problem {problem.id} is not usable: {error}")
        if not errors:
            return Verdict(1.0)
        said = "; ".join(f"{_path(e.absolute_path)}: {e.message[:200]}" for e in errors[:3])
        return Verdict(0.0, f"the JSON value does not fit: {said}.")


@dataclass(frozen=True)
class JsonEqual:
    """Reward 1 if the response is the expected JSON value. Numbers are compared as numbers, objects without order of keys.

    alone: nothing but the JSON value is allowed. keys: only these keys of an object are compared, and the share that is right is the reward."""

    alone: bool = True
    keys: Sequence[str] = ()
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.keys, list | tuple):
            raise ValueError(f"keys={self.keys!r}; it must be a list of keys")

    def __call__(self, problem: Problem, response: str) -> Verdict:
        try:
            value = read_json(response, alone=self.alone)
        except NoJson as error:
            return Verdict(0.0, str(error))
        if not self.keys:
            where = self._difference(value, problem.answer, "")
            return Verdict(1.0) if where is None else Verdict(0.0, f"the JSON value is wrong: {where}.")
        if not isinstance(value, dict) or not isinstance(problem.answer, Mapping):
            return Verdict(0.0, f"a JSON object with the keys {', '.join(self.keys)} is wanted.")
        wrong = [
            where
            for key in self.keys
            if (where := self._difference(value.get(key), problem.answer.get(key), key)) is not None
        ]
        reward = 1 - len(wrong) / len(self.keys)
        return Verdict(reward, f"wrong: {'; '.join(wrong)}." if wrong else "")

    def gold(self, problem: Problem) -> str:
        return json.dumps(problem.answer, ensure_ascii=False)

    def _difference(self, given: Any, expected: Any, at: str) -> str | None:
        """Where two values differ, None if nowhere."""
        place = at or "the value"
        if isinstance(expected, Mapping):
            if not isinstance(given, Mapping):
                return f"{place} must be an object, not {quoted(json.dumps(given)[:80])}"
            missing, extra = expected.keys() - given.keys(), given.keys() - expected.keys()
            parts = [f"lacks {', '.join(sorted(missing))}"] if missing else []
            parts += [f"has {', '.join(sorted(extra))} too many"] if extra else []
            if parts:
                return f"{place} {' and '.join(parts)}"
            found = (
                self._difference(given[key], expected[key], f"{at}.{key}".lstrip(".")) for key in expected
            )
            return next((where for where in found if where is not None), None)
        if isinstance(expected, list | tuple):
            if not isinstance(given, list) or len(given) != len(expected):
                return f"{place} must be a list of {len(expected)}"
            pairs = enumerate(zip(given, expected, strict=True))
            return next(
                (w for i, (a, b) in pairs if (w := self._difference(a, b, f"{at}[{i}]")) is not None), None
            )
        if all(isinstance(x, int | float) and not isinstance(x, bool) for x in (given, expected)):
            same = math.isclose(given, expected, rel_tol=0, abs_tol=self.tolerance)
        else:
            same = type(given) is type(expected) and given == expected
        if same:
            return None
        return f"{place} must be {json.dumps(expected)}, not {quoted(json.dumps(given)[:80])}"


def _path(parts: Any) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
    return text or "the value"
