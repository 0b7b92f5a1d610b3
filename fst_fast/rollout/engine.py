"""The rollout engine: requests in, rollouts out, in the same order and the same whatever else is in the batch.

It samples with the very weights that are being trained (no copy, no second process) and does not talk to other ranks: each rank has an
engine and a share of the requests. docs/rollouts.md says how it works and what it costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fst_fast.contracts import Rollout
from fst_fast.errors import UserError
from fst_fast.rollout.decode import ForestDecoder
from fst_fast.rollout.padded import decode_padded
from fst_fast.rollout.responses import Responses, Sampling


@dataclass(frozen=True)
class Request:
    """One sequence to sample. seed: its own random stream, 0 <= seed < 2^63; prompt_ids: int64 [P], not empty."""

    problem_id: str
    context_id: str
    sample: int
    prompt_ids: NDArray[np.int64]
    seed: int

    def __str__(self) -> str:
        return f"problem {self.problem_id}, context {self.context_id}, sample {self.sample}"


class RolloutEngine:
    """Samples from `model`.

    packing="forest" needs a model loaded with the "fst" attention, "padded" one with an attention of transformers. eos_ids end a response.
    max_batch: sequences decoded at a time. prefill_tokens: prompt tokens of one forward of the forest path.
    tokens_computed: positions that went through the model, idle slots and padding included. tokens_unshared: prompt + response tokens of
    every sequence, as if nothing were shared. Both count from the engine's first request on.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        max_batch: int,
        packing: Literal["forest", "padded"],
        prefill_tokens: int = 8192,
    ) -> None:
        attention = model.config._attn_implementation
        assert (attention == "fst") == (packing == "forest"), (
            f"attention {attention} does not go with packing {packing}"
        )
        assert min(max_batch, prefill_tokens) >= 1, (
            f"max_batch={max_batch}, prefill_tokens={prefill_tokens}: at least 1"
        )
        self.model, self.packing = model, packing
        self.eos_ids, self.pad_id = tuple(eos_ids), pad_id
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        self.tokens_computed = 0
        self.tokens_unshared = 0

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_response_tokens: int,
        temperature: float,
        top_p: float | None = None,
        top_k: int | None = None,
        policy_version: int,
    ) -> list[Rollout]:
        """Rollouts in request order. Raises UserError before it starts where a prompt is empty or too long for the model, and
        FloatingPointError naming request and token where the model gives NaN or Inf."""
        if not requests:
            return []
        self._check(requests, max_response_tokens)
        prompts = [np.asarray(r.prompt_ids, dtype=np.int64) for r in requests]
        responses = Responses(
            [r.seed for r in requests],
            limit=max_response_tokens,
            eos_ids=self.eos_ids,
            sampling=Sampling(temperature, top_p, top_k),
            name=lambda i: str(requests[i]),
        )
        with _evaluating(self.model), torch.inference_mode():
            if self.packing == "forest":
                decoder = ForestDecoder(
                    self.model,
                    prompts,
                    responses,
                    max_batch=self.max_batch,
                    prefill_tokens=self.prefill_tokens,
                )
                decoder.run()
                self.tokens_computed += decoder.tokens_computed
            else:
                self.tokens_computed += decode_padded(
                    self.model, prompts, responses, max_batch=self.max_batch, pad_id=self.pad_id
                )
        self.tokens_unshared += sum(map(len, prompts)) + int(responses.length.sum())
        return [
            Rollout(
                problem_id=r.problem_id,
                context_id=r.context_id,
                sample=r.sample,
                response_ids=responses.ids[i, : responses.length[i]].copy(),
                logprobs=responses.logprobs[i, : responses.length[i]].copy(),
                finish=str(responses.finish[i]),  # type: ignore[arg-type]
                policy_version=policy_version,
                temperature=temperature,
            )
            for i, r in enumerate(requests)
        ]

    def _check(self, requests: Sequence[Request], max_response_tokens: int) -> None:
        if max_response_tokens < 1:
            raise UserError(f"max_response_tokens={max_response_tokens}; at least 1 is needed")
        positions = getattr(
            self.model.config.get_text_config(), "max_position_embeddings", None
        )  # None: no limit of its own
        for request in requests:
            length = len(request.prompt_ids)
            if not length:
                raise UserError(
                    f"{request}: the prompt is empty; at least one token is needed to sample from"
                )
            if positions is not None and length + max_response_tokens > positions:
                raise UserError(
                    f"{request}: {length} prompt tokens + {max_response_tokens} response tokens are more than the model's "
                    f"{positions} positions; the prompt may have at most {positions - max_response_tokens}"
                )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout and the like off; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
