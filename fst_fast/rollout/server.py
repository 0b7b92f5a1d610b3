"""Sampling by an OpenAI-compatible server (vLLM, SGLang) in the place of the engine of this process: rollout.backend=openai.

Prompts go out as token ids to /v1/completions and token ids come back, so nothing is tokenised twice. Servers return ids in one of two ways: per
choice as `token_ids` when asked by `return_token_ids` (vLLM, SGLang), or as tokens spelt "token_id:17" in the log-probs when asked by
`return_tokens_as_token_ids` (older vLLM). The log-probs are those of `logprobs`, one per token.

The weights are the server's. So it serves the fast phase and the base model's side of an evaluation; what the trained weights sample is
sampled here. Its fast-phase rollouts may enter RL groups only with ids and log-probs of every token, which `check_training` makes sure of. A server
that returns text alone can still evaluate: the text is then tokenised here and the log-probs are NaN.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fst_fast.contracts import Rollout
from fst_fast.errors import UserError
from fst_fast.rollout.engine import Request

KEY_VARIABLE = "OPENAI_API_KEY"
SPELT = "token_id:"
Ints = NDArray[np.int64]


class ServerArgs(BaseModel):
    """rollout.backend_args of rollout.backend=openai."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(min_length=1)
    """Name of the model at the server."""
    base_url: str = Field(pattern=r"^https?://[^\s@]+$")
    """Root of the API, up to and including /v1. It must not hold a user name or password."""
    timeout_s: float = Field(600.0, gt=0)
    """Longest wait for one try."""
    retries: int = Field(3, ge=0, le=10)
    """Further tries after the first, where that is worth it (connection faults, time-outs, 429, 5xx)."""
    concurrency: int = Field(64, ge=1, le=4096)
    """Requests of one process under way at the same time."""
    processed_logprobs: bool = False
    """Whether the server's log-probs are those of the distribution sampled, temperature included (vLLM: --logprobs-mode
    processed_logprobs). Otherwise training from it needs rollout.temperature=1."""


class ServerEngine:
    """The interface of RolloutEngine, spoken to a server.

    encode: text -> token ids, for a server that returns none. tokens_computed and tokens_unshared: prompt and response tokens of every sequence;
    what the server shares it does not say.
    """

    def __init__(
        self,
        args: ServerArgs,
        *,
        eos_ids: Sequence[int],
        stop: Sequence[str],
        encode: Callable[[str], Sequence[int]],
    ) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise UserError(
                "rollout.backend=openai needs the package openai; install it with: pip install 'fst-fast[reflect]'"
            ) from error
        self.args, self.eos_ids, self.stop, self.encode = args, tuple(eos_ids), tuple(stop), encode
        self.tokens_computed = self.tokens_reused = self.tokens_unshared = 0
        self._key = os.environ.get(KEY_VARIABLE, "")
        self._client = OpenAI(
            api_key=self._key or "not-needed",
            base_url=args.base_url,
            timeout=args.timeout_s,
            max_retries=args.retries,
        )

    @classmethod
    def from_args(cls, args: Mapping[str, Any], **how: Any) -> ServerEngine:
        """Check the arguments. Raises UserError; never prints a value that may hold a password."""
        try:
            checked = ServerArgs.model_validate(dict(args))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            allowed = ", ".join(ServerArgs.model_fields)
            raise UserError(
                f"rollout.backend_args.{where}: {first['msg']}; allowed keys: {allowed}"
            ) from None
        return cls(checked, **how)

    def forget(self) -> None:
        """Nothing is held here between calls."""

    def check_training(self, temperature: float) -> None:
        """Raises UserError, one sentence, unless rollouts of this server may be trained on: ids and log-probs of every token come back."""
        if temperature != 1 and not self.args.processed_logprobs:
            raise UserError(
                f"rollout.temperature={temperature:g}: a server's log-probs are those at temperature 1 unless "
                "rollout.backend_args.processed_logprobs=true says otherwise, so its rollouts cannot be trained on; use temperature 1, or "
                "fast.reuse_rollouts=false"
            )
        probe = Request("probe", "", 0, np.array([self.eos_ids[0]]), 0)
        ids, logprobs, _, missing = self._one(probe, max_tokens=1, temperature=temperature, top_p=None)
        if missing or len(ids) != 1 or not np.isfinite(logprobs).all():
            raise UserError(
                f"rollout.backend=openai: {self.args.base_url} returns no {missing or 'finite log-prob'} for a sampled token, so its "
                "rollouts cannot be trained on; use a server that returns token ids and log-probs (vLLM, SGLang), or "
                "fast.reuse_rollouts=false"
            )

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_response_tokens: int,
        temperature: float,
        top_p: float | None = None,
        policy_version: int,
    ) -> list[Rollout]:
        """Rollouts in request order. Raises UserError where the server fails after all tries or did not answer the prompt it was sent."""
        if not requests:
            return []

        def one(request: Request) -> Rollout:
            ids, logprobs, finish, _ = self._one(
                request, max_tokens=max_response_tokens, temperature=temperature, top_p=top_p
            )
            return Rollout(
                problem_id=request.problem_id,
                context_id=request.context_id,
                sample=request.sample,
                response_ids=ids,
                logprobs=logprobs,
                finish="length" if finish == "length" else "stop",
                policy_version=policy_version,
                temperature=temperature,
            )

        with ThreadPoolExecutor(max_workers=min(self.args.concurrency, len(requests))) as pool:
            rollouts = list(pool.map(one, requests))
        tokens = sum(len(r.prompt_ids) for r in requests) + sum(len(r.response_ids) for r in rollouts)
        self.tokens_computed += tokens
        self.tokens_unshared += tokens
        return rollouts

    def _one(
        self, request: Request, *, max_tokens: int, temperature: float, top_p: float | None
    ) -> tuple[Ints, NDArray[np.float32], str, str]:
        """ids, log-probs, finish reason, and what did not come back: "token ids", "log-probs" or ""."""
        fields: dict[str, Any] = {} if top_p is None else {"top_p": top_p}
        if self.stop:
            fields["stop"] = list(self.stop)
        try:
            answer: Any = self._client.completions.create(
                model=self.args.model,
                prompt=[int(token) for token in request.prompt_ids],
                max_tokens=max_tokens,
                temperature=temperature,
                logprobs=1,
                seed=request.seed % 2**31,
                extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True},
                **fields,
            )
            choice = answer.choices[0]
            text = choice.text
        except Exception as error:  # noqa: BLE001 - a network and somebody else's server: whatever it is, it is one sentence
            raise UserError(
                f"rollout.backend=openai: {request} at {self.args.base_url}: {self._without_key(error)}"
            ) from None
        sent = getattr(choice, "prompt_token_ids", None) or getattr(answer, "prompt_token_ids", None)
        if sent is not None and list(sent) != request.prompt_ids.tolist():
            raise UserError(
                f"rollout.backend=openai: {self.args.base_url} sampled {request} from {len(sent)} prompt tokens that are not the "
                f"{len(request.prompt_ids)} it was sent; does it add a token of its own?"
            )
        finish = str(choice.finish_reason or "stop")
        spelt = getattr(choice.logprobs, "tokens", None) or []
        values = getattr(choice.logprobs, "token_logprobs", None) or []
        ids = getattr(choice, "token_ids", None)
        if ids is None and spelt and all(str(token).startswith(SPELT) for token in spelt):
            ids = [int(str(token).removeprefix(SPELT)) for token in spelt]
        if ids is None:
            made = np.array(self.encode(text), dtype=np.int64)
            return made, np.full(len(made), np.nan, np.float32), finish, "token ids"
        if len(values) != len(ids) or any(value is None for value in values):
            return np.array(ids, dtype=np.int64), np.full(len(ids), np.nan, np.float32), finish, "log-probs"
        return np.array(ids, dtype=np.int64), np.array(values, dtype=np.float32), finish, ""

    def _without_key(self, error: Exception) -> str:
        text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        text = f"{type(error).__name__}: {text}"
        return text.replace(self._key, "***") if self._key else text
