"""Who reflects: `mini` (rules, mini world only), `self` (the frozen base model), `openai` (an endpoint), `given` (a person, beforehand), or a
user's Python function or class.

A new kind is one file here and one line in REFLECTORS. What is wrong with the arguments is said at start-up; what goes wrong in
a call becomes a reply with an error (see reflection.ask), since a reflector that is down must not stop the slow phase.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from fst_fast.errors import UserError
from fst_fast.fast.reflection import Reflector
from fst_fast.fast.reflectors.self_ import Generate, SelfReflector

Style = Literal["full", "short"]
Make = Callable[[Mapping[str, Any], Generate | None, Style], Reflector]
"""Makes a reflector of fast.reflector_args, the base model's `generate` and the style of its requests."""


def make_reflector(
    name: str, args: Mapping[str, Any], *, generate: Generate | None, style: Style = "full"
) -> Reflector:
    """The reflector that fast.reflector names. generate: needed by `self` only, as style is. Raises UserError on a name or arguments that
    cannot be."""
    if name in REFLECTORS:
        return REFLECTORS[name](args, generate, style)
    if ".py:" in name:
        from fst_fast.fast.reflectors.python import user_reflector

        return user_reflector(name, args)
    raise UserError(
        f"fast.reflector={name} is unknown; allowed: {', '.join(REFLECTORS)}, or file.py:function"
    )


def _mini(args: Mapping[str, Any], generate: Generate | None, style: Style) -> Reflector:
    from fst_fast.fast.reflectors.mini import reflect as rules
    from fst_fast.fast.reflectors.python import FunctionReflector, no_args, seeded

    no_args("mini", args)
    return FunctionReflector("mini", seeded(rules))


def _self(args: Mapping[str, Any], generate: Generate | None, style: Style) -> Reflector:
    from fst_fast.fast.reflectors.python import no_args

    no_args("self", args)
    if generate is None:
        raise UserError(
            "fast.reflector=self needs a model that generates; allowed without one: mini, openai, file.py:function"
        )
    return SelfReflector(generate, style)


def _openai(args: Mapping[str, Any], generate: Generate | None, style: Style) -> Reflector:
    from fst_fast.fast.reflectors.openai import OpenAIReflector  # the package `openai` is an extra

    return OpenAIReflector.from_args(args)


def _given(args: Mapping[str, Any], generate: Generate | None, style: Style) -> Reflector:
    from fst_fast.fast.reflectors.given import GivenContexts

    return GivenContexts.from_args(args)


REFLECTORS: dict[str, Make] = {"mini": _mini, "self": _self, "openai": _openai, "given": _given}
