"""The state of a run survives JSON exactly, and the data stream follows from seed and step alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fst_fast.contracts import Context, Problem, Rollout, ScoredRollout, Verdict
from fst_fast.data.stream import anchor_set, lookahead, minibatch
from fst_fast.errors import UserError
from fst_fast.fast.population import FastState, Scores
from fst_fast.rollout.reuse import ReusePool
from fst_fast.run.counters import Counters
from fst_fast.state import State

PROBLEMS = [Problem(str(i), [{"role": "user", "content": "?"}], None) for i in range(10)]


def test_a_state_comes_back_from_its_file_exactly(tmp_path: Path) -> None:
    logprobs = np.log(np.random.default_rng(0).random(5)).astype(np.float32)
    rollout = Rollout("3", "c", 1, np.array([5, 2, 7, 7, 1]), logprobs, "stop", 4, 1.0)
    state = State(
        fast=FastState.initial("seed"),
        population=[Context.of("a", parent="x", born=2), Context.of("seed")],
        step=7,
        cycle=2,
        counters=Counters(1, 2, 3, 4, 5),
        reusable=ReusePool([ScoredRollout(rollout, Verdict(0.5, "so so", {"m": 1.0}), "text")]),
        base_rewards={"c": {"p/0": 0.1}},
        date="2026-02-28T23:59:58",
        data=[{"train": {"problems": 3, "hashed": 3, "sha256": "ab"}}],
    )
    state.save(tmp_path / "state.json")
    again = State.load(tmp_path / "state.json")
    assert (again.step, again.cycle, again.counters, again.population) == (
        7,
        2,
        state.counters,
        state.population,
    )
    assert again.fast.to_json() == state.fast.to_json()
    assert again.base_rewards == state.base_rewards
    assert again.date == state.date
    assert again.data == state.data
    [s] = again.reusable.rollouts
    assert s.verdict == state.reusable.rollouts[0].verdict
    assert s.rollout.logprobs.dtype == np.float32
    np.testing.assert_array_equal(s.rollout.logprobs, logprobs)
    np.testing.assert_array_equal(s.rollout.response_ids, rollout.response_ids)


def test_a_state_of_an_earlier_version_has_no_fingerprint_and_a_damaged_one_is_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state.json"
    State(FastState.initial("seed"), []).save(path)
    tree = json.loads(path.read_text())
    del tree["data"]
    path.write_text(json.dumps(tree))
    assert State.load(path).data is None
    for damage in (7, [7], [{"train": 7}], [{"train": {"sha256": "a"}}]):
        path.write_text(json.dumps({**tree, "data": damage}))
        with pytest.raises(UserError, match="is not the state of a run"):
            State.load(path)


def test_what_was_measured_on_old_data_is_dropped_and_the_contexts_stay() -> None:
    rollout = Rollout("3", "c", 1, np.array([5]), np.zeros(1, np.float32), "stop", 0, 1.0)
    fast = FastState.initial("seed")
    fast = replace(fast, scores=Scores(0, {fast.seed_id: {"p": (2, 1.0)}}), cycle=3)
    state = State(fast, [Context.of("seed")], reusable=ReusePool([ScoredRollout(rollout, Verdict(1.0), "")]))
    state.base_rewards = {"c": {"p/0": 0.1}}
    state.forget_data()
    assert not state.base_rewards
    assert not state.reusable.rollouts
    assert not state.fast.scores.at_version(0).cells, (
        "with frozen weights scores are kept from cycle to cycle"
    )
    assert (state.fast.cycle, state.fast.contexts) == (3, fast.contexts)


def test_a_state_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99; this version reads 2"):
        State.load(tmp_path / "state.json")


def test_an_epoch_shows_every_problem_once_and_the_next_in_another_order() -> None:
    first = [p.id for step in range(5) for p in minibatch(PROBLEMS, step, 2, seed=0)]
    second = [p.id for step in range(5, 10) for p in minibatch(PROBLEMS, step, 2, seed=0)]
    assert sorted(first) == sorted(second) == sorted(p.id for p in PROBLEMS)
    assert first != second
    assert first == [p.id for step in range(5) for p in minibatch(PROBLEMS, step, 2, seed=0)]
    assert first != [p.id for step in range(5) for p in minibatch(PROBLEMS, step, 2, seed=1)]


def test_a_batch_larger_than_the_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"problems_per_step=11 is more than the 10 problems"):
        minibatch(PROBLEMS, 0, 11, seed=0)


def test_the_lookahead_is_the_union_of_the_next_minibatches_and_anchors_come_from_it() -> None:
    ahead = lookahead(PROBLEMS, 4, 3, 2, seed=0)  # crosses an epoch
    batches = [p.id for t in range(3) for p in minibatch(PROBLEMS, 4 + t, 2, seed=0)]
    assert [p.id for p in ahead] == list(dict.fromkeys(batches))
    anchors = anchor_set(ahead, 3, cycle=1, seed=0)
    assert len({p.id for p in anchors}) == 3
    assert {p.id for p in anchors} <= {p.id for p in ahead}
    assert anchor_set(ahead, 99, cycle=1, seed=0) == ahead
    draws = {tuple(p.id for p in anchor_set(ahead, 3, cycle=c, seed=0)) for c in range(8)}
    assert len(draws) > 1


def test_a_state_without_a_date_is_read_and_one_with_nonsense_for_it_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    State(fast=FastState.initial("seed"), population=[Context.of("seed")]).save(file)
    tree = json.loads(file.read_text())
    del tree["date"]
    file.write_text(json.dumps(tree))
    assert State.load(file).date == ""
    file.write_text(json.dumps({**tree, "date": "yesterday"}))
    with pytest.raises(UserError, match="not the state of a run"):
        State.load(file)
