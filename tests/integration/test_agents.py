"""Whole runs of environments: killed inside an episode and continued, and from the command line."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.crash import SMALL, fst, same, train
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


# Contexts of components that make the base look facts up over several turns.
TOOLS = (
    "configs/mini/hidden_facts.yaml", *SMALL, "--eval.every=0",
    "--fast.components.protocol=ask again until you have the city .",
    "--fast.components.tool:lookup=call the tool for every fact .",
)  # fmt: skip


def tools(run_dir: Path, *more: str, **how: Any) -> tuple[int, str]:
    return fst("train", *TOOLS, "--run-dir", str(run_dir), *more, printed=run_dir.with_suffix(".out"), **how)


def print_the_turns() -> None:
    """After each turn, print which it was and how many episodes have another."""
    from fst_fast.rollout import episodes

    answer = episodes._answer

    def answer_and_print(sampler: Any, live: Any, **how: Any) -> None:
        turn = len(live[0].turns)
        answer(sampler, live, **how)
        print(f"turn {turn}, {sum(e.verdict is None for e in live)} go on", flush=True)

    episodes._answer = answer_and_print


@pytest.fixture(scope="module")
def unbroken_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools") / "run"
    code, printed = tools(folder)
    assert code == 0, printed
    for name in ("rollouts.jsonl", "contexts.json", "problems.json"):
        assert (folder / name).stat().st_size
    return folder


@pytest.mark.parametrize(
    ("fault", "last", "saved"),
    [
        pytest.param("turn:15", "turn 1, 6 go on", 1, id="step"),
        pytest.param("turn:2", "turn 1, 2 go on", 0, marks=pytest.mark.chaos, id="first fast phase"),
        pytest.param("turn:18", "turn 1, 2 go on", 2, marks=pytest.mark.chaos, id="second fast phase"),
        pytest.param("turn:42", "turn 2, 1 go on", 4, marks=pytest.mark.chaos, id="last evaluation"),
    ],
)
def test_a_run_killed_while_its_episodes_look_up_facts_continues_bit_equal(
    fault: str, last: str, saved: int, unbroken_tools: Path, tmp_path: Path
) -> None:
    code, printed = tools(tmp_path / "run", fault=fault, hook=print_the_turns)
    assert code == -signal.SIGKILL, printed
    assert [line for line in printed.splitlines() if line.startswith("turn ")][-1] == last
    latest = tmp_path / "run" / "checkpoints" / "latest"
    assert (latest.read_text() if latest.exists() else "") == (f"step-{saved:06d}\n" if saved else "")
    code, printed = tools(tmp_path / "run", "--resume")
    assert code == 0, printed
    same(tmp_path / "run", unbroken_tools)
    steps = records(tmp_path / "run", "step")
    assert all(step["verdict_metrics"]["tool_calls"] > 1 for step in steps)
