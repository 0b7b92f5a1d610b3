"""Graders that compare text: exact, contains, regex, multiple_choice."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from fst_fast.contracts import Problem, Verdict
from fst_fast.tasks.boxed import NoBoxedAnswer, last_box

Read = Literal["all", "last_line", "box"]
_READ = ("all", "last_line", "box")
_PLACES = {"all": "the response", "last_line": "the last line", "box": "the box"}


def answer_part(response: str, read: str) -> str:
    """The part of a response that holds the answer. Raises NoBoxedAnswer, with feedback, where there is none."""
    match read:
        case "all":
            return response.strip()
        case "last_line":
            lines = [line.strip() for line in response.splitlines() if line.strip()]
            if not lines:
                raise NoBoxedAnswer("the response is empty: the last line must hold the answer.")
            return lines[-1]
        case _:
            return last_box(response, "the answer")


def normal(text: str, *, case: bool) -> str:
    """Runs of white space become one space, ends are stripped; case folded unless it counts."""
    joined = " ".join(text.split())
    return joined if case else joined.casefold()


def quoted(text: str, limit: int = 200) -> str:
    """A text in quotes, its middle left out where it is long."""
    short = text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
    return f'"{short}"'


def answers_of(problem: Problem) -> list[str]:
    """The accepted answers: the problem's answer, or each of them where it is a list."""
    several = problem.answer if isinstance(problem.answer, list | tuple) else [problem.answer]
    return [str(answer) for answer in several]


@dataclass(frozen=True)
class Exact:
    """Reward 1 if the answer is the expected text, or one of several. White space is normalised; case counts if `case`.

    read: which part of the response is the answer: all of it, its last line, or the last \\boxed{}."""

    case: bool = False
    read: Read = "all"

    def __post_init__(self) -> None:
        if self.read not in _READ:
            raise ValueError(f"read={self.read!r}; allowed: {', '.join(_READ)}")

    def __call__(self, problem: Problem, response: str) -> Verdict:
        try:
            given = answer_part(response, self.read)
        except NoBoxedAnswer as error:
            return Verdict(0.0, str(error))
        expected = answers_of(problem)
        if normal(given, case=self.case) in {normal(text, case=self.case) for text in expected}:
            return Verdict(1.0)
        place = "the whole response" if self.read == "all" else _PLACES[self.read]
        return Verdict(0.0, f"{place} must be exactly {quoted(expected[0])}, but is {quoted(given)}.")

    def gold(self, problem: Problem) -> str:
        answer = answers_of(problem)[0]
        return f"\\boxed{{{answer}}}" if self.read == "box" else answer


@dataclass(frozen=True)
class Contains:
    """Reward: the share of the expected texts that the response contains; with `any` 1 for one of them, with `all_or_nothing` 1 for all of
    them alone. `words`: as whole words.

    read: as for exact. limit: most characters of the part that is read, so that a list of everything earns nothing; 0: any number."""

    case: bool = False
    any: bool = False
    words: bool = True
    read: Read = "all"
    all_or_nothing: bool = False
    limit: int = 0

    def __post_init__(self) -> None:
        if self.read not in _READ:
            raise ValueError(f"read={self.read!r}; allowed: {', '.join(_READ)}")
        if self.any and self.all_or_nothing:
            raise ValueError("any and all_or_nothing exclude each other")
        if not isinstance(self.limit, int) or self.limit < 0:
            raise ValueError(f"limit={self.limit!r}; allowed: a whole number >= 0")

    def __call__(self, problem: Problem, response: str) -> Verdict:
        try:
            part = answer_part(response, self.read)
        except NoBoxedAnswer as error:
            return Verdict(0.0, str(error))
        place = _PLACES[self.read]
        if self.limit and len(part) > self.limit:
            return Verdict(0.0, f"{place} has {len(part)} characters; at most {self.limit} are read.")
        text = normal(part, case=self.case)
        expected = answers_of(problem)
        missing = [answer for answer in expected if not self._has(text, normal(answer, case=self.case))]
        found = len(expected) - len(missing)
        reward = float(found > 0) if self.any else found / len(expected)
        if reward == 1:
            return Verdict(1.0)
        what = " or ".join(map(quoted, expected)) if self.any else ", ".join(map(quoted, missing))
        return Verdict(0.0 if self.all_or_nothing else reward, f"{place} does not contain {what}.")

    def _has(self, text: str, answer: str) -> bool:
        if not self.words:
            return answer in text
        return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None

    def gold(self, problem: Problem) -> str:
        answers = " ".join(answers_of(problem))
        return f"\\boxed{{{answers}}}" if self.read == "box" else answers


@dataclass(frozen=True)
class Regex:
    """Reward 1 if the pattern matches somewhere in the response, or all of it with `full`.

    pattern: Python's `re`; without it the problem's answer is the pattern. group: then the match's group of this number must be the answer."""

    pattern: str = ""
    full: bool = False
    group: int | None = None

    def __post_init__(self) -> None:
        try:
            compiled = re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern={self.pattern!r} is no regular expression: {error}") from None
        if self.group is not None and (not self.pattern or not 0 <= self.group <= compiled.groups):
            raise ValueError(f"group={self.group} is not in the pattern, which has {compiled.groups} groups")

    def __call__(self, problem: Problem, response: str) -> Verdict:
        pattern = self.pattern or str(problem.answer)
        try:
            found = (re.fullmatch if self.full else re.search)(pattern, response.strip())
        except re.error as error:
            return Verdict(None, f"the answer of problem {problem.id} is no regular expression: {error}")
        if found is None:
            how = "as a whole" if self.full else "anywhere"
            return Verdict(0.0, f"the response does not match the pattern {pattern} {how}.")
        if self.group is not None:
            given, expected = found[self.group] or "", str(problem.answer)
            if normal(given, case=True) != normal(expected, case=True):
                return Verdict(0.0, f"the answer must be {quoted(expected)}, but is {quoted(given)}.")
        return Verdict(1.0)


@dataclass(frozen=True)
class MultipleChoice:
    """Reward 1 if the chosen letter is the answer (a letter, or the index of one).

    The letter is read from the last \\boxed{}, else after the last "answer is" or "answer:", else from a response that is only a letter.
    choices: the letters that exist."""

    choices: str = "ABCDEFGHIJ"

    def __post_init__(self) -> None:
        if not self.choices or len(set(self.choices.upper())) != len(self.choices):
            raise ValueError(f"choices={self.choices!r}; each letter once, such as ABCD")

    def __call__(self, problem: Problem, response: str) -> Verdict:
        expected = self._expected(problem)
        if expected is None:
            return Verdict(
                None, f"the answer {problem.answer!r} of problem {problem.id} is none of {self.choices}"
            )
        given = self._given(response)
        if given is None:
            return Verdict(
                0.0,
                f"no choice was found: end with the letter of the choice in \\boxed{{}}, one of {', '.join(self.choices)}.",
            )
        if given not in self.choices.upper():
            return Verdict(0.0, f"{given} is none of the choices {', '.join(self.choices)}.")
        if given == expected:
            return Verdict(1.0)
        return Verdict(0.0, f"the choice {given} is wrong; {expected} is right.")

    def gold(self, problem: Problem) -> str | None:
        expected = self._expected(problem)
        return None if expected is None else f"\\boxed{{{expected}}}"

    def _expected(self, problem: Problem) -> str | None:
        answer = problem.answer
        if isinstance(answer, int) and not isinstance(answer, bool):
            return self.choices[answer].upper() if 0 <= answer < len(self.choices) else None
        letter = str(answer).strip().strip("().").upper()
        return letter if len(letter) == 1 and letter in self.choices.upper() else None

    def _given(self, response: str) -> str | None:
        try:
            boxed = last_box(response, "the letter")
        except NoBoxedAnswer:
            boxed = ""
        letter = re.fullmatch(
            r"(?:\\(?:text|mathrm|mathbf)\{)?\s*\(?([A-Za-z])\)?[.:]?\s*\}?(?:\s.*)?", boxed, re.DOTALL
        )
        if letter:
            return letter[1].upper()
        said = re.findall(r"answer\s*(?:is|:)\s*\**\(?([A-Za-z])\)?(?![A-Za-z])", response, re.IGNORECASE)
        if said:
            return str(said[-1]).upper()
        alone = re.fullmatch(r"\W*([A-Za-z])\W*", response.strip())
        return alone[1].upper() if alone else None
