"""The base model reflects on itself: its frozen weights answer the reflection as an ordinary user message.

The trainer passes `generate`, which renders the chat template and decodes in the same rollout engine as everything else; here is only
the batch and its form: the long request that every reflector gets, or the short ones of short.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

from fst_fast.contracts import Message
from fst_fast.fast.reflection import ReflectionPrompt, Reply
from fst_fast.fast.reflectors import short

SMALL_PARAMETERS = 3_000_000_000
"""A base model with fewer parameters gets the short requests where fast.reflection_style=auto."""


class Generate(Protocol):
    """Answers of the frozen base model to conversations, one seed each, as one batch. Where the last message is the assistant's, the answer
    continues it. system: text of the system message. stop: texts that end an answer; None: those of rollouts."""

    def __call__(
        self,
        conversations: Sequence[Sequence[Message]],
        seeds: Sequence[int],
        *,
        system: str = "",
        stop: Sequence[str] | None = None,
        temperature: float = 1.0,
    ) -> list[Reply]: ...


class SelfReflector:
    def __init__(self, generate: Generate, style: Literal["full", "short"]) -> None:
        self._generate = generate
        self.style = style

    def __call__(self, prompts: Sequence[ReflectionPrompt], *, seeds: Sequence[int]) -> list[Reply]:
        if self.style == "full":
            return self._generate(
                [[{"role": "user", "content": prompt.render()}] for prompt in prompts], seeds
            )
        replies = self._generate(
            [short.conversation(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)],
            seeds,
            system=short.SYSTEM,
            stop=(short.FENCE,),
            temperature=short.TEMPERATURE,
        )
        return [
            reply
            if reply.text is None
            else dataclasses.replace(reply, text=short.whole(reply.text, ended=reply.finish == "stop"))
            for reply in replies
        ]
