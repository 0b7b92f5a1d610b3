"""Expected response lengths, by which rollouts are dealt out to processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fst_fast import distributed
from fst_fast.contracts import Context, Problem, Rollout
from fst_fast.rollout import lengths
from fst_fast.rollout.lengths import ResponseLengths


def problem(name: str) -> Problem:
    return Problem(name, [{"role": "user", "content": name}], None)


def rollout(name: str, tokens: int) -> Rollout:
    return Rollout(name, "c", 0, np.zeros(tokens, np.int64), np.zeros(tokens, np.float32), "stop", 0, 1.0)


def test_a_problem_is_expected_to_be_as_long_as_its_last_responses_and_a_new_one_as_the_mean() -> None:
    known = ResponseLengths()
    assert known.expected([problem("a"), problem("b")]) == [1, 1]
    known.note([rollout("a", 10), rollout("b", 100), rollout("a", 30)])
    assert known.expected([problem("a"), problem("b"), problem("new")]) == [20, 100, 60]
    known.note([rollout("a", 0)])
    assert known.expected([problem("a")]) == [1]


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "REMEMBERED", 2)
    known = ResponseLengths({"a": 1.0, "b": 2.0})
    known.note([rollout("a", 5), rollout("c", 7)])
    assert known.known == {"a": 5.0, "c": 7.0}


def test_long_problems_are_dealt_to_different_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of eight groups have long responses: by count one process would get both."""
    from fst_fast.config import Config
    from fst_fast.slow import slow_phase
    from fst_fast.slow.groups import plan_group

    problems = [problem(f"p{i}") for i in range(8)]
    known = ResponseLengths({p.id: 10.0 for p in problems} | {"p0": 500.0, "p2": 500.0})
    dealt: dict[int, list[str]] = {}

    class Sampler:
        lengths = known

        def expected_tokens(self, problems: Any) -> list[int]:
            return self.lengths.expected(problems)

        def local(self, _: Any, requests: Any, **__: Any) -> list[Any]:
            dealt[distributed.rank()] = sorted({r.problem.id for r in requests})
            return []

    class Models:
        trained = None

    requests = [plan_group(p, [Context.of("c")], 2) for p in problems]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather", lambda mine: [mine])
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        with pytest.raises(StopIteration):  # no rollout came back
            slow_phase._sample_shard(
                requests,
                [[None, None]] * 8,
                config=Config(),
                step=0,
                policy_version=0,
                sampler=Sampler(),  # type: ignore[arg-type]
                models=Models(),  # type: ignore[arg-type]
            )
    assert ("p0" in dealt[0]) != ("p2" in dealt[0])
    assert sorted(dealt[0] + dealt[1]) == [p.id for p in problems]


def test_evaluations_leave_alone_how_training_is_dealt_out() -> None:
    from fst_fast.contracts import RolloutRequest, ScoredRollout, Verdict
    from fst_fast.rollout.sampler import Sampler

    sampler = object.__new__(Sampler)
    sampler.lengths = ResponseLengths({"a": 10.0})
    sampler.local = lambda engine, requests, **how: [  # type: ignore[method-assign]
        ScoredRollout(rollout(r.problem.id, 50), Verdict(1.0), "") for r in requests
    ]
    asked: Any = [RolloutRequest(Context.of("c"), problem("a"), 0)]
    sampler.spread(None, asked, remember=False)  # type: ignore[arg-type]
    assert sampler.lengths.known == {"a": 10.0}
    sampler.spread(None, asked)  # type: ignore[arg-type]
    assert sampler.lengths.known == {"a": 50.0}
