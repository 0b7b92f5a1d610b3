"""Budgets of the evolution besides rollouts (fast.budget): over the whole run, checked before a fast phase and before each of its waves.

A wave that has begun is finished, then the best contexts are scored in full: so much a budget can be exceeded by. rollout_budget is the only one that is never exceeded.
"""

from __future__ import annotations

from fst_fast.config import FastConfig
from fst_fast.fast.population import Spent


def budget_over(config: FastConfig, spent: Spent, idle: int) -> str:
    """Why the evolution is over, as a sentence without a full stop; "" where it is not. idle: fast phases in a row that admitted no child."""
    budget = config.budget
    for key, used, limit in (
        ("tokens", spent.tokens, budget.tokens),
        ("seconds", spent.seconds, budget.seconds),
        ("usd", spent.usd, budget.usd),
        ("idle_cycles", idle, budget.idle_cycles),
    ):
        if limit is not None and used >= limit:
            return f"fast.budget.{key}={limit:g} is used up ({used:g}); the contexts stay as they are"
    return ""
