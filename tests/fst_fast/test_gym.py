"""reasoning-gym's data sets as tasks."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from fst_fast.contracts import Problem
from fst_fast.errors import UserError
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


@pytest.mark.parametrize(
    ("name", "args", "sentence"),
    [
        ("chain_smu", {}, "task=reasoning_gym:chain_smu: Dataset 'chain_smu' not registered"),
        ("chain_sum", {"sze": 3}, "unexpected keyword argument 'sze'"),
        ("chain_sum", {"min_terms": 9, "max_terms": 3}, "max_terms must be >= min_terms"),
        ("chain_sum", {"train": 0}, "task_args.train=0 must be a whole number of at least 1"),
        ("chain_sum", {"read": "end"}, "allowed: last_line, all, box, tag"),
        ("composite", {"datasets": "chain_sum"}, "datasets must be a list of {name, weight, config}"),
    ],
)
def test_what_cannot_be_is_one_sentence(name: str, args: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        load_task(f"reasoning_gym:{name}", args)
    assert sentence in str(refused.value)
