"""How long the responses to a problem are likely to be, for dealing rollouts out to processes.

The slowest process ends a phase of sampling, and a process is slow because its responses are long. What a problem's last responses took is the best
guess there is; a problem that has not been sampled counts as the mean of those that have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from fst_fast.contracts import Problem, Rollout

REMEMBERED = 100_000


class ResponseLengths:
    """known: mean tokens of the last responses to each problem, by its id, the oldest first. The same on all processes."""

    def __init__(self, known: dict[str, float] | None = None) -> None:
        self.known = dict(known or {})

    def note(self, rollouts: Iterable[Rollout]) -> None:
        """Remember the lengths of rollouts, those of all processes."""
        self.remember((r.problem_id, len(r.response_ids)) for r in rollouts)

    def remember(self, tokens: Iterable[tuple[str, int]]) -> None:
        by_problem: dict[str, list[int]] = defaultdict(list)
        for problem_id, count in tokens:
            by_problem[problem_id].append(count)
        for problem_id, counts in by_problem.items():
            self.known.pop(problem_id, None)
            self.known[problem_id] = sum(counts) / len(counts)
        for problem_id in list(self.known)[: max(0, len(self.known) - REMEMBERED)]:
            del self.known[problem_id]

    def expected(self, problems: Sequence[Problem]) -> list[int]:
        """Tokens of a response to each problem, at least 1; all alike where nothing is known."""
        guess = sum(self.known.values()) / len(self.known) if self.known else 1.0
        return [max(1, round(self.known.get(p.id, guess))) for p in problems]
