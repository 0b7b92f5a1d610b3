"""Reflection by any OpenAI-compatible endpoint (OpenAI, vLLM, llama.cpp, Ollama, a proxy); run/openai_client.py is the client.

Requests of a batch run in a few threads. Whatever fails after all tries is a reply with an error.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from fst_fast.fast.reflection import ReflectionPrompt, Reply, first_line
from fst_fast.run.openai_client import OPENAI_URL, Endpoint, EndpointArgs, check_args

USER = "fast.reflector=openai"
STANDARD = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1}
EXTENDED = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""What a server takes from the model's generation config where a request leaves it out. OpenAI's own API does not know these."""


class OpenAIArgs(EndpointArgs):
    """fast.reflector_args of fast.reflector=openai."""

    base_url: str = Field(OPENAI_URL, pattern=r"^https?://[^\s@?#]+$")
    """Root of the API, up to and including /v1. It must not hold a user name, a password or a query: it is written to config.yaml."""
    timeout_s: float = Field(120.0, gt=0)
    """Longest wait for one try."""
    concurrency: int = Field(8, ge=1, le=256)
    """Requests under way at the same time."""
    max_tokens: int = Field(2048, ge=1)
    """Longest reply. One that reaches it is refused: what is missing is not known."""
    temperature: float | None = Field(None, ge=0, le=2)
    """Sampling temperature. Not sent if not given, since some models refuse it: the endpoint's own defaults hold then, all of them."""
    send_sampling: bool = True
    """With a temperature, say too that nothing else shapes the distribution (top_p=1, no penalties; at addresses other than OpenAI's top_k,
    min_p and repetition_penalty): servers take what is left out from the model's generation config. Switch off for endpoints that refuse it."""
    send_seed: bool = True
    """Send a seed with each request; switch off for endpoints that refuse the field."""
    usd_per_million_prompt_tokens: float = Field(0.0, ge=0)
    """Price, for the cost counter."""
    usd_per_million_completion_tokens: float = Field(0.0, ge=0)
    """Price, for the cost counter."""


class OpenAIReflector:
    """Counters, all since the start: requests, errors, prompt_tokens, completion_tokens, cost_usd."""

    def __init__(self, args: OpenAIArgs) -> None:
        self.args = args
        self.requests = 0
        self.errors = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._lock = threading.Lock()
        self._endpoint = Endpoint(args, user=USER)

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> OpenAIReflector:
        """Check the arguments and the key. Raises UserError; never prints the value of an argument that is not known."""
        return cls(check_args(OpenAIArgs, args, section="fast.reflector_args", user=USER))

    @property
    def cost_usd(self) -> float:
        return self._cost(self.prompt_tokens, self.completion_tokens)

    def _cost(self, read: int, written: int) -> float:
        args = self.args
        return (
            read * args.usd_per_million_prompt_tokens + written * args.usd_per_million_completion_tokens
        ) / 1e6

    def __call__(self, prompts: Sequence[ReflectionPrompt], *, seeds: Sequence[int]) -> list[Reply]:
        return self._endpoint.map(self._one, list(zip(prompts, seeds, strict=True)))

    def _one(self, item: tuple[ReflectionPrompt, int]) -> Reply:
        try:
            reply = self._request(*item)
        except Exception as error:  # noqa: BLE001 - a network and somebody else's server: a fault costs one proposal
            reply = Reply.failed(self._endpoint.fault(error))
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
            if args.send_sampling:
                fields |= STANDARD
                if args.base_url != OPENAI_URL:
                    fields["extra_body"] = EXTENDED
        if args.send_seed:
            fields["seed"] = seed
        answer: Any = self._endpoint.chat(messages=[{"role": "user", "content": prompt.render()}], **fields)
        choices = getattr(answer, "choices", None)
        if not isinstance(choices, list):
            return Reply.failed(
                f"the endpoint's answer is not a chat completion: {self._endpoint.redact(first_line(repr(answer), 120))}"
            )
        usage = getattr(answer, "usage", None)
        read, written = (
            _count(getattr(usage, name, None)) for name in ("prompt_tokens", "completion_tokens")
        )
        used = read, written, self._cost(read, written)
        if not choices:
            return Reply(None, "error", "the endpoint's answer has no choices", *used)
        text = getattr(getattr(choices[0], "message", None), "content", None)
        finish = str(getattr(choices[0], "finish_reason", None))  # None: the reply is not said to be whole
        if not isinstance(text, str):
            return Reply(None, finish, f"the endpoint's answer has no text (finish: {finish})", *used)
        return Reply(self._endpoint.redact(text), finish, None, *used)


def _count(value: Any) -> int:
    """Tokens as an endpoint counts them; 0 where it says nothing that is a number."""
    return value if type(value) is int and value >= 0 else 0
