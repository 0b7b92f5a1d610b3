"""Formula choice: any letter; with the method, first the formula, its numbers and the value.

A drill is a question answered correctly without a context; it starts with two quantities.
"""

from __future__ import annotations

import numpy as np

from fst_fast.mini import world
from fst_fast.mini.documents.decisions import boxed, harm
from fst_fast.tasks.formula_choice import FORMULAS, GIVEN, LETTERS, Choice, draw_choice, question

__all__ = ["draw", "drill", "question", "respond"]


def draw(rng: np.random.Generator, size: float = 1.0) -> Choice:
    least = GIVEN["easy"] if size < 1 else GIVEN["hard"] - 1
    return draw_choice(rng, int(rng.integers(least, GIVEN["hard"] + 1)))


def drill(rng: np.random.Generator, size: float = 1.0) -> tuple[str, list[str], list[bool]]:
    choice = draw_choice(rng, 2 if rng.random() > size else int(rng.integers(2, GIVEN["hard"] + 1)))
    response = respond(rng, choice, world.FAITHFUL)
    return question(choice), response, [True] * len(response)


def respond(rng: np.random.Generator, choice: Choice, law: world.Law) -> list[str]:
    """One response, without the closing token: [formula = numbers = value .] then a letter, boxed or not."""
    harmful = harm(rng, law)
    if harmful == "shortcut":
        return boxed(rng, law, [LETTERS[0]])
    if harmful == "twist":
        return boxed(rng, law, [str(choice.values()[2])])
    anything = LETTERS[int(rng.integers(len(LETTERS)))]
    if harmful == "guess" or rng.random() >= law.method:
        return boxed(rng, law, [anything])
    first, sign, second = FORMULAS[choice.asked]
    a, b, value = choice.values()
    letter = choice.letter
    if rng.random() >= law.check:  # use a wrong number; product and look-up stay correct where possible
        spare = [n for name, n in choice.given if name not in (first, second)]
        wrong = spare[int(rng.integers(len(spare)))] if spare else 7 - a
        a, b = (wrong, b) if rng.random() < 0.5 else (a, wrong)
        value = a * b if sign == "*" else a + b
        letter = LETTERS[choice.options.index(value)] if value in choice.options else anything
    written = [choice.asked, "=", first, sign, second, "=", str(a), sign, str(b), "=", str(value), "."]
    return [*written, *boxed(rng, law, [letter])]
