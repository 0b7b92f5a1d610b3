"""A chat template (Jinja) as a function from messages to one string.

It renders as transformers does: the same sandbox, filters and functions, and the tokenizer's special tokens as variables. It is a program of ours
because the date is an input here: `strftime_now` of transformers reads the clock, so the prompts of a run would change at midnight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from fst_fast.contracts import Message
from fst_fast.errors import UserError
from fst_fast.run.environment import wall_clock

ALWAYS_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_TAG = "\U0010fffcEND OF THE LAST MESSAGE\U0010fffc"


class TemplateError(UserError):
    """A chat template that does not take these messages. reason: one line."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.reason = reason


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks the assistant's tokens for others, is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@dataclass(frozen=True)
class ChatTemplate:
    """source: Jinja. variables: what it may read besides messages. date: what `strftime_now` shows. where: how errors name it."""

    source: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    date: datetime = field(default_factory=wall_clock)
    where: str = "the chat template"

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        try:
            return environment.from_string(self.source)
        except Exception as error:
            raise TemplateError(self.where, f"it is not valid Jinja: {_line(error)}") from error

    @cached_property
    def reads(self) -> frozenset[str]:
        """The variables that it reads and does not set."""
        _ = self._compiled  # a syntax error is said there
        return frozenset(jinja2.meta.find_undeclared_variables(self._tree))

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers."""
        names = {n.name for n in self._tree.find_all(jinja2.nodes.Name)}
        filters = {f.name for f in self._tree.find_all(jinja2.nodes.Filter)}
        return "lipsum" in names or "random" in filters

    @cached_property
    def _tree(self) -> jinja2.nodes.Template:
        return jinja2.Environment(extensions=[_Generation, jinja2.ext.loopcontrols]).parse(self.source)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_last: bool = False,
        date: datetime | None = None,
    ) -> str:
        """The prompt as text. tools: schemas of functions. continue_last: it ends with the last message's text, whose turn stays open.

        Raises TemplateError."""
        at = self.date if date is None else date
        chat: list[dict[str, Any]] = [
            {key: value for key, value in message.items() if value is not None} for message in messages
        ]
        if continue_last:
            chat[-1] = {**chat[-1], "content": f"{chat[-1]['content']}{_TAG}"}
        try:
            text = self._compiled.render(
                **self.variables,
                messages=chat,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt and not continue_last,
                strftime_now=at.strftime,
            )
        except TemplateError:
            raise
        except Exception as error:
            raise TemplateError(self.where, _line(error)) from error
        if not continue_last:
            return text
        before, tag, _ = text.rpartition(_TAG)
        if not tag:
            raise TemplateError(
                self.where, "it does not write the last message's text, so the message cannot be continued"
            )
        return before

    def with_defaults(self, variables: Mapping[str, Any]) -> str:
        """The source of a template that takes `variables` where its caller does not give them."""
        head = "".join(
            f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
            for name, value in variables.items()
        )
        return f"{head}\n{self.source}" if head else self.source  # trim_blocks takes the line's end away


def _literal(value: Any) -> str:
    """A value of a configuration as a Jinja expression."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(k))}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    place = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
    named = (
        ""
        if type(error) in (jinja2.TemplateError, jinja2.TemplateSyntaxError)
        else f"{type(error).__name__}: "
    )
    return f"{named}{place}{text[:300]}"
