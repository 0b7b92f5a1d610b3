"""The four cells: what is counted, who meets which context, and which cells are one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest

from fst_fast import evaluate as module
from fst_fast.config import Config, EvalConfig
from fst_fast.contracts import CELLS, Context, Problem, Rollout, ScoredRollout, Verdict
from fst_fast.evaluate import cell, evaluate, requests_of
from fst_fast.rollout.models import SamplingModels

SEED, A, B = Context.of("seed"), Context.of("a"), Context.of("b")
PROBLEMS = [Problem(str(i), [{"role": "user", "content": "?"}], None) for i in range(4)]


def sampled(problem: str, reward: float | None, context: str = "c") -> ScoredRollout:
    return ScoredRollout(
        Rollout(problem, context, 0, np.array([1]), np.zeros(1, np.float32), "stop", 0, 1.0),
        Verdict(reward),
        "",
    )


def test_the_configuration_allows_exactly_the_four_cells() -> None:
    field = EvalConfig.model_fields["cells"]
    (allowed,) = get_args(field.annotation)
    assert get_args(allowed) == tuple(CELLS)
    assert field.default == list(CELLS)


def test_a_cell_is_the_mean_over_problems_with_its_standard_error_and_pass_at_k() -> None:
    got = cell(
        [
            ("p", 1),
            ("p", 0),
            ("q", 0),
            ("q", 0),
            ("r", 1),
            ("r", 1),
        ],
        2,
    )
    assert got["mean"] == pytest.approx(0.5)
    assert got["stderr"] == pytest.approx(np.std([0.5, 0, 1], ddof=1) / np.sqrt(3))
    assert got["pass_at_k"] == pytest.approx(2 / 3)
    assert got["n"] == 3


def test_an_unjudged_sample_does_not_count_as_a_failure() -> None:
    assert cell([("p", 1), ("p", None)], 2)["mean"] == 1
    assert cell([("p", None)], 2)["n"] == 0


def test_evolved_contexts_take_turns_evenly_over_problems_and_samples() -> None:
    plan = requests_of(PROBLEMS, [A, B], 3)
    assert len(plan) == 12
    assert sum(c is A for c, _, _ in plan) == 6
    assert {(p.id, k) for _, p, k in plan} == {(p.id, k) for p in PROBLEMS for k in range(3)}
    assert {c.text for c, p, _ in plan if p.id == "0"} == {"a", "b"}


class RecordingSampler:
    """Answers reward 1 for the trained model, 0 for the base, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, frozenset[str]]] = []

    def spread(self, engine: str, plan: Sequence[Any], **how: Any) -> list[ScoredRollout]:
        assert how["paired"]
        self.asked.append((engine, frozenset(c.text for c, _, _ in plan)))
        return [sampled(p.id, float(engine == "policy"), c.id) for c, p, _ in plan]


@pytest.mark.parametrize(
    ("method", "version", "population", "asked"),
    [
        ("fst", 5, [A, B], [("base", "seed"), ("base", "a b"), ("policy", "seed"), ("policy", "a b")]),
        ("rl", 5, [SEED], [("base", "seed"), ("policy", "seed")]),
        ("gepa", 0, [A], [("base", "seed"), ("base", "a")]),
        ("fst", 0, [SEED], [("base", "seed")]),
    ],
)
def test_cells_that_are_one_by_construction_are_sampled_once(
    method: str,
    version: int,
    population: list[Context],
    asked: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "kl", lambda *_: 0.25)
    sampler: Any = RecordingSampler()
    models: Any = SamplingModels("policy", "base", "policy", None, None)  # type: ignore[arg-type]
    config = Config.model_validate({"method": method})
    got = evaluate(
        config, sampler, models, PROBLEMS, seed_context=SEED, population=population, policy_version=version
    )
    assert sampler.asked == [(engine, frozenset(texts.split())) for engine, texts in asked]
    assert list(got["channels"]) == ["neither", "context", "weights", "both"]
    trained = method != "gepa" and version > 0
    assert got["channels"]["both"]["mean"] == float(trained)
    assert got["kl_seed"] == (0.25 if trained else 0.0)


@pytest.mark.parametrize(
    ("method", "population", "cells", "asked", "kls", "measured"),
    [
        ("fst", [A, B], ["both"], [("policy", "a b")], ["a b"], (None, 0.25)),
        ("fst", [A, B], ["weights"], [("policy", "seed")], ["seed"], (0.25, None)),
        ("fst", [A, B], ["both", "neither"], [("base", "seed"), ("policy", "a b")], ["a b"], (None, 0.25)),
        ("fst", [A, B], ["context"], [("base", "a b")], [], (None, None)),
        ("rl", [SEED], ["both", "weights"], [("policy", "seed")], ["seed"], (0.25, 0.25)),
        ("gepa", [A, B], ["both"], [("base", "a b")], [], (None, 0.0)),
    ],
)
def test_only_the_cells_asked_for_are_sampled(
    method: str,
    population: list[Context],
    cells: list[str],
    asked: list[tuple[str, str]],
    kls: list[str],
    measured: tuple[float | None, float | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    under: list[str] = []

    def kl(config: Any, sampler: Any, models: Any, problems: Any, contexts: list[Context], version: int) -> float:  # fmt: skip
        under.append(" ".join(c.text for c in contexts))
        return 0.25

    monkeypatch.setattr(module, "kl", kl)
    sampler: Any = RecordingSampler()
    models: Any = SamplingModels("policy", "base", "policy", None, None)  # type: ignore[arg-type]
    got = evaluate(
        Config.model_validate({"method": method}), sampler, models, PROBLEMS, seed_context=SEED,
        population=population, policy_version=5, cells=cells,
    )  # fmt: skip
    assert sampler.asked == [(engine, frozenset(texts.split())) for engine, texts in asked]
    assert under == kls
    assert sorted(got["channels"]) == sorted(cells)
    assert (got["kl_seed"], got["kl_evolved"]) == measured


def measured(sampler: Any, memory: dict[str, dict[str, float]], population: list[Context]) -> dict[str, Any]:
    models: Any = SamplingModels("policy", "base", "policy", None, None)  # type: ignore[arg-type]
    return evaluate(
        Config(), sampler, models, PROBLEMS, seed_context=SEED, population=population, policy_version=0,
        base_rewards=memory,
    )  # fmt: skip


def test_what_the_base_model_scored_once_is_not_sampled_again() -> None:
    memory: dict[str, dict[str, float]] = {}
    first, again, moved = RecordingSampler(), RecordingSampler(), RecordingSampler()
    channels = measured(first, memory, [A, B])["channels"]
    assert first.asked == [("base", {"seed"}), ("base", {"a", "b"})]
    memory["seed"] = memory.pop(SEED.id)  # under a name that no context has
    memory[A.id]["0/0"] = 1.0
    changed = measured(again, memory, [A, B])["channels"]
    assert again.asked == [("base", {"seed"})]  # A and B are known
    assert changed["context"]["mean"] > channels["context"]["mean"] == 0.0
    assert set(memory) == {SEED.id, A.id, B.id}
    measured(moved, memory, [B, A])  # every sample now meets the other context
    assert moved.asked == [("base", {"a", "b"})]
    assert len(memory[A.id]) == len(PROBLEMS) * Config().eval.samples


def test_a_sample_that_could_not_be_judged_is_tried_again() -> None:
    memory: dict[str, dict[str, float]] = {}
    sampler: Any = RecordingSampler()
    sampler.spread = lambda engine, plan, **how: [sampled(p.id, None, c.id) for c, p, _ in plan]
    measured(sampler, memory, [SEED])
    assert memory == {}


def test_what_was_not_measured_is_none_and_rounding_is_no_spread() -> None:
    assert cell([("p", None), ("q", None)], 2) == {
        "mean": None,
        "stderr": None,
        "pass_at_k": None,
        "n": 0,
        "k": 2,
    }
    assert cell([], 1)["mean"] is None
    one = cell([("p", 0.5), ("p", 1.0)], 2)
    assert (one["mean"], one["stderr"], one["n"]) == (0.75, None, 1)
    same = cell([("p", 0.1 + 0.2), ("q", 0.3), ("r", 0.3)], 1)
    assert same["stderr"] == 0.0
    assert cell([("p", sum([0.1] * 10)), ("q", 0.999)], 1)["pass_at_k"] == 0.5
