"""Spikes of the gradient norm: seen against the steps before, and the same after a resume. The rate of tokens. A summary read back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fst_fast.contracts import Rollout, ScoredRollout, Verdict
from fst_fast.run.callbacks import Callback, Callbacks
from fst_fast.run.console import Console
from fst_fast.run.counters import Counters, Stopwatch
from fst_fast.run.folder import write_json
from fst_fast.run.liveness import Liveness
from fst_fast.run.recorder import (
    SPIKE_STEPS,
    Recorder,
    StepReport,
    deviation,
    grad_norm_spike,
    last_grad_norms,
    read_summary,
)
from fst_fast.slow.update import unmeasured


def test_a_norm_ten_times_the_median_is_a_spike_and_one_spike_hides_no_other() -> None:
    before = [1.0, 1.2, 0.9, 1.1, 50.0, 1.0, 0.8, 1.0]
    assert grad_norm_spike(before, 10.0) == 10.0
    assert grad_norm_spike(before, 9.9) is None
    assert grad_norm_spike([*before, 40.0], 10.0) == 10.0


def test_the_first_steps_and_steps_without_a_gradient_are_no_spikes() -> None:
    assert grad_norm_spike([1.0] * (SPIKE_STEPS // 4 - 1), 100.0) is None
    assert grad_norm_spike([1.0] * SPIKE_STEPS, None) is None
    assert grad_norm_spike([1.0] * SPIKE_STEPS, 0.0) is None


def test_the_norms_of_the_last_steps_are_read_back(tmp_path: Path) -> None:
    lines = [{"kind": "start"}, *({"kind": "step", "grad_norm": float(n)} for n in range(50))]
    lines[20:20] = [{"kind": "eval"}, {"kind": "step", "grad_norm": None}, {"kind": "step", "grad_norm": 0.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(last_grad_norms(tmp_path)) == [float(n) for n in range(50 - SPIKE_STEPS, 50)]


def test_a_median_of_nothing_is_no_measure_of_a_spike() -> None:
    assert grad_norm_spike([0.0] * SPIKE_STEPS, 3.0) is None
    assert grad_norm_spike([5e-324] * SPIKE_STEPS, 1e10) is None, "too many times to be a number"


@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7, 1.0, 1e-9])
@pytest.mark.parametrize("count", [3, 7, 96])
def test_equal_rewards_have_no_deviation_and_none_have_none(reward: float, count: int) -> None:
    assert deviation(count, sum([reward] * count), sum([reward * reward] * count)) == 0.0
    assert deviation(0, 0.0, 0.0) is None
    mixed = [reward, *[0.0] * count]
    expected = np.std(mixed)
    assert deviation(len(mixed), sum(mixed), sum(r * r for r in mixed)) == pytest.approx(expected, rel=1e-9)


def timing_of(sampled: int, reused: int, trained: int, tmp_path: Path) -> tuple[float | None, str]:
    """The rate of a step of 2 s, of responses of 5 tokens that are sampled and reused, and what the console says of it."""
    seen: list[Any] = []

    class Watch(Callback):
        def on_step(self, event: Any) -> None:
            seen.append(event.timing)

    rollout = Rollout("p", "c", 0, np.arange(5), np.zeros(5, np.float32), "stop", 3, 1.0)
    scored = [ScoredRollout(rollout, Verdict(1.0), "")] * (sampled + reused)
    report = StepReport(
        scored, [0.0] * len(scored), 1, 1, 0, 0, [], skipped=False, numbers=unmeasured(1e-3) | {"tokens": trained},
        reused=reused, reused_tokens=5 * reused, seconds=2.0, prompt_text=lambda _: "",
    )  # fmt: skip
    said = io.StringIO()
    recorder = Recorder(
        tmp_path, 0, 0, 1.0, Console(total_steps=9, stream=said), Callbacks([Watch()], tmp_path, is_main=True), Stopwatch(), Liveness(tmp_path, 0)
    )  # fmt: skip
    recorder.step(report, step=4, cycle=0, counters=Counters(), unverified={})
    return seen[0]["tokens_per_s"], said.getvalue()


def test_the_rate_of_a_step_counts_what_it_sampled_and_trained_on_and_nothing_reused(tmp_path: Path) -> None:
    assert timing_of(2, 3, 40, tmp_path)[0] == (10 + 40) / 2
    assert timing_of(0, 3, 40, tmp_path)[0] == 40 / 2


def test_a_step_that_sampled_and_trained_nothing_has_no_rate(tmp_path: Path) -> None:
    rate, said = timing_of(0, 3, 0, tmp_path)
    assert rate is None
    assert "step 4/9" in said
    assert "tokens/s" not in said


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"config_hash": HASH}', '{"config_hash": HASH, "channels": {"both": 1}}']
)
def test_a_summary_that_is_damaged_or_of_another_configuration_is_no_summary(
    damage: str, tmp_path: Path
) -> None:
    (tmp_path / "summary.json").write_text(damage.replace("HASH", '"h"'))
    assert read_summary(tmp_path, "h") is None
    write_json(tmp_path / "summary.json", {"config_hash": "h", "channels": {}})
    assert read_summary(tmp_path, "h") is not None
    assert read_summary(tmp_path, "other") is None
