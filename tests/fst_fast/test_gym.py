"""reasoning-gym's data sets as tasks."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from fst_fast.contracts import Problem
from fst_fast.errors import UserError
from fst_fast.tasks import gym
from fst_fast.tasks.registry import load_task

SUMS = {"train": 30, "validation": 8, "max_terms": 2, "max_digits": 1}


def test_a_set_gives_the_same_problems_each_time_and_no_question_twice() -> None:
    task, again = (load_task("reasoning_gym:chain_sum", SUMS) for _ in range(2))
    train, validation = task.problems("train"), task.problems("validation")
    assert list(train) == list(again.problems("train"))
    assert 0 < len(train) <= 30
    assert len(validation) <= 8
    questions = [p.messages[0]["content"] for p in [*train, *validation]]
    assert len(set(questions)) == len(questions)
    assert len({p.id for p in [*train, *validation]}) == len(questions)
    other = load_task("reasoning_gym:chain_sum", {**SUMS, "seed": 1})
    assert [p.messages for p in other.problems("train")] != [p.messages for p in train]
    assert task.problems("ood") == []


@pytest.mark.parametrize(("read", "right", "missing"), [
    ("last_line", "I add.\n{}", None), ("all", "{}", None), ("box", "so \\boxed{{{}}}", "no \\boxed{}"), ("tag", "<answer> {} </answer>", "no <answer>"),
])  # fmt: skip
def test_the_package_scores_the_part_that_is_read(read: str, right: str, missing: str | None) -> None:
    task: Any = load_task("reasoning_gym:chain_sum", {**SUMS, "read": read})
    problem: Problem = task.problems("train")[0]
    assert task.verify(problem, right.format(problem.answer)).reward == 1
    assert task.verify(problem, task.gold(problem)).reward == 1
    verdict = task.verify(problem, "nonsense")
    assert verdict.reward < 1
    assert (missing or f'A right answer is "{problem.answer}"') in verdict.feedback


def test_sets_may_be_composed() -> None:
    parts = [{"name": "chain_sum", "config": {"max_terms": 2}}, {"name": "leg_counting", "weight": 2}]
    task = load_task("reasoning_gym:composite", {"train": 12, "validation": 4, "datasets": parts})
    sources = {p.meta["item"]["metadata"]["source_dataset"] for p in task.problems("train")}
    assert sources == {"chain_sum", "leg_counting"}


def test_a_level_of_the_curriculum_sets_the_arguments_and_what_is_given_outright_goes_first() -> None:
    sizes = {"train": 12, "validation": 2}

    def drawn(**args: Any) -> set[tuple[int, int]]:
        items = [
            p.meta["item"]["metadata"]["difficulty"]
            for p in load_task("reasoning_gym:chain_sum", {**sizes, **args}).problems("train")
        ]
        return {(item["num_terms"][1], item["num_digits"][1]) for item in items}

    assert drawn(curriculum={"num_terms": 3}) == {(5, 1)}
    assert drawn(curriculum=2) == {(4, 3)}
    assert drawn(curriculum=2, max_digits=5) == {(4, 5)}
    parts = [{"name": "chain_sum", "config": {"curriculum": 1}}, {"name": "leg_counting"}]
    task = load_task("reasoning_gym:composite", {**sizes, "datasets": parts})
    sums = [p.meta["item"]["metadata"] for p in task.problems("train")]
    assert {m["difficulty"]["num_terms"] for m in sums if m["source_dataset"] == "chain_sum"} == {(2, 3)}


def test_codeio_gives_what_its_programs_gave_in_a_process_apart(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = {"train": 60, "validation": 8, "read": "tag", "longest": 3000}
    task: Any = load_task("reasoning_gym:codeio", args)
    train = task.problems("train")
    assert 10 < len(train) < 60
    assert max(len(p.messages[0]["content"]) for p in train) <= 3000
    assert task.verify(train[0], task.gold(train[0])).reward == 1
    [again] = gym._draw_apart([{"size": 60, "seed": 1}])
    same = {item["question"]: item for item in again}
    assert [same[p.meta["item"]["question"]] for p in train] == [p.meta["item"] for p in train]
    assert pickle.loads(pickle.dumps(train)) == train
    # What the programs print, write and change stays with them.
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(gym, "_PROGRAM", "import sys; sys.exit('no program')")
    with pytest.raises(UserError, match="the process that makes its items ended with 1: no program"):
        load_task("reasoning_gym:codeio", args).problems("train")


def test_an_answer_that_the_package_cannot_read_scores_nothing() -> None:
    task: Any = load_task("reasoning_gym:prime_factorization", {"train": 2, "validation": 1})
    verdict = task.verify(task.problems("train")[0], "nonsense")
    assert verdict.reward == 0
    assert 'the answer "nonsense" cannot be read: invalid literal' in verdict.feedback


def test_a_last_line_is_refused_where_answers_have_several() -> None:
    with pytest.raises(UserError, match="answers of rotate_matrix have several; set it to all, box or tag"):
        load_task("reasoning_gym:rotate_matrix", {"train": 2, "validation": 2}).problems("train")


@pytest.mark.parametrize(
    ("name", "args", "sentence"),
    [
        ("chain_smu", {}, "task=reasoning_gym:chain_smu: there is no such set; did you mean chain_sum?"),
        ("chain_sum", {"sze": 3}, "there is no argument sze; allowed: "),
        ("chain_sum", {"min_terms": 9, "max_terms": 3}, "max_terms must be >= min_terms"),
        ("chain_sum", {"train": 0}, "task_args.train=0 must be a whole number of at least 1"),
        ("chain_sum", {"read": "end"}, "allowed: last_line, all, box, tag"),
        ("chain_sum", {"longest": 0}, "task_args.longest=0 must be a whole number of at least 1"),
        (
            "chain_sum",
            {"curriculum": {"terms": 1}},
            "the curriculum of chain_sum has no 'terms'; it has num_terms, num_digits",
        ),
        ("chain_sum", {"curriculum": {"num_terms": 99}}, "Invalid level: 99"),
        ("chain_sum", {"curriculum": "hard"}, "curriculum='hard' must be a level or {attribute: level}"),
        ("composite", {"datasets": "chain_sum"}, "datasets must be a list of {config, name, weight}"),
        (
            "composite",
            {"datasets": [{"name": "chain_sum", "wieght": 2}]},
            "datasets must be a list of {config, name, weight}",
        ),
        ("composite", {"datasets": [{"name": "chain_sum", "weight": 0}]}, "Weight must be positive"),
        ("composite", {}, "datasets must be a list of"),
    ],
)
def test_what_cannot_be_is_one_sentence(name: str, args: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        load_task(f"reasoning_gym:{name}", args)
    assert sentence in str(refused.value)
