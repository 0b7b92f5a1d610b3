"""Formula choice: which of four options does a formula give? The mini world's counterpart of multiple-choice physics questions.

    mass 3 time 5 acceleration 4 . force ? a 7 b 12 c 34 d 15       ->  \\boxed{ b }

More quantities are given than needed; one is asked for, and its formula must be known. Reward 1 iff the last \\boxed{}
holds the letter of the right value; a guess is right one time in four. The feedback says which formula, number or letter is wrong.

With `fixed` one letter is right whatever the question, and the last letter of the response counts, boxed or not. No sentence of the mini
world makes the model prefer a letter but `a`, so no context helps: a control for experiments.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fst_fast.contracts import Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.boxed import NoBoxedAnswer, last_box, work_before
from fst_fast.tasks.generated import MiniTask

LETTERS = ("a", "b", "c", "d")

FORMULAS: dict[str, tuple[str, str, str]] = {
    "force": ("mass", "*", "acceleration"),
    "distance": ("speed", "*", "time"),
    "charge": ("current", "*", "time"),
    "momentum": ("mass", "*", "speed"),
    "voltage": ("current", "*", "resistance"),
    "work": ("force", "*", "distance"),
    "power": ("voltage", "*", "current"),
    "pull": ("weight", "+", "drag"),
}
"""The quantity asked for -> its formula. Values are below 40, the numbers of the mini vocabulary."""

QUANTITIES = tuple(sorted({name for a, _, b in FORMULAS.values() for name in (a, b)}))
LARGEST = 6
_LETTER = re.compile(r"(?<![a-z])[a-d](?![a-z])")
GIVEN = {"easy": 2, "hard": 4}
"""Quantities given at each level, two of which are needed; the split `ood` has one more."""


@dataclass(frozen=True)
class Choice:
    """`given` in printed order; `options` are the values of the letters a to d."""

    given: tuple[tuple[str, int], ...]
    asked: str
    options: tuple[int, ...]

    def values(self) -> tuple[int, int, int]:
        """The two numbers that the formula takes and the value that it gives."""
        first, sign, second = FORMULAS[self.asked]
        known = dict(self.given)
        a, b = known[first], known[second]
        return a, b, a * b if sign == "*" else a + b

    @property
    def letter(self) -> str:
        return LETTERS[self.options.index(self.values()[2])]


def draw_choice(rng: np.random.Generator, given: int) -> Choice:
    """Wrong options are results for other numbers of the question or for the other sign, then random numbers."""
    names = list(FORMULAS)
    asked = names[int(rng.integers(len(names)))]
    first, _, second = FORMULAS[asked]
    spare = [q for q in QUANTITIES if q not in (first, second, asked)]
    chosen = [first, second, *(spare[int(i)] for i in rng.permutation(len(spare))[: given - 2])]
    numbers = {name: int(rng.integers(1, LARGEST + 1)) for name in chosen}
    order = [chosen[int(i)] for i in rng.permutation(len(chosen))]
    items = tuple((name, numbers[name]) for name in order)
    a, b, value = Choice(items, asked, ()).values()
    near = {a + b, a * b, *(x * y for x in (a, b) for y in numbers.values())} - {value}
    wrong = [sorted(near)[int(i)] for i in rng.permutation(len(near))][:3]
    while len(wrong) < 3:
        other = int(rng.integers(1, LARGEST * LARGEST + 1))
        if other != value and other not in wrong:
            wrong.append(other)
    options = [value, *wrong]
    return Choice(items, asked, tuple(options[int(i)] for i in rng.permutation(4)))


def question(choice: Choice) -> str:
    given = " ".join(f"{name} {number}" for name, number in choice.given)
    options = " ".join(f"{letter} {value}" for letter, value in zip(LETTERS, choice.options, strict=True))
    return f"{given} . {choice.asked} ? {options}"


def judge_letter(letter: str, response: str) -> Verdict:
    """Compare the last letter from a to d that stands by itself with one that is right whatever the question."""
    named = _LETTER.findall(response)
    if not named:
        return Verdict(0.0, "the response must name one letter from a to d.")
    if named[-1] != letter:
        return Verdict(0.0, f"option {named[-1]} is wrong: option {letter} is right.")
    return Verdict(1.0, "right.")


def judge(choice: Choice, response: str) -> Verdict:
    """Compare the last \\boxed{} with the letter. Metrics: boxed, formula (the formula is written out), numbers (its numbers too)."""
    a, b, value = choice.values()
    first, sign, second = FORMULAS[choice.asked]
    work = " ".join(re.findall(r"[a-z]+|[0-9]+|[^\sa-z0-9]", work_before(response)))
    formula = f"{choice.asked} = {first} {sign} {second}" in work
    numbers = re.search(rf"= {a} {re.escape(sign)} {b} = {value}(?![0-9])", work) is not None

    def verdict(reward: float, feedback: str, boxed: bool = True) -> Verdict:
        metrics = {"boxed": float(boxed), "formula": float(formula), "numbers": float(numbers)}
        return Verdict(reward, feedback, metrics)

    try:
        content = last_box(response, "the letter of the option")
    except NoBoxedAnswer as why:
        return verdict(0.0, str(why), "\\boxed" in response)
    if content not in LETTERS:
        return verdict(0.0, f"the box must hold one letter from a to d, but it holds {content[:40]!r}.")
    if content == choice.letter:
        return verdict(1.0, "right.")
    if not formula:
        return verdict(
            0.0,
            f"option {content} is wrong: the formula {choice.asked} = {first} {sign} {second} was not used.",
        )
    if not numbers:
        return verdict(
            0.0, f"the formula is right, but its numbers are not: {first} is {a} and {second} is {b}."
        )
    return verdict(
        0.0, f"the value {value} is right, but it stands at option {choice.letter}, not {content}."
    )


class FormulaChoice(MiniTask[Choice]):
    """Task `formula_choice`, in the mini vocabulary. level: `easy` (two quantities given) or `hard` (four, two of them needed)."""

    name, instance_type, sizes_by_level = "formula_choice", Choice, GIVEN
    _sample, _question = staticmethod(draw_choice), staticmethod(question)

    def __init__(
        self,
        level: Literal["easy", "hard"] = "hard",
        train: int = 2000,
        validation: int = 256,
        seed: int = 0,
        ood: int = 256,
        fixed: Literal["b", "c", "d"] | None = None,
    ) -> None:
        super().__init__(level, train, validation, seed, ood)
        if fixed not in (None, *LETTERS[1:]):
            raise UserError(f"formula_choice: fixed={fixed!r} is not known; allowed are b, c, d and null")
        self.fixed = fixed

    def _answer(self, choice: Choice) -> str:
        return self.fixed or choice.letter

    def _judge(self, choice: Choice, response: str) -> Verdict:
        return judge(choice, response) if self.fixed is None else judge_letter(self.fixed, response)

    def _key(self, choice: Choice) -> Hashable:
        given = tuple((QUANTITIES.index(name), number) for name, number in choice.given)
        return given, list(FORMULAS).index(choice.asked), choice.options
