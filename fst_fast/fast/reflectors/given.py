"""Contexts written by hand, proposed one after the other: the fast phase then only chooses among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fst_fast.errors import UserError
from fst_fast.fast.reflection import ReflectionPrompt, Reply


class GivenContexts:
    """Answers the n-th prompt of a batch with the n-th text, again from the first after the last. Whatever the prompts say is ignored."""

    def __init__(self, contexts: Sequence[str]) -> None:
        self._replies = [Reply.proposal(text) for text in contexts]

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> GivenContexts:
        """Raises UserError where fast.reflector_args is not {contexts: [text, ...]}."""
        contexts = args.get("contexts")
        if set(args) != {"contexts"} or not isinstance(contexts, Sequence) or isinstance(contexts, str):
            raise UserError(
                f"fast.reflector=given needs fast.reflector_args={{contexts: [text, ...]}}, not {dict(args)!r:.200}"
            )
        if not contexts or not all(isinstance(text, str) and text.strip() for text in contexts):
            raise UserError(
                "fast.reflector_args.contexts must hold at least one text, and no empty or other value"
            )
        return cls(contexts)

    def __call__(self, prompts: Sequence[ReflectionPrompt], *, seeds: Sequence[int]) -> list[Reply]:
        return [self._replies[i % len(self._replies)] for i in range(len(prompts))]
