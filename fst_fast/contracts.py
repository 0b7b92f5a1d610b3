"""The types that all packages share. No torch here.

    Problem + Context --> rollout --> Rollout --> Task.verify --> Verdict --> group --> advantages --> one step

A *problem* carries its messages without the context; a *context* is a text (phi), placed in the system message; the two together,
as tokens, are a *prompt*. Source of the method: arXiv 2605.12484, Algorithm 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

REWARD_ROUNDING = 4 * float(np.finfo(np.float32).eps)
"""Rewards that differ by no more than this share of their magnitude are the same number: graders compute in float32 too, and 0.1 + 0.2 is
not 0.3 in any type."""
FULL_REWARD = 1.0 - REWARD_ROUNDING
"""A reward from here on is the full one: ten times 0.1 is 0.9999999999999999."""
_UNIT_ROUNDING = 1e-15  # what a subtraction in float64 leaves of rewards up to 1 that cancel

Finish = Literal["stop", "length", "abort"]
Message = Mapping[str, str]  # {"role": ..., "content": ...}

CELLS = {
    "neither": "base weights, seed context",
    "context": "base weights, evolved contexts",
    "weights": "trained weights, seed context",
    "both": "trained weights, evolved contexts",
}
"""The four cells of an evaluation in the order in which they are shown: name -> label."""


@dataclass(frozen=True)
class Problem:
    """One item of a task. `id` is unique within the task and is the key of the advantage group."""

    id: str
    messages: Sequence[Message]  # chat messages without the context
    answer: Any
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """One text of the population. Two contexts with the same text are the same context: the id is a hash of the text."""

    id: str
    text: str
    parent: str | None = None  # id of the context it was edited from
    born: int = 0  # cycle in which it was proposed

    @classmethod
    def of(cls, text: str, *, parent: str | None = None, born: int = 0) -> Context:
        """Build a context, its id the first 12 hex digits of the SHA-256 of the text."""
        return cls(id=hashlib.sha256(text.encode()).hexdigest()[:12], text=text, parent=parent, born=born)


@dataclass(frozen=True)
class Verdict:
    """What a task says of one response.

    reward: in [0, 1], or None where the response could not be judged (grader failed or timed out): then it counts as no sample,
    never as 0. feedback: text for the reflection. metrics: named numbers for the logs.
    """

    reward: float | None
    feedback: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout:
    """One sampled response, token-in token-out: the sampled ids are never retokenised.

    response_ids: int64 [T], the closing eos token included when finish == "stop".
    logprobs: float32 [T], natural log, of each sampled token under the distribution actually sampled at `temperature`
    (with truncation off, as in training, that is the policy's own log-prob at that temperature).
    """

    problem_id: str
    context_id: str
    sample: int
    response_ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    finish: Finish
    policy_version: int
    temperature: float


def alike(rewards: ArrayLike) -> bool:
    """Whether rewards, at least one, are equal up to rounding (REWARD_ROUNDING). NaN is like nothing, infinity like itself alone."""
    r = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(r).all():
        return bool((r == r.flat[0]).all())
    return bool(np.ptp(r) <= max(REWARD_ROUNDING * float(np.abs(r).max()), _UNIT_ROUNDING))


class RolloutRequest(NamedTuple):
    """Ask for one response. `sample` numbers the samples of one problem under one context and selects the random stream."""

    context: Context
    problem: Problem
    sample: int


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout, its verdict, and its text as the verifier read it."""

    rollout: Rollout
    verdict: Verdict
    response: str


@dataclass(frozen=True)
class Judged:
    """One sample of an evaluation. response, feedback: None where the reward was known and nothing was sampled."""

    problem_id: str
    context_id: str
    reward: float | None
    response: str | None
    feedback: str | None


@runtime_checkable
class Task(Protocol):
    """A source of problems and their verifier. `verify` must be a pure function of its arguments: it runs in child processes."""

    def problems(
        self, split: str
    ) -> Sequence[Problem]: ...  # split: "train" or "validation"; a task may offer more

    def verify(self, problem: Problem, response: str) -> Verdict: ...

    # Optional: `gold(problem) -> str`, a response that must get reward 1. A task that has it is refused at start-up where it fails its
    # own gold; one that has none is checked with str(problem.answer) only if problem.meta["check_gold"] asks for it.
