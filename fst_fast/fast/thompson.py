"""Thompson sampling over the contexts of a fast phase (fast.parents=thompson): many proposals, each scored as far as it deserves.

A child starts with FIRST rollouts. In every wave the most promising unfinished contexts go on to twice as many, until they are scored in full.
What is promising is drawn, not ranked: a context's mean reward has a Beta distribution, the likelihood of its rollouts times a prior of PRIOR
rollouts at its parent's mean; each choice takes the context whose draw is highest (Thompson 1933). So are the parents, from all contexts
of the phase, unfinished ones too: an edit that has solved one problem can be built on at once, and is forgotten when its next rollouts fail.
Only contexts that are scored in full, on the pairs of problem and sample that their ancestors have, can be admitted.

Each context meets the anchor problems in a random order of its own: a few easy ones in front would otherwise flatter all that have only met those.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fst_fast.config.derived import FIRST
from fst_fast.contracts import Context, RolloutRequest
from fst_fast.fast.evaluations import Evaluations

PRIOR = 4.0
"""Rollouts that the parent's mean counts for."""
LEAST = 0.02
"""The least mean that a prior has: that a parent has solved nothing yet does not make its children hopeless."""
CLIMBING = 0.75
"""Unfinished contexts that go on in a wave, for each child of a full wave."""
SPARE = 2
"""Contexts beyond the size of the population that may be scored in full at the end."""


class Search:
    """The contexts of one phase, in order of birth, and how far each is scored."""

    def __init__(
        self, evaluations: Evaluations, members: Sequence[Context], *, width: int, key: Sequence[int]
    ) -> None:
        """members: scored in full. width: children of a full wave. key: seeds the orders in which contexts meet the problems."""
        self.evaluations, self.width, self.key = evaluations, width, tuple(key)
        self.full = len(evaluations.problem) * evaluations.samples
        self.contexts = {context.id: context for context in members}
        self.asked = {context.id: self.full for context in members}
        self.parent: dict[str, str] = {}  # of every child

    def parents(self, count: int, rng: np.random.Generator) -> list[Context]:
        """The parents of `count` children, with replacement, among contexts with failures; siblings are adjacent."""
        failing = np.array([bool(self.evaluations.failures[context_id]) for context_id in self.contexts])
        if count <= 0 or not failing.any():
            return []
        drawn = np.where(failing, rng.beta(*self.beliefs(), size=(count, len(failing))), -1.0).argmax(axis=1)
        found = list(self.contexts.values())
        return [found[row] for row in sorted(drawn.tolist())]

    def score(
        self, children: Sequence[tuple[Context, Context]], rng: np.random.Generator, left: int
    ) -> list[Context]:
        """Score the first rollouts of the children and take the most promising unfinished contexts further, all in one batch of at most `left`
        rollouts; those that are now scored in full, in order of birth. children: each with its parent."""
        goals = {context.id: min(FIRST, self.full) for context, _ in children}
        left -= sum(goals.values())
        assert left >= 0
        a, b = self.beliefs()
        drawn = dict(zip(self.contexts, rng.beta(a, b).tolist(), strict=True))
        unfinished = sorted((i for i in self.contexts if self.asked[i] < self.full), key=lambda i: -drawn[i])
        for context_id in unfinished[: round(CLIMBING * self.width)]:
            goal = min(2 * self.asked[context_id], self.full)
            if goal - self.asked[context_id] <= left:
                left -= goal - self.asked[context_id]
                goals[context_id] = goal
        self.contexts |= {context.id: context for context, _ in children}
        self.parent |= {context.id: parent.id for context, parent in children}
        return self._reach(goals)

    def finish(self, count: int, left: int) -> list[Context]:
        """Of the `count` contexts with the best expected mean score the unfinished ones in full, best first, as far as `left` rollouts go."""
        finished: list[Context] = []
        while True:
            a, b = self.beliefs()
            means = dict(zip(self.contexts, (a / (a + b)).tolist(), strict=True))
            best = sorted(means, key=lambda i: -means[i])[:count]
            todo = [i for i in best if self.asked[i] < self.full]
            if not todo or self.full - self.asked[todo[0]] > left:
                return finished
            left -= self.full - self.asked[todo[0]]
            finished += self._reach({todo[0]: self.full})

    def beliefs(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The two parameters of each context's Beta distribution, [C] each, in order of birth."""
        mean: dict[str, float] = {}
        found = []
        for context_id in self.contexts:
            rewards = self.evaluations.rewards[context_id]
            judged = rewards[~np.isnan(rewards)]
            solved, failed = float(judged.sum()), float((1 - judged).sum())
            own = solved / len(judged) if len(judged) else 0.0
            prior = min(max(mean.get(self.parent.get(context_id, ""), own), LEAST), 1 - LEAST)
            a, b = solved + PRIOR * prior, failed + PRIOR * (1 - prior)
            mean[context_id] = a / (a + b)
            found.append((a, b))
        both = np.array(found)
        return both[:, 0], both[:, 1]

    def _reach(self, goals: dict[str, int]) -> list[Context]:
        """Score these contexts up to so many rollouts, in one batch; those that are then scored in full."""
        self.evaluations.sample(
            [
                request
                for context_id, goal in goals.items()
                for request in self._order(self.contexts[context_id])[:goal]
            ]
        )
        self.asked |= goals
        return [self.contexts[i] for i in self.contexts if goals.get(i) == self.full]

    def _order(self, context: Context) -> list[RolloutRequest]:
        """All requests of a context: every problem once, in its own order, then every problem again."""
        rng = np.random.default_rng(np.random.SeedSequence([*self.key, zlib.crc32(context.id.encode())]))
        problems = list(self.evaluations.problem.values())
        order = rng.permutation(len(problems))
        return [
            RolloutRequest(context, problems[i], sample)
            for sample in range(self.evaluations.samples)
            for i in order
        ]
