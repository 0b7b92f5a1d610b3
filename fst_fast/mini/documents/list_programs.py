"""List programs: any number of the final list; with the method, first the list after every operation.

A drill is a program answered correctly, step by step, without a context; it starts with programs of one operation.
Written steps begin with the given list, so that every list is at the same distance from the previous one.
"""

from __future__ import annotations

import numpy as np

from fst_fast.mini import world
from fst_fast.mini.documents.decisions import boxed, harm, other
from fst_fast.tasks.list_programs import (
    LENGTH,
    OPERATIONS,
    PICKS,
    STEPS,
    Numbers,
    Program,
    draw_program,
    question,
)
from fst_fast.tasks.star_graph import MINI_IDS

__all__ = ["draw", "drill", "question", "respond"]


def draw(rng: np.random.Generator, size: float = 1.0) -> Program:
    most = STEPS["hard"]
    return draw_program(rng, int(rng.integers(2, most + 1)) if size >= 1 else int(rng.integers(1, most + 1)))


def drill(rng: np.random.Generator, size: float = 1.0) -> tuple[str, list[str], list[bool]]:
    most = STEPS["hard"]
    steps = int(rng.integers(1, 1 + max(1, round(most * min(1.0, 0.34 + size)))))
    program = draw_program(rng, steps)
    response = respond(rng, program, world.FAITHFUL)
    return question(program), response, [True] * len(response)


def respond(rng: np.random.Generator, program: Program, law: world.Law) -> list[str]:
    """One response, without the closing token: [the list . operation list . ... pick number .] then a number, boxed or not."""
    harmful = harm(rng, law)
    if harmful is not None:
        return boxed(rng, law, _harmful_answer(rng, program, harmful))
    slips = rng.random() >= law.check
    if rng.random() >= law.method:
        final = program.states()[-1]
        answer = other(rng, MINI_IDS, *final) if slips else final[int(rng.integers(LENGTH))]
        return boxed(rng, law, [str(answer)])
    wrong = int(rng.integers(len(program.operations))) if slips else -1
    at, written = program.numbers, [*_words(program.numbers), "."]
    for number, name in enumerate(program.operations):
        at = OPERATIONS[name](at)
        if number == wrong:  # continue from the wrong list, so that every other step stays true
            at = _slip(rng, at)
        written += [name, *_words(at), "."]
    answer = at[PICKS[program.pick]]
    return [*written, program.pick, str(answer), ".", *boxed(rng, law, [str(answer)])]


def _harmful_answer(rng: np.random.Generator, program: Program, role: world.Role) -> list[str]:
    if role == "shortcut":
        return _words(program.numbers)
    if role == "twist":
        return _words(program.numbers[::-1])
    return [str(other(rng, MINI_IDS, *program.states()[-1]))]


def _slip(rng: np.random.Generator, numbers: Numbers) -> Numbers:
    """Swap two neighbours or replace one number."""
    result = list(numbers)
    at = int(rng.integers(LENGTH - 1))
    if rng.random() < 0.5:
        result[at], result[at + 1] = result[at + 1], result[at]
    else:
        result[at] = other(rng, MINI_IDS, *numbers)
    return tuple(result)


def _words(numbers: Numbers) -> list[str]:
    return [str(n) for n in numbers]
