"""Who reflects: `mini` (rules, mini world only), `self` (the frozen base model), `openai` (an endpoint), `given` (a person, beforehand), or a
user's Python function.

A new kind is one file here and one line in `make_reflector`. What is wrong with the arguments is said at start-up; what goes wrong in
a call becomes a reply with an error (see reflection.ask), since a reflector that is down must not stop the slow phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fst_fast.errors import UserError
from fst_fast.fast.reflection import Reflector
from fst_fast.fast.reflectors.self_ import Generate, SelfReflector


def make_reflector(
    name: str, args: Mapping[str, Any], *, generate: Generate | None, style: Literal["full", "short"] = "full"
) -> Reflector:
    """The reflector that fast.reflector names. generate: needed by `self` only, as style is. Raises UserError on a name or arguments that
    cannot be."""
    if name == "openai":
        from fst_fast.fast.reflectors.openai import OpenAIReflector  # the package `openai` is an extra

        return OpenAIReflector.from_args(args)
    if name == "given":
        from fst_fast.fast.reflectors.given import GivenContexts

        return GivenContexts.from_args(args)
    if args:
        raise UserError(
            f"fast.reflector_args has {', '.join(sorted(args))}, but fast.reflector={name} takes no arguments; only openai and given do"
        )
    if name == "mini":
        from fst_fast.fast.reflectors.mini import reflect as rules
        from fst_fast.fast.reflectors.python import FunctionReflector, seeded

        return FunctionReflector("mini", seeded(rules))
    if name == "self":
        if generate is None:
            raise UserError(
                "fast.reflector=self needs a model that generates; allowed without one: mini, openai, file.py:function"
            )
        return SelfReflector(generate, style)
    if ".py:" in name:
        from fst_fast.fast.reflectors.python import FunctionReflector, load_function, unseeded

        return FunctionReflector(name, unseeded(load_function(name)))
    raise UserError(
        f"fast.reflector={name} is unknown; allowed: mini, self, openai, given, or file.py:function"
    )
