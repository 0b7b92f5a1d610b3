"""What a sampling server answered, checked before anything is trained or measured on it.

A server is somebody else's program: it may run out of memory, time out a request, count its vocabulary differently or know other ends of a response. Every
answer is therefore one of three things: a whole response, one that the server gave up (`abort`, to be asked for again), or nonsense, which is
one sentence. Nothing is repaired.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fst_fast.contracts import Rollout
from fst_fast.rollout.engine import Request

SPELT = "token_id:"
GIVEN_UP = ("abort", "error", "content_filter")
"""Finish reasons of a response that the server did not sample to its end: preempted, failed, or withheld by a filter."""
ROUNDING = 1e-5  # a log-prob may be above 0 by this: logsumexp is no more exact
IMPOSSIBLE = -9999.0  # vLLM's number for minus infinity: no token of this log-prob is ever sampled

Ints = NDArray[np.int64]


class NonsenseError(Exception):
    """What is wrong with an answer, to stand behind `it`: `says finish_reason=null`."""


@dataclass(frozen=True)
class Expected:
    """What an answer must fit. decode: text of token ids; encode: token ids of a text, for a server that returns none."""

    prompt_ids: Ints
    max_tokens: int
    eos_ids: Sequence[int]
    stop: Sequence[str]
    vocab_size: int
    decode: Callable[[Ints], str]
    encode: Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Answer:
    """ids int64 [T], logprobs float32 [T], NaN where there are none. missing: what did not come back. reason: of `abort`, as the server says."""

    ids: Ints
    logprobs: NDArray[np.float32]
    finish: Literal["stop", "length", "abort"]
    missing: Literal["", "token ids", "log-probs"] = ""
    reason: str = ""


def read_answer(answer: Any, expected: Expected) -> Answer:
    """Read an answer of /completions, an object as the package `openai` makes it. Raises NonsenseError."""
    choices = getattr(answer, "choices", None)
    if not isinstance(choices, list) or len(choices) != 1:
        what = f"{len(choices)} choices" if isinstance(choices, list) else "no list of choices"
        raise NonsenseError(f"has {what} where one is due")
    choice = choices[0]
    said = getattr(choice, "finish_reason", None)
    if said in GIVEN_UP:
        return Answer(np.zeros(0, np.int64), np.zeros(0, np.float32), "abort", reason=said)
    if said not in ("stop", "length"):
        raise NonsenseError(
            f"says finish_reason={_shown(said)}; stop, length and, to be tried again, {', '.join(GIVEN_UP)} are known"
        )
    finish: Literal["stop", "length"] = "stop" if said == "stop" else "length"
    _check_prompt(answer, choice, expected)
    given = getattr(choice, "logprobs", None)
    spelt, values = (getattr(given, name, None) for name in ("tokens", "token_logprobs"))
    ids = _ids(getattr(choice, "token_ids", None), spelt)
    if ids is None:
        return _text_alone(getattr(choice, "text", None), finish, expected)
    _check_ids(ids, finish, expected)
    array = np.array(ids, dtype=np.int64)
    if ids[-1] in expected.eos_ids:
        finish = "stop"  # at the last token allowed both are true; the native engine says stop
    if not isinstance(values, list) or any(value is None for value in values):
        return Answer(array, _unknown(len(ids)), finish, "log-probs")
    _check_logprobs(values, len(ids))
    return Answer(array, np.array(values, dtype=np.float32), finish)


def rollouts_of(
    requests: Sequence[Request], answers: Sequence[Answer], *, policy_version: int, temperature: float
) -> list[Rollout]:
    """The answers to the requests as rollouts, in their order."""
    return [
        Rollout(
            problem_id=request.problem_id,
            context_id=request.context_id,
            sample=request.sample,
            response_ids=answer.ids,
            logprobs=answer.logprobs,
            finish=answer.finish,
            policy_version=policy_version,
            temperature=temperature,
        )
        for request, answer in zip(requests, answers, strict=True)
    ]


def given_up(answers: Sequence[Answer], tries: int) -> str | None:
    """What is to be said, behind the server's name, of responses that it gave up in every try; None where there is none."""
    reasons = Counter(answer.reason for answer in answers if answer.finish == "abort")
    if not reasons:
        return None
    each = ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items()))
    return f"gave up {reasons.total()} of {len(answers)} responses ({each}), each {tries} times; they are not judged"


def _check_prompt(answer: Any, choice: Any, expected: Expected) -> None:
    sent = getattr(choice, "prompt_token_ids", None)
    sent = getattr(answer, "prompt_token_ids", None) if sent is None else sent
    if sent is None or sent == expected.prompt_ids.tolist():
        return
    count = f"{len(sent)} prompt tokens" if isinstance(sent, list) else "a prompt"
    raise NonsenseError(
        f"is sampled from {count} that are not the {len(expected.prompt_ids)} it was sent; does the server add a token of its own?"
    )


def _ids(token_ids: Any, spelt: Any) -> list[Any] | None:
    """The token ids in either spelling, None where there are none. Raises NonsenseError where the two differ."""
    read: list[Any] | None = None
    if isinstance(spelt, list) and spelt and all(isinstance(t, str) and t.startswith(SPELT) for t in spelt):
        digits = [token.removeprefix(SPELT) for token in spelt]
        read = [
            int(text) if text.isascii() and text.isdigit() and len(text) < 19 else text for text in digits
        ]
    if token_ids is None:
        return read
    if not isinstance(token_ids, list):
        raise NonsenseError(f"has token_ids={_shown(token_ids)}; it must be a list of integers")
    if read is not None and read != token_ids:
        raise NonsenseError("has token_ids that are not the ids of its log-probs")
    return token_ids


def _check_ids(ids: Sequence[Any], finish: str, expected: Expected) -> None:
    if not ids:
        raise NonsenseError("has no token; a response has one at least, that which ends it")
    for at, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < expected.vocab_size:
            raise NonsenseError(
                f"has the token id {_shown(token)} at {at}; the model's are 0 to {expected.vocab_size - 1}"
            )
    if len(ids) > expected.max_tokens:
        raise NonsenseError(f"has {len(ids)} tokens; it was asked for {expected.max_tokens} at most")
    early = next((at for at, token in enumerate(ids[:-1]) if token in expected.eos_ids), None)
    if early is not None:
        raise NonsenseError(f"goes on after the token {ids[early]} at {early}, which ends a response")
    if finish == "length" and len(ids) < expected.max_tokens and ids[-1] not in expected.eos_ids:
        raise NonsenseError(
            f"says finish_reason=length after {len(ids)} of {expected.max_tokens} tokens; does the server's context length hold prompt and response?"
        )
    if finish == "stop" and ids[-1] not in expected.eos_ids and not _stopped_by_text(ids, expected):
        texts = " or a stop text" if expected.stop else ""
        raise NonsenseError(
            f"says finish_reason=stop after the token {ids[-1]}, which is none of {sorted(expected.eos_ids)}{texts}; does the server serve the same model?"
        )


def _stopped_by_text(ids: Sequence[int], expected: Expected) -> bool:
    """Whether the last tokens complete a stop text; each is at least one byte of it."""
    if not expected.stop:
        return False
    tail = max(len(text.encode()) for text in expected.stop) + 1
    text = expected.decode(np.array(ids[-tail:], dtype=np.int64))
    return any(stop in text for stop in expected.stop)


def _check_logprobs(values: Sequence[Any], count: int) -> None:
    if len(values) != count:
        raise NonsenseError(f"has {len(values)} log-probs for {count} tokens")
    for at, value in enumerate(values):
        number = type(value) in (int, float) and math.isfinite(value)
        if not number or not IMPOSSIBLE < value <= ROUNDING:
            raise NonsenseError(
                f"has the log-prob {_shown(value)} at {at}; that of a sampled token is finite and at most 0"
            )


def _text_alone(text: Any, finish: Literal["stop", "length"], expected: Expected) -> Answer:
    """An answer without ids: its text is tokenised here, which is good enough to judge it and not to train on it."""
    if not isinstance(text, str):
        raise NonsenseError(f"has neither token ids nor a text: text={_shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NonsenseError(f"has half a surrogate pair in its text {_shown(text)}") from None
    ids = np.array(expected.encode(text), dtype=np.int64)
    return Answer(ids, _unknown(len(ids)), finish, "token ids")


def _unknown(count: int) -> NDArray[np.float32]:
    return np.full(count, np.nan, np.float32)


def _shown(value: Any) -> str:
    """The value whole, or its kind: half of it could be half of the key that a server echoes, which nothing would recognise."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__} of {len(text)} characters"
