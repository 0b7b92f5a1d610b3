"""kill -9 anywhere, then --resume: metrics and weights are those of an unbroken run, bit by bit.

A sample of the points is in `make runs`, all of them in `make chaos` (marker `chaos`).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fst_fast.run import faults
from tests.integration.crash import TINY, same, start, start_two, train, train_two, until
from tests.integration.launch import REPO, one_thread, records

SAMPLE = ("fast.end", "rollout", "optimiser", "save.model", "save.rename")
# Where the run is when it is killed: with nothing saved, between two checkpoints, and at its end. `turn` is in test_agents.py.
WHEN = {
    "fast.wave": 4, "reflection": 2, "fast.end": 1, "rollout": 150, "verification": 9, "backward": 2, "optimiser": 3, "hand_over": 1,
    "metrics": 6, "evaluation": 2, "save.begin": 2, "save.engine": 1, "save.state": 3, "save.model": 2, "save.manifest": 4,
    "save.rename": 1, "save.latest": 4, "save.cleanup": 2, "summary": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    code, printed = train(folder)
    assert code == 0, printed
    return folder


def test_a_run_is_killed_at_every_point() -> None:
    assert {*WHEN, "turn"} == set(faults.POINTS)


def all_points() -> list[object]:
    return [pytest.param(point, marks=() if point in SAMPLE else pytest.mark.chaos) for point in WHEN]


@pytest.mark.parametrize("point", all_points())
def test_a_run_killed_at_this_point_continues_bit_equal(point: str, unbroken: Path, tmp_path: Path) -> None:
    code, printed = train(tmp_path / "run", fault=f"{point}:{WHEN[point]}")
    assert code == -signal.SIGKILL, printed
    code, printed = train(tmp_path / "run", "--resume")
    assert code == 0, printed
    same(tmp_path / "run", unbroken)


@pytest.mark.chaos
def test_a_run_that_is_killed_again_and_again_ends_bit_equal(unbroken: Path, tmp_path: Path) -> None:
    code, _ = train(tmp_path / "run", fault="hand_over:2")
    for fault in ("save.begin:1", "rollout:20", "save.latest:1", "save.cleanup:1", "summary:1"):
        assert code == -signal.SIGKILL
        code, printed = train(tmp_path / "run", "--resume", fault=fault)
    assert code == -signal.SIGKILL
    code, printed = train(tmp_path / "run", "--resume")
    assert code == 0, printed
    same(tmp_path / "run", unbroken)


@pytest.fixture(scope="module")
def unbroken_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    codes, printed = train_two(folder)
    assert codes == [0, 0], printed
    return folder


def faults_of_two() -> list[object]:
    """Every point, and some where one process alone is killed."""
    when = {**WHEN, "rollout": 60}  # each process samples half
    alone = ["backward:2:1", "evaluation:2:1", "hand_over:3:0"]
    return [
        pytest.param(fault, marks=() if fault.startswith("save.engine") else pytest.mark.chaos)
        for fault in [*(f"{point}:{when[point]}" for point in WHEN), *alone]
    ]


@pytest.mark.parametrize("fault", faults_of_two())
def test_a_run_on_two_processes_continues_bit_equal(fault: str, unbroken_two: Path, tmp_path: Path) -> None:
    codes, printed = train_two(tmp_path / "run", fault=fault, limit_s=60)
    assert -signal.SIGKILL in codes, printed
    codes, printed = train_two(tmp_path / "run", "--resume")
    assert codes == [0, 0], printed
    same(tmp_path / "run", unbroken_two)


@pytest.mark.chaos
def test_a_run_under_zero_3_with_offload_continues_bit_equal(tmp_path: Path) -> None:
    how = ("--policy.zero_stage=3", "--policy.offload_optimizer=true")
    codes, printed = train_two(tmp_path / "whole", *how)
    assert codes == [0, 0], printed
    codes, printed = train_two(tmp_path / "run", *how, fault="optimiser:3", limit_s=60)
    assert -signal.SIGKILL in codes, printed
    codes, printed = train_two(tmp_path / "run", "--resume")
    assert codes == [0, 0], printed
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.chaos)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    number: signal.Signals, unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    child, printed = start(folder, "--checkpoint.every=0")
    until(child, lambda: "step 1/4" in printed.read_text())
    os.kill(child.pid, number)
    child.join()
    assert child.exitcode == 0, printed.read_text()
    lines = printed.read_text().splitlines()
    assert f"fst: {number.name}: finishing this step, then saving the run; send it again to stop now" in lines
    stopped = re.fullmatch(
        r"stopped after step ([123]) of 4; continue with: fst train --run-dir (.*) --resume", lines[-1]
    )
    assert stopped, lines
    assert stopped[2] == str(folder)
    assert int(stopped[1]) == records(folder, "step")[-1]["step"]
    assert not (folder / "summary.json").exists()
    code, output = train(folder, "--resume", "--checkpoint.every=0")
    assert code == 0, output
    same(folder, unbroken, but_for="config_hash")


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    child, printed = start(tmp_path / "run", "--slow.steps=100000", "--eval.every=0")
    until(child, lambda: "step 1/" in printed.read_text())
    os.kill(child.pid, signal.SIGTERM)
    until(child, lambda: "fst: SIGTERM" in printed.read_text())
    os.kill(child.pid, signal.SIGTERM)
    child.join()
    assert child.exitcode == -signal.SIGTERM
    assert "stopped after" not in printed.read_text()


@pytest.mark.chaos
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path: Path) -> None:
    children = start_two(tmp_path / "run")
    until(children[0][0], lambda: "step 1/4" in children[0][1].read_text())
    os.kill(children[1][0].pid, signal.SIGTERM)
    for child, printed in children:
        child.join()
        assert child.exitcode == 0, printed.read_text()
    assert "stopped after step" in children[0][1].read_text()
    codes, output = train_two(tmp_path / "run", "--resume")
    assert codes == [0, 0], output


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.chaos)])
def test_where_one_process_is_killed_the_other_ends_with_a_line_that_names_it(
    killed: int, tmp_path: Path
) -> None:
    codes, printed = train_two(tmp_path / "run", fault=f"backward:2:{killed}", limit_s=120)
    expected = [2, 2]
    expected[killed] = -signal.SIGKILL
    assert codes == expected, printed
    lines = re.findall(r"^fst: .*$", printed, re.MULTILINE)
    own = "" if killed else "process 1: "
    assert lines == [
        f"fst: {own}process {killed} has ended (step 1, update); this one stops. Start all of them again with --resume; "
        "a wait is limited by run.timeout_s (1800 s)"
    ]
    assert "Traceback" not in printed


@pytest.mark.chaos
def test_a_process_that_does_not_answer_is_named_after_the_time_limit(tmp_path: Path) -> None:
    (first, printed), (second, _) = start_two(
        tmp_path / "run", "--run.timeout_s=20", "--slow.steps=1000", "--eval.every=0"
    )
    until(first, lambda: "step 1/" in printed.read_text())
    os.kill(second.pid, signal.SIGSTOP)
    first.join()
    second.kill()
    second.join()
    assert first.exitcode == 2, printed.read_text()
    [line] = re.findall(r"^fst: .*$", printed.read_text(), re.MULTILINE)
    assert re.match(
        r"fst: a process does not answer; process 0 is at: step \d+, \w+; process 1 is at: step \d+, \w+; this",
        line,
    )


def turn_the_clock_back() -> None:
    """From the first question on the wall clock jumps a day back at every question."""
    clock, asked = time.time, itertools.count()
    time.time = lambda: clock() - 86400 * next(asked)


@pytest.mark.chaos
def test_a_wall_clock_that_jumps_back_changes_nothing(unbroken: Path, tmp_path: Path) -> None:
    code, printed = train(tmp_path / "run", hook=turn_the_clock_back)
    assert code == 0, printed
    same(tmp_path / "run", unbroken)
    timing = [json.loads(line) for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in timing]
    assert seconds == sorted(seconds)
    assert all(value >= 0 for line in timing for value in line.values())


def test_the_wall_clock_is_asked_in_one_place_and_never_for_a_duration() -> None:
    asks = [
        str(p.relative_to(REPO / "fst_fast"))
        for p in (REPO / "fst_fast").rglob("*.py")
        if re.search(r"\btime\.time\(|datetime\.now|utcnow|date\.today", p.read_text())
    ]
    assert asks == ["run/environment.py"]  # wall_clock()
    users = {
        p.stem
        for p in (REPO / "fst_fast").rglob("*.py")
        if re.search(r"wall_clock\b(?!\(\) ->)", p.read_text())
    }
    # dates of prompts, names of run folders, the time of a point in a tracker, the age of a file
    assert users == {"startup", "train", "template", "chat_template", "track", "follow"}


@pytest.mark.chaos
def test_a_run_that_has_ended_continues_with_more_steps_as_if_they_had_been_asked_for(
    unbroken: Path, tmp_path: Path
) -> None:
    code, printed = train(tmp_path / "run", "--slow.steps=2")
    assert code == 0, printed
    code, printed = train(tmp_path / "run", "--resume")
    assert code == 2
    assert "slow.steps was 2, is 4; --allow-config-change continues with the new one" in printed
    code, printed = train(tmp_path / "run", "--resume", "--allow-config-change")
    assert code == 0, printed
    assert "changed since the run was last started: slow.steps was 2, is 4" in printed
    [change] = records(tmp_path / "run", "config")
    assert change["changes"] == ["slow.steps was 2, is 4"]
    assert records(tmp_path / "run", "step") == records(unbroken, "step")
    last = ("checkpoints", "step-000004", "model", "model.safetensors")
    assert (tmp_path / "run").joinpath(*last).read_bytes() == unbroken.joinpath(*last).read_bytes()


@pytest.mark.chaos
def test_under_torchrun_a_killed_process_is_named_and_the_run_continues_bit_equal(
    unbroken_two: Path, tmp_path: Path
) -> None:
    """The other tests start their two processes themselves, with the variables that torchrun sets."""
    torchrun = [
        str(Path(sys.executable).parent / "torchrun"),
        "--standalone",
        "--nproc_per_node=2",
        "train.py",
    ]

    def launch(fault: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*torchrun, "--run-dir", str(tmp_path / "run"), *TINY, *more],
            cwd=REPO, env={**one_thread(), "FST_FAULT": fault}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = launch("backward:2:1")
    assert done.returncode != 0
    said = re.findall(r"^fst: process .*$", done.stderr, re.MULTILINE)
    assert len(said) == 1, done.stderr
    assert said[0].startswith("fst: process 1 has ended (step 1, update); this one stops.")
    done = launch("", "--resume")
    assert done.returncode == 0, done.stderr
    same(tmp_path / "run", unbroken_two)


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("processes", "before", "now"),
    [(2, ["--policy.zero_stage=1"], ["--policy.zero_stage=0"]),
     (1, [], ["--policy.zero_stage=3", "--policy.offload_optimizer=true"])],
    ids=["two to one", "one to two"],
)  # fmt: skip
def test_a_killed_run_continues_on_another_number_of_processes_under_another_zero_stage(
    processes: int, before: list[str], now: list[str], unbroken: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"

    def go(n: int, *more: str, fault: str = "") -> tuple[list[int], str]:
        if n == 2:
            return train_two(folder, *more, fault=fault, limit_s=60)
        code, printed = train(folder, *more, fault=fault)
        return [code], printed

    codes, printed = go(processes, *before, fault="optimiser:3")
    assert -signal.SIGKILL in codes, printed
    codes, printed = go(3 - processes, *now, "--resume")
    assert codes[0] == 2
    assert re.search(r"policy.zero_stage was \d, is \d.*--allow-config-change", printed)
    codes, printed = go(3 - processes, *now, "--resume", "--allow-config-change", fault="backward:1")
    assert -signal.SIGKILL in codes, printed
    codes, printed = go(3 - processes, *now, "--resume")  # killed before it had a checkpoint of its own
    assert set(codes) == {0}, printed
    [record] = records(folder, "config")
    assert [re.sub("'.*'", "...", change) for change in record["changes"]] == [
        "config_hash was ...",
        f"processes was {processes}, is {3 - processes}",
    ]
    for one, other in zip(records(folder, "step"), records(unbroken, "step"), strict=True):
        for key in ("reward", "groups_kept", "response_tokens", "rollouts"):
            assert one[key] == other[key], (one["step"], key)
        for key in ("loss", "grad_norm", "kl"):
            close = None if other[key] is None else pytest.approx(other[key], rel=1e-4, abs=1e-6)
            assert one[key] == close, (one["step"], key)


def draw_from_the_global_generators() -> None:
    """Advantages with noise from every generator that code which is not ours may draw from."""
    from fst_fast.slow import slow_phase

    sequences = slow_phase.sequences

    def noisy(*given: Any) -> Any:
        data = sequences(*given)
        noise = random.random() + np.random.random() + torch.rand(len(data.advantages)).numpy()
        data.advantages[:] += 0.1 * noise.astype(np.float32)
        return data

    slow_phase.sequences = noisy


@pytest.mark.chaos
def test_what_other_code_draws_from_the_global_generators_is_drawn_again(tmp_path: Path) -> None:
    draws = {"hook": draw_from_the_global_generators}
    code, printed = train(tmp_path / "whole", **draws)
    assert code == 0, printed
    code, printed = train(tmp_path / "run", fault="optimiser:3", **draws)
    assert code == -signal.SIGKILL, printed
    code, printed = train(tmp_path / "run", "--resume", **draws)
    assert code == 0, printed
    same(tmp_path / "run", tmp_path / "whole")
