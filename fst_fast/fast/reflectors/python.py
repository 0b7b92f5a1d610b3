"""A reflector that is a Python function: the user's `file.py:function`, called with a ReflectionPrompt, or the mini world's rules.

The function returns its reply as a language model would write it, with the new context in a fenced block. An exception
becomes the error of that reply; the other prompts of the batch continue.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fst_fast.errors import UserError
from fst_fast.fast.reflection import ReflectionPrompt, Reply, first_line

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
            text = self._function(prompt, seed)
        except Exception as error:  # noqa: BLE001 - an error in the user's code costs one proposal
            return Reply.failed(f"{self.name} raised {type(error).__name__}: {first_line(str(error))}")
        if not isinstance(text, str):
            return Reply.failed(f"{self.name} returned {type(text).__name__}, not a string")
        return Reply(text, "stop")


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
