"""What a run has cost so far: rollouts, tokens, skipped steps, and wall-clock seconds by kind of work."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

KINDS = ("rollout_s", "verify_s", "train_s", "fast_s", "eval_s")
PARTS = ("reflect_s",)
"""What is a part of another kind's seconds: the reflections, of fast_s."""


@dataclass
class Counters:
    """What the training has cost so far, over all processes; evaluation is not counted."""

    rollouts: int = 0  # sampled, the fast phase's included
    fast_rollouts: int = 0
    reused_rollouts: int = 0  # fast-phase rollouts that RL groups claimed
    tokens_computed: int = 0  # tokens through a forward pass: rollouts, reference scoring, training
    tokens_unshared: int = 0  # the same work with no prefix shared
    skipped_steps: int = 0  # on_nonfinite=skip

    def add_tokens(self, computed: int, unshared: int) -> None:
        """Count tokens through a forward pass, and what they would have been without sharing."""
        self.tokens_computed += computed
        self.tokens_unshared += unshared


class Stopwatch:
    """Wall-clock seconds of a run and, by kind of work (`KINDS`), since the last record of timing.jsonl, parts apart.

    before: seconds of the runs that this one resumes.
    """

    def __init__(self, before: float = 0.0) -> None:
        self.before = before
        self._opened = time.perf_counter()
        self._spent: dict[str, float] = defaultdict(float)
        self._inside_phase = False

    def total(self) -> float:
        """Seconds of the run, those of the runs that it resumes included."""
        return self.before + time.perf_counter() - self._opened

    def add(self, kind: str, seconds: float) -> None:
        """Count seconds of one kind, unless a surrounding `phase` counts them already. Those of a part are always counted."""
        assert kind in KINDS + PARTS, kind
        if kind in PARTS or not self._inside_phase:
            self._spent[kind] += seconds

    @contextmanager
    def part(self, kind: str) -> Iterator[None]:
        """Count everything inside as this part of a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(kind, time.perf_counter() - started)

    @contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """Count everything inside as this one kind of work."""
        started, self._inside_phase = time.perf_counter(), True
        try:
            yield
        finally:
            self._inside_phase = False
            self.add(kind, time.perf_counter() - started)

    def take(self) -> dict[str, float]:
        """Seconds by kind since the last call."""
        return {kind: self._spent.pop(kind, 0.0) for kind in KINDS + PARTS}
