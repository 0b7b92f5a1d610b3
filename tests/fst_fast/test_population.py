"""The per-problem front, admission, selection of K, and the state as JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fst_fast.contracts import Context
from fst_fast.fast import pareto
from fst_fast.fast.population import FastState, Lineage, Scores, ShownFailure

claim = settings(max_examples=60, deadline=None)  # no timing assertions

# few distinct values, so that ties are common; NaN = no judged sample
matrices = st.tuples(st.integers(1, 6), st.integers(1, 7)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.5, 1.0, np.nan]))
)


def select(scores, k, *, seed=None):
    """Selection with one sample per problem as scores."""
    return pareto.select(scores, scores[..., None], k, seed=seed)


def brute_wins(scores):
    """The definition, applied to one problem and one context at a time."""
    front = np.zeros(scores.shape, dtype=bool)
    for j in range(scores.shape[1]):
        known = [(s, i) for i, s in enumerate(scores[:, j]) if not np.isnan(s)]
        if len({s for s, _ in known}) < 2:
            continue
        best = max(s for s, _ in known)
        for s, i in known:
            front[i, j] = s == best
    return front


@claim
@given(matrices)
def test_the_front_holds_the_best_contexts_of_each_distinguishing_problem(scores):
    np.testing.assert_array_equal(pareto.wins(scores), brute_wins(scores))


def test_sums_in_another_order_still_tie():
    scores = np.array([[(0.1 + 0.2 + 0.3) / 3], [(0.3 + 0.2 + 0.1) / 3], [0.0]])
    assert scores[0] != scores[1]
    np.testing.assert_array_equal(pareto.wins(scores), [[True], [True], [False]])
    assert not pareto.wins(scores[:2]).any(), "nor do they distinguish"


@claim
@given(matrices)
def test_the_undominated_cover_every_won_problem_and_none_is_redundant(scores):
    front, standing = pareto.wins(scores), pareto.undominated(scores)
    assert (front[standing].any(axis=0) == front.any(axis=0)).all()
    if front.any():
        for row in np.flatnonzero(standing):
            others = standing.copy()
            others[row] = False
            assert (front[row] & ~front[others].any(axis=0)).any()


@claim
@given(matrices)
def test_parent_weights_are_the_shares_of_problems_won(scores):
    weights = pareto.parent_weights(scores)
    assert weights.sum() == pytest.approx(1)
    won = (brute_wins(scores) * pareto.undominated(scores)[:, None]).sum(axis=1)
    expected = won / won.sum() if won.sum() else np.full(len(scores), 1 / len(scores))
    np.testing.assert_allclose(weights, expected)


def test_a_problem_on_which_all_tie_adds_no_parent_weight():
    scores = np.array([[1.0, 1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0, 0.0]])
    np.testing.assert_allclose(pareto.parent_weights(scores), [2 / 3, 1 / 3])


@claim
@given(matrices, st.integers(1, 8), st.integers(0, 5))
def test_selection_keeps_exactly_k_with_the_best_mean_first_and_repeats_only_the_best(scores, k, seed):
    kept = select(scores, k, seed=seed if seed < len(scores) else None)
    assert len(kept) == k
    assert all(0 <= row < len(scores) for row in kept)
    distinct = list(dict.fromkeys(kept))
    assert kept == distinct + [kept[0]] * (k - len(distinct))
    means = pareto.row_means(scores)
    if not np.isnan(means).all():
        assert means[kept[0]] == pytest.approx(np.nanmax(means))


@claim
@given(matrices, st.integers(0, 5))
def test_with_enough_room_every_context_that_adds_two_problems_is_kept(scores, seed):
    front = brute_wins(scores)
    kept = select(scores, len(scores), seed=seed if seed < len(scores) else None)
    gains = (front & ~front[kept].any(axis=0)).sum(axis=1)
    assert (gains < pareto.CERTAIN_GAIN).all()


def test_the_seed_stays_while_it_alone_wins_a_problem_and_is_not_clearly_worse():
    # row 0 alone wins problem 0; row 2 has the better mean and wins two, but none of them alone
    close = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.5]])
    assert select(close, 2, seed=0) == [1, 0]
    assert select(close, 2) == [1, 2]
    far = np.hstack([close, np.array([[0.0], [1.0], [1.0]]).repeat(20, axis=1)])
    assert select(far, 2, seed=0) == [1, 2]


def test_an_unjudged_context_is_kept_while_there_is_room():
    scores = np.array([[0.5, 1.0], [np.nan, np.nan], [0.5, 0.0]])
    assert select(scores, 3) == [0, 1, 0]


def test_a_dominated_seed_is_not_kept_even_where_there_is_room():
    scores = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    assert select(scores, 4, seed=0) == [1, 2, 1, 1]


def test_greedy_cover_prefers_the_problems_that_the_kept_lack():
    scores = np.array(
        [
            [1.0, 1.0, 1.0, 1.0, 0.0, 0.0],  # best mean
            [1.0, 1.0, 1.0, 0.0, 0.0, 0.0],  # good, but adds nothing
            [0.0, 0.0, 0.0, 0.0, 1.0, 1.0],  # covers the rest
        ]
    )
    assert select(scores, 2) == [0, 2]
    assert select(scores, 3) == [0, 2, 1]


def test_a_clearly_worse_context_is_kept_for_two_problems_of_its_own_but_not_for_one():
    best = np.r_[np.ones(30), 0.0, 0.0]
    one, two = np.zeros(32), np.zeros(32)
    one[30] = two[30] = two[31] = 1
    assert select(np.stack([best, one]), 2) == [0, 0]
    assert select(np.stack([best, two]), 2) == [0, 1]


def test_one_lone_success_is_not_enough_but_two_are():
    parent = np.zeros((32, 2))
    one, two = parent.copy(), parent.copy()
    one[3, 0] = 1
    two[3, 0] = two[8, 1] = 1
    assert not pareto.admits(one, parent, 1.0)
    assert pareto.admits(two, parent, 1.0)
    assert pareto.admits(one, parent, 0.0)
    assert not pareto.admits(parent, parent, 0.0)


def test_the_bound_is_the_paired_mean_minus_z_standard_errors_over_problems():
    rng = np.random.default_rng(0)
    child, parent = rng.random((10, 3)), rng.random((10, 3))
    d = (child - parent).mean(axis=1)
    assert pareto.lower_bound(child, parent, 1.5) == pytest.approx(
        d.mean() - 1.5 * d.std(ddof=1) / np.sqrt(10)
    )


def test_unjudged_samples_are_no_samples():
    child = np.array([[1.0, np.nan], [1.0, 1.0], [np.nan, np.nan]])
    parent = np.array([[0.0, 1.0], [np.nan, 1.0], [0.0, 0.0]])
    # pairs: problem 0 sample 0 (+1), problem 1 sample 1 (0); problem 2 has none
    assert pareto.lower_bound(child, parent, 0.0) == pytest.approx(0.5)
    assert pareto.lower_bound(child, parent, 1.0) == pytest.approx(0.5 - 0.5)
    assert pareto.lower_bound(child[2:], parent[2:], 0.0) == -np.inf
    assert pareto.lower_bound(child[:1], parent[:1], 1.0) == -np.inf, "one problem has no standard error"


def cover_everything(scores, k):
    """Selection without thresholds: cover every won problem, then fill by mean."""
    front, order = pareto.wins(scores), [int(row) for row in np.argsort(-scores.mean(axis=1), kind="stable")]
    kept = order[:1]
    while len(kept) < k:
        gain = (front & ~front[kept].any(axis=0)).sum(axis=1)
        best = max(order, key=lambda row: gain[row])
        kept.append(best if gain[best] else next((row for row in order if row not in kept), kept[0]))
    return kept


@pytest.mark.parametrize(
    ("kinds", "better_by"),
    [
        # one is good
        ([(0.02, 0.02), (0.05, 0.05), (0.12, 0.12), (0.3, 0.3), (0.35, 0.35), (0.5, 0.5)], 0.05),
        # a rare specialist
        ([(0.0, 0.6), (0.8, 0.02), (0.0, 0.5), (0.0, 0.4), (0.0, 0.1), (0.1, 0.3), (0.02, 0.02)], 0.0),
    ],
)
def test_the_thresholds_keep_better_contexts_and_cover_as_much(kinds, better_by):
    rng = np.random.default_rng(11)
    difference = []
    for _ in range(200):
        # [C, 32]: first number: the rare kind of problem
        true = np.where(rng.random(32) < 0.15, *(np.array(kinds).T[..., None]))
        rewards = (rng.random((*true.shape, 2)) < true[..., None]).astype(float)
        scores = rewards.mean(axis=2)
        ours, plain = (
            true[rows] for rows in (pareto.select(scores, rewards, 4, seed=None), cover_everything(scores, 4))
        )
        difference.append((ours.mean() - plain.mean(), ours.max(axis=0).mean() - plain.max(axis=0).mean()))
    mean, covered = np.mean(difference, axis=0)
    assert mean > better_by
    assert covered > -0.005


def test_scores_of_another_policy_version_are_dropped():
    scores = Scores(3)
    scores.add("a", "p", 1.0)
    same, moved = scores.at_version(3), scores.at_version(4)
    same.add("a", "p", 0.0)
    assert same.cells == {"a": {"p": (2, 1.0)}}
    assert moved.cells == {}
    assert scores.cells == {"a": {"p": (1, 1.0)}}, "the old table is a value"


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
reals = st.floats(0, 1)


@st.composite
def states(draw):
    all_texts = draw(st.lists(texts, min_size=1, max_size=5, unique=True))
    contexts = [
        Context.of(t, parent=None if i == 0 else Context.of(all_texts[0]).id, born=i)
        for i, t in enumerate(all_texts)
    ]
    lineage = {
        c.id: Lineage(
            c,
            admitted=draw(st.booleans()),
            policy_version=draw(st.none() | st.integers(0, 9)),
            mean=draw(st.none() | reals),
            n=draw(st.integers(0, 99)),
            failures=tuple(draw(st.lists(st.builds(ShownFailure, texts, texts), max_size=2))),
            reflection=draw(texts),
        )
        for c in contexts
    }
    cells = {
        c.id: draw(st.dictionaries(texts, st.tuples(st.integers(1, 9), st.floats(0, 9)), max_size=3))
        for c in contexts
    }
    population = tuple(draw(st.lists(st.sampled_from(sorted(lineage)), min_size=1, max_size=4)))
    return FastState(
        contexts[0].id, population, lineage, Scores(draw(st.integers(-1, 9)), cells), draw(st.integers(0, 99))
    )


@claim
@given(states())
def test_the_state_survives_json_exactly(state):
    again = FastState.from_json(json.loads(json.dumps(state.to_json(), allow_nan=False)))
    assert again == state
    assert json.dumps(again.to_json()) == json.dumps(state.to_json())


def test_another_population_size_cuts_or_repeats_the_best():
    contexts = [Context.of(t) for t in "abc"]
    lineage = {c.id: Lineage(c, admitted=True) for c in contexts}
    a, b, c = (x.id for x in contexts)
    state = FastState(a, (b, a, b, c), lineage, Scores(0))
    assert [x.id for x in state.population_of(4)] == [b, a, b, c]
    assert [x.id for x in state.population_of(2)] == [b, a]
    assert [x.id for x in state.population_of(5)] == [b, a, c, b, b]
