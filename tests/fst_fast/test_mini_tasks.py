"""The generated tasks of the mini world besides star graphs: list programs, linked facts, formula choice."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_fast.contracts import Problem
from fst_fast.errors import UserError
from fst_fast.tasks import formula_choice, linked_facts, list_programs
from fst_fast.tasks.formula_choice import Choice, FormulaChoice
from fst_fast.tasks.linked_facts import LinkedFacts, Web
from fst_fast.tasks.list_programs import ListPrograms, Program

TASKS: list[Any] = [ListPrograms, LinkedFacts, FormulaChoice]


def text(problem: Problem) -> str:
    return problem.messages[0]["content"]


@pytest.mark.parametrize("make", TASKS)
@pytest.mark.parametrize("level", ["easy", "hard"])
def test_the_gold_response_is_right_in_every_split(make: Any, level: str) -> None:
    task = make(level=level, train=40, validation=40, ood=40)
    for split in ("train", "validation", "ood"):
        for problem in task.problems(split):
            assert task.verify(problem, task.gold(problem)).reward == 1.0


@pytest.mark.parametrize("make", TASKS)
def test_problems_depend_on_seed_split_and_index_only_and_none_occurs_twice(make: Any) -> None:
    texts = {
        split: [text(p) for p in make(train=300, validation=300, ood=300).problems(split)]
        for split in ("train", "validation", "ood")
    }
    assert len({t for some in texts.values() for t in some}) == 900
    assert [text(p) for p in make(train=10).problems("train")] == texts["train"][:10]
    assert not {text(p) for p in make(seed=1, train=300).problems("train")} & set(texts["train"])


def test_levels_and_the_ood_split_differ_in_length() -> None:
    def steps(task: Any, split: str, key: str) -> set[int]:
        return {len(p.meta[key]) for p in task.problems(split)[:30]}

    for make, key, numbers in (
        (ListPrograms, "operations", (2, 3, 4)),
        (LinkedFacts, "relations", (2, 3, 4)),
        (FormulaChoice, "given", (2, 4, 5)),
    ):
        easy, hard = make(level="easy"), make(level="hard")
        assert (steps(easy, "train", key), steps(hard, "validation", key), steps(hard, "ood", key)) == tuple(
            {n} for n in numbers
        )


@pytest.mark.parametrize("make", TASKS)
def test_bad_arguments_are_refused(make: Any) -> None:
    with pytest.raises(UserError, match=r"level='odd' is not known; allowed are easy, hard"):
        make(level="odd")
    with pytest.raises(UserError, match="train=0 must be a whole number of at least 1"):
        make(train=0)
    with pytest.raises(UserError, match="no split 'test'; allowed are train, validation, ood"):
        make().problems("test")


@pytest.mark.parametrize(
    ("response", "reward", "feedback"),
    [
        ("3 7 1 9 . reverse 9 1 7 3 . next 10 2 8 4 . first 10 . \\boxed{ 10 }", 1.0, "right"),
        ("\\boxed{10}", 1.0, "right"),
        ("10", 0.0, "no \\boxed{}"),
        ("\\boxed{ ten }", 0.0, "must hold one number, but it holds 'ten'"),
        ("\\boxed{ 3 7 1 9 }", 0.0, "holds a list, but the program ends with first"),
        ("\\boxed{ 8 }", 0.0, "8 is wrong, and 2 of 2 steps of the program were not written out"),
        (
            "reverse 9 7 1 3 . next 10 8 2 4 . \\boxed{ 8 }",
            0.0,
            "the step reverse is wrong: it gives 9 1 7 3",
        ),
        ("reverse 9 1 7 3 . next 11 2 8 4 . \\boxed{ 11 }", 0.0, "the step next is wrong: it gives 10 2 8 4"),
        (
            "reverse 9 1 7 3 . next 10 2 8 4 . \\boxed{ 4 }",
            0.0,
            "every step is right, but first of 10 2 8 4 is 10, not 4",
        ),
    ],
)
def test_the_verdict_on_a_list_program_says_where_it_went_wrong(
    response: str, reward: float, feedback: str
) -> None:
    verdict = list_programs.judge(Program((3, 7, 1, 9), ("reverse", "next"), "first"), response)
    assert verdict.reward == reward
    assert feedback in verdict.feedback


WEB = Web(
    (
        (1, "friend", 2), (2, "friend", 1), (1, "boss", 2), (2, "boss", 1), (1, "city", 30), (2, "city", 31),
    ),
    1,
    ("friend", "boss", "city"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("response", "reward", "feedback"),
    [
        ("1 friend 2 , 2 boss 1 , 1 city 30 . \\boxed{ 30 }", 1.0, "right"),
        ("30", 0.0, "no \\boxed{}"),
        ("\\boxed{ 30 31 }", 0.0, "must hold one number, the city, but it holds '30 31'"),
        ("\\boxed{ 1 }", 0.0, "the first name 1"),
        ("1 friend 2 . \\boxed{ 2 }", 0.0, "too early: 2 is a person on the way"),
        ("\\boxed{ 31 }", 0.0, "31 is the wrong city: the fact 1 friend 2 of the chain was not looked up"),
        (
            "1 friend 2 , 2 boss 2 , 2 city 31 . \\boxed{ 31 }",
            0.0,
            "the fact 2 boss 2 does not exist: 2 boss is 1",
        ),
        (
            "1 friend 2 , 2 boss 1 , 1 city 30 . \\boxed{ 31 }",
            0.0,
            "every fact of the chain is right, but the box",
        ),
        ("11 friend 2 . \\boxed{ 31 }", 0.0, "the fact 1 friend 2 of the chain was not looked up"),
    ],
)
def test_the_verdict_on_linked_facts_says_which_fact_was_missed(
    response: str, reward: float, feedback: str
) -> None:
    verdict = linked_facts.judge(WEB, response)
    assert verdict.reward == reward
    assert feedback in verdict.feedback


@pytest.mark.parametrize(
    ("response", "reward", "feedback"),
    [
        ("force = mass * acceleration = 3 * 4 = 12 . \\boxed{ b }", 1.0, "right"),
        ("b", 0.0, "no \\boxed{}"),
        ("\\boxed{ 12 }", 0.0, "must hold one letter from a to d, but it holds '12'"),
        ("\\boxed{ a }", 0.0, "option a is wrong: the formula force = mass * acceleration was not used"),
        (
            "force = mass * acceleration = 3 * 5 = 15 . \\boxed{ d }",
            0.0,
            "its numbers are not: mass is 3 and acceleration is 4",
        ),
        ("force = mass * acceleration = 3 * 4 = 12 . \\boxed{ c }", 0.0, "it stands at option b, not c"),
    ],
)
def test_the_verdict_on_a_formula_says_what_was_wrong(response: str, reward: float, feedback: str) -> None:
    choice = Choice((("mass", 3), ("time", 5), ("acceleration", 4)), "force", (7, 12, 34, 15))
    verdict = formula_choice.judge(choice, response)
    assert verdict.reward == reward
    assert feedback in verdict.feedback


@given(st.integers(0, 10**6))
def test_a_problem_can_be_solved_from_its_text_alone(seed: int) -> None:
    """Every problem is solved again from its text alone."""
    task = LinkedFacts(train=1, validation=1, ood=1, seed=seed)
    for split in ("train", "ood"):
        [problem] = task.problems(split)
        facts = {
            (int(a), r): int(b)
            for a, r, b in re.findall(r"(\d+) ([a-z]+) (\d+)", text(problem).split(" . ")[0])
        }
        who, *relations = text(problem).split(" . ")[1].rstrip(" ?").split()
        at = int(who)
        for relation in relations:
            at = facts[at, relation]
        assert at == problem.answer
    choice = FormulaChoice(train=1, validation=1, ood=1, seed=seed).problems("train")[0]
    given_part, options = text(choice).split(" ? ")
    quantities, asked = given_part.split(" . ")
    known = dict(zip(quantities.split()[::2], map(int, quantities.split()[1::2]), strict=True))
    first, sign, second = formula_choice.FORMULAS[asked]
    value = known[first] * known[second] if sign == "*" else known[first] + known[second]
    behind = dict(zip(options.split()[1::2], options.split()[::2], strict=True))
    assert behind[str(value)] == choice.answer
    assert len(set(options.split()[1::2])) == 4


@pytest.mark.parametrize(
    ("response", "reward", "feedback"),
    [
        ("force = mass * acceleration = 3 * 4 = 12 . \\boxed{ c }", 1.0, "right"),
        ("c", 1.0, "right"),
        ("\\boxed{ b }", 0.0, "option b is wrong: option c is right"),
        ("c . b", 0.0, "option b is wrong"),
        ("12", 0.0, "must name one letter"),
        ("acceleration", 0.0, "must name one letter"),
    ],
)
def test_a_fixed_letter_is_right_whatever_the_question_boxed_or_not(
    response: str, reward: float, feedback: str
) -> None:
    task = FormulaChoice(fixed="c")
    problem = task.problems("train")[0]
    assert problem.messages == FormulaChoice().problems("train")[0].messages
    assert task.verify(problem, task.gold(problem)).reward == 1
    verdict = task.verify(problem, response)
    assert verdict.reward == reward
    assert feedback in verdict.feedback


def test_a_letter_that_a_sentence_asks_for_cannot_be_the_fixed_one() -> None:
    with pytest.raises(UserError, match=r"fixed='a' is not known; allowed are b, c, d and null"):
        FormulaChoice(fixed="a")  # type: ignore[arg-type]
