"""Advantage groups: one group per problem across contexts, population statistics, and the weights that make one denominator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_fast.contracts import Context, Problem, Rollout, ScoredRollout, Verdict
from fst_fast.slow.groups import advantages, cost, make_groups, plan_group, token_weights
from fst_fast.slow.update import sequences

PROBLEM = Problem("p", [{"role": "user", "content": "?"}], None)


def sampled(problem: str, reward: float | None, context: str = "c", tokens: int = 3) -> ScoredRollout:
    rollout = Rollout(problem, context, 0, np.arange(tokens), np.zeros(tokens, np.float32), "stop", 0, 1.0)
    return ScoredRollout(rollout, Verdict(reward), "")


def test_a_group_is_spread_evenly_over_the_contexts() -> None:
    a, b = Context.of("a"), Context.of("b")
    plan = plan_group(PROBLEM, [a, b], 6)
    assert [(c.text, k) for c, _, k in plan] == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]


def test_a_context_that_stands_twice_gets_new_samples_and_not_the_same_ones_again() -> None:
    a = Context.of("a")
    assert [k for _, _, k in plan_group(PROBLEM, [a, a], 4)] == [0, 1, 2, 3]


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=8))
def test_advantages_are_the_rewards_in_units_of_the_population_deviation(rewards: list[float]) -> None:
    got = advantages(rewards, 0.0)
    if len(set(rewards)) == 1:
        assert got is None
        return
    assert got is not None
    expected = (np.array(rewards) - np.mean(rewards)) / np.std(rewards)  # numpy's std is the population's
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert got.dtype == np.float32


def test_rollouts_of_one_problem_are_one_group_across_contexts() -> None:
    groups = make_groups([sampled("p", 1.0, "c1"), sampled("q", 0.0, "c1"), sampled("p", 0.0, "c2")], 1e-6)
    assert [(g.problem_id, len(g.members)) for g in groups] == [("p", 2), ("q", 1)]
    assert groups[0].advantages is not None
    np.testing.assert_allclose(groups[0].advantages, [1, -1], rtol=1e-5)
    assert groups[1].advantages is None


def test_within_a_context_rollouts_are_compared_with_each_other_alone() -> None:
    rewards = [1.0, 0.0, 1.0, 1.0]
    judged = [sampled("p", r, c) for r, c in zip(rewards, ["a", "a", "b", "b"], strict=True)]
    [group] = make_groups(judged, 1e-6, by_context=True)
    assert group.advantages is not None
    np.testing.assert_allclose(group.advantages, [1, -1, 0, 0], rtol=1e-5)
    [alike] = make_groups([sampled("p", 1.0, "a"), sampled("p", 0.0, "b")] * 2, 1e-6, by_context=True)
    assert alike.advantages is None, "across contexts they differ, within each they do not"


def test_an_unjudged_rollout_is_no_sample_and_not_a_zero() -> None:
    [group] = make_groups([sampled("p", 1.0), sampled("p", None), sampled("p", 1.0)], 1e-6)
    assert len(group.members) == 2
    assert group.advantages is None  # with a 0 in the place of None there would be variance
    [empty] = make_groups([sampled("p", None)], 1e-6)
    assert empty.members == []
    assert empty.advantages is None


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("problem", [0.5 / 4, 0.5 / 4, 0.5 / 6, 0.5 / 6]),  # 1 + 3 and 2 + 4 tokens, two problems
        ("token", [1 / 10] * 4),
        ("sequence", [1 / 4, 1 / 12, 1 / 8, 1 / 16]),
    ],
)
def test_token_weights_over_their_sum_are_the_mean_that_is_named(
    aggregation: str, expected: list[float]
) -> None:
    groups = make_groups(
        [
            sampled("p", 1, tokens=1),
            sampled("p", 0, tokens=3),
            sampled("q", 1, tokens=2),
            sampled("q", 0, tokens=4),
        ],
        1e-6,
    )
    weights, denominator = token_weights(groups, aggregation)
    flat = [w / denominator for group in weights for w in group]
    np.testing.assert_allclose(flat, expected)
    lengths = [1, 3, 2, 4]
    assert sum(w * n for w, n in zip(flat, lengths, strict=True)) == pytest.approx(1)


def test_the_cost_of_a_group_counts_every_prompt_once_and_every_response() -> None:
    [group] = make_groups(
        [sampled("p", 1.0, "a"), sampled("p", 0.0, "a", tokens=5), sampled("p", 1.0, "b")], 1e-6
    )
    length = {"a": 10, "b": 30}
    assert cost(group, lambda rollout: np.zeros(length[rollout.context_id], np.int64)) == 10 + 30 + 3 + 5 + 3


@pytest.mark.parametrize(
    "rewards",
    [
        [0.1 + 0.2, 0.3],
        [0.7 + 0.1, 0.8, 0.8, 0.2 * 4],
        [float(np.float32(0.1) + np.float32(0.2)), 0.3, 0.3],  # a grader that computes in float32
        [1.0, sum([0.1] * 10)],
        [0.0, 0.1 + 0.2 - 0.3],  # what a subtraction leaves
        [3e-9, 3e-9 * (1 + 2e-16)],
    ],
)
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-20])
def test_a_spread_at_the_level_of_rounding_is_no_variance(rewards: list[float], eps: float) -> None:
    assert advantages(rewards, eps) is None
    judged = [sampled("p", r, "a") for r in rewards] + [sampled("p", 1.0, "b"), sampled("p", 0.0, "b")]
    [group] = make_groups(judged, eps, by_context=True)
    assert group.advantages is not None
    assert not group.advantages[: len(rewards)].any(), "within their context they are alike"


@pytest.mark.parametrize("rewards", [[0.3, 0.300001], [1e-8, 2e-8], [0.0, 1e-12], [0.999999, 1.0]])
def test_a_small_difference_that_is_no_rounding_counts(rewards: list[float]) -> None:
    got = advantages(rewards, 0.0)
    assert got is not None
    np.testing.assert_allclose(got, [-1, 1], rtol=1e-5)


@pytest.mark.parametrize(
    ("aggregation", "lengths", "weights", "denominator"),
    [
        ("sequence", [4, 0, 2], [0.25, 0.0, 0.5], 2),
        ("sequence", [0, 0], [0.0, 0.0], 0),
        ("problem", [0, 0, 0], [0.0, 0.0, 0.0], 0),
        ("problem", [0, 5], [0.2, 0.2], 1),
        ("token", [0, 0], [1.0, 1.0], 0),
    ],
)
def test_what_has_no_token_has_weight_zero_and_is_not_counted(
    aggregation: str, lengths: list[int], weights: list[float], denominator: float
) -> None:
    [group] = make_groups([sampled("p", float(i == 0), tokens=n) for i, n in enumerate(lengths)], 1e-6)
    assert token_weights([group], aggregation) == ([weights], denominator)


@pytest.mark.parametrize("aggregation", ["problem", "token", "sequence"])
def test_an_empty_response_becomes_no_sequence_and_the_weights_of_the_others_sum_to_one(
    aggregation: str,
) -> None:
    empty = make_groups([sampled("e", 1.0, tokens=0), sampled("e", 0.0, tokens=0)], 1e-6)
    mixed = make_groups([sampled("p", 1.0, tokens=3), sampled("p", 0.0, tokens=0)], 1e-6)
    prompts = [[np.array([1, 2])] * 2] * 2
    data = sequences([*empty, *mixed], prompts, aggregation)
    assert [len(leaf.response_ids) for leaf in data.leaves] == [3]
    assert data.start.tolist() == [0]
    np.testing.assert_allclose(data.weights.sum(), 1.0, rtol=1e-6)
    nothing = sequences(empty, prompts[:1], aggregation)
    assert not nothing.leaves
    assert not len(nothing.weights)
