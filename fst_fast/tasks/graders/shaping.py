"""Graders of a response's form, to be combined with one of its content: format and length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fst_fast.contracts import Problem, Verdict


@dataclass(frozen=True)
class Format:
    """Reward: the share of these demands that a response meets. They are all optional, one at least is needed.

    starts, ends: texts it must begin and end with. pattern: a regular expression that must match all of it. once: texts that must occur
    exactly once. forbidden: texts that must not occur."""

    starts: str = ""
    ends: str = ""
    pattern: str = ""
    once: Sequence[str] = ()
    forbidden: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("once", "forbidden"):
            if not isinstance(getattr(self, name), list | tuple):
                raise ValueError(f"{name} must be a list of texts")
        if not (self.starts or self.ends or self.pattern or self.once or self.forbidden):
            raise ValueError("no demand is given; one of starts, ends, pattern, once, forbidden is needed")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern={self.pattern!r} is no regular expression: {error}") from None

    def __call__(self, problem: Problem, response: str) -> Verdict:
        text = response.strip()
        checks: list[tuple[bool, str]] = []
        if self.starts:
            checks.append((text.startswith(self.starts), f"the response must begin with {self.starts}"))
        if self.ends:
            checks.append((text.endswith(self.ends), f"the response must end with {self.ends}"))
        if self.pattern:
            fits = re.fullmatch(self.pattern, text, re.DOTALL) is not None
            checks.append((fits, f"the response must have the form {self.pattern}"))
        checks += [
            (text.count(x) == 1, f"{x} must occur exactly once, not {text.count(x)} times") for x in self.once
        ]
        checks += [(x not in text, f"{x} must not occur") for x in self.forbidden]
        wrong = [said for good, said in checks if not good]
        return Verdict(1 - len(wrong) / len(checks), f"{'; '.join(wrong)}." if wrong else "")


@dataclass(frozen=True)
class Length:
    """Reward 1 up to `limit`, then falling in a line to 0 at `limit + buffer`; below `least` 0. Counted in characters or words.

    With a buffer it is the soft penalty on overlong responses of DAPO (arXiv 2503.14476), in text units."""

    limit: int
    buffer: int = 0
    least: int = 0
    unit: str = "chars"

    def __post_init__(self) -> None:
        if self.unit not in ("chars", "words"):
            raise ValueError(f"unit={self.unit!r}; allowed: chars, words")
        if not 0 <= self.least <= self.limit or self.buffer < 0:
            raise ValueError(
                f"least={self.least}, limit={self.limit}, buffer={self.buffer}; allowed: 0 <= least <= limit, buffer >= 0"
            )

    def __call__(self, problem: Problem, response: str) -> Verdict:
        n = len(response.split()) if self.unit == "words" else len(response)
        metrics = {f"length_{self.unit}": float(n)}
        if n < self.least:
            return Verdict(
                0.0, f"the response has {n} {self.unit}; at least {self.least} are wanted.", metrics
            )
        if n <= self.limit:
            return Verdict(1.0, "", metrics)
        reward = max(1 - (n - self.limit) / self.buffer, 0.0) if self.buffer else 0.0
        return Verdict(reward, f"the response has {n} {self.unit}; at most {self.limit} are wanted.", metrics)
