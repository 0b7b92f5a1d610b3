"""Recorded and replayed decode steps: inputs reach the recording through fixed buffers, and a recording is valid until
its slots change.

Here a plain function stands in for the CUDA graph; the test at the end records on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

pytest.importorskip("transformers")  # scripts/gpu_check.sh loads this file on machines that may lack it

from fst_fast.rollout.graphs import EAGER_STEPS, StepGraph
from tests.fst_fast.test_rollout import assert_same, forest, make_model, padded, requests_of, sample


def recording(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    out = run().clone()

    def replay() -> None:
        out.copy_(run())

    out.fill_(float("nan"))  # as a graph's result is before it is replayed
    return replay, out


@pytest.mark.parametrize("fused", [True, False])
def test_repeated_steps_give_the_same_rollouts(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr("fst_fast.rollout.engine.unsupported_reason", lambda _: "the test says so")
    monkeypatch.setattr("fst_fast.rollout.graphs.look_at_values", lambda _: False)
    requests = requests_of(samples=1)
    said = sample(padded(make_model(attention="sdpa"), eos=()), requests, 150)
    graph = StepGraph(recording)
    engine = forest(make_model(), eos=(), max_batch=4, prefill_tokens=16, graph=graph)
    assert_same(sample(engine, requests, 150), said)
    assert graph.recorded == 4, "two fillings of the slots, and in each the suffixes outgrow 128 tokens"
    assert graph.replayed > 200


def test_short_runs_and_runs_with_value_checks_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = StepGraph(recording)
    sample(forest(make_model(), eos=(), graph=graph), requests_of(), 12)
    assert graph.recorded == 0, "on a CPU values are always looked at"
    monkeypatch.setattr("fst_fast.rollout.graphs.look_at_values", lambda _: False)
    sample(forest(make_model(), eos=(), graph=graph), requests_of(), EAGER_STEPS + 1)
    assert graph.recorded == 0
    sample(forest(make_model(), eos=(), graph=graph), requests_of(), EAGER_STEPS + 2)
    assert graph.recorded == 1
    graph = StepGraph(recording)
    monkeypatch.setattr("fst_fast.rollout.graphs.look_at_values", lambda _: True)
    sample(forest(make_model(), eos=(), graph=graph), requests_of(), 12)
    assert graph.recorded == 0


@pytest.mark.gpu
def test_on_a_gpu_a_recorded_step_gives_the_same_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FST_CHECK", raising=False)
    requests = requests_of(samples=4)
    model = make_model().cuda()
    said = sample(forest(model, eos=()), requests, 70)
    graph = StepGraph()
    assert_same(sample(forest(model, eos=(), graph=graph), requests, 70), said)
    assert graph.replayed > 20
