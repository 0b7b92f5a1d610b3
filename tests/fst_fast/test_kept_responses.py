"""The engine keeps what an episode's earlier turns computed: the next turn computes the last sampled token and the observation."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fst_fast import distributed
from fst_fast.contracts import Rollout
from fst_fast.policy import trained
from fst_fast.rollout import decode
from fst_fast.rollout.engine import Request, RolloutEngine
from fst_fast.rollout.room import Room
from tests.fst_fast.agents import config_of, save_model

TURNS, SAMPLES, OBSERVED = 4, 6, 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    distributed.init()
    folder: Path = save_model(tmp_path_factory.mktemp("kept"), "qwen")
    return trained.load(config_of(folder, "none"))


def episodes(
    engine: RolloutEngine, *, keep: bool, forget: bool = False
) -> tuple[list[list[Rollout]], list[int]]:
    """The rollouts of every turn of a few episodes on one prompt, and the tokens computed in each turn."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 200, 40)
    read = [prompt] * SAMPLES
    turns, computed = [], []
    for turn in range(TURNS):
        before = engine.tokens_computed
        requests = [Request("p", "c", i, ids, 1000 * turn + i) for i, ids in enumerate(read)]
        turns.append(
            engine.generate(
                requests, max_response_tokens=12, temperature=1.0, policy_version=0, keep_responses=keep
            )
        )
        computed.append(engine.tokens_computed - before)
        observed = [rng.integers(0, 200, OBSERVED) for _ in read]
        read = [
            np.concatenate([r, x.response_ids, o]) for r, x, o in zip(read, turns[-1], observed, strict=True)
        ]
        if forget:
            engine.forget()
    return turns, computed


def make_engine(model: Any, **how: Any) -> RolloutEngine:
    return RolloutEngine(
        model, eos_ids=(256,), pad_id=256, max_batch=8, packing="forest", join_tokens=0, **how
    )


def test_a_turn_computes_neither_its_past_nor_the_response_again(model: Any) -> None:
    kept, computed = episodes(make_engine(model), keep=True)
    again, recomputed = episodes(make_engine(model), keep=False)
    alone, unshared = episodes(make_engine(model), keep=False, forget=True)
    for turn, (a, b, c) in enumerate(zip(kept, again, alone, strict=True)):
        for x, y, z in zip(a, b, c, strict=True):
            assert x.response_ids.tolist() == y.response_ids.tolist() == z.response_ids.tolist(), turn
            np.testing.assert_allclose(x.logprobs, z.logprobs, atol=1e-4)
    for turn in range(1, TURNS):
        read = sum(len(r.response_ids) for r in kept[turn - 1])
        new = SAMPLES * (OBSERVED + 1)  # the last sampled token was not fed yet
        assert recomputed[turn] - computed[turn] == read - SAMPLES
        assert computed[turn] - (recomputed[turn] - read - SAMPLES * OBSERVED) == new
    assert sum(unshared) > sum(recomputed) > sum(computed)


def test_what_is_kept_of_responses_in_pages_is_what_is_kept_of_whole_ones(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, computed = episodes(make_engine(model), keep=True)
    monkeypatch.setattr(decode, "room_for", lambda *_, **__: Room(8, 3, 4, 32))
    paged, same = episodes(make_engine(model), keep=True)
    assert same == computed
    for x, y in zip(chain(*whole), chain(*paged), strict=True):
        assert x.response_ids.tolist() == y.response_ids.tolist()
        np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-5)


def test_without_room_responses_are_not_kept_and_nothing_changes(model: Any) -> None:
    engine = make_engine(model)
    tight = make_engine(model, kv_bytes=engine.token_bytes() * 500)
    few, computed = episodes(tight, keep=True)
    many, less = episodes(engine, keep=True)
    assert [[r.response_ids.tolist() for r in turn] for turn in few] == [
        [r.response_ids.tolist() for r in turn] for turn in many
    ]
    assert sum(computed) > sum(less)


def test_a_response_that_waits_for_others_to_end_keeps_its_own_keys(model: Any) -> None:
    """Slots are refilled once a quarter is idle, so most responses here wait some steps before they are kept."""
    rng = np.random.default_rng(1)
    ends = tuple(range(0, 256, 16))

    def second_turn(keep: bool) -> list[Rollout]:
        engine = RolloutEngine(model, eos_ids=ends, pad_id=256, max_batch=32, packing="forest", join_tokens=0)

        def turn(prompts: list[Any], seed: int, keep: bool) -> list[Rollout]:
            requests = [Request("p", "c", i, ids, seed + i) for i, ids in enumerate(prompts)]
            return engine.generate(
                requests, max_response_tokens=24, temperature=1.0, policy_version=0, keep_responses=keep
            )

        first = turn([prompt] * 32, 0, keep)
        return turn([np.concatenate([prompt, r.response_ids, observed]) for r in first], 1000, False)

    prompt, observed = rng.integers(0, 200, 40), rng.integers(0, 200, OBSERVED)
    for kept, computed in zip(second_turn(True), second_turn(False), strict=True):
        assert kept.response_ids.tolist() == computed.response_ids.tolist()
        np.testing.assert_allclose(kept.logprobs, computed.logprobs, atol=1e-5)
