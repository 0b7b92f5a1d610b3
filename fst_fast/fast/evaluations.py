"""What one fast phase has sampled: the rewards of each context by problem and sample, its failures, counts and sums for the front."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fst_fast.contracts import FULL_REWARD, Context, Message, Problem, RolloutRequest, ScoredRollout
from fst_fast.fast import pareto
from fst_fast.fast.population import Scores
from fst_fast.fast.reflection import Failure
from fst_fast.fast.scoring import ScoreFn

SHOWN_SUCCESSES = 8
"""How many responses with the full reward are kept for reflection prompts."""


class Evaluations:
    """What this phase has sampled: rewards by (problem, sample) for the paired test, counts and sums for the front."""

    def __init__(self, problems: list[Problem], samples: int, scores: Scores, score: ScoreFn) -> None:
        self.problem = {problem.id: problem for problem in problems}
        self.samples = samples
        self.scores = scores
        self.score = score
        self.rewards: dict[str, NDArray[np.float64]] = {}  # context id -> [N, S], NaN where unjudged
        # context id -> the first failed sample of each failed problem
        self.failures: dict[str, list[ScoredRollout]] = {}
        self.successes: list[ScoredRollout] = []  # the first with the full reward, of whatever context
        self.sampled: list[ScoredRollout] = []
        self.unjudged = 0
        self._asked: set[tuple[str, str, int]] = set()  # (context, problem, sample)
        self._failed: set[tuple[str, str]] = set()

    @classmethod
    def of(
        cls, rollouts: Sequence[ScoredRollout], problems: Sequence[Problem], policy_version: int
    ) -> Evaluations:
        """Of rollouts that exist already; they do not count as spent."""

        def none(requests: object) -> list[ScoredRollout]:
            raise AssertionError("nothing is sampled here")

        samples = 1 + max((r.rollout.sample for r in rollouts), default=0)
        found = cls(list(problems), samples, Scores(policy_version), none)
        found._add(rollouts)
        return found

    @property
    def spent(self) -> int:
        return len(self.sampled)

    def judge(
        self, contexts: Sequence[Context], *, problems: int | None = None, samples: int | None = None
    ) -> None:
        """Score these contexts on every problem and sample that they have not been scored on, in one batch. problems, samples: on the first
        ones only."""
        self.sample(
            [
                RolloutRequest(c, p, k)
                for c in contexts
                for p in list(self.problem.values())[:problems]
                for k in range(self.samples if samples is None else samples)
            ]
        )

    def sample(self, requests: Sequence[RolloutRequest]) -> None:
        """Score those of these requests that have not been asked before, in one batch."""
        items = [r for r in requests if (r.context.id, r.problem.id, r.sample) not in self._asked]
        self._asked |= {(c.id, p.id, k) for c, p, k in items}
        if not items:
            return
        answers = self.score(items)
        assert len(answers) == len(items), f"score returned {len(answers)} rollouts for {len(items)}"
        self.sampled += answers
        for context_id in {request.context.id: None for request in items}:
            self._rows(context_id)
        for (context, problem, sample), answer in zip(items, answers, strict=True):
            rollout = answer.rollout
            assert (rollout.context_id, rollout.problem_id, rollout.sample) == (
                context.id,
                problem.id,
                sample,
            )
            assert rollout.policy_version == self.scores.policy_version, "a rollout of another policy"
        self._add(answers)

    def _rows(self, context_id: str) -> NDArray[np.float64]:
        self.failures.setdefault(context_id, [])
        return self.rewards.setdefault(context_id, np.full((len(self.problem), self.samples), np.nan))

    def _add(self, answers: Sequence[ScoredRollout]) -> None:
        column = {problem_id: j for j, problem_id in enumerate(self.problem)}
        for answer in answers:
            rollout, reward = answer.rollout, answer.verdict.reward
            rows = self._rows(rollout.context_id)
            if reward is None:
                self.unjudged += 1
                continue
            rows[column[rollout.problem_id], rollout.sample] = reward
            self.scores.add(rollout.context_id, rollout.problem_id, reward)
            if reward >= FULL_REWARD:
                self.successes = [*self.successes, answer][:SHOWN_SUCCESSES]
            elif (rollout.context_id, rollout.problem_id) not in self._failed:
                self._failed.add((rollout.context_id, rollout.problem_id))
                self.failures[rollout.context_id].append(answer)

    def matrix(self, context_ids: Sequence[str]) -> pareto.Matrix:
        return self.scores.matrix(context_ids, list(self.problem))

    def mean(self, context_id: str) -> tuple[float | None, int]:
        """(mean over this phase's problems of the mean reward, number of judged rollouts)."""
        n = self.scores.count(context_id, list(self.problem))
        return (float(pareto.row_means(self.matrix([context_id]))[0]) if n else None), n

    def question(self, problem_id: str) -> str:
        """A problem's messages as a reflection shows them."""
        return _as_text(self.problem[problem_id].messages)

    def failure(self, sampled: ScoredRollout) -> Failure:
        """A rollout of this phase as a reflection shows it."""
        verdict = sampled.verdict
        assert verdict.reward is not None
        asked = _as_text(sampled.opening) if sampled.opening else self.question(sampled.rollout.problem_id)
        return Failure(asked, sampled.response, verdict.feedback, verdict.reward, sampled.said)

    def calls(self, context_id: str, tool: str) -> float | None:
        """The mean reward of the judged rollouts of a context that called a tool; 0 where none did, None where it is not known."""
        judged = [s.verdict for s in self.sampled if s.rollout.context_id == context_id]
        known = [v for v in judged if v.reward is not None and f"calls/{tool}" in v.metrics]
        rewards = [v.reward for v in known if v.reward is not None and v.metrics[f"calls/{tool}"]]
        return float(np.mean(rewards)) if rewards else 0.0 if known else None


def _as_text(messages: Sequence[Message]) -> str:
    return "\n\n".join(
        m["content"] if m["role"] == "user" else f"{m['role']}: {m['content']}" for m in messages
    )
