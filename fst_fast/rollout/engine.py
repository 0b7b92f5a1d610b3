"""The rollout engine: requests in, rollouts out, in the same order and the same whatever else is in the batch.

It samples with the very weights that are being trained (no second process) and does not talk to other ranks: each rank has an engine and a
share of the requests. Between calls it holds what earlier ones computed for as long as the weights are the same, which it sees from the
weights themselves. docs/rollouts.md says how it works and what it costs.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from fst_fast.contracts import Rollout
from fst_fast.errors import UserError
from fst_fast.policy import gpu_forward
from fst_fast.policy.base_model import first_line
from fst_fast.policy.cpu_forward import CpuForward, unsupported_reason
from fst_fast.policy.gpu_forward import GpuForward
from fst_fast.rollout.decode import ForestDecoder, Forward, transformers_forward
from fst_fast.rollout.graphs import StepGraph
from fst_fast.rollout.kv_pool import KVPool
from fst_fast.rollout.kv_tree import token_bytes
from fst_fast.rollout.logits import float32_logits
from fst_fast.rollout.padded import decode_padded
from fst_fast.rollout.prefixes import PrefixCache
from fst_fast.rollout.prompt_tree import JOIN_TOKENS
from fst_fast.rollout.responses import Ints, Responses, Sampling
from fst_fast.rollout.stops import StopTexts

DEVICE_FRACTION = 0.9


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


def _quiet(_: str) -> None:
    pass


class RolloutEngine:
    """Samples from `model`.

    packing="forest" needs a model loaded with the "fst" attention, "padded" one with an attention of transformers. eos_ids end a response;
    so do the texts `stop`, for which decode(ids) must give the text of token ids. max_batch: sequences decoded at a time. prefill_tokens:
    prompt tokens of one forward of the forest path. join_tokens: a shared prefix is not shared where that costs no more tokens. kv_bytes:
    what its keys and values may take at a time; None: 0.9 of what torch can have on the device (free, held back by its allocator, and the pool's own) less
    what a forward takes besides, and at least half of it; on a CPU half of what is free on the machine, shared by the processes on it. graph: runs the decode steps. note: told what was chosen for want of memory.
    tokens_computed: positions that went through the model, idle slots and padding included. tokens_reused: prompt tokens taken over from
    earlier calls. tokens_unshared: prompt + response tokens of every sequence, as if nothing were shared. All count from the first request.
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
        join_tokens: int = JOIN_TOKENS,
        kv_bytes: int | None = None,
        graph: StepGraph | None = None,
        stop: Sequence[str] = (),
        decode: Callable[[NDArray[np.int64]], str] | None = None,
        note: Callable[[str], None] = _quiet,
    ) -> None:
        attention = model.config._attn_implementation
        assert (attention == "fst") == (packing == "forest"), (
            f"attention {attention} does not go with packing {packing}"
        )
        assert min(max_batch, prefill_tokens) >= 1, (
            f"max_batch={max_batch}, prefill_tokens={prefill_tokens}: at least 1"
        )
        assert not stop or decode, "stop texts without the decoding of tokens"
        self.model, self.packing = model, packing
        self.eos_ids, self.pad_id = tuple(eos_ids), pad_id
        self.max_batch, self.prefill_tokens, self.kv_bytes = max_batch, prefill_tokens, kv_bytes
        self.join_tokens, self.graph = join_tokens, graph
        self._decode = decode
        self._ends = StopTexts(stop, decode) if stop and decode else None
        self.note = note
        self.tokens_computed = self.tokens_reused = self.tokens_unshared = 0
        self.most_kv_bytes = 0  # held at a time, ever
        self._noted: set[tuple[int, int]] = set()
        self._prefixes = PrefixCache()
        self._pool = KVPool()
        self._forward: Forward | None = None
        self._weights: list[int] = []

    def forget(self) -> None:
        """Drop what earlier calls computed: the next call then does not depend on them, not even in its rounding."""
        self._prefixes.forget()
        self._pool = KVPool()
        self._forward = None  # holds products of the weights
        if self.graph:
            self.graph.forget()

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_response_tokens: int,
        temperature: float,
        top_p: float | None = None,
        top_k: int | None = None,
        policy_version: int,
        stop: Sequence[str] | None = None,
        keep_responses: bool = False,
        watch: Callable[[Ints, Responses], None] | None = None,
    ) -> list[Rollout]:
        """Rollouts in request order. watch: see Responses; where memory runs out a response can end twice. stop: texts that end a response here, instead of the engine's own. keep_responses: a later prompt may go on
        from them, so hold their keys and values, too. Raises UserError before it starts where a prompt is empty, too long for the model or for kv_bytes,
        or where two requests are one and the same; UserError where memory runs out twice, the second time with half the sequences; and
        FloatingPointError naming request and token where the model gives NaN or Inf."""
        if not requests:
            return []
        ends = self._ends
        if stop is not None:
            assert self._decode is not None, "stop texts without the decoding of tokens"
            ends = StopTexts(stop, self._decode) if stop else None
        room = self._room() if self.packing == "forest" else 0
        self._check(requests, max_response_tokens, room)
        prompts = [np.asarray(r.prompt_ids, dtype=np.int64) for r in requests]

        def fill(max_batch: int) -> Responses:
            responses = Responses(
                [r.seed for r in requests],
                limit=max_response_tokens,
                eos_ids=self.eos_ids,
                sampling=Sampling(temperature, top_p, top_k),
                name=lambda i: str(requests[i]),
                stop=ends,
                watch=watch,
            )
            with _evaluating(self.model), float32_logits(self.model), torch.inference_mode():
                if self.packing == "forest":
                    self._decode_forest(prompts, responses, max_batch, room, keep_responses)
                else:
                    self.tokens_computed += decode_padded(
                        self.model, prompts, responses, max_batch=max_batch, pad_id=self.pad_id
                    )
            return responses

        responses = self._in_memory(fill, len(requests))
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

    def _decode_forest(
        self,
        prompts: Sequence[NDArray[np.int64]],
        responses: Responses,
        max_batch: int,
        room: int,
        keep_responses: bool,
    ) -> None:
        weights = fingerprint(self.model)
        if weights != self._weights:
            self.forget()
            self._weights = weights
        if self._forward is None:
            self._forward = _forward(self.model)
        head = self.model.get_output_embeddings().weight
        each = self.token_bytes()
        decoder = ForestDecoder(
            self._forward,
            prompts,
            responses,
            layers=self.model.config.get_text_config().num_hidden_layers,
            dtype=head.dtype,
            device=head.device,
            max_batch=max_batch,
            prefill_tokens=self.prefill_tokens,
            kv_tokens=room // each,
            logits_tokens=-(-head.shape[0] * head.dtype.itemsize // each),
            prefixes=self._prefixes,
            pool=self._pool,
            join_tokens=self.join_tokens,
            graph=self.graph,
            keep_responses=keep_responses,
        )
        wanted = min(max_batch, len(prompts))
        slots, page, most, pages = decoder.room
        if (slots < wanted or most > 1) and (slots, wanted) not in self._noted:
            self._noted.add((slots, wanted))
            number = f"{slots} instead of {wanted}" if slots < wanted else str(slots)
            shared = f", whose responses share {pages} pages of {page} tokens" if most > 1 else ""
            self.note(
                f"rollouts: {number} sequences at a time{shared}, since keys and values of {each} bytes per token "
                f"must stay within {decoder.kv_tokens * each} bytes (rollout.kv_memory_bytes)"
            )
        decoder.run()
        self.tokens_computed += decoder.tokens_computed
        self.tokens_reused += decoder.tokens_reused
        self.most_kv_bytes = max(self.most_kv_bytes, decoder.most_tokens * each)

    def _in_memory(self, fill: Callable[[int], Responses], count: int) -> Responses:
        """What `fill` returns for a batch of max_batch, or, if memory runs out, for one of half as many: once."""
        batch = min(self.max_batch, count)
        try:
            return fill(batch)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            reason = first_line(error)
        self.forget()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = max(1, batch // 2)
        self.note(
            f"rollouts: out of memory with {batch} sequences at a time ({reason}); once more with {half}"
        )
        try:
            return fill(half)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            raise UserError(
                f"out of memory while sampling, with {batch} sequences at a time and again with {half}: {first_line(error)}; lower "
                f"rollout.max_batch={self.max_batch} or rollout.kv_memory_bytes, or free memory"
            ) from error

    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return token_bytes(
            config.num_hidden_layers, kv_heads, dim, self.model.get_output_embeddings().weight.dtype
        )

    def _room(self) -> int:
        """Bytes for keys and values, those that earlier calls left included."""
        if self.kv_bytes is not None:
            return self.kv_bytes
        head = self.model.get_output_embeddings().weight
        if head.device.type != "cuda":
            return _half_of_free_memory()
        config = self.model.config.get_text_config()
        hidden, inner = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
        forward = self.prefill_tokens * (8 * hidden + 3 * inner) * head.dtype.itemsize
        # and what the sampler makes of them
        logits = 3 * self.max_batch * head.shape[0] * torch.float32.itemsize
        return _room_on_device(head.device, self._pool.bytes, forward + logits)

    def _check(self, requests: Sequence[Request], max_response_tokens: int, room: int) -> None:
        if max_response_tokens < 1:
            raise UserError(f"max_response_tokens={max_response_tokens}; at least 1 is needed")
        # None: no limit of its own
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
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
        seen: set[tuple[str, str, int, int]] = set()
        for r in requests:
            key = (r.problem_id, r.context_id, r.sample, r.seed)
            if key in seen:
                raise UserError(
                    f"{r} is asked for twice with the same seed {r.seed}; it would count as two samples and be one"
                )
            seen.add(key)
        if self.packing == "forest":
            longest = max(requests, key=lambda r: len(r.prompt_ids))
            each = self.token_bytes()
            needed = len(longest.prompt_ids) + max(max_response_tokens - 1, 1)
            if needed * each > room:
                raise UserError(
                    f"{longest}: keys and values of {len(longest.prompt_ids)} prompt and {max_response_tokens} response tokens take "
                    f"{needed * each} bytes ({each} per token); rollout.kv_memory_bytes allows {room}"
                )


def _forward(model: Any) -> Forward:
    """The fastest forward that the model has."""
    if unsupported_reason(model) is None:
        return CpuForward(model)
    return transformers_forward(model) if gpu_forward.unsupported_reason(model) else GpuForward(model)


def fingerprint(model: Any) -> list[int]:
    """For each weight the sum of its bytes, taken eight at a time as an integer: equal as long as the weights are."""
    with torch.no_grad():
        return torch.stack([_sum_of_bytes(p) for p in model.parameters()]).tolist()


def _sum_of_bytes(weight: Tensor) -> Tensor:
    raw = weight.detach().reshape(-1).view(torch.uint8)
    if raw.storage_offset() % 8:  # inside ZeRO's flat tensor
        raw = raw.clone()
    whole = len(raw) // 8 * 8
    return raw[:whole].view(torch.int64).sum() + raw[whole:].sum()


def _half_of_free_memory() -> int:
    """Of the machine, shared by the processes on it."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    return int(psutil.virtual_memory().available) // (2 * processes)


def _room_on_device(device: torch.device, held_bytes: int, other_bytes: int) -> int:
    """Of what the device has free, what torch's allocator holds back and what the keys and values take already: the rest is in use by tensors.

    other_bytes: what a forward takes besides. Never less than half, which a device that is nearly full may not have; a rollout that runs out
    of memory is repeated with half as many sequences.
    """
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = torch.cuda.mem_get_info(device)[0] + idle + held_bytes
    return max(available // 2, min(int(DEVICE_FRACTION * available), available - other_bytes))


def _out_of_memory(error: BaseException) -> bool:
    """torch raises a type of its own on a GPU and a plain RuntimeError on the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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
