"""The statistics of experiments on known answers: intervals, ceilings, paired tests, power, costs to reach a level."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from fst_fast.experiments import statistics
from fst_fast.experiments.curves import Curve


def test_a_level_is_reached_at_an_evaluation_after_the_base_or_never() -> None:
    reward = np.array([0.3, 0.0, 0.5, 0.4])
    curve = Curve("rl", 0, {"tokens": np.array([0.0, 5.0, 10.0, 20.0])}, reward, reward, reward, {})
    assert curve.cost_to_reach("tokens", 0.25) == 10.0
    assert curve.cost_to_reach("tokens", 0.0) == 5.0
    assert curve.cost_to_reach("tokens", 0.6) == np.inf


@given(st.lists(st.floats(-5, 5) | st.just(np.inf), min_size=1, max_size=50))
def test_quantiles_are_the_ranks_that_the_published_results_were_computed_with(values: list[float]) -> None:
    ordered = sorted(values)
    n = len(ordered)
    low, high = ordered[int(0.025 * (n - 1))], ordered[int(np.ceil(0.975 * (n - 1)))]
    assert statistics.percentiles(np.array(values)) == (low, high)
    assert statistics.median(np.array(values)) == ordered[(n - 1) // 2]


def test_the_draws_of_a_bootstrap_are_those_of_the_published_results() -> None:
    values, rng = np.array([0.2, np.inf, 0.3, 0.9, 0.1]), np.random.default_rng(0)
    drawn = sorted(sorted(values[rng.integers(5, size=5)])[2] for _ in range(statistics.DRAWS))
    found = statistics.bootstrap(values.tolist(), statistics.median)
    assert (found.low, found.value, found.high) == (drawn[49], 0.3, drawn[1950])
    assert found.high == np.inf


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9))
def test_an_interval_holds_its_figure_and_lies_within_the_values(values: list[float]) -> None:
    found = statistics.bootstrap(values, statistics.median)
    assert min(values) <= found.low <= found.value <= found.high <= max(values)


def test_never_is_a_value_and_nan_is_none() -> None:
    found = statistics.bootstrap([0.2, 0.3, np.inf, np.inf, np.inf], statistics.median)
    assert found.value == found.high == np.inf
    assert found.text().startswith("never")
    assert found.json()["value"] is None
    with pytest.raises(ValueError, match="no NaN"):
        statistics.bootstrap([0.1, np.nan], statistics.mean)


def test_the_interval_of_a_mean_is_about_two_standard_errors_wide() -> None:
    values = np.random.default_rng(1).normal(size=200).tolist()
    found = statistics.bootstrap(values, statistics.mean)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * statistics.standard_error(values), rel=0.1)


def sigmoid(x: np.ndarray, top: float, mid: float) -> np.ndarray:
    return top / (1 + (mid / np.maximum(x, 1e-9)) ** 2.0)


@pytest.fixture
def few_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "FIT_DRAWS", 20)


def test_ceilings_are_found_and_told_apart(few_fits: None) -> None:
    x, rng = np.arange(0, 126, 6.0), np.random.default_rng(0)
    high = [(x, sigmoid(x, 0.9, 20) + rng.normal(0, 0.02, len(x))) for _ in range(5)]
    low = [(x, sigmoid(x, 0.6, 30) + rng.normal(0, 0.02, len(x))) for _ in range(5)]
    found = statistics.ceiling_difference(high, low)
    assert found is not None
    a, b, difference = found
    assert a.value == pytest.approx(0.9, abs=0.05)
    assert b.value == pytest.approx(0.6, abs=0.05)
    assert difference.low > 0.2
    same = statistics.ceiling_difference(high, [(x, y.copy()) for x, y in high[::-1]])
    assert same is not None
    assert same[2].low <= 0 <= same[2].high
    flat = [(x, np.zeros_like(x))] * 5
    assert statistics.ceiling_difference(high, flat) is None, "what never moved has no ceiling"


@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=1, max_size=8))
def test_the_sign_flip_test_counts_the_sign_patterns_that_are_as_extreme(values: list[float]) -> None:
    patterns = [
        sum(s * x for s, x in zip(signs, values, strict=True))
        for signs in itertools.product([1, -1], repeat=len(values))
    ]
    extreme = sum(abs(p) >= abs(sum(values)) - 1e-9 for p in patterns)
    assert statistics.sign_flip_test(values) == pytest.approx(extreme / len(patterns))
    with pytest.raises(ValueError, match="at most 20"):
        statistics.sign_flip_test([0.1] * 21)


def test_the_seeds_needed_give_the_power_that_simulated_tests_have() -> None:
    assert [statistics.seeds_needed(0.2, d) for d in (0.1, 0.2, 0.3)] == [34, 10, 6]  # of the usual tables
    rng = np.random.default_rng(0)
    n = statistics.seeds_needed(1.0, 0.8)
    assert n is not None
    x = rng.normal(0.8, 1.0, (20_000, n))
    t = x.mean(axis=1) / (x.std(axis=1, ddof=1) / np.sqrt(n))
    assert 0.8 <= (np.abs(t) > scipy.stats.t.ppf(0.975, n - 1)).mean() + 0.01 < 0.86
    assert statistics.seeds_needed(1.0, 0.01) is None
    assert statistics.seeds_needed(float("inf"), 0.5) is None
    assert statistics.seeds_needed(0.0, 0.1) == 2


def test_the_mean_reward_on_the_way_is_that_of_the_last_evaluation_before_each_point() -> None:
    reward = np.array([0.0, 0.5, 1.0])
    curve = Curve("rl", 0, {"tokens": np.array([0.0, 10.0, 20.0])}, reward, reward, reward, {})
    assert curve.mean_reward("tokens", 20.0) == pytest.approx(0.25)
    assert curve.mean_reward("tokens", 40.0) == pytest.approx((10 * 0.5 + 20 * 1.0) / 40)
    assert curve.mean_reward("tokens", 5.0) == 0.0
