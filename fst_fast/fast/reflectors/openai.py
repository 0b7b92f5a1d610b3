"""Reflection by any OpenAI-compatible endpoint (OpenAI, vLLM, llama.cpp, Ollama, a proxy), through the `openai` package.

The key comes from the environment variable OPENAI_API_KEY only and is cut out of every error and reply. Requests of a batch run in a few
threads; the client repeats what is worth repeating (connection faults, time-outs, 408, 409, 429, 5xx) at most `retries` times with
growing pauses, honouring Retry-After up to two minutes. Whatever fails after that is a reply with an error.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fst_fast.errors import UserError
from fst_fast.fast.reflection import ReflectionPrompt, Reply, first_line

OPENAI_URL = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"


class OpenAIArgs(BaseModel):
    """fast.reflector_args of fast.reflector=openai."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())

    model: str = Field(min_length=1)
    """Name of the model at the endpoint."""
    base_url: str = Field(OPENAI_URL, pattern=r"^https?://[^\s@?#]+$")
    """Root of the API, up to and including /v1. It must not hold a user name, a password or a query: it is written to config.yaml."""
    timeout_s: float = Field(120.0, gt=0)
    """Longest wait for one try."""
    retries: int = Field(3, ge=0, le=10)
    """Further tries after the first."""
    concurrency: int = Field(8, ge=1, le=256)
    """Requests under way at the same time."""
    max_tokens: int = Field(2048, ge=1)
    """Longest reply. One that reaches it is refused: what is missing is not known."""
    temperature: float | None = Field(None, ge=0, le=2)
    """Sampling temperature; not sent if not given, since some models refuse it."""
    send_seed: bool = True
    """Send a seed with each request; switch off for endpoints that refuse the field."""
    usd_per_million_prompt_tokens: float = Field(0.0, ge=0)
    """Price, for the cost counter."""
    usd_per_million_completion_tokens: float = Field(0.0, ge=0)
    """Price, for the cost counter."""


class OpenAIReflector:
    """Counters, all since the start: requests, errors, prompt_tokens, completion_tokens, cost_usd."""

    def __init__(self, args: OpenAIArgs, key: str) -> None:
        from openai import OpenAI

        self.args = args
        self.requests = 0
        self.errors = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._key = key
        self._lock = threading.Lock()
        self._client = OpenAI(
            api_key=key, base_url=args.base_url, timeout=args.timeout_s, max_retries=args.retries
        )

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> OpenAIReflector:
        """Check the arguments and the key. Raises UserError; never prints the value of an argument that is not known."""
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise UserError(
                "fast.reflector=openai needs the package openai; install it with: pip install 'fst-fast[reflect]'"
            ) from error
        allowed = ", ".join(OpenAIArgs.model_fields)
        unknown = sorted(set(args) - set(OpenAIArgs.model_fields))
        if unknown:
            hint = (
                f"; the key comes from the environment variable {KEY_VARIABLE}"
                if any("key" in n for n in unknown)
                else ""
            )
            raise UserError(f"fast.reflector_args has no {', '.join(unknown)}; allowed: {allowed}{hint}")
        try:
            checked = OpenAIArgs.model_validate(dict(args))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = f"fast.reflector_args.{'.'.join(str(part) for part in first['loc'])}"
            if first["type"] == "missing":
                raise UserError(f"{where} is missing, but fast.reflector=openai needs it") from None
            if where.endswith("base_url"):  # its value may hold a password
                raise UserError(
                    f"{where} must be http(s)://host/path without user name, password or query"
                ) from None
            raise UserError(f"{where}={first['input']!r}: {first['msg']}") from None
        key = os.environ.get(KEY_VARIABLE, "")
        if not key:
            if checked.base_url == OPENAI_URL:
                raise UserError(
                    f"fast.reflector=openai at {OPENAI_URL} needs the environment variable {KEY_VARIABLE}, which is not set"
                )
            key = "not-needed"  # local servers want none, the client wants one
        return cls(checked, key)

    @property
    def cost_usd(self) -> float:
        args = self.args
        return (
            self.prompt_tokens * args.usd_per_million_prompt_tokens
            + self.completion_tokens * args.usd_per_million_completion_tokens
        ) / 1e6

    def __call__(self, prompts: Sequence[ReflectionPrompt], *, seeds: Sequence[int]) -> list[Reply]:
        if not prompts:
            return []
        with ThreadPoolExecutor(max_workers=min(self.args.concurrency, len(prompts))) as pool:
            return list(pool.map(self._one, prompts, seeds))

    def _one(self, prompt: ReflectionPrompt, seed: int) -> Reply:
        try:
            reply = self._request(prompt, seed)
        except Exception as error:  # noqa: BLE001 - a network and somebody else's server: a fault costs one proposal
            reply = Reply.failed(self._without_key(f"{type(error).__name__}: {first_line(str(error))}"))
        with self._lock:
            self.requests += 1
            self.errors += reply.error is not None
            self.prompt_tokens += reply.prompt_tokens
            self.completion_tokens += reply.completion_tokens
        return reply

    def _request(self, prompt: ReflectionPrompt, seed: int) -> Reply:
        args = self.args
        # OpenAI's own newer models refuse max_tokens, other servers know no other name
        limit = "max_completion_tokens" if args.base_url == OPENAI_URL else "max_tokens"
        fields: dict[str, Any] = {limit: args.max_tokens}
        if args.temperature is not None:
            fields["temperature"] = args.temperature
        if args.send_seed:
            fields["seed"] = seed
        answer: Any = self._client.chat.completions.create(
            model=args.model, messages=[{"role": "user", "content": prompt.render()}], **fields
        )
        choices = getattr(answer, "choices", None)
        if not isinstance(choices, list):
            return Reply.failed(
                f"the endpoint's answer is not a chat completion: {self._without_key(first_line(repr(answer), 120))}"
            )
        usage = getattr(answer, "usage", None)
        read = int(getattr(usage, "prompt_tokens", None) or 0)
        written = int(getattr(usage, "completion_tokens", None) or 0)
        if not choices:
            return Reply(None, "error", "the endpoint's answer has no choices", read, written)
        text = getattr(getattr(choices[0], "message", None), "content", None)
        finish = str(
            getattr(choices[0], "finish_reason", None) or "none"
        )  # an end that is not said is not taken for one
        if not isinstance(text, str):
            return Reply(None, finish, f"the endpoint's answer has no text (finish: {finish})", read, written)
        return Reply(self._without_key(text), finish, None, read, written)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key != "not-needed" else text
