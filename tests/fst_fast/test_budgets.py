"""Budgets of the evolution besides rollouts: tokens, time, money, cycles without an admitted child."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fst_fast.config import FastConfig
from fst_fast.fast.population import FastState, Spent
from fst_fast.fast.reflection import Reply
from tests.fst_fast.test_evolution import World, half, numbered, run, start

WAVE = {
    "parents": "front",
    "population": 2,
    "rollout_budget": 400,
    "children": 2,
    "samples": 1,
    "first_generations": 4,
    "generations": 4,
}


def settings(**budget: Any) -> FastConfig:
    return FastConfig.model_validate({**WAVE, "reflector": "mine.py:reflect", "budget": budget})


def test_tokens_end_the_evolution_before_the_next_wave_and_for_good() -> None:
    """A rollout of the toy world has one token: 8 problems for the seed, 16 for the two children of a wave."""
    said: list[str] = []
    result = run(start(), World(half), numbered(), settings(tokens=30), log=said.append)
    assert (result.record["waves"], result.record["fast_rollouts"]) == (2, 8 + 16 + 16)
    assert result.state.spent == Spent(tokens=40)
    assert "ends before generation 2: fast.budget.tokens=30 is used up (40)" in said[-1]
    later = run(result.state, World(half), numbered(), settings(tokens=30), cycle=1, log=said.append)
    assert (later.record["fast_rollouts"], later.state.population) == (0, result.state.population)
    assert later.state.cycle == result.state.cycle + 1
    assert run(start(), World(half), numbered(), settings(tokens=10**6)).record["waves"] == 4


def test_what_the_reflector_costs_is_counted_in_money_and_tokens() -> None:
    def priced(prompts: Any, *, seeds: Any) -> list[Reply]:
        return [Reply(f"```\nx {s}\n```", "stop", None, 100, 10, cost_usd=0.25) for s in seeds]

    result = run(start(), World(half), priced, settings(usd=1.0))
    assert (result.record["waves"], result.record["reflection_usd"]) == (2, 1.0)
    assert result.state.spent.usd == 1.0
    assert result.state.spent.tokens == result.record["fast_rollouts"] + 4 * 110
    assert FastState.from_json(result.state.to_json()).spent == result.state.spent
    old = result.state.to_json()
    del old["spent"]  # a checkpoint of an earlier version
    assert FastState.from_json(old).spent == Spent()


def test_seconds_are_those_of_the_clock_of_the_phase() -> None:
    from fst_fast.fast.evolution import evolve
    from tests.fst_fast.test_evolution import problems

    now = iter([5.0, 15.0, 15.0])
    result = evolve(
        start(), anchor=problems(8), score=World(half), reflect=numbered(), config=settings(seconds=10), count_tokens=len, cycle=0,
        policy_version=0, seed=0, log=lambda line: None, clock=lambda: next(now),
    )  # fmt: skip
    assert result.record["waves"] == 1
    assert result.state.spent.seconds == 15.0


def test_cycles_without_an_admitted_child_end_the_evolution() -> None:
    def never(text: str, problem: Any) -> float:
        return 0.0

    state = start()
    rollouts = []
    for cycle in range(4):
        result = run(state, World(never), numbered(), settings(idle_cycles=2), cycle=cycle)
        state = result.state
        rollouts.append(result.record["fast_rollouts"])
    assert [n > 0 for n in rollouts] == [True, True, False, False]


@pytest.mark.parametrize(
    ("fast", "reason"),
    [
        ({"budget": {"usd": 1.0}, "reflector": "openai"}, "needs prices"),
        ({"budget": {"usd": 1.0}}, "costs nothing"),
        ({"budget": {"tokens": 0}}, "greater than or equal to 1"),
        ({"budget": {"seconds": -1}}, "greater than 0"),
        ({"budget": {"dollars": 1}}, "Extra inputs"),
    ],
)
def test_budgets_that_cannot_be_are_refused(fast: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        FastConfig.model_validate(fast)


def test_the_cost_of_a_reply_follows_from_the_prices() -> None:
    from tests.fst_fast.test_reflectors import PROMPT, completion, openai_at, serving

    with serving(lambda n, body: completion("```\nx\n```")) as server:
        reflector = openai_at(
            server, usd_per_million_prompt_tokens=2e6, usd_per_million_completion_tokens=3e6
        )
        [reply] = reflector([PROMPT], seeds=[0])
    assert reply.cost_usd == 2 * reply.prompt_tokens + 3 * reply.completion_tokens > 0
    assert reflector.cost_usd == reply.cost_usd
