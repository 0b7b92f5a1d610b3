"""The base model reflects on itself: its frozen weights answer the reflection as an ordinary user message.

The trainer passes `generate`, which renders the chat template and decodes in the same rollout engine as everything else; here is only
the batch and its form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fst_fast.fast.reflection import ReflectionPrompt, Reply


class SelfReflector:
    def __init__(self, generate: Callable[[Sequence[str], Sequence[int]], list[Reply]]) -> None:
        self._generate = generate

    def __call__(self, prompts: Sequence[ReflectionPrompt], *, seeds: Sequence[int]) -> list[Reply]:
        return self._generate([prompt.render() for prompt in prompts], seeds)
