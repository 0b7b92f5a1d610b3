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

Finish = Literal["stop", "length", "abort", "max_turns", "max_tokens", "error"]
"""How a rollout ended: its last response was whole (`stop`) or cut (`length`), or the server gave it up (`abort`); an episode of an
environment also at the limit of its turns or tokens, or because the environment failed (`error`)."""
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

    response_ids: int64 [T], the closing eos token included when finish == "stop"; of an episode those of all its responses, joined.
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
    # of an episode; () for a task, whose prompt is that of its problem and context
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One turn of an episode: the policy reads the first `kept` tokens of the episode so far, then `added`, and samples `length` tokens.

    added: int64 [A], the prompt in the first turn, then what the environment said. In an episode that only grows, `kept` is all of it."""

    kept: int
    added: NDArray[np.int64]
    length: int


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
    """A rollout, its verdict, and its text as the verifier read it. Of an episode also its messages: what it was opened with, and what was
    said behind that, by the policy (role `assistant`) and by the environment."""

    rollout: Rollout
    verdict: Verdict
    response: str
    opening: Sequence[Message] = ()
    said: Sequence[Message] = ()


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

    # split: "train" or "validation"; a task may offer more
    def problems(self, split: str) -> Sequence[Problem]: ...

    def verify(self, problem: Problem, response: str) -> Verdict: ...

    # Optional: `tools`, functions that the policy may call before it answers; the task is then an environment (docs/environments.md).
    # Optional: `gold(problem) -> str`, a response that must get reward 1. A task that has it is refused at start-up where it fails its
    # own gold; one that has none is checked with str(problem.answer) only if problem.meta["check_gold"] asks for it.


@dataclass
class EpisodeState:
    """One episode as its environment sees it.

    seed: the episode's own, for whatever is random in it. messages: the conversation so far without the context, the response last.
    memory: what `start` gave besides messages and tools, else an empty dict; any object, the environment's own. tool_calls: the syntax of the
    model's tool calls, as rollout.tool_calls, "" where its template shows none."""

    problem: Problem
    seed: int
    messages: list[Message]
    memory: Any = field(default_factory=dict)
    tool_calls: str = ""


@runtime_checkable
class Environment(Protocol):
    """A source of problems that answers the policy turn by turn. A Task is an environment of one turn.

    Both methods may be `async` and run in child processes with the limits of `verify`. An episode whose process was lost is played
    again from its responses, so what they return must depend on their arguments alone."""

    def problems(self, split: str) -> Sequence[Problem]: ...

    def start(self, problem: Problem) -> Any:
        """The opening messages (without the context, the same in every episode of the problem), or (messages, tools), or (messages,
        tools, memory). tools: functions with type hints, or JSON schemas of those that `step` runs itself."""

    def step(self, state: EpisodeState, response: str) -> Any:
        """What follows a response that calls no tool: a Verdict, which ends the episode, or messages (a text is a user's message)."""

    # Optional: `end(state, why) -> Verdict` of an episode that ends without one: why is length, max_turns or max_tokens. Without it the
    # reward is 0. Optional: `close(state)`, called when an episode is over in whatever way, to give up what it holds. Optional:
    # `gold(problem)`, the response or list of responses that must get reward 1.
