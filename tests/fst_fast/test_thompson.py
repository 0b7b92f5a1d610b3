"""fast.parents=thompson: what is believed of a context, whose turn it is, how far each is scored, and that a rare good edit is found."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.config import FastConfig
from fst_fast.config.derived import FIRST, Size, reserve
from fst_fast.contracts import Context, RolloutRequest
from fst_fast.fast import candidates
from fst_fast.fast.evaluations import Evaluations
from fst_fast.fast.population import Scores
from fst_fast.fast.thompson import LEAST, PRIOR, Search
from tests.fst_fast.test_evolution import SEED, Scribe, World, numbered, problems, run, start

ROOT = Context.of(SEED)
A, B = Context.of("a", parent=ROOT.id), Context.of("b", parent=Context.of("a").id)


def searched(quality, n=8, samples=2):
    """A Search with the root scored in full, over a world with these probabilities by text; and the world."""
    world = World(lambda text, problem: quality[text])
    evaluations = Evaluations(problems(n), samples, Scores(0), world)
    evaluations.judge([ROOT])
    return Search(evaluations, [ROOT], width=4, key=[1, 2, 3]), world


def test_a_belief_is_the_rollouts_and_a_prior_at_the_parents_expected_mean():
    search, _ = searched({SEED: 0.0, "a": 1.0, "b": 0.0})
    search.score([(A, ROOT)], np.random.default_rng(0), 100)
    search.score([(B, A)], np.random.default_rng(0), 0 + FIRST)
    root_a, root_b = PRIOR * LEAST, 16 + PRIOR * (1 - LEAST)
    mean = root_a / (root_a + root_b)
    expected = [(root_a, root_b)]
    for solved, failed in ((2, 0), (0, 2)):
        prior = max(mean, LEAST)
        expected.append((solved + PRIOR * prior, failed + PRIOR * (1 - prior)))
        mean = expected[-1][0] / sum(expected[-1])
    assert np.allclose(np.stack(search.beliefs(), axis=1), expected)


def test_unjudged_rollouts_change_no_belief():
    search, _ = searched({SEED: 0.5, "a": None})
    search.score([(A, ROOT)], np.random.default_rng(0), 100)
    (root_a, own_a), (root_b, own_b) = search.beliefs()
    assert own_a + own_b == pytest.approx(PRIOR)
    assert own_a / PRIOR == pytest.approx(root_a / (root_a + root_b))


def test_parents_are_drawn_by_how_likely_each_is_the_best_and_only_where_something_failed():
    search, _ = searched({SEED: 0.3, "a": 0.6, "b": 1.0})
    for child, parent in ((A, ROOT), (B, A)):
        search.score([(child, parent)], np.random.default_rng(0), 100)
    search.finish(3, 100)
    assert not search.evaluations.failures[B.id], "b fails nowhere"
    a, b = search.beliefs()
    draws = np.random.default_rng(1).beta(a[:2], b[:2], size=(20_000, 2))
    drawn = Counter(c.text for c in search.parents(4000, np.random.default_rng(2)))
    assert set(drawn) <= {SEED, "a"}
    assert drawn["a"] / 4000 == pytest.approx((draws[:, 1] > draws[:, 0]).mean(), abs=0.03)
    assert search.parents(0, np.random.default_rng(2)) == []


def test_the_promising_go_on_to_twice_as_many_rollouts_each_wave_and_never_past_what_is_left():
    search, world = searched({SEED: 0.0, "a": 1.0, "b": 1.0})
    rng = np.random.default_rng(0)
    asked = []
    finished = search.score([(A, ROOT)], rng, 100)
    while not finished:
        asked.append(search.asked[A.id])
        finished = search.score([], rng, 100)
    assert asked == [2, 4, 8]
    assert finished == [A]
    assert search.score([(B, A)], rng, FIRST) == []
    assert search.finish(3, 13) == [], "14 are missing"
    assert search.finish(3, 14) == [B]
    assert world.rollouts == 16 * 3
    assert len({(c.id, p.id, k) for call in world.calls for c, p, k in call}) == world.rollouts


def test_every_context_meets_all_problems_once_before_any_twice_in_an_order_of_its_own():
    search, world = searched({SEED: 0.0, "a": 1.0, "b": 1.0}, n=16)
    rng = np.random.default_rng(0)
    search.score([(A, ROOT), (B, ROOT)], rng, 200)
    search.finish(3, 200)
    orders = defaultdict(list)
    for call in world.calls:
        for context, problem, sample in call:
            orders[context.text].append((sample, problem.id))
    for text in ("a", "b"):
        assert [sample for sample, _ in orders[text]] == [0] * 16 + [1] * 16
        assert len(set(orders[text])) == 32
    assert orders["a"] != orders["b"]


def test_only_contexts_scored_in_full_are_admitted_and_every_child_is_decided_once():
    world = World(lambda text, problem: 0.9 if text.endswith("7") else 0.1)
    decided = Counter()
    config = FastConfig(children=8, samples=2, rollout_budget=400)
    from fst_fast.fast.evolution import evolve

    result = evolve(
        start(), anchor=problems(8), score=world, reflect=numbered(), config=config, count_tokens=len, cycle=0, policy_version=0, seed=0,
        log=lambda line: None, spells_special=lambda text: False, fits=lambda context: True,
        emit=lambda kind, **fields: decided.update([fields["context"].id] if "admitted" in fields else []),
    )  # fmt: skip
    lines = result.record["contexts"]
    assert {line["n"] for line in lines if line["admitted"]} == {16}
    assert any(line["n"] == FIRST for line in lines)
    assert {line["text"][-1] for line in lines if line["admitted"]} == {"7"}
    assert decided == Counter(line["id"] for line in lines)


@pytest.mark.parametrize("parents", ["thompson", "front"])
def test_a_rare_good_edit_is_found_where_scoring_every_child_in_full_misses_it(parents):
    """One of fifty edits solves a quarter of the problems, the others nothing; the same rollouts for both ways."""
    found = 0
    for seed in range(12):
        world = World(lambda text, problem, seed=seed: 0.3 if hash_of(text, seed) < 0.02 else 0.0, seed=seed)
        width = {"thompson": 16, "front": 4}[parents]
        config = FastConfig(
            parents=parents, children=width, first_generations=12, samples=2, rollout_budget=960
        )
        result = run(start(), world, numbered(), config, anchor=problems(32), seed=seed)
        found += any(hash_of(context.text, seed) < 0.02 for context in result.population)
    assert (found >= 9) == (parents == "thompson"), found


def hash_of(text, seed):
    return np.random.default_rng([seed, *text.encode()]).random() if text != SEED else 1.0


def test_a_search_from_the_seed_alone_goes_deeper_until_a_context_is_better_beyond_doubt():
    never = World(lambda text, problem: 0.5)
    config = FastConfig(children=8, first_generations=2, generations=1, rollout_budget=300, search_budget=900)
    lost = run(start(), never, numbered(), config, anchor=problems(16))
    assert 300 < lost.record["fast_rollouts"] == never.rollouts <= 900
    soon = World(lambda text, problem: 0.0 if text == SEED else 1.0)
    found = run(start(), soon, numbered(), config, anchor=problems(16))
    assert found.record["waves"] == 2
    assert soon.rollouts <= 300
    again = World(lambda text, problem: 0.5, version=1)
    assert (
        run(found.state, again, numbered(), config, cycle=1, anchor=problems(16)).record["fast_rollouts"]
        <= 300
    )


@pytest.mark.parametrize("parents", ["thompson", "front"])
def test_a_deeper_search_ends_where_the_reflector_has_no_more_to_say(parents):
    world = World(lambda text, problem: 0.5)
    config = FastConfig(
        parents=parents, children=4, first_generations=2, generations=1, rollout_budget=300, search_budget=900
    )
    lost = run(start(), world, Scribe(lambda prompt, seed: prompt.context), config, anchor=problems(16))
    assert world.rollouts == 32
    assert lost.record["refused"] == {"duplicate": lost.record["proposed"]}


def test_a_deeper_search_ends_with_a_context_that_solves_everything():
    """Where the seed fails four of 32 problems nothing can be better than it by three standard errors."""
    world = World(lambda text, problem: float(text != SEED or problem.answer >= 4))
    config = FastConfig(
        children=8, first_generations=4, generations=1, rollout_budget=400, search_budget=2000
    )
    result = run(start(), world, numbered(), config, anchor=problems(32))
    assert result.record["best_mean"] == 1.0
    assert world.rollouts <= 400


def test_an_edit_that_was_given_up_early_may_be_proposed_again_under_the_same_weights():
    state = start()
    for cycle in range(3):
        texts = Scribe(lambda prompt, seed: f"edit {seed % 40}")
        world = World(lambda text, problem: 0.1 if text == SEED else 0.2, seed=cycle)
        result = run(state, world, texts, FastConfig(children=8), anchor=problems(32), cycle=cycle)
        assert len(result.record["contexts"]) > 4
        whole = {line["text"] for line in result.record["contexts"] if line["n"] == 64}
        before = {
            line.context.text for line in state.contexts.values() if line.n == 64 and line.policy_version == 0
        }
        assert not whole & before, "what was scored in full is known"
        state = result.state


def test_where_a_budget_ends_the_phase_what_is_promising_is_scored_in_full():
    world = World(lambda text, problem: 0.0 if text == SEED else 0.9)
    config = FastConfig.model_validate(
        {"children": 4, "reflector": "mine.py:reflect", "budget": {"tokens": 80}}
    )
    result = run(start(), world, numbered(), config, anchor=problems(32))
    assert result.record["waves"] < 4
    assert result.record["admitted"]


def test_a_partner_is_chosen_by_problems_that_the_parent_has_met():
    solved_by = {"a": {3}, "b": {0, 2, 3}, "c": set()}
    found = Evaluations(
        problems(4), 1, Scores(0), World(lambda text, problem: float(problem.answer in solved_by[text]))
    )
    contexts = [Context.of(text) for text in "abc"]
    found.judge(contexts[:2])
    found.sample([RolloutRequest(contexts[2], problems(4)[0], 0)])
    [(partner, solved)] = candidates._partners(
        FastConfig(crossover=1.0), found, contexts[:2], contexts[2], np.random.default_rng(0)
    )
    assert (partner.text, solved) == ("b", ["problem number 0"])


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(0, 300), children=st.integers(1, 9), search=st.integers(0, 400), seed=st.integers(0, 5), samples=st.integers(1, 3),
    crossover=st.sampled_from([0.0, 0.5]), keep=st.booleans(),
)  # fmt: skip
def test_the_budgets_hold(budget, children, search, seed, samples, crossover, keep):
    config = FastConfig(
        children=children, samples=samples, rollout_budget=budget, search_budget=budget + search, crossover=crossover, keep_seed=keep
    )  # fmt: skip
    state = start()
    for cycle in range(3):
        world = World(lambda text, problem: 0.3, version=cycle, seed=seed)
        alone = set(state.population) == {state.seed_id}
        result = run(state, world, numbered(), config, cycle=cycle, seed=seed)
        assert world.rollouts <= (budget + search if alone else budget)
        state = result.state


def test_two_contexts_can_be_finished_at_the_end_if_that_is_at_most_half_of_what_is_left():
    assert reserve(Size(32, 2), 256) == 128
    assert reserve(Size(32, 2), 255) == 64
