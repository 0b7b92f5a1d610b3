"""A reflector in Python: the user's `file.py:NAME`, or the mini world's rules.

A function is called once for each ReflectionPrompt. It returns its reply as a language model would write it, with the new context in a
fenced block, or a Reply, such as `Reply.proposal(text)`. An exception becomes the error of that reply; the other prompts of the batch
continue. A class is made once, with fast.reflector_args, and called like any reflector, with the whole batch and its seeds.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fst_fast.errors import UserError
from fst_fast.fast.reflection import ReflectionPrompt, Reflector, Reply, first_line

Seeded = Callable[[ReflectionPrompt, int], Any]


class FunctionReflector:
    """Calls a function once per prompt."""

    def __init__(self, name: str, function: Seeded) -> None:
        self.name = name
        self._function = function

    def __call__(self, prompts: Sequence[ReflectionPrompt], *, seeds: Sequence[int]) -> list[Reply]:
        return [self._one(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def _one(self, prompt: ReflectionPrompt, seed: int) -> Reply:
        try:
            said = self._function(prompt, seed)
        except Exception as error:  # noqa: BLE001 - an error in the user's code costs one proposal
            return Reply.failed(f"{self.name} raised {type(error).__name__}: {first_line(str(error))}")
        if isinstance(said, Reply):
            return said
        if not isinstance(said, str):
            return Reply.failed(f"{self.name} returned {type(said).__name__}, not a string")
        return Reply(said, "stop")


def user_reflector(spec: str, args: Mapping[str, Any]) -> Reflector:
    """The reflector that `file.py:NAME` names. Raises UserError where it cannot be made with `args`."""
    named: Any = load_function(spec)
    if not inspect.isclass(named):
        no_args(spec, args)
        return FunctionReflector(spec, unseeded(named))
    try:
        inspect.signature(named).bind(**args)
    except TypeError as error:
        raise UserError(f"fast.reflector_args={dict(args)} do not fit {spec}: {error}") from error
    try:
        reflector: Any = named(**args)
    except Exception as error:
        raise UserError(
            f"fast.reflector={spec} cannot be made with fast.reflector_args={dict(args)}: {type(error).__name__}: "
            f"{first_line(str(error))}"
        ) from error
    if not callable(reflector):
        raise UserError(
            f"fast.reflector={spec}: its objects cannot be called; a __call__(prompts, *, seeds) is due"
        )
    return reflector  # type: ignore[no-any-return]


def no_args(name: str, args: Mapping[str, Any]) -> None:
    """Raise UserError where arguments are given to a reflector that takes none."""
    if args:
        raise UserError(
            f"fast.reflector_args has {', '.join(sorted(args))}, but fast.reflector={name} takes no arguments; openai, given and classes do"
        )


def seeded(rules: Callable[[ReflectionPrompt, np.random.Generator], str]) -> Seeded:
    """Adapt a function of (prompt, random generator) to (prompt, seed)."""
    return lambda prompt, seed: rules(prompt, np.random.default_rng(seed))


def unseeded(function: Callable[[ReflectionPrompt], Any]) -> Seeded:
    """Adapt a function of the prompt alone to (prompt, seed)."""
    return lambda prompt, _seed: function(prompt)


def load_function(spec: str) -> Callable[[ReflectionPrompt], Any]:
    """Load the function named by `path/to/file.py:function`. Raises UserError if the file or the function does not exist."""
    path_text, _, name = spec.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise UserError(f"fast.reflector={spec}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location(f"_fst_reflector_{path.stem}", path)
    assert module_spec is not None  # a .py file always has a spec and a loader
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"fast.reflector={spec}: importing {path} failed with {type(error).__name__}: {first_line(str(error))}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        offered = sorted(
            n
            for n, v in vars(module).items()
            if callable(v) and getattr(v, "__module__", None) == module.__name__
        )
        raise UserError(
            f"fast.reflector={spec}: {path} has no function {name!r}; it offers {', '.join(offered) or 'none'}"
        )
    return function  # type: ignore[no-any-return]
