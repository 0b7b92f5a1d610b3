"""A Python function as a tool: the name, the docstring and the type hints are what the model reads and what its arguments must fit.

    def search(query: str, results: int = 3) -> str:
        "Search the handbook."

A parameter with the type hint `EpisodeState` gets the episode's state and is not shown to the model; `Annotated[str, Field(description=...)]`
describes a parameter. pydantic makes the schema and checks the arguments.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from fst_fast.contracts import EpisodeState
from fst_fast.errors import UserError


class ToolError(Exception):
    """What is wrong with a call, as the sentence that the model gets to read."""


@dataclass(frozen=True)
class Tool:
    """state: the parameter that gets the episode's state, None where there is none."""

    name: str
    description: str
    function: Callable[..., Any]
    arguments: type[BaseModel]
    state: str | None

    @classmethod
    def of(cls, function: Any) -> Tool:
        """Raises UserError where the function cannot be described to a model."""
        name = getattr(function, "__name__", "")
        if not callable(function) or not name.isidentifier():
            raise UserError(f"the tool {function!r:.80} is not a function with a name")
        try:
            hints = typing.get_type_hints(function, include_extras=True)
        except (NameError, TypeError) as error:
            raise UserError(f"the tool {name}: its type hints cannot be read: {error}") from error
        fields: dict[str, Any] = {}
        state = None
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise UserError(f"the tool {name}: {parameter} cannot be given by name")
            if parameter.name not in hints:
                raise UserError(f"the tool {name}: the parameter {parameter.name} has no type hint")
            if hints[parameter.name] is EpisodeState:
                state = parameter.name
                continue
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[parameter.name] = (hints[parameter.name], default)
        try:
            arguments = create_model(name, __config__=ConfigDict(extra="forbid", strict=True), **fields)
            arguments.model_json_schema()
        except Exception as error:  # pydantic has many for what JSON cannot hold
            raise UserError(
                f"the tool {name}: its parameters have no JSON schema: {str(error).splitlines()[0]}"
            ) from error
        return cls(name, inspect.getdoc(function) or "", function, arguments, state)

    @property
    def schema(self) -> dict[str, Any]:
        """In the form that chat templates take."""
        parameters = _without_titles(self.arguments.model_json_schema())
        parameters.pop("additionalProperties", None)
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }

    async def call(self, arguments: Mapping[str, Any], state: EpisodeState) -> str:
        """The result as text. Raises ToolError where the arguments do not fit or the function raises."""
        try:
            checked = self.arguments.model_validate_json(json.dumps(arguments), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ToolError(f"{self.name}: the argument {where}: {first['msg']}") from None
        given = {name: getattr(checked, name) for name in type(checked).model_fields}
        try:
            result = self.function(**given, **({} if self.state is None else {self.state: state}))
            if inspect.isawaitable(result):
                result = await result
        except MemoryError:
            raise
        except BaseException as error:  # noqa: BLE001 - the user's code: its fault is what the model reads
            raise ToolError(f"{self.name} raised {type(error).__name__}: {str(error)[:500]}") from None
        return _text(self.name, result)


def _text(name: str, result: Any) -> str:
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise ToolError(
            f"{name} returned a {type(result).__name__}, which is neither text nor JSON data"
        ) from None


def _without_titles(tree: Any) -> Any:
    """A JSON schema without the titles that pydantic makes of names."""
    if isinstance(tree, list):
        return [_without_titles(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: {name: _without_titles(item) for name, item in value.items()}
        if key in ("properties", "$defs")
        else _without_titles(value)
        for key, value in tree.items()
        if key != "title"
    }
