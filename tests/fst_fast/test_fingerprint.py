"""The fingerprint of a task's data: equal for equal problems in every process, different for every difference that a run could read."""

from __future__ import annotations

import dataclasses
import enum
import json
import subprocess
import sys
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fst_fast
from fst_fast.commands.evaluate import evaluate_run
from fst_fast.contracts import Problem
from fst_fast.data.fingerprint import STREAMED, changes, of_problems, shared_fingerprint
from fst_fast.errors import UserError
from fst_fast.run.metrics_schema import check_record
from fst_fast.startup import _check_data
from fst_fast.tasks.mixture import Mixture

ROOT = Path(__file__).parents[2]


def problem(answer: Any = 1, text: str = "?", id: str = "a", **meta: Any) -> Problem:
    return Problem(id, [{"role": "user", "content": text}], answer, meta)


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Point:
    x: Any


class Plain:
    def __init__(self, x: Any) -> None:
        self.x = x


DIFFERENT: list[Any] = [
    None, True, 1, 1.0, "1", b"1", [1], [[1]], [1, 1], {"1": 1}, {"1": 2}, {"2": 1}, {1, 2}, {1, 3}, np.int64(1), np.float32(1),
    np.array([1]), np.array([[1]]), np.array([1.0]), Colour.RED, Colour.BLUE, Point(1), Point(2), Plain(1), Plain(2), Plain([1]),
    Decimal("1"), Decimal("2"), Fraction(1, 3), "\ud83d", "", [], {}, set(), 1j, float("nan"), float("inf"), {"a": {1}}, {"a": b""},
]  # fmt: skip


def test_every_kind_of_answer_and_every_value_has_a_print_of_its_own() -> None:
    prints = [of_problems([problem(answer)])["sha256"] for answer in DIFFERENT]
    assert len(set(prints)) == len(DIFFERENT)
    again = [of_problems([problem(answer)])["sha256"] for answer in DIFFERENT]
    assert prints == again


@pytest.mark.parametrize(
    "other",
    [problem(2), problem(text="? "), problem(id="b"), problem(gold=1), Problem("a", [{"role": "system", "content": "?"}], 1)],
)  # fmt: skip
def test_id_text_role_answer_and_meta_count(other: Problem) -> None:
    assert of_problems([problem()]) != of_problems([other])


def test_the_order_of_keys_and_the_kind_of_sequence_do_not_count() -> None:
    a = Problem("a", [{"role": "user", "content": "?"}], {"x": 1, "y": [2]}, {"k": 1, "l": 2})
    b = Problem("a", ({"content": "?", "role": "user"},), {"y": (2,), "x": 1}, {"l": 2, "k": 1})
    assert of_problems([a]) == of_problems((b,))


def test_values_that_hold_themselves_end() -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    assert of_problems([problem(ring)]) == of_problems([problem(ring)])


def test_it_is_the_same_in_another_process() -> None:
    code = (
        "from fst_fast.contracts import Problem\nfrom fst_fast.data.fingerprint import of_problems\n"
        "class A:\n    def __init__(self): self.s = {'x', 'y', 'z'}; self.f = len\n"
        "print(of_problems([Problem('a', [{'role': 'user', 'content': '?'}], [{'p', 'q', 'r'}, A(), object()])])['sha256'])"
    )
    env = {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={**env, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in "12"
    }  # fmt: skip
    assert len(told) == 1


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.data())
def test_any_edit_of_any_problem_is_seen(answers: list[int], data: st.DataObject) -> None:
    problems = [problem(a, id=str(i)) for i, a in enumerate(answers)]
    at = data.draw(st.integers(0, len(problems) - 1))
    edited = [dataclasses.replace(p, answer=9) if i == at else p for i, p in enumerate(problems)]
    assert of_problems(problems) != of_problems(edited)


class Drawn(Sequence[Problem]):
    """Makes its problems when they are asked for."""

    def __init__(self, total: int, edited: int = -1) -> None:
        self.total, self.edited, self.asked = total, edited, 0

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: Any) -> Any:
        self.asked += 1
        return problem(index == self.edited, id=str(index))


def test_of_a_split_that_is_made_when_asked_for_the_first_problems_and_the_number_count() -> None:
    drawn = Drawn(10**9)
    assert of_problems(drawn)["hashed"] == drawn.asked == STREAMED
    assert of_problems(Drawn(10**9)) == of_problems(Drawn(10**9))
    assert of_problems(Drawn(10**9)) != of_problems(Drawn(10**9 + 1))
    assert of_problems(Drawn(10**9)) != of_problems(Drawn(10**9, edited=STREAMED - 1))
    assert of_problems(Drawn(10**9)) == of_problems(Drawn(10**9, edited=STREAMED)), "as documented"
    many = [problem(id=str(i)) for i in range(STREAMED + 5)]
    assert of_problems(many)["hashed"] == len(many), "what is in memory is hashed whole"


def test_the_parts_of_a_mixture_are_hashed_whole_where_they_are_in_memory(tmp_path: Path) -> None:
    (tmp_path / "g.py").write_text("def f(problem, response): return 1.0\n")

    def mixture(edited: int = -1) -> Any:
        lines = [
            {"id": str(i), "prompt": "?", "answer": i == edited, "split": "train"}
            for i in range(STREAMED + 9)
        ]
        lines.append({"id": "v", "prompt": "?", "answer": 0, "split": "validation"})
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        part = {"task": str(tmp_path / "d.jsonl"), "task_args": {"verify": f"{tmp_path}/g.py:f"}}
        return Mixture([part, part]).problems("train")

    assert of_problems(mixture())["hashed"] == 2 * (STREAMED + 9)
    assert of_problems(mixture()) != of_problems(mixture(edited=STREAMED + 3))


def test_a_change_names_the_split_and_a_new_stage_is_none() -> None:
    a, b, c = (of_problems([problem(i)] * n) for i, n in ((1, 1), (2, 1), (1, 2)))
    assert changes([{"train": a}], [{"train": a}]) == []
    assert changes([{"train": a}], [{"train": b}]) == ["the train split has other problems, 1 as before"]
    assert changes([{"train": a, "validation": a}], [{"train": a, "validation": c}]) == [
        "the validation split had 1 problems and has 2"
    ]
    assert changes([{"train": a}], [{"train": a}, {"train": b}]) == []
    assert changes([{"train": a}, {"train": a}], [{"train": a}, {"train": b}]) == [
        "the train split of stage 2 has other problems, 1 as before"
    ]


class StopAfterFirst(fst_fast.Callback):
    def on_checkpoint(self, event: Any) -> None:
        raise RuntimeError("stopped")


def test_a_run_does_not_go_on_with_other_data_unless_told_to_and_forgets_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file's ids stay, its answers change, and with them what every response is worth."""
    (tmp_path / "g.py").write_text("def f(problem, response): return float(problem.answer == 'new')\n")
    run = tmp_path / "run"

    def write(answer: str, extra: int = 0) -> None:
        rows = [
            {"id": f"{split}{i}", "prompt": f"path from {i} to 2 ?", "answer": answer, "split": split}
            for split in ("train", "validation")
            for i in range(8 + extra)
        ]
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(**how: Any) -> Any:
        return fst_fast.train(
            run_dir=run,
            task=str(tmp_path / "d.jsonl"),
            task_args={"verify": f"{tmp_path}/g.py:f", "gold": ""},
            slow={"steps": 2, "problems_per_step": 4},
            fast={"anchor_size": 4, "cycle_steps": 2, "rollout_budget": 40, "samples": 1, "children": 2},
            eval={"every": 2, "problems": 2, "final_problems": 2, "samples": 1, "kl_problems": 1},
            checkpoint={"every": 1},
            **how,
        )

    write("old")
    with pytest.raises(UserError, match="stopped"):
        train(callbacks=[StopAfterFirst()])
    state = json.loads((run / "checkpoints/step-000001/state.json").read_text())
    assert state["base_rewards"], "there is something to forget"
    before = (run / "metrics.jsonl").read_bytes()

    write("new")
    with pytest.raises(UserError, match=r"--resume: the data of the task are not those .* train split has other problems, 8 as before; the validation.*--allow-data-change"):  # fmt: skip
        train(resume=True)
    write("old", extra=1)
    with pytest.raises(UserError, match="the train split had 8 problems and has 9"):
        train(resume=True)
    assert (run / "metrics.jsonl").read_bytes() == before, "nothing is written"

    write("new")
    result = train(resume=True, allow_data_change=True)
    assert result.summary is not None
    assert result.summary["channels"]["neither"]["mean"] == 1.0, "the old rewards were 0"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        check_record(record)
    [change] = [r for r in records if r["kind"] == "config"]
    assert change["changes"][0] == "the train split has other problems, 8 as before"
    assert (
        "changed since the run was last started: the train split has other problems"
        in capsys.readouterr().out
    )
    again = train(resume=True)
    assert again.summary["channels"] == result.summary["channels"], "the new data are the run's now"

    write("newer")
    with pytest.warns(
        UserWarning, match="since the checkpoint was written, the train split has other problems"
    ):
        cells = evaluate_run(run, problems=2, samples=1)
    assert cells["channels"]["neither"]["mean"] == 0.0, "no answer is 'new' any more"

    # The run has ended, and its last checkpoint takes the other data over all the same.
    with pytest.raises(UserError, match="--allow-data-change"):
        train(resume=True)
    assert train(resume=True, allow_data_change=True).summary["channels"]["neither"]["mean"] == 0.0
    logs = (run / "metrics.jsonl").read_bytes()
    assert logs.count(b'"kind": "config"') == 2
    assert train(resume=True).summary["channels"]["neither"]["mean"] == 0.0
    assert (run / "metrics.jsonl").read_bytes() == logs


def test_a_checkpoint_without_a_fingerprint_is_continued_with_a_note() -> None:
    said: list[str] = []
    state = SimpleNamespace(data=None)
    run: Any = SimpleNamespace(state=state, recorder=SimpleNamespace(note=said.append), run_dir="R")
    now = [{"train": of_problems([problem()])}]
    assert _check_data(run, now, allowed=False) == []
    assert len(said) == 1
    assert "kept no fingerprint of the data" in said[0]


def test_processes_that_are_given_other_problems_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stage: Any = SimpleNamespace(train=[problem(1)], validation=[problem(2)])
    theirs = [{"train": of_problems([problem(3)]), "validation": of_problems([problem(2)])}]
    monkeypatch.setattr("fst_fast.distributed.all_gather", lambda mine: [mine, mine, theirs])
    with pytest.raises(
        UserError, match=r"process 2 has been given other problems than process 0 \(the train split"
    ):
        shared_fingerprint([stage])
