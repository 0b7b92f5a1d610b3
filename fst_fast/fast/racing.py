"""Race the children of a wave: sequential halving (Karnin et al. 2013) on the anchor problems, paired with the parents.

All children start on a few problems. After each rung those that are not ahead of their parent there are out, as in GEPA after its minibatch, and
of the others the better half goes on to twice as many problems. What is not sampled pays for more children or later waves. Only those that run to the end can be admitted: the
admission test sees the same pairs as without a race.
"""

from __future__ import annotations

from collections.abc import Sequence

from fst_fast.config.derived import rungs
from fst_fast.contracts import Context
from fst_fast.fast import pareto
from fst_fast.fast.evaluations import Evaluations

Child = tuple[Context, Context]
"""A child and its parent."""


def race(evaluations: Evaluations, children: Sequence[Child], count: int) -> list[Child]:
    """Score children in `count` rungs, one batch each; those that ran to the end, in their order. count = 1: all, in one batch."""
    running = list(children)
    for starters, problems in rungs(len(children), len(evaluations.problem), count):
        running = _best(evaluations, running, starters)
        evaluations.judge([child for child, _ in running], problems=problems)
        if problems < len(evaluations.problem):
            running = [pair for pair in running if _ahead(evaluations, *pair)]
    return running


def _ahead(evaluations: Evaluations, child: Context, parent: Context) -> bool:
    return pareto.admits(evaluations.rewards[child.id], evaluations.rewards[parent.id], 0.0)


def _best(evaluations: Evaluations, running: list[Child], count: int) -> list[Child]:
    """The `count` best by mean, of equals the first, in their order."""
    if len(running) <= count:
        return running
    ranked = sorted(running, key=lambda pair: -(evaluations.mean(pair[0].id)[0] or 0.0))[:count]
    return [pair for pair in running if pair in ranked]
