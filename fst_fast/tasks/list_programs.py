"""List programs: the output of a short program on a list. The mini world's counterpart of program-output prediction (CodeIO).

    list 3 7 1 9 : reverse rotate next first ?        ->  \\boxed{ 2 }

Four different numbers and a few operations, applied from left to right; the last one picks a number from the list.
Written out step by step the answer is easy; without, it is a guess among four numbers. Reward 1 iff the last \\boxed{}
holds it; the feedback says after which operation the written steps, or else the answer, went wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from fst_fast.contracts import Verdict
from fst_fast.tasks.boxed import NoBoxedAnswer, last_box, work_before
from fst_fast.tasks.generated import MiniTask
from fst_fast.tasks.star_graph import MINI_IDS

LENGTH = 4
Numbers = tuple[int, ...]

OPERATIONS: dict[str, Callable[[Numbers], Numbers]] = {
    "reverse": lambda x: x[::-1],
    "rotate": lambda x: (*x[1:], x[0]),
    "swap": lambda x: (x[1], x[0], *x[2:]),
    "next": lambda x: tuple((n + 1) % MINI_IDS for n in x),
}
"""Name -> function: reverse the list; move the first number to the end; swap the first two; add one to each (0 after 39)."""

PICKS = {"first": 0, "last": -1}
"""The last word of a program -> the index of the number that it picks."""

STEPS = {"easy": 2, "hard": 3}
"""Operations of a program at each level, before the pick; the split `ood` has one more."""


@dataclass(frozen=True)
class Program:
    numbers: Numbers
    operations: tuple[str, ...]
    pick: str

    def states(self) -> list[Numbers]:
        """The list after each operation."""
        states, at = [], self.numbers
        for name in self.operations:
            at = OPERATIONS[name](at)
            states.append(at)
        return states

    @property
    def answer(self) -> int:
        return self.states()[-1][PICKS[self.pick]]


def draw_program(rng: np.random.Generator, steps: int) -> Program:
    """Different numbers; no operation twice in a row."""
    names = list(OPERATIONS)
    numbers = tuple(rng.permutation(MINI_IDS)[:LENGTH].tolist())
    chosen: list[str] = []
    while len(chosen) < steps:
        name = names[int(rng.integers(len(names)))]
        if not chosen or name != chosen[-1]:
            chosen.append(name)
    return Program(numbers, tuple(chosen), list(PICKS)[int(rng.integers(len(PICKS)))])


def question(program: Program) -> str:
    return f"list {joined(program.numbers)} : {' '.join(program.operations)} {program.pick} ?"


def joined(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def judge(program: Program, response: str) -> Verdict:
    """Compare the last \\boxed{} with the number. Metrics: boxed, steps (every operation is written out correctly)."""
    states = program.states()
    written = _written(program, response)
    right = [found == state for found, state in zip(written, states, strict=True)]

    def wrong(feedback: str, boxed: bool = True) -> Verdict:
        return Verdict(0.0, feedback, {"boxed": float(boxed), "steps": float(all(right))})

    try:
        content = last_box(response, "the number")
    except NoBoxedAnswer as why:
        return wrong(str(why), "\\boxed" in response)
    if re.fullmatch(r"[0-9]{1,9}([\s,]+[0-9]{1,9})+", content):
        return wrong(
            f"the box holds a list, but the program ends with {program.pick}: one number must stand there."
        )
    if not re.fullmatch(r"[0-9]{1,9}", content):
        return wrong(f"the box must hold one number, but it holds {content[:40]!r}.")
    answer = int(content)
    if answer == program.answer:
        return Verdict(1.0, "right.", {"boxed": 1.0, "steps": float(all(right))})
    for name, found, state, good in zip(program.operations, written, states, right, strict=True):
        if found is not None and not good:
            return wrong(
                f"the step {name} is wrong: it gives {joined(state)}, but {joined(found)} was written."
            )
    missing = sum(found is None for found in written)
    if missing:
        return wrong(
            f"{answer} is wrong, and {missing} of {len(states)} steps of the program were not written out."
        )
    return wrong(
        f"every step is right, but {program.pick} of {joined(states[-1])} is {program.answer}, not {answer}."
    )


def _written(program: Program, response: str) -> list[Numbers | None]:
    """The list after each operation's name in the response, in the program's order; None for a step that is not written."""
    words = re.findall(r"[a-z]+|[0-9]{1,9}|[^\sa-z0-9]", work_before(response))
    found: list[Numbers | None] = []
    at = 0
    for name in program.operations:
        place = next((i for i in range(at, len(words)) if words[i] == name), None)
        numbers: list[int] = []
        if place is not None:
            at = place + 1
            while at < len(words) and words[at].isdigit():
                numbers.append(int(words[at]))
                at += 1
        found.append(tuple(numbers) if numbers else None)
    return found


class ListPrograms(MiniTask[Program]):
    """Task `list_programs`, in the mini vocabulary. level: `easy` (2 operations) or `hard` (3)."""

    name, instance_type, sizes_by_level = "list_programs", Program, STEPS
    _sample, _question, _judge = staticmethod(draw_program), staticmethod(question), staticmethod(judge)

    def _answer(self, program: Program) -> int:
        return program.answer

    def _key(self, program: Program) -> Hashable:
        operations = tuple(list(OPERATIONS).index(name) for name in program.operations)
        return program.numbers, operations, PICKS[program.pick]
