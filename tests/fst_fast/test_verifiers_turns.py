"""Environments of the package verifiers run as they are: its own rollout and rubric, our policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fst_fast.config import Config
from fst_fast.contracts import Context, RolloutRequest
from fst_fast.errors import UserError
from fst_fast.rollout.sampler import Sampler
from fst_fast.tasks.registry import load_task
from tests.fst_fast.agents import Scripted, config_of, save_model

pytest.importorskip("verifiers")

GUESSING = '''
import verifiers as vf
from datasets import Dataset

class Guessing(vf.MultiTurnEnv):
    """Say a number; the environment says whether it is too small. States are live objects."""

    async def setup_state(self, state):
        state["secret"] = iter([int(state["answer"])] * 100)
        return state

    async def env_response(self, messages, state):
        said, secret = int(messages[-1].content), next(state["secret"])
        if said == secret:
            state["final_env_response"] = [vf.UserMessage(content="right")]
            return state["final_env_response"]
        return [vf.UserMessage(content="too small" if said < secret else "too large")]

def right(completion, answer, state):
    if answer == "3":
        raise KeyError("no three")
    return float(completion[-1].content == "right") * 2 - 1

class Rewriting(Guessing):
    """Says in its first message how often the policy has spoken."""

    async def get_prompt_messages(self, state):
        first, *others = await super().get_prompt_messages(state)
        return [vf.SystemMessage(content=f"Guess. {len(state['trajectory'])}"), *others]

def load_environment(rewrites=False):
    rows = [{"question": f"guess {i}", "answer": str(i)} for i in range(10)]
    return (Rewriting if rewrites else Guessing)(dataset=Dataset.from_list(rows), rubric=vf.Rubric(funcs=[right]), system_prompt="Guess.", max_turns=4)
'''

TOOLS = '''
import verifiers as vf
from datasets import Dataset

async def double(number: int) -> str:
    """Double a number.

    Args:
        number: any whole number
    """
    return str(2 * number)

def right(completion, answer):
    return float(answer in str(completion[-1].content))

def load_environment():
    rows = [{"question": f"twice {i}?", "answer": str(2 * i)} for i in range(10)]
    return vf.ToolEnv(tools=[double], dataset=Dataset.from_list(rows), rubric=vf.Rubric(funcs=[right]), max_turns=4)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = save_model(tmp_path_factory.mktemp("verifiers"), "qwen")
    (folder / "guessing_game.py").write_text(GUESSING)
    (folder / "doubling.py").write_text(TOOLS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


def played(config: Config, say: Any, count: int) -> list[Any]:
    with Sampler.open(config) as sampler:
        task = load_task(config.task, config.task_args)
        both = [*task.problems("train"), *task.problems("validation")]  # divided by a hash
        problems = sorted(both, key=lambda problem: int(problem.answer))[:count]
        requests = [RolloutRequest(Context.of("Be quick."), p, 0) for p in problems]
        engine: Any = Scripted(sampler.tokenizer, say)
        return sampler.local(engine, requests, stream=("test",), policy_version=0, temperature=1.0)


def test_an_environment_of_several_turns_runs_unchanged(folder: Path) -> None:
    config = config_of(
        folder, "verifiers:guessing-game", task_args={"reward_range": [-1, 1]}, rollout={"max_turns": 3},
        verify={"memory_mib": 8192},
    )  # fmt: skip
    zero, one, two, three, four = played(config, lambda problem, turn, sample: str(turn), count=5)
    assert [s.verdict.reward for s in (zero, one, two)] == [1.0, 1.0, 1.0]
    assert [len(s.rollout.turns) for s in (zero, one, two, four)] == [1, 2, 3, 3]
    assert (four.rollout.finish, four.verdict.reward) == (
        "max_turns",
        0.0,
    )  # the rubric judged what there was
    assert (three.rollout.finish, three.verdict.reward) == ("error", None)
    assert "no three" in three.verdict.feedback
    assert "user\ntoo small<|im_end|>" in one.response
    assert two.verdict.metrics == {"reward/right": 1.0}


def test_an_environment_that_changes_what_it_has_said_is_not_played(folder: Path) -> None:
    """The policy would be trained on a conversation that the environment does not have."""
    config = config_of(
        folder, "verifiers:guessing-game", verify={"memory_mib": 8192},
        task_args={"reward_range": [-1, 1], "args": {"rewrites": True}},
    )  # fmt: skip
    zero, one = played(config, lambda problem, turn, sample: str(turn), count=2)
    assert zero.verdict.reward == 1.0
    assert one.verdict.reward is None
    assert "the environment rewrites its conversation" in one.verdict.feedback


def test_its_tools_are_called_in_the_syntax_of_the_template(folder: Path) -> None:
    config = config_of(folder, "verifiers:doubling", verify={"memory_mib": 8192})

    def say(problem: str, turn: int, sample: int) -> str:
        number = int(problem[-1])
        calls = [
            "<tool_call>{",
            f'<tool_call>{{"name": "double", "arguments": {{"number": {number}}}}}</tool_call>',
        ]
        return calls[turn] if turn < 2 else f"it is {2 * number}" if number != 2 else "?"

    zero, one, two = played(config, say, count=3)
    assert [s.verdict.reward for s in (zero, one, two)] == [1.0, 1.0, 0.0]
    assert "<tool_response>\nerror: a <tool_call> is not closed" in one.response
    assert "<tool_response>\n2\n</tool_response>" in one.response


def test_an_environment_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(UserError, match="Could not import 'no-such-game' environment"):
        load_task("verifiers:no-such-game", {})
