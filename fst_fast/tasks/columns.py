"""Map the columns of a row to the parts of a problem: `task_args.columns`, and the condition `task_args.filter`.

    columns:
      prompt: "Claim: {{ claim }}"             text with {{ }} or {% %}: a Jinja template over the row's columns
      answer: details.label                    without braces: the name of a column, dots lead into objects
      meta: {hops: num_hops}                   each entry as above
    filter: "num_hops >= 3"                    a Jinja expression; rows for which it is false are left out

A template that is one {{ expression }} keeps the expression's type, any other gives text. `row` is the whole row, for names such as
row["Question Type"]; the filter `fromjson` reads a text as JSON. Templates run in Jinja's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, Undefined
from jinja2.nativetypes import NativeEnvironment, NativeTemplate
from jinja2.sandbox import SandboxedEnvironment

from fst_fast.errors import UserError

KEYS = ("id", "messages", "prompt", "answer", "split", "meta", "gold")
Row = Mapping[str, Any]


def _concat(values: Iterable[Any]) -> Any:
    """What a template renders to: the value itself where it is one expression, else text."""
    parts = list(values)
    return parts[0] if len(parts) == 1 else "".join(map(str, parts))


class _Environment(SandboxedEnvironment, NativeEnvironment):
    concat = staticmethod(_concat)


class _Template(NativeTemplate):
    environment_class = _Environment


_Environment.template_class = _Template
_ENVIRONMENT = _Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters["fromjson"] = json.loads


def make_columns(spec: Any) -> Callable[[Row], dict[str, Any]]:
    """The mapping that `task_args.columns` describes: from a row to the fields of KEYS. Raises UserError.

    The mapping raises ValueError, saying which column is wrong. Parts that come out as null are left out, the answer excepted."""
    if not isinstance(spec, Mapping) or not spec:
        raise UserError(f"task_args.columns={spec!r:.80} must map {', '.join(KEYS)} to columns or templates")
    for key in spec:
        if key not in KEYS:
            raise UserError(f"task_args.columns.{key} is not known; allowed: {', '.join(KEYS)}")
    if "answer" not in spec or ("prompt" in spec) == ("messages" in spec):
        raise UserError("task_args.columns needs answer, and one of prompt and messages")
    meta = spec.get("meta", {})
    if not isinstance(meta, Mapping):
        raise UserError(f"task_args.columns.meta={meta!r:.80} must map names to columns or templates")
    parts = {key: _value(text, f"columns.{key}") for key, text in spec.items() if key != "meta"}
    metas = {str(name): _value(text, f"columns.meta.{name}") for name, text in meta.items()}

    def fields(row: Row) -> dict[str, Any]:
        found = {key: value(row) for key, value in parts.items()}
        for key in ("id", "split", "gold"):
            if isinstance(found.get(key), int):
                found[key] = str(found[key])
        if isinstance(found.get("messages"), list):
            found["messages"] = [_without_nulls(message) for message in found["messages"]]
        found["meta"] = {name: value(row) for name, value in metas.items()}
        return {key: value for key, value in found.items() if value is not None or key == "answer"}

    return fields


def make_filter(text: Any) -> Callable[[Row], bool]:
    """The condition `task_args.filter`. Raises UserError; the condition raises ValueError."""
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"task_args.filter={text!r:.80} must be an expression over the columns, such as level >= 3"
        )
    holds = _value(f"{{{{ ({text}) }}}}", "filter")
    return lambda row: bool(holds(row))


def _value(text: Any, key: str) -> Callable[[Row], Any]:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"task_args.{key}={text!r:.80} must be the name of a column or a template")
    if "{{" not in text and "{%" not in text:
        return lambda row: _column(row, text, key)
    try:
        template = _ENVIRONMENT.from_string(text)
    except TemplateError as error:
        raise UserError(f"task_args.{key} is not a valid template: {error}") from None

    def render(row: Row) -> Any:
        try:
            value: Any = template.render({"row": row, **row})
            if isinstance(value, Undefined):
                str(value)  # raises
        except Exception as error:  # noqa: BLE001 - the user's expression over somebody's data may raise anything
            raise ValueError(f"task_args.{key}: {_first_line(error)}; {_there(row)}") from None
        return value

    return render


def _column(row: Row, name: str, key: str) -> Any:
    value: Any = row
    for part in [name] if name in row else name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"task_args.{key}={name} is not a column; {_there(row)}")
        value = value[part]
    return value


def _there(row: Row) -> str:
    return f"the columns are {', '.join(map(str, row))}"[:300]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _without_nulls(message: Any) -> Any:
    """A chat message without its empty fields: tables fill in the fields that other messages have."""
    if not isinstance(message, Mapping):
        return message
    return {key: value for key, value in message.items() if value is not None}
