"""Whole runs of environments: killed inside an episode and continued, and from the command line."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.integration.crash import same, train
from tests.integration.launch import records

EPISODES = ("--task=examples/own_environment.py:SecondChance", "--rollout.max_turns=2", "--eval.every=0")


def test_a_run_killed_between_the_turns_of_its_episodes_continues_bit_equal(tmp_path: Path) -> None:
    code, printed = train(tmp_path / "unbroken", *EPISODES)
    assert code == 0, printed
    steps = records(tmp_path / "unbroken", "step")
    assert all(step["turns"] > 1 and step["finishes"] == {"stop": 8} for step in steps)
    # Every batch is judged after each of two turns: those of the first fast phase, then those of the steps.
    code, printed = train(tmp_path / "run", *EPISODES, fault="turn:14")
    assert code == -signal.SIGKILL, printed
    assert 1 <= len(records(tmp_path / "run", "step")) < len(steps)
    code, printed = train(tmp_path / "run", *EPISODES, "--resume")
    assert code == 0, printed
    same(tmp_path / "run", tmp_path / "unbroken")
