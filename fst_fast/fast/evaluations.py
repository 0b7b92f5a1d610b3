"""What a fast phase has sampled so far: rewards, scores, failures and successes of every context."""

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
"""How many full rewards a reflection prompt brings along."""


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

    @property
    def spent(self) -> int:
        return len(self.sampled)

    def judge(self, contexts: Sequence[Context], *, screen: int | None = None) -> None:
        """Score these contexts on every problem and sample that they have not been scored on, in one batch. screen: on the first problems
        only, one sample each."""
        items = [
            RolloutRequest(c, p, k)
            for c in contexts
            for p in list(self.problem.values())[:screen]
            for k in range(self.samples if screen is None else 1)
            if (c.id, p.id, k) not in self._asked
        ]
        self._asked |= {(c.id, p.id, k) for c, p, k in items}
        if not items:
            return
        answers = self.score(items)
        assert len(answers) == len(items), f"score returned {len(answers)} rollouts for {len(items)}"
        self.sampled += answers
        column = {problem_id: j for j, problem_id in enumerate(self.problem)}
        for context in contexts:
            self.rewards.setdefault(context.id, np.full((len(column), self.samples), np.nan))
            self.failures.setdefault(context.id, [])
        for (context, problem, sample), answer in zip(items, answers, strict=True):
            rollout, reward = answer.rollout, answer.verdict.reward
            assert (rollout.context_id, rollout.problem_id, rollout.sample) == (
                context.id,
                problem.id,
                sample,
            )
            assert rollout.policy_version == self.scores.policy_version, "a rollout of another policy"
            if reward is None:
                self.unjudged += 1
                continue
            self.rewards[context.id][column[problem.id], sample] = reward
            self.scores.add(context.id, problem.id, reward)
            if reward >= FULL_REWARD:
                self.successes = [*self.successes, answer][:SHOWN_SUCCESSES]
            elif (context.id, problem.id) not in self._failed:
                self._failed.add((context.id, problem.id))
                self.failures[context.id].append(answer)

    def matrix(self, context_ids: Sequence[str]) -> pareto.Matrix:
        return self.scores.matrix(context_ids, list(self.problem))

    def mean(self, context_id: str) -> tuple[float | None, int]:
        """(mean over this phase's problems of the mean reward, number of judged rollouts)."""
        n = self.scores.count(context_id, list(self.problem))
        return (float(pareto.row_means(self.matrix([context_id]))[0]) if n else None), n

    def failure(self, sampled: ScoredRollout) -> Failure:
        """A rollout of this phase as a reflection shows it."""
        assert sampled.verdict.reward is not None
        messages: Sequence[Message] = sampled.opening or self.problem[sampled.rollout.problem_id].messages
        text = "\n\n".join(
            m["content"] if m["role"] == "user" else f"{m['role']}: {m['content']}" for m in messages
        )
        verdict = sampled.verdict
        return Failure(text, sampled.response, verdict.feedback, sampled.verdict.reward, sampled.said)

    def calls(self, context_id: str, tool: str) -> float | None:
        """The mean reward of the judged rollouts of a context that called a tool; 0 where none did, None where it is not known."""
        judged = [s.verdict for s in self.sampled if s.rollout.context_id == context_id]
        known = [v for v in judged if v.reward is not None and f"calls/{tool}" in v.metrics]
        rewards = [v.reward for v in known if v.reward is not None and v.metrics[f"calls/{tool}"]]
        return float(np.mean(rewards)) if rewards else 0.0 if known else None
