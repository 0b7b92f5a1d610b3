"""Options of the fast phase's waves: more proposals than children, races, a deeper search, the seed's share, parents by improvement, crossover."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.config import FastConfig
from fst_fast.config.derived import Size, rungs, wave_cost
from fst_fast.contracts import Context
from fst_fast.fast import evolution, pareto, plain_gepa
from fst_fast.fast.outcome import with_room
from fst_fast.fast.population import Lineage
from tests.fst_fast.test_evolution import (
    SEED,
    Scribe,
    World,
    front,
    half,
    numbered,
    problems,
    run,
    start,
    uniform,
)

# -- more proposals than children ---------------------------------------------------------------------------------------------


WIDE = front(children=2, proposals=6, screen_problems=4, samples=2, first_generations=1)


def test_more_proposals_than_children_are_asked_for_as_one_batch_and_the_best_of_a_first_comparison_go_on():
    reflect = numbered()
    world = World(lambda text, problem: 1.0 if text.endswith(("3", "5")) else 0.0)
    result = run(start(), world, reflect, WIDE)
    assert [len(prompts) for prompts, _ in reflect.batches] == [6]
    assert [len(call) for call in world.calls] == [16, 6 * 4, 2 * (16 - 4)]
    scored_whole = {line["text"] for line in result.record["contexts"] if line["n"] == 16}
    assert scored_whole == {f"{SEED} variant 3", f"{SEED} variant 5"}
    assert result.record["admitted"] == 2
    assert len(result.record["contexts"]) == 6
    asked = [(c.id, p.id, k) for call in world.calls for c, p, k in call]
    assert len(asked) == len(set(asked)), "no rollout is sampled twice"


def test_proposals_that_leave_no_more_than_the_children_are_not_compared_first():
    lots = iter(["a", "", "b", "", "", ""])
    world = World(half)
    run(start(), world, Scribe(lambda prompt, seed: next(lots)), WIDE)
    assert [len(call) for call in world.calls] == [16, 32]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 200), st.integers(1, 5), st.integers(1, 12), st.integers(1, 9), st.integers(1, 3))
def test_the_budget_holds_with_a_first_comparison(budget, children, proposals, screen, generations):
    config = front(
        children=children, proposals=proposals, screen_problems=screen, samples=2, rollout_budget=budget, first_generations=generations
    )  # fmt: skip
    world = World(half)
    assert run(start(), world, numbered(), config).record["fast_rollouts"] == world.rollouts <= budget


def test_a_prompt_brings_successes_other_contexts_and_the_latest_admitted_edits():
    reflect, world = numbered(), World(lambda text, problem: 0.2 if text == SEED else 0.7)
    run(start(), world, reflect, front(children=2, samples=2, first_generations=3))
    first, *_, last = [prompts for prompts, _ in reflect.batches]
    assert not first[0].others
    assert not first[0].lessons
    assert last[0].successes
    assert all(s.reward == 1.0 for s in last[0].successes)
    assert last[0].others
    assert last[0].context not in last[0].others
    assert any(lesson.before == SEED and lesson.after.startswith(SEED) for lesson in last[0].lessons)


# -- options: races, a deeper first search, the seed's share, parents by expected improvement, crossover -----------------------------------------


def test_a_race_halves_the_children_and_doubles_the_problems():
    assert rungs(8, 32, 3) == [(8, 8), (4, 16), (2, 32)]
    assert rungs(3, 5, 2) == [(3, 3), (2, 5)]
    assert rungs(4, 32, 1) == [(4, 32)]


def test_a_race_costs_what_is_planned_and_the_better_half_runs_on_and_only_the_end_admits():
    quality = {f"{SEED} variant {i}": p for i, p in enumerate([0, 1, 0, 0, 1, 0, 0, 0])}
    world = World(lambda text, problem: quality.get(text, 0.0))
    config = front(children=8, rungs=3, samples=2, first_generations=1, rollout_budget=10**4)
    result = run(start(), world, numbered(), config, anchor=problems(32))
    assert [len(call) for call in world.calls] == [64, 8 * 8 * 2, 2 * 8 * 2, 2 * 16 * 2], "six are not ahead"
    assert wave_cost(config, 8, Size(32, 2)) == 8 * 8 * 2 + 4 * 8 * 2 + 2 * 16 * 2
    assert {line["text"] for line in result.record["contexts"] if line["admitted"]} == {
        f"{SEED} variant 1",
        f"{SEED} variant 4",
    }
    assert {line["n"] for line in result.record["contexts"]} == {16, 64}
    all_ahead = World(lambda text, problem: float("variant" in text))
    run(start(), all_ahead, numbered(), config, anchor=problems(32))
    assert [len(call) for call in all_ahead.calls] == [64, 8 * 8 * 2, 4 * 8 * 2, 2 * 16 * 2], (
        "the planned cost"
    )


def test_children_that_are_not_ahead_of_their_parent_leave_a_race_at_once():
    world = World(lambda text, problem: 0.0 if "variant" in text else float(problem.answer % 2))
    config = front(children=4, rungs=2, first_generations=1)
    run(start(), world, numbered(), config, anchor=problems(32))
    assert [len(call) for call in world.calls] == [64, 4 * 16 * 2]


@settings(max_examples=40, deadline=None)
@given(
    budget=st.integers(0, 300), children=st.integers(1, 9), count=st.integers(1, 4), search=st.integers(0, 400),
    seed=st.integers(0, 5), parents=st.sampled_from(["front", "improvement"]), crossover=st.sampled_from([0.0, 0.5]),
)  # fmt: skip
def test_the_budgets_hold_with_every_option(budget, children, count, search, seed, parents, crossover):
    config = front(
        children=children, rungs=count, rollout_budget=budget, search_budget=budget + search, parents=parents, crossover=crossover,
        keep_seed=True,
    )  # fmt: skip
    state = start()
    for cycle in range(2):
        world = World(lambda text, problem: uniform(text), version=cycle, seed=seed)
        alone = set(state.population) == {state.seed_id}
        result = run(state, world, numbered(), config, cycle=cycle, seed=seed)
        assert world.rollouts <= (budget + search if alone else budget)
        state = result.state
        assert state.seed_id in state.population


def test_a_search_from_the_seed_alone_goes_on_until_something_is_admitted_and_then_stops():
    config = front(children=2, samples=1, first_generations=2, rollout_budget=60, search_budget=400)

    def good(number):
        return World(lambda text, problem: float(f"variant {number}" in text and problem.answer < 6))

    late = good(9)
    found = run(start(), late, numbered(), config)
    assert found.record["waves"] == 5
    assert found.record["admitted"] == 1
    assert late.rollouts == 8 + 10 * 8
    soon = good(1)
    assert run(start(), soon, numbered(), config).record["waves"] == 2, "no deeper than without"
    never = good(10**6)
    assert run(start(), never, numbered(), config).record["fast_rollouts"] == 400 - 400 % 8
    again = run(found.state, good(10**6), numbered(), config, cycle=1)
    assert again.record["fast_rollouts"] <= 60, "the seed is no longer alone"


def test_the_seed_keeps_its_place_if_asked_to_even_from_a_population_without_it():
    worse = World(lambda text, problem: 1.0 if "variant" in text else 0.0)
    plain = run(start(), worse, numbered(), front())
    assert start().seed_id not in plain.state.population
    kept = run(plain.state, World(half, version=1), numbered(), front(keep_seed=True), cycle=1)
    assert start().seed_id in kept.state.population
    assert kept.record["seed_mean"] is not None


def test_expected_improvement_is_that_of_a_plain_integral_and_prefers_the_best_and_the_uncertain():
    rng = np.random.default_rng(0)
    rewards = (rng.random((3, 16, 2)) < np.array([0.2, 0.5, 0.45])[:, None, None]).astype(float)
    gains = [0.1, -0.2, 0.05]
    values = rewards.mean(axis=2)
    spread = np.sqrt(values.var(axis=1, ddof=1) / 16 + np.mean(np.square(gains)))
    drawn = values.mean(axis=1) + spread * rng.normal(size=(200_000, 3))
    plain = np.maximum(drawn - values.mean(axis=1).max(), 0).mean(axis=0)
    assert np.allclose(pareto.expected_improvement(rewards, gains), plain / plain.sum(), atol=0.01)
    unknown = np.full((2, 4, 1), np.nan)
    assert np.allclose(pareto.expected_improvement(unknown, []), 0.5)


def test_a_crossover_shows_the_context_that_wins_the_most_problems_that_the_parent_does_not():
    texts = iter(["odd", "even", "both"])

    def scored(text, problem):
        return {"odd": float(problem.answer % 2), "even": float(problem.answer % 2 == 0)}.get(text, 0.0)

    scribe = Scribe(lambda prompt, seed: next(texts, prompt.context))
    config = front(children=2, first_generations=2, crossover=1.0, population=2)
    run(start(), World(scored), scribe, config)
    assert not any(p.partners for p in scribe.batches[0][0]), "the seed has nobody beside it"
    for prompt in scribe.batches[1][0]:
        [partner] = prompt.partners
        assert {prompt.context, partner.text} == {"odd", "even"}
        numbers = [int(text.rsplit(" ", 1)[1]) % 2 for text in partner.problems]
        assert set(numbers) == {int(partner.text == "odd")}
        assert partner.text in prompt.render()


# -- contexts that have become too long ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("evolver", ["waves", "gepa"])
@pytest.mark.parametrize("budget", [600, 0], ids=["scored", "carried unscored"])
def test_carried_contexts_that_leave_no_room_for_a_later_problem_are_dropped_and_not_sampled(evolver, budget):
    """The problems of this cycle are longer than those for which the contexts were admitted; their prompts would end the run."""
    long, short = (Context.of(f"{SEED} {word}") for word in ("long", "short"))
    lineage = {c.id: Lineage(c, admitted=True) for c in (long, short)}
    before = dataclasses.replace(
        start(), population=(long.id, short.id, long.id), contexts={**start().contexts, **lineage}
    )
    world, said = World(half), []
    evolve = plain_gepa.evolve if evolver == "gepa" else evolution.evolve
    result = evolve(
        before, anchor=problems(8), score=world, reflect=numbered(), config=FastConfig(rollout_budget=budget, population=3),
        count_tokens=len, cycle=3, policy_version=0, seed=0, log=said.append, fits=lambda context: "long" not in context.text,
    )  # fmt: skip
    assert long not in result.population
    asked = {context.id for call in world.calls for context, _, _ in call}
    assert long.id not in asked
    assert short.id in asked if budget else short in result.population
    assert said[0].startswith(
        "fast phase of cycle 3: 1 of 2 contexts leave no room for a problem of this cycle"
    )
    alone = dataclasses.replace(before, population=(long.id,))
    assert with_room(alone, lambda context: False, said.append, 3).population == (before.seed_id,)
