"""Sampling ahead of training (rollout.ahead) on two processes, one of which samples: which weights sampled what, and what is left after kill -9."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.integration.crash import TINY, _fst, same, start_group, start_two, train_two, until
from tests.integration.launch import records

AHEAD = (
    "--rollout.ahead=1",
    "--rollout.sampler_ranks=1",
    "--fast.cycle_steps=4",
    "--slow.dynamic_sampling=1",
    "--fast.parents=front",
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead") / "run"
    codes, printed = train_two(folder, *AHEAD)
    assert codes == [0, 0], printed
    return folder


def test_each_step_trains_on_rollouts_of_the_weights_one_step_before(unbroken: Path) -> None:
    steps = records(unbroken, "step")
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    reused = [s["reused_rollouts"] for s in steps]
    assert reused[0] < reused[-1]  # of the fast phase, by weights that are as many steps old as the cycle is
    expected = []
    for i, before in enumerate([0, *reused[:-1]]):
        old = reused[i] - before
        n = 4 * steps[i]["groups"]
        expected.append((old * i + (n - old) * min(i, 1)) / n)
    assert [s["rollout_staleness"] for s in steps] == expected
    assert any(s["refill_groups"] for s in steps)
    assert any(s["grad_norm"] for s in steps)


FAULTS = (
    "optimiser:3:0",
    "rollout:60:1",
    "save.rename:2",
    "evaluation:2:1",
    "backward:2:0",
    "hand_over:4",
    "save.state:3",
    "verification:6:1",
)


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=() if i < 2 else pytest.mark.chaos) for i, f in enumerate(FAULTS)]
)
def test_a_run_with_a_killed_trainer_or_sampler_continues_bit_equal(
    fault: str, unbroken: Path, tmp_path: Path
) -> None:
    codes, printed = train_two(tmp_path / "run", *AHEAD, fault=fault, limit_s=60)
    assert sorted(codes) == [-signal.SIGKILL, 2], printed
    assert f"process {codes.index(-signal.SIGKILL)} has ended" in printed
    codes, printed = train_two(tmp_path / "run", *AHEAD, "--resume")
    assert codes == [0, 0], printed
    same(tmp_path / "run", unbroken)


@pytest.mark.chaos
def test_a_signal_to_the_sampler_alone_ends_the_step_and_saves(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    started = start_two(folder, *AHEAD, "--checkpoint.every=0")
    until(started[0][0], lambda: "step 1/4" in started[0][1].read_text())
    os.kill(started[1][0].pid, signal.SIGTERM)
    for child, printed in started:
        child.join()
        assert child.exitcode == 0, printed.read_text()
    assert "stopped after step" in started[0][1].read_text()
    codes, printed = train_two(folder, *AHEAD, "--checkpoint.every=0", "--resume")
    assert codes == [0, 0], printed
    same(folder, unbroken, but_for="config_hash")


@pytest.mark.chaos
def test_evaluations_and_checkpoints_do_not_change_what_is_trained(unbroken: Path, tmp_path: Path) -> None:
    codes, printed = train_two(tmp_path / "run", *AHEAD, "--eval.every=0", "--checkpoint.every=0")
    assert codes == [0, 0], printed
    assert records(tmp_path / "run", "step") == records(unbroken, "step")


@pytest.mark.chaos
def test_what_ends_the_sampling_is_said_by_the_trainer_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "shape.py").write_text(
        "import os\n"
        "def shape(problem, rollouts):\n"
        "    calls = os.environ['CALLS'] = str(int(os.environ.get('CALLS', '0')) + 1)\n"
        "    if os.environ['RANK'] == '1' and int(calls) > 2:\n"  # not in the first batch, which all sample
        "        raise ValueError('no reward today')\n"
        "    return [r.verdict.reward for r in rollouts]\n"
    )
    codes, printed = train_two(tmp_path / "run", *AHEAD, f"--slow.reward_shaping={tmp_path}/shape.py:shape")
    assert codes == [2, 2], printed
    first = [line for line in printed.splitlines() if line.startswith("fst: slow.reward_shaping")]
    assert len(first) == 1, printed
    assert "no reward today" in first[0]
    assert "Traceback" not in printed


@pytest.mark.chaos
@pytest.mark.parametrize("samplers", [1, 2])
def test_three_processes_take_the_steps_of_two(samplers: int, unbroken: Path, tmp_path: Path) -> None:
    """Two trainers under ZeRO 3 and one sampler, and one trainer and two samplers."""
    how = [*AHEAD, f"--rollout.sampler_ranks={samplers}", "--policy.zero_stage=3"]
    folder = tmp_path / "run"
    for child, printed in start_group(3, folder, _fst, ["train", "--run-dir", str(folder), *TINY, *how]):
        child.join()
        assert child.exitcode == 0, printed.read_text()
    steps, expected = records(folder, "step"), records(unbroken, "step")
    for name in ("reward", "rollouts", "reused_rollouts", "rollout_staleness"):
        assert [s[name] for s in steps] == [s[name] for s in expected]
    losses = [s["loss"] for s in expected]
    assert [s["loss"] for s in steps] == pytest.approx(losses, abs=1e-4)


@pytest.mark.chaos
def test_adapters_reach_the_sampler(tmp_path: Path) -> None:
    """A sampler whose weights differ from the trainer's ends the run (fst_fast/rollout/link.py)."""
    pytest.importorskip("peft")
    codes, printed = train_two(tmp_path / "run", *AHEAD, "--policy.lora.rank=4")
    assert codes == [0, 0], printed
    assert any(s["grad_norm"] for s in records(tmp_path / "run", "step"))
