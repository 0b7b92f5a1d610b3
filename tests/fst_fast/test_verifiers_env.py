"""Single-turn environments of the package verifiers as tasks. Importing it takes seconds, here and in a verifying process: 4,000 modules."""

from __future__ import annotations

import pickle
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verifiers")

from fst_fast.errors import UserError
from fst_fast.tasks.registry import load_task
from fst_fast.verify.pool import VerifierPool

ENVIRONMENT = '''
import sys

import verifiers as vf
from datasets import Dataset


async def right(completion, answer, info):
    if info["sum"] < 0:
        raise KeyError("no sum")
    return float(completion[-1]["content"].strip() == answer)


def brief(parser, completion, state):
    assert state["prompt"][0]["role"] == "system"
    return float(len(parser.parse_answer(completion)) < 5)


def rude(completion):
    return float("!" in completion[-1]["content"])


def seen(prompt, **kwargs):
    return 3.0 + ("torch" in sys.modules)


def rows(first, count):
    return Dataset.from_list([
        {"question": f"{i} + 1 = ?", "answer": str(i + 1), "info": {"sum": i}} for i in range(first, first + count)
    ])


def load_environment(kind="good", count=40, held_out=0):
    rubric = vf.RubricGroup([vf.Rubric([right, brief], [1.0, 0.5]), vf.Rubric([rude, seen], [-0.5, 0.0])])
    if kind == "group":
        def ranked(completions) -> list[float]:
            return [0.0 for _ in completions]
        rubric = vf.Rubric([ranked])
    if kind == "unweighted":
        rubric = vf.Rubric([right], [0.0])
    if kind == "multi":
        class Dialogue(vf.MultiTurnEnv):
            async def env_response(self, messages, state, **kwargs):
                return []
        return Dialogue(dataset=rows(0, 4), rubric=rubric)
    if kind == "tools":
        def add(a: int) -> int:
            """Add."""
            return a
        return vf.ToolEnv(tools=[add], dataset=rows(0, 4), rubric=rubric)
    if kind == "broken":
        return vf.SingleTurnEnv(dataset=lambda: 1 / 0, rubric=rubric)
    more = {"eval_dataset": lambda: rows(1000, held_out)} if held_out else {}
    return vf.SingleTurnEnv(dataset=lambda: rows(-1, count), system_prompt="Be brief.", rubric=rubric, **more)
'''  # fmt: skip


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_sum_env.py").write_text(ENVIRONMENT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield "verifiers:a-sum-env"
    sys.modules.pop("a_sum_env", None)


def test_its_rows_are_problems_and_its_system_prompt_a_message(environment: str) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    task: Any = load_task(environment, {"args": {"count": 60}, "validation_fraction": 0.2})
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    train, held = task.problems("train"), task.problems("validation")
    assert (len(train) + len(held), 2 < len(held) < 25) == (60, True)
    problem = next(p for p in [*train, *held] if p.id == "a-sum-env/train/3")
    assert problem.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 1 = ?"},
    ]
    assert problem.answer == "3"
    assert pickle.loads(pickle.dumps(problem)) == problem
    held_out: Any = load_task(environment, {"args": {"held_out": 5}, "train": 10, "validation": 3})
    assert [len(held_out.problems(split)) for split in ("train", "validation")] == [10, 3]
    assert held_out.problems("validation")[0].messages[1]["content"] == "1000 + 1 = ?"


def test_its_rubric_judges_with_every_reward_logged(environment: str) -> None:
    import torch  # noqa: F401

    task: Any = load_task(environment, {})
    problem = next(p for p in [*task.problems("train"), *task.problems("validation")] if p.answer == "8")
    full = task.verify(problem, "8")
    assert (full.reward, full.feedback) == (1.0, "")
    assert full.metrics == {"reward/right": 1.0, "reward/brief": 1.0, "reward/rude": 0.0, "reward/seen": 4.0}
    wrong = task.verify(problem, "It is 9!")
    assert wrong.reward == 0.0, "from -0.5, the sum of the negative weights, to 1.5"
    assert (
        wrong.feedback
        == 'the response scores 0 of 1 (right 0, brief 0, rude 1, seen 4). A right answer is "8".'
    )
    assert task.verify(problem, "9").reward == pytest.approx(1.0 / 2.0)
    assert task.verify(problem, "8").reward == 1.0, "one call leaves nothing to the next"
    narrow: Any = load_task(environment, {"reward_range": [0, 1]})
    assert narrow.verify(problem, "8").reward is None
    assert (
        "the rubric gives 1.5, which is not in [0, 1]; task_args.reward_range"
        in narrow.verify(problem, "8").feedback
    )


def test_a_reward_function_that_raises_leaves_the_rollout_unjudged(environment: str) -> None:
    task: Any = load_task(environment, {})
    problem = next(p for p in [*task.problems("train"), *task.problems("validation")] if p.answer == "0")
    verdict = task.verify(problem, "0")
    assert verdict.reward is None
    assert "Error calling reward function right: 'no sum'" in verdict.feedback


def test_it_judges_in_a_verifying_process_without_torch(environment: str) -> None:
    task: Any = load_task(environment, {})
    problem = next(p for p in task.problems("train") if p.answer == "8")
    with VerifierPool(environment, {}, workers=1, timeout_s=60, memory_mib=2048) as pool:
        verdicts = pool.verify([(problem, "8"), (problem, "nine")])
    assert [verdict.reward for verdict in verdicts] == [1.0, pytest.approx(0.5)]
    assert verdicts[0].metrics["reward/seen"] == 3.0, "torch is not there"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"args": {"kind": "group"}}, "judges the rollouts of a problem together"),
        ({"args": {"kind": "unweighted"}}, "its rubric has no reward function with a weight"),
        ({"args": {"sort": "good"}}, "got an unexpected keyword argument 'sort'"),
        ({"args": 3}, "task_args.args=3 must be the keyword arguments"),
        ({"kind": "good"}, "'kind'"),
        ({"train": 0}, "task_args.train=0 must be a whole number of at least 1"),
        ({"reward_range": [1, 0]}, "task_args.reward_range=[1, 0] must be two finite numbers"),
        ({"validation_fraction": 1}, "task_args.validation_fraction=1 must be a number between 0 and 1"),
    ],
)
def test_what_cannot_be_trained_on_is_one_sentence(environment: str, args: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        load_task(environment, args)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_environment_that_is_not_there_or_has_no_data_is_one_sentence(environment: str) -> None:
    with pytest.raises(UserError, match="task=verifiers:gone: Could not import 'gone' environment"):
        load_task("verifiers:gone", {})
    with pytest.raises(UserError, match="its data set cannot be built: division by zero"):
        load_task(environment, {"args": {"kind": "broken"}}).problems("train")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(
        UserError, match=r"needs the package verifiers; install it with: pip install 'fst-fast\[verifiers\]'"
    ):
        load_task("verifiers:any", {})
