"""The configured reflector of a run of several processes: the first one asks it and sends the replies to the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.contracts import Context, Message, Problem
from fst_fast.errors import UserError
from fst_fast.fast.reflection import ReflectionPrompt, Reflector, Reply, ask
from fst_fast.fast.reflectors import make_reflector
from fst_fast.fast.reflectors.self_ import SMALL_PARAMETERS
from fst_fast.fast.request import load_templates, template_for
from fst_fast.rollout.engine import Request, RolloutEngine
from fst_fast.rollout.prompt import Chat, response_text
from fst_fast.run.faults import reach


def shared_reflector(config: Config, base: RolloutEngine, chat: Chat) -> Reflector:
    """The configured reflector; rank 0 asks it and broadcasts its replies. Raises UserError on what is wrong with fast.reflector and the keys
    that belong to it."""
    templates = load_templates(config.fast.reflection_templates)

    def generate(
        conversations: Sequence[Sequence[Message]],
        seeds: Sequence[int],
        *,
        system: str = "",
        stop: Sequence[str] | None = None,
        temperature: float = 1.0,
    ) -> list[Reply]:
        requests = [
            Request(
                problem_id="reflection",
                context_id="",
                sample=i,
                prompt_ids=chat.prompt(Context.of(system), Problem("", messages, None)),
                seed=seed,
            )
            for i, (messages, seed) in enumerate(zip(conversations, seeds, strict=True))
        ]
        positions = getattr(base.model.config, "max_position_embeddings", None)
        room = math.inf if positions is None else positions - max(len(q.prompt_ids) for q in requests)
        tokens = max(1, int(min(config.fast.reflection_tokens, room)))
        rollouts = base.generate(
            requests, max_response_tokens=tokens, temperature=temperature, policy_version=0, stop=stop
        )
        return [
            Reply(
                response_text(chat.tokenizer, r.response_ids, {*base.eos_ids, base.pad_id}),
                r.finish,
                prompt_tokens=len(q.prompt_ids),
                completion_tokens=len(r.response_ids),
            )
            for q, r in zip(requests, rollouts, strict=True)
        ]

    style = config.fast.reflection_style
    if style == "auto":
        few = sum(p.numel() for p in base.model.parameters()) < SMALL_PARAMETERS
        style = "short" if few else "full"
    name = config.fast.reflector
    if templates and (name == "mini" or (name == "self" and style == "short")):
        what = "mini" if name == "mini" else "self with fast.reflection_style=short"
        raise UserError(
            f"fast.reflection_templates has no effect with fast.reflector={what}; allowed with full, openai, file.py:NAME"
        )
    asked = make_reflector(config.fast.reflector, config.fast.reflector_args, generate=generate, style=style)

    def quiet(_: str) -> None:
        """The fast phase logs what is wrong with the replies, on every process alike."""

    def reflect(prompts: Sequence[ReflectionPrompt], *, seeds: Sequence[int]) -> list[Reply]:
        reach("reflection")
        shown = [replace(p, template=template_for(templates, p.component)) for p in prompts]
        return distributed.broadcast(ask(asked, shown, seeds, quiet) if distributed.rank() == 0 else None)

    return reflect
