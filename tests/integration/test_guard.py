"""NaN and Inf never reach the weights: the run stops or leaves the batch out, dumps it, and `fst replay` repeats the step."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.integration.crash import LAST, fst, same, train, train_two
from tests.integration.launch import records

BAD = 2  # the step, from 1, whose batch is spoilt
WEIGHTS = "model/model.safetensors"


def spoil() -> None:
    """Token weights so large that the loss of step BAD, every term of it finite, is not."""
    from fst_fast.slow import slow_phase

    sequences, calls = slow_phase.sequences, itertools.count(1)

    def spoilt(*given):
        data = sequences(*given)
        if next(calls) == BAD:
            data.weights[:] = 3e38
        return data

    slow_phase.sequences = spoilt


def spoil_advantages() -> None:
    """A NaN where an advantage was, before any forward pass."""
    from fst_fast.slow import slow_phase

    sequences, calls = slow_phase.sequences, itertools.count(1)

    def spoilt(*given):
        data = sequences(*given)
        if next(calls) == BAD:
            data.advantages[:3] = np.nan
        return data

    slow_phase.sequences = spoilt


def spoil_logprobs() -> None:
    """An Inf where the log-prob of a sampled token was."""
    from fst_fast.slow import slow_phase

    sequences, calls = slow_phase.sequences, itertools.count(1)

    def spoilt(*given):
        data = sequences(*given)
        if next(calls) == BAD:
            data.behaviour[0] = -np.inf
        return data

    slow_phase.sequences = spoilt


def spoil_rewards() -> None:
    """A NaN where a reward was: what a verifying child would have to smuggle past two checks."""
    from fst_fast.slow import slow_phase

    make_groups, calls = slow_phase.make_groups, itertools.count(1)

    def spoilt(sampled, eps, **how):
        if next(calls) == BAD:
            sampled = [
                dataclasses.replace(s, verdict=dataclasses.replace(s.verdict, reward=float("nan")))
                for s in sampled
            ]
        return make_groups(sampled, eps, **how)

    slow_phase.make_groups = spoilt


def empty() -> None:
    """No sequence at all in the batch of step BAD, which moves no weight."""
    from fst_fast.slow import slow_phase

    sequences, calls = slow_phase.sequences, itertools.count(1)

    def emptied(groups, prompts, *how):
        return sequences(groups, prompts, *how) if next(calls) != BAD else sequences([], [], *how)

    slow_phase.sequences = emptied


def spoil_weights() -> None:
    """The weights are NaN after the first step."""
    from fst_fast.policy.trained import TrainedPolicy

    hand_over = TrainedPolicy.hand_over

    def spoilt(self):
        next(self.module.parameters()).data.fill_(float("nan"))
        hand_over(self)

    TrainedPolicy.hand_over = spoilt


def test_a_step_with_nan_stops_before_the_weights_and_is_replayed_to_the_same_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, printed = train(folder, hook=spoil)
    assert code == 2, printed
    [line] = re.findall(r"^fst: .*$", printed, re.MULTILINE)
    assert re.match(
        r"fst: step 1: 1 process\(es\) with a non-finite loss, \d+ non-finite gradients; the weights were not",
        line,
    )
    assert [s["step"] for s in records(folder, "step")] == [1]
    dump = folder / "dumps" / "step-000001"
    assert str(dump) in line
    assert {p.suffix for p in dump.rglob("*") if p.is_file()} <= {".safetensors", ".json", ".yaml"}
    saved = folder / "checkpoints" / "step-000001" / WEIGHTS
    assert (dump / WEIGHTS).read_bytes() == saved.read_bytes()
    tree = json.loads((dump / "dump.json").read_text())
    assert all(0 <= s["reward"] <= 1 for s in tree["sequences"][0])

    code, printed = fst("replay", str(dump), printed=tmp_path / "replay.out")
    assert code == 0, printed
    lines = printed.splitlines()
    assert lines[-1] == "the same numbers"
    assert any(re.fullmatch(r"micro-batch 0: loss (nan|-?inf), dumped as \1", line) for line in lines), lines

    code, printed = train(folder, "--resume")
    assert code == 0, printed
    train(tmp_path / "unbroken")
    same(folder, tmp_path / "unbroken")


def test_a_step_of_adapters_is_replayed_from_the_dumped_ones(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    code, printed = train(tmp_path / "run", "--policy.lora.rank=4", hook=spoil)
    assert code == 2, printed
    dump = tmp_path / "run/dumps/step-000001"
    assert (dump / "adapter" / "adapter_model.safetensors").is_file()
    code, printed = fst("replay", str(dump), printed=tmp_path / "replay.out")
    assert code == 0, printed
    assert printed.splitlines()[-1] == "the same numbers"


@pytest.mark.parametrize("stage", [0, *(pytest.param(s, marks=pytest.mark.chaos) for s in (1, 2, 3))])
def test_a_step_left_out_is_counted_and_changes_nothing_that_follows(stage: int, tmp_path: Path) -> None:
    more = ("--on_nonfinite=skip", f"--policy.zero_stage={stage}")
    code, printed = train(tmp_path / "skipped", *more, hook=spoil)
    assert code == 0, printed
    train(tmp_path / "empty", *more, hook=empty)
    skipped, emptied = (records(tmp_path / name, "step") for name in ("skipped", "empty"))
    assert [s["skipped_steps"] for s in skipped] == [0, 1, 1, 1]
    assert skipped[1]["loss"] is skipped[1]["grad_norm"] is None
    for one, other in zip(skipped[2:], emptied[2:], strict=True):
        assert {**one, "skipped_steps": 0} == other
    weights = [(tmp_path / name).joinpath(*LAST).read_bytes() for name in ("skipped", "empty")]
    assert weights[0] == weights[1]
    assert (tmp_path / "skipped" / "dumps" / "step-000001" / "dump.json").is_file()


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        (spoil_advantages, "0 non-finite log-probs of sampled tokens, 3 tokens with a non-finite advantage"),
        (spoil_logprobs, "1 non-finite log-probs of sampled tokens, 0 tokens with a non-finite advantage"),
        (spoil_rewards, r"0 non-finite log-probs of sampled tokens, \d+ tokens with a non-finite advantage"),
    ],
)
def test_a_non_finite_number_is_found_before_the_forward_pass(
    hook: Callable[[], None], reason: str, tmp_path: Path
) -> None:
    code, printed = train(tmp_path / "run", hook=hook)
    assert code == 2
    assert re.search(f"step 1: {reason}", printed)
    code, printed = fst("replay", str(tmp_path / "run/dumps/step-000001"), printed=tmp_path / "replay.out")
    assert printed.splitlines()[-1] == "the same numbers"


@pytest.mark.chaos
def test_weights_that_are_nan_are_one_sentence_at_the_next_rollout(tmp_path: Path) -> None:
    code, printed = train(tmp_path / "run", hook=spoil_weights)
    assert code == 2
    [line] = re.findall(r"^fst: .*$", printed, re.MULTILINE)
    assert "the model gave NaN or Inf logits" in line
    assert "Traceback" not in printed


def test_what_is_no_dump_is_one_sentence(tmp_path: Path) -> None:
    code, printed = fst("replay", str(tmp_path), printed=tmp_path / "out")
    assert code == 2
    assert printed.startswith(
        f"fst: {tmp_path} is not a whole dump of a step, such as RUN/dumps/step-000012 ("
    )
    assert printed.count("\n") == 1


@pytest.mark.chaos
def test_a_step_of_two_processes_is_dumped_whole_and_replayed_on_one(tmp_path: Path) -> None:
    codes, printed = train_two(tmp_path / "run", "--policy.zero_stage=1", hook=spoil)
    assert codes == [2, 2], printed
    dump = tmp_path / "run/dumps/step-000001"
    assert {p.name for p in dump.glob("rank-*")} == {"rank-0.safetensors", "rank-1.safetensors"}
    code, printed = fst("replay", str(dump), printed=tmp_path / "replay.out")
    assert code == 0
    assert re.search(r"^micro-batch 0: loss (nan|-?inf), dumped as \1$", printed, re.MULTILINE), printed
