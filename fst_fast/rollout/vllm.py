"""Sampling by vLLM servers that are sent the trained weights: rollout.backend=vllm.

The interface of RolloutEngine. Token ids go out to vLLM's /inference/v1/generate and token ids come back, with the log-prob of each as it was drawn and
the stamp of the weights that drew it (vllm_hosts.py). Every sampling parameter is sent, and every answer is checked (answers.py).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from types import SimpleNamespace
from typing import Any

from torch import nn

from fst_fast.contracts import Rollout
from fst_fast.errors import UserError
from fst_fast.rollout.answers import (
    SPELT,
    Answer,
    Expected,
    Ints,
    NonsenseError,
    given_up,
    read_answer,
    rollouts_of,
)
from fst_fast.rollout.engine import Request
from fst_fast.rollout.vllm_args import USER
from fst_fast.rollout.vllm_client import GoneError, RefusedError, VllmClient
from fst_fast.rollout.vllm_hosts import UNTOUCHED, Hosts, Weights

Asked = tuple[Answer, int] | GoneError | None
"""What became of a request: its answer and the prompt tokens that the server had cached, a server that is gone, or not asked."""


class VllmEngine:
    """Samples from the weights of `module` on the servers of `hosts`.

    base: the weights do not move, whatever policy version a call names. vocab_size: ids are below it. decode, encode: text of token ids and back, as in
    ServerEngine. tokens_computed: prompt and response tokens, less what the server says it had in its prefix cache; tokens_unshared: all of
    them.
    """

    def __init__(
        self,
        hosts: Hosts,
        module: nn.Module,
        *,
        base: bool,
        eos_ids: Sequence[int],
        stop: Sequence[str],
        vocab_size: int,
        decode: Callable[[Ints], str],
        encode: Callable[[str], Sequence[int]],
    ) -> None:
        self.hosts, self.module, self.base = hosts, module, base
        self.eos_ids, self.stop, self.vocab_size = tuple(eos_ids), tuple(stop), vocab_size
        self.decode, self.encode = decode, encode
        self.tokens_computed = self.tokens_reused = self.tokens_unshared = 0

    def forget(self) -> None:
        """Nothing is held here between calls."""

    def weights(self, policy_version: int) -> Weights:
        return Weights(self.module, None if self.base else policy_version)

    def prepare(self, policy_version: int) -> None:
        """Bring the servers to the weights of this version. All processes call it before they sample. Raises UserError."""
        self.hosts.prepare(self.weights(policy_version))

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_response_tokens: int,
        temperature: float,
        top_p: float | None = None,
        policy_version: int,
    ) -> list[Rollout]:
        """Rollouts in request order, after `prepare`. One that the server gave up in every try has finish `abort` and no tokens: it is not to be judged.

        Raises UserError where the servers are lost too often, and where an answer is nonsense."""
        weights = self.weights(policy_version)
        answers: dict[int, Answer] = {}
        reused = 0
        while left := [i for i in range(len(requests)) if i not in answers]:
            seen, gone = self.hosts.generation, threading.Event()
            ask = functools.partial(
                self._ask,
                weights=weights,
                gone=gone,
                max_tokens=max_response_tokens,
                temperature=temperature,
                top_p=top_p,
            )
            said = self._spread(ask, [requests[i] for i in left])
            for i, found in zip(left, said, strict=True):
                if isinstance(found, tuple):
                    answers[i] = found[0]
                    reused += found[1]
            if lost := [found for found in said if isinstance(found, GoneError)]:
                self.hosts.recover(weights, seen, str(lost[0]))
        made = [answers[i] for i in range(len(requests))]
        if words := given_up(made, 1 + self.hosts.args.retries):
            self.hosts.note(f"{USER}: {self.hosts.named} {words}")
        tokens = sum(len(r.prompt_ids) for r in requests) + sum(len(a.ids) for a in made)
        self.tokens_reused += reused
        self.tokens_computed += tokens - reused
        self.tokens_unshared += tokens
        return rollouts_of(requests, made, policy_version=policy_version, temperature=temperature)

    def _spread(
        self, ask: Callable[[VllmClient, Request], Asked], requests: Sequence[Request]
    ) -> list[Asked]:
        """`ask` of every request, in order. Neighbours, which share prompts, go to the same server. The first UserError is raised once all have ended."""
        clients, n = self.hosts.clients, len(requests)
        with ThreadPoolExecutor(min(self.hosts.args.concurrency, n)) as pool:
            asked = [
                pool.submit(ask, clients[i * len(clients) // n], request)
                for i, request in enumerate(requests)
            ]
            wait(asked, return_when=FIRST_EXCEPTION)
            pool.shutdown(wait=True, cancel_futures=True)
        failed = [e for f in asked if not f.cancelled() and (e := f.exception()) is not None]
        if failed:
            raise failed[0]
        return [future.result() for future in asked]

    def _ask(
        self, client: VllmClient, request: Request, *, weights: Weights, gone: threading.Event, **how: Any
    ) -> Asked:
        """The answer to a request, and how many prompt tokens the server had in its cache. An answer that is given up, or lost by a server that is
        there, is asked for again. A GoneError is returned, and not begun is what is asked after one. Raises UserError."""
        if gone.is_set():
            return None
        try:
            return self._try(client, request, weights, self.sampling(request, **how))
        except GoneError as error:
            gone.set()
            return error

    def _try(
        self, client: VllmClient, request: Request, weights: Weights, sampling: dict[str, Any]
    ) -> tuple[Answer, int]:
        body = {
            "token_ids": request.prompt_ids.tolist(),
            "sampling_params": sampling,
            "model": self.hosts.model(weights),
            "return_token_ids": True,
        }
        expected = Expected(
            request.prompt_ids, sampling["max_tokens"], self.eos_ids, self.stop, self.vocab_size, self.decode, self.encode
        )  # fmt: skip
        answer = None
        for left in reversed(range(1 + self.hosts.args.retries)):
            try:
                made = client.post("/inference/v1/generate", body)
            except GoneError:
                if not left or not client.answers():
                    raise
                continue
            except RefusedError as error:
                if "does not exist" in str(error) and body["model"] is not None:
                    raise GoneError("has lost its adapters") from None
                raise UserError(f"{USER}: {client.where} {error}") from None
            try:
                self._check_stamp(client, made, self.hosts.stamp(weights))
                answer = read_answer(_as_completion(made), expected)
                cached = _cached_tokens(made)
            except NonsenseError as error:
                raise UserError(
                    f"{USER}: the answer of {client.where} to {request} {client.redact(str(error))}"
                ) from None
            if answer.finish != "abort":
                break
        assert answer is not None
        if answer.missing:
            raise UserError(f"{USER}: {client.where} returns no {answer.missing} for a sampled token")
        return answer, cached

    def _check_stamp(self, client: VllmClient, made: Any, wanted: str) -> None:
        """Raises GoneError for an answer of weights that were never sent, UserError for one of other weights, NonsenseError for one that does not say."""
        try:
            choices = made["choices"]
            spans = [str(span["version"]) for choice in choices for span in choice["weight_versions"] or []]
        except (TypeError, KeyError):
            raise NonsenseError("does not say which weights made it") from None
        if not spans and any(choice.get("token_ids") for choice in choices):
            raise NonsenseError("does not say which weights made it")
        for stamp in spans:
            if stamp == UNTOUCHED:
                raise GoneError("was started anew and has the weights of its start")
            if stamp != wanted:
                raise UserError(
                    f"{USER}: {client.where} answers with the weights {client.redact(stamp)!r:.60}, but this run sent it {wanted!r}; does another run use it?"
                )

    def sampling(
        self, request: Request, *, max_tokens: int, temperature: float, top_p: float | None
    ) -> dict[str, Any]:
        """Every sampling parameter of vLLM that shapes a response, with the value that the native engine has by construction."""
        return {
            "n": 1,
            "max_tokens": max_tokens,
            "min_tokens": 0,
            "temperature": temperature,
            "top_p": 1.0 if top_p is None else top_p,
            "top_k": 0,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "seed": request.seed,
            "stop": list(self.stop),
            "stop_token_ids": list(self.eos_ids),
            "ignore_eos": False,
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "detokenize": bool(self.stop),
            "logprobs": 0,
            "prompt_logprobs": None,
            "logit_bias": None,
            "allowed_token_ids": None,
            "bad_words": [],
            "structured_outputs": None,
            "thinking_token_budget": None,
            "repetition_detection": None,
            "watermarking": False,
        }


def _as_completion(made: Any) -> Any:
    """An answer of /inference/v1/generate in the shape that read_answer knows. Raises NonsenseError."""
    try:
        choices = []
        for choice in made["choices"]:
            tokens = (choice.get("logprobs") or {}).get("content")
            spelt = None
            if tokens is not None:
                spelt = SimpleNamespace(
                    tokens=[f"{SPELT}{token['token_id']}" for token in tokens],
                    token_logprobs=[token["logprob"] for token in tokens],
                )
            finish, ids = choice["finish_reason"], choice["token_ids"]
            choices.append(SimpleNamespace(finish_reason=finish, token_ids=ids, logprobs=spelt, text=None))
        return SimpleNamespace(choices=choices, prompt_token_ids=made["prompt_token_ids"])
    except (TypeError, KeyError, AttributeError):
        raise NonsenseError("is not one of /inference/v1/generate") from None


def _cached_tokens(made: Any) -> int:
    """Prompt tokens that a server had cached, where it says so (--enable-prompt-tokens-details)."""
    details = (made.get("usage") or {}).get("prompt_tokens_details") or {}
    count = details.get("cached_tokens") or 0
    return count if type(count) is int else 0
