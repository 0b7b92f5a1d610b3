"""The grader `math`: mathematical equality by math-verify (extra `tasks`)."""

from __future__ import annotations

from dataclasses import dataclass

from fst_fast.contracts import Problem, Verdict
from fst_fast.tasks.boxed import NoBoxedAnswer, last_box
from fst_fast.tasks.graders.text import quoted
from fst_fast.tasks.readers import import_package


@dataclass(frozen=True)
class Math:
    """Reward 1 if the response's answer equals the problem's, as mathematics: 1/2, 0.5 and \\frac{1}{2} are one number.

    boxed: the answer must be in the last \\boxed{}; otherwise any answer that math-verify finds counts. digits: to which decimals are compared."""

    boxed: bool = True
    digits: int = 6

    def __post_init__(self) -> None:
        import_package("math_verify", "the grader math", "tasks")

    def __call__(self, problem: Problem, response: str) -> Verdict:
        # The time limit is the verifying process's: math-verify's own needs a signal.
        from math_verify import parse, verify

        expected = parse(_latex(str(problem.answer)), parsing_timeout=None)
        if not expected:
            return Verdict(
                None,
                f"the answer {str(problem.answer)!r} of problem {problem.id} is no mathematical expression",
            )
        given = response
        if self.boxed:
            try:
                given = last_box(response, "the final answer")
            except NoBoxedAnswer as error:
                return Verdict(0.0, str(error))
        found = parse(_latex(given) if self.boxed else given, parsing_timeout=None)
        if not found:
            return Verdict(0.0, f"{quoted(given)} is no mathematical expression.")
        if verify(expected, found, float_rounding=self.digits, timeout_seconds=None):
            return Verdict(1.0)
        return Verdict(0.0, f"the answer {quoted(given)} is wrong; {problem.answer} is right.")

    def gold(self, problem: Problem) -> str:
        return f"\\boxed{{{problem.answer}}}"


def _latex(text: str) -> str:
    return text if "$" in text or "\\boxed" in text else f"${text}$"
