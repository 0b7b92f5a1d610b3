"""Fast-phase rollouts that the slow phase of the same cycle may train on (arXiv 2605.12484, appendix F).

At a cycle's first step the weights are those that sampled them. Later steps correct for the difference by the
importance ratio, using the log-probs stored at sampling time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fst_fast.contracts import Context, RolloutRequest, ScoredRollout


@dataclass
class ReusePool:
    """The rollouts of this cycle's fast phase that no group has claimed yet, in sampling order."""

    rollouts: list[ScoredRollout] = field(default_factory=list)

    @classmethod
    def of(cls, scored: Sequence[ScoredRollout], population: Sequence[Context]) -> ReusePool:
        """Keep the judged rollouts whose context is in the population."""
        kept = {context.id for context in population}
        return cls([s for s in scored if s.verdict.reward is not None and s.rollout.context_id in kept])

    def claim(self, plan: Sequence[RolloutRequest]) -> list[ScoredRollout | None]:
        """For each request an unclaimed rollout of the same context and problem, or None. A rollout is claimed at most once."""
        claims: list[ScoredRollout | None] = []
        for context, problem, _ in plan:
            wanted = (context.id, problem.id)
            places = (
                i
                for i, s in enumerate(self.rollouts)
                if (s.rollout.context_id, s.rollout.problem_id) == wanted
            )
            found = next(places, None)
            claims.append(None if found is None else self.rollouts.pop(found))
        return claims
