"""Sampling by an OpenAI-compatible server (vLLM, SGLang) in the place of the engine of this process: rollout.backend=openai.

Prompts go out as token ids to /v1/completions and token ids come back, so nothing is tokenised twice. Servers return ids in one of two ways: per
choice as `token_ids` when asked by `return_token_ids` (vLLM, SGLang), or as tokens spelt "token_id:17" in the log-probs when asked by
`return_tokens_as_token_ids` (older vLLM). The log-probs are those of `logprobs`, one per token. Every sampling parameter is sent, since a server
fills what is left out from the model's generation config; every answer is checked (answers.py).

The weights are the server's. So it serves the fast phase and the base model's side of an evaluation; what the trained weights sample is
sampled here. Its fast-phase rollouts may enter RL groups only with ids and log-probs of every token, which `check_training` makes sure of. A server
that returns text alone can still evaluate: the text is then tokenised here and the log-probs are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fst_fast.contracts import Rollout
from fst_fast.errors import UserError
from fst_fast.rollout.answers import (
    Answer,
    Expected,
    Ints,
    NonsenseError,
    given_up,
    read_answer,
    rollouts_of,
)
from fst_fast.rollout.engine import Request
from fst_fast.run.openai_client import Endpoint, EndpointArgs, check_args

USER = "rollout.backend=openai"


class ServerArgs(EndpointArgs):
    """rollout.backend_args of rollout.backend=openai."""

    processed_logprobs: bool = False
    """Whether the server's log-probs are those of the distribution sampled, temperature included (vLLM: --logprobs-mode
    processed_logprobs). Otherwise training from it needs rollout.temperature=1."""


class ServerEngine:
    """The interface of RolloutEngine, spoken to a server.

    vocab_size: of the model; ids are below it. decode: ids -> text, to find the texts of `stop`; encode: text -> token ids, for a server that
    returns none. note: told of responses that the server gave up. tokens_computed and tokens_unshared: prompt and response tokens of every
    sequence; what the server shares it does not say.
    """

    def __init__(
        self,
        args: ServerArgs,
        *,
        eos_ids: Sequence[int],
        stop: Sequence[str],
        vocab_size: int,
        decode: Callable[[Ints], str],
        encode: Callable[[str], Sequence[int]],
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.args, self.eos_ids, self.stop = args, tuple(eos_ids), tuple(stop)
        self.vocab_size, self.decode, self.encode, self.note = vocab_size, decode, encode, note
        self.tokens_computed = self.tokens_reused = self.tokens_unshared = 0
        self.endpoint = Endpoint(args, user=USER)
        self._trained_on = False

    @classmethod
    def from_args(cls, args: Mapping[str, Any], **how: Any) -> ServerEngine:
        """Check the arguments. Raises UserError; never prints a value that may hold a password."""
        return cls(check_args(ServerArgs, args, section="rollout.backend_args", user=USER), **how)

    def forget(self) -> None:
        """Nothing is held here between calls."""

    def check_training(self, temperature: float) -> None:
        """Raises UserError, one sentence, unless rollouts of this server may be trained on: ids and log-probs of every token come back.

        From then on an answer without them is refused as well."""
        if temperature != 1 and not self.args.processed_logprobs:
            raise UserError(
                f"rollout.temperature={temperature:g}: a server's log-probs are those at temperature 1 unless "
                "rollout.backend_args.processed_logprobs=true says otherwise, so its rollouts cannot be trained on; use temperature 1, or "
                "fast.reuse_rollouts=false"
            )
        probe = Request("probe", "", 0, np.array([self.eos_ids[0]]), 0)
        answer = self._ask(probe, max_tokens=1, temperature=temperature, top_p=None)
        if answer.finish == "abort":
            raise UserError(
                f"{USER}: {self.args.base_url} gave up a response of one token (finish_reason={answer.reason}), {1 + self.args.retries} times"
            )
        self._trained_on = True
        self._check_trained_on(answer)

    def _check_trained_on(self, answer: Answer) -> None:
        if answer.missing:
            raise UserError(
                f"{USER}: {self.args.base_url} returns no {answer.missing} for a sampled token, so its "
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
        """Rollouts in request order. One that the server gave up in every try has finish `abort` and no tokens: it is not to be judged.

        Raises UserError where the server fails after all tries, and where an answer is nonsense."""

        def one(request: Request) -> Answer:
            answer = self._ask(request, max_tokens=max_response_tokens, temperature=temperature, top_p=top_p)
            if self._trained_on and answer.finish != "abort":
                self._check_trained_on(answer)
            return answer

        answers = self.endpoint.map(one, requests)
        if said := given_up(answers, 1 + self.args.retries):
            self.note(f"{USER}: {self.args.base_url} {said}")
        tokens = sum(len(r.prompt_ids) for r in requests) + sum(len(a.ids) for a in answers)
        self.tokens_computed += tokens
        self.tokens_unshared += tokens
        return rollouts_of(requests, answers, policy_version=policy_version, temperature=temperature)

    def _ask(self, request: Request, *, max_tokens: int, temperature: float, top_p: float | None) -> Answer:
        """The answer to a request; one that the server gives up is asked for again. Raises UserError."""
        fields = self.sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
        prompt = request.prompt_ids.tolist()
        expected = Expected(
            request.prompt_ids, max_tokens, self.eos_ids, self.stop, self.vocab_size, self.decode, self.encode
        )
        try:
            for _ in range(1 + self.args.retries):
                made = self.endpoint.complete(prompt=prompt, seed=request.seed % 2**31, **fields)
                answer = read_answer(made, expected)
                if answer.finish != "abort":
                    break
        except NonsenseError as error:
            what = self.endpoint.redact(str(error))
            raise UserError(f"{USER}: the answer of {self.args.base_url} to {request} {what}") from None
        except Exception as error:  # noqa: BLE001 - a network and somebody else's server: whatever it is, it is one sentence
            raise UserError(
                f"{USER}: {request} at {self.args.base_url}: {self.endpoint.fault(error)}"
            ) from None
        return answer

    def sampling(self, *, max_tokens: int, temperature: float, top_p: float | None) -> dict[str, Any]:
        """Every sampling parameter of a request, with the value that the native engine has by construction; docs/rollouts.md says why each.

        Those of `extra_body` are vLLM's names, which SGLang shares but for no_stop_trim."""
        return {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": 1.0 if top_p is None else top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n": 1,
            "echo": False,
            "stop": list(self.stop),
            "logprobs": 1,
            "extra_body": {
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "min_tokens": 0,
                "ignore_eos": False,
                "stop_token_ids": list(self.eos_ids),
                "include_stop_str_in_output": True,
                "no_stop_trim": True,
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
                "add_special_tokens": False,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            },
        }
