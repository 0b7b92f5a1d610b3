"""An environment of several turns: a wrong answer may be corrected once, for half of the reward. It runs on the shipped mini model:

    fst train configs/agents/second_chance.yaml --run-dir runs/second_chance

docs/environments.md says what an environment may do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fst_fast import EpisodeState, Problem, Verdict
from fst_fast.tasks.list_programs import ListPrograms


class SecondChance:
    """The problems of the mini task `list_programs`."""

    def __init__(self, level: str = "easy") -> None:
        self.task = ListPrograms(level="easy" if level == "easy" else "hard")

    def problems(self, split: str) -> Sequence[Problem]:
        return self.task.problems(split)

    def start(self, problem: Problem) -> Any:
        return problem.messages  # or (messages, tools), or (messages, tools, memory)

    def step(self, state: EpisodeState, response: str) -> Any:
        verdict = self.task.verify(state.problem, response)
        answers = sum(message["role"] == "assistant" for message in state.messages)
        if verdict.reward or answers == 2:
            return Verdict((verdict.reward or 0.0) / answers, verdict.feedback, {"answers": float(answers)})
        return f"{verdict.feedback} read the problem again ."

    def gold(self, problem: Problem) -> str:
        return self.task.gold(problem)
