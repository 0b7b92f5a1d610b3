"""Which rollouts of the fast phase the slow phase may claim, and how often."""

from __future__ import annotations

import numpy as np

from fst_fast.contracts import Context, Problem, Rollout, RolloutRequest, ScoredRollout, Verdict
from fst_fast.rollout.reuse import ReusePool


def scored(context: Context, problem: str, reward: float | None, sample: int = 0) -> ScoredRollout:
    rollout = Rollout(problem, context.id, sample, np.array([1]), np.zeros(1, np.float32), "stop", 0, 1.0)
    return ScoredRollout(rollout, Verdict(reward), "")


def test_a_rollout_is_claimed_once_and_only_under_its_own_context_and_problem() -> None:
    a, b, gone = Context.of("a"), Context.of("b"), Context.of("gone")
    problem = Problem("p", [{"role": "user", "content": "?"}], None)
    offered = [
        scored(a, "p", 1.0, 0),
        scored(a, "p", 0.0, 1),
        scored(b, "q", 1.0),
        scored(gone, "p", 1.0),
        scored(a, "p", None),
    ]
    pool = ReusePool.of(offered, [a, b])
    assert pool.rollouts == offered[:3]  # judged, and under a context that was kept
    plan = [RolloutRequest(c, problem, k) for c, k in ((a, 0), (a, 1), (a, 2), (b, 0))]
    assert pool.claim(plan) == [offered[0], offered[1], None, None]
    assert pool.rollouts == [offered[2]]
    assert pool.claim(plan) == [None] * 4
