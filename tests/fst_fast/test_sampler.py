"""Sampler.local: responses are sent to the verifying children as soon as they end, and nothing depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fst_fast import mini
from fst_fast.config import Config
from fst_fast.contracts import Context, RolloutRequest, ScoredRollout
from fst_fast.policy.attention import load_model
from fst_fast.rollout.engine import RolloutEngine
from fst_fast.rollout.sampler import Sampler
from fst_fast.tasks.registry import load_task
from fst_fast.verify.pool import Judging


@pytest.fixture(scope="module")
def opened() -> Iterator[tuple[Sampler, RolloutEngine, list[RolloutRequest]]]:
    config = Config.model_validate(
        {
            "task_args": {"form": "mini", "arms": 5, "path": 4, "ids": 40},
            "rollout": {"max_response_tokens": 24},
        }
    )
    task: Any = load_task(config.task, config.task_args)
    problems = task.problems("train")[:4]
    requests = [RolloutRequest(Context.of("solve the problem ."), p, i) for p in problems for i in range(3)]
    with Sampler.open(config) as sampler:
        yield sampler, sampler.engine(load_model(mini.path(), "float32", attention="tree")), requests


def sample(sampler: Sampler, engine: RolloutEngine, requests: list[RolloutRequest]) -> list[ScoredRollout]:
    engine.forget()
    return sampler.local(engine, requests, stream=("test",), policy_version=0, temperature=1.0)


def test_verification_begins_before_sampling_ends_and_verdicts_are_the_same(
    opened: tuple[Sampler, RolloutEngine, list[RolloutRequest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, engine, requests = opened
    sampling, added = [False], []
    generate, add = engine.generate, Judging.add

    def generating(*given: Any, **named: Any) -> Any:
        sampling[0] = True
        out = generate(*given, **named)
        sampling[0] = False
        return out

    def adding(self: Judging, *item: Any) -> int:
        added.append(sampling[0])
        return add(self, *item)

    monkeypatch.setattr(engine, "generate", generating)
    monkeypatch.setattr(Judging, "add", adding)
    overlapped = sample(sampler, engine, requests)
    assert added == [True] * len(requests)

    monkeypatch.setattr(engine, "generate", lambda *given, watch, **named: generate(*given, **named))
    after = sample(sampler, engine, requests)
    assert added[len(requests) :] == [False] * len(requests)
    assert [(s.response, s.verdict) for s in after] == [(s.response, s.verdict) for s in overlapped]
    assert [s.rollout.response_ids.tolist() for s in after] == [
        s.rollout.response_ids.tolist() for s in overlapped
    ]


def test_a_response_that_ends_otherwise_the_second_time_is_judged_anew(
    opened: tuple[Sampler, RolloutEngine, list[RolloutRequest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory runs out and a wave is sampled once more."""
    sampler, engine, requests = opened
    generate = engine.generate

    def twice(*given: Any, watch: Any, **named: Any) -> Any:
        hot = generate(*given, watch=watch, **{**named, "temperature": 5.0})
        rollouts = generate(*given, watch=None, **named)
        assert any(
            a.response_ids.tolist() != b.response_ids.tolist() for a, b in zip(hot, rollouts, strict=True)
        )
        return rollouts

    plain = sample(sampler, engine, requests)
    monkeypatch.setattr(engine, "generate", twice)
    again = sample(sampler, engine, requests)
    assert [(s.response, s.verdict) for s in again] == [(s.response, s.verdict) for s in plain]
