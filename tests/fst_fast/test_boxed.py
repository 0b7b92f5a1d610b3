"""Which answer a response gives in its boxes, and what it is told where it gives none."""

from __future__ import annotations

import pytest

from fst_fast.contracts import Problem
from fst_fast.tasks.boxed import NoBoxedAnswer, last_box, work_before
from fst_fast.tasks.linked_facts import LinkedFacts


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{30}", "30"),
        (r"\boxed{ 3 , 7 }", "3 , 7"),
        (r"\boxed{\text{30}}", "30"),
        (r"\boxed{\mathrm{ 12 }}", "12"),
        (r"\boxed{{3}}", "3"),
        (r"\boxed{{{ \textbf{8} }}}", "8"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{{1}{2}}", "{1}{2}"),
        (r"\boxed{30 \text{ km}}", r"30 \text{ km}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"so \boxed 5.", "5"),
        (r"$\boxed-7$", "-7"),
        (r"\boxed 3,7,9", "3,7,9"),
        (r"\boxed b", "b"),
        (r"\boxed {4}", "4"),
        (r"\boxed{1} is my answer, written in \boxed{} form", "1"),
        (r"\boxed{1}, in \boxed form", "1"),
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\boxed{6}}", "6"),
        (r"\boxedtext{1} \boxed{2}", "2"),
        (r"\boxed{ \boxed{4}", "4"),
    ],
)
def test_the_last_box_that_is_not_empty_holds_the_answer(response, answer):
    assert last_box(response, "the number") == answer


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("the answer is 5", "there is no \\boxed{}"),
        (r"\boxedtext{1}", "there is no \\boxed{}"),
        (r"\boxed{}", "the box is empty: the number must stand"),
        (r"\boxed{ {} }", "the box is empty"),
        (r"write it in \boxed form", "the box is empty"),
        (r"\boxed{1", "is not closed"),
        (r"\boxed{1} or rather \boxed{\frac{1}{2}", "is not closed"),
        (r"\boxed{1\}", "is not closed"),
    ],
)
def test_a_response_without_an_answer_is_told_the_truth_about_its_box(response, said):
    with pytest.raises(NoBoxedAnswer) as why:
        last_box(response, "the number")
    assert said in str(why.value)


def test_a_built_in_task_takes_an_answer_in_a_text_command_and_quotes_one_that_is_no_number():
    task = LinkedFacts()
    problem: Problem = task.problems("validation")[0]
    gold = task.gold(problem).replace("{ ", "{\\text{").replace(" }", "}}")
    assert task.verify(problem, gold).reward == 1.0
    verdict = task.verify(problem, r"\boxed{\frac{1}{2}}")
    assert verdict.reward == 0.0
    assert r"\frac{1}{2}" in verdict.feedback


@pytest.mark.parametrize(
    ("response", "work"),
    [
        (r"3 boss 5 . \boxed{5}", "3 boss 5 . "),
        (r"I answer in \boxed{} form: 3 boss 5 . \boxed{5}", r"I answer in \boxed{} form: 3 boss 5 . "),
        (r"3 boss 5 . \boxed{5} as \boxed{} asks", "3 boss 5 . "),
        ("3 boss 5", "3 boss 5"),
        (r"3 boss 5 \boxed{", "3 boss 5 "),
    ],
)
def test_the_work_is_all_that_comes_before_the_answer(response, work):
    assert work_before(response) == work
