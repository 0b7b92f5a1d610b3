"""The grader `python_tests`: the response is a program, run confined against the problem's tests (fst_fast.run_code)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fst_fast.contracts import Problem, Verdict
from fst_fast.tasks.graders.text import quoted


@dataclass(frozen=True)
class PythonTests:
    """Reward: the share of the tests that the response's program passes, or 1 only for all of them (`all_or_nothing`).

    The program is the last ```python block, else the whole response. The tests are the problem's answer:
    [{"input": stdin, "output": stdout}, ...] compares what is printed; ["assert add(1, 2) == 3", ...] or one such text is run after the program."""

    timeout_s: float = 2.0
    memory_mib: int = 256
    all_or_nothing: bool = False

    def __post_init__(self) -> None:
        import_module("fst_fast.verify.run_code")  # now, so that the run says how programs are isolated
        if not self.timeout_s > 0 or not self.memory_mib >= 64:
            raise ValueError(
                f"timeout_s={self.timeout_s}, memory_mib={self.memory_mib}; allowed: > 0 and >= 64"
            )

    def __call__(self, problem: Problem, response: str) -> Verdict:
        tests = problem.answer if isinstance(problem.answer, list | tuple) else [problem.answer]
        if not tests or not all(isinstance(test, str) or _is_io(test) for test in tests):
            return Verdict(
                None,
                f"problem {problem.id} has no tests: a list of asserts or of objects with input and output",
            )
        program = program_of(response)
        if not program.strip():
            return Verdict(0.0, "there is no program: write it in a ```python block.")
        passed, feedback = 0, ""
        for test in tests:
            wrong = self._run(program, test)
            passed += not wrong
            feedback = feedback or wrong
        share = passed / len(tests)
        reward = float(share == 1) if self.all_or_nothing else share
        metrics = {"tests_passed": share}
        return Verdict(
            reward, f"{passed} of {len(tests)} tests pass. {feedback}" if feedback else "", metrics
        )

    def gold(self, problem: Problem) -> str | None:
        solution = problem.meta.get("solution")
        return f"```python\n{solution}\n```" if isinstance(solution, str) else None

    def _run(self, program: str, test: Any) -> str:
        """What went wrong, "" if the test passes."""
        from fst_fast import run_code  # public, as any grader uses it

        if isinstance(test, str):
            result = run_code(f"{program}\n\n{test}\n", timeout_s=self.timeout_s, memory_mib=self.memory_mib)
            what = f"The test {quoted(test)}"
        else:
            stdin = str(test["input"])
            result = run_code(program, stdin=stdin, timeout_s=self.timeout_s, memory_mib=self.memory_mib)
            what = f"With the input {quoted(stdin)}"
            if result.status == "ok":
                expected, given = str(test["output"]).split(), result.stdout.split()
                if given == expected:
                    return ""
                return f"{what} it prints {quoted(result.stdout.strip())}, not {quoted(str(test['output']).strip())}."
        if result.status == "ok":
            return ""
        if result.status == "timeout":
            return f"{what} does not end within {self.timeout_s:g} s."
        last = (result.stderr.strip().splitlines() or [result.status])[-1]
        return f"{what} fails: {last[:300]}."


def program_of(response: str) -> str:
    """The last fenced block of a response, else all of it."""
    blocks: Sequence[str] = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", response, re.DOTALL)
    return blocks[-1] if blocks else response


def _is_io(test: Any) -> bool:
    return isinstance(test, Mapping) and {"input", "output"} <= test.keys()
