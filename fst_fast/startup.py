"""What is refused before a run begins, each with one sentence, and the reflector that all its processes share. For session.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.contracts import Context, Problem
from fst_fast.errors import UserError
from fst_fast.fast.reflection import ReflectionPrompt, Reflector, Reply, ask
from fst_fast.fast.reflectors import make_reflector
from fst_fast.policy import trained as policy_engine
from fst_fast.rollout.engine import Request, RolloutEngine
from fst_fast.rollout.prompt import render_prompt
from fst_fast.rollout.sampler import Sampler
from fst_fast.run.faults import reach
from fst_kernels.backends import choose_backend


def check_kernels(config: Config) -> None:
    """Refuse a kernel path forced by FST_KERNELS that this machine cannot take."""
    operations = ["linear_logprob", "linear_policy_loss", "sample_tokens"]
    for operation in operations + (["tree_attention"] if config.policy.attention == "tree" else []):
        try:
            choose_backend(operation, None, distributed.device(), policy_engine.dtype_of(config))
        except (RuntimeError, ValueError) as error:
            raise UserError(str(error)) from error


def check_room(
    config: Config, base: RolloutEngine, sampler: Sampler, seed_context: Context, problems: Sequence[Problem]
) -> None:
    """Refuse lengths that cannot be before anything is written: of the model's positions, the memory for keys and values, and the prompts
    under the seed context."""
    positions = getattr(base.model.config, "max_position_embeddings", None)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if positions is not None and longest > positions:
        raise UserError(
            f"rollout.max_prompt_tokens={config.rollout.max_prompt_tokens} + rollout.max_response_tokens="
            f"{config.rollout.max_response_tokens} are {longest} tokens; the model has {positions} positions"
        )
    room, each = config.rollout.kv_memory_bytes, base.token_bytes()
    if room is not None and config.policy.packing == "forest" and longest * each > room:
        raise UserError(
            f"keys and values of the longest sequence, {longest} tokens (rollout.max_prompt_tokens + rollout.max_response_tokens), take "
            f"{longest * each} bytes ({each} per token); rollout.kv_memory_bytes allows {room}"
        )
    for problem in problems:
        sampler.prompts.ids(seed_context, problem)


def reflector(config: Config, base: RolloutEngine, tokenizer: Any) -> Reflector:
    """The configured reflector; rank 0 asks it and the others hear its replies."""

    def generate(texts: Sequence[str], seeds: Sequence[int]) -> list[Reply]:
        requests = [
            Request(
                problem_id="reflection",
                context_id="",
                sample=i,
                prompt_ids=render_prompt(
                    tokenizer, Context.of(""), Problem("", [{"role": "user", "content": text}], None)
                ),
                seed=seed,
            )
            for i, (text, seed) in enumerate(zip(texts, seeds, strict=True))
        ]
        positions = getattr(base.model.config, "max_position_embeddings", None)
        room = math.inf if positions is None else positions - max(len(q.prompt_ids) for q in requests)
        tokens = max(1, int(min(config.fast.reflection_tokens, room)))
        rollouts = base.generate(requests, max_response_tokens=tokens, temperature=1.0, policy_version=0)
        return [
            Reply(
                tokenizer.decode(r.response_ids, skip_special_tokens=True),
                r.finish,
                prompt_tokens=len(q.prompt_ids),
                completion_tokens=len(r.response_ids),
            )
            for q, r in zip(requests, rollouts, strict=True)
        ]

    asked = make_reflector(config.fast.reflector, config.fast.reflector_args, generate=generate)

    def quiet(_: str) -> None:
        """The fast phase logs what is wrong with the replies, on every process alike."""

    def reflect(prompts: Sequence[ReflectionPrompt], *, seeds: Sequence[int]) -> list[Reply]:
        reach("reflection")
        return distributed.from_rank_zero(
            ask(asked, prompts, seeds, quiet) if distributed.rank() == 0 else None
        )

    return reflect
