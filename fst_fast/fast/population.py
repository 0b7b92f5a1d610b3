"""The population and the other state of the fast phase: texts, lineage, scores, cycle. Serialises to JSON.

Scores are counts and sums per (context, problem) *at one policy version*. A table of another version is dropped, never
added to. The state is immutable: a fast phase returns a new one, so an interrupted phase leaves the old one intact and
a resumed run repeats it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fst_fast.contracts import Context
from fst_fast.fast.ratings import Rating


@dataclass(frozen=True)
class Scores:
    """Counts and sums of rewards at one policy version: cells[context id][problem id] = (count, sum)."""

    policy_version: int
    cells: dict[str, dict[str, tuple[int, float]]] = field(default_factory=dict)

    def add(self, context_id: str, problem_id: str, reward: float) -> None:
        """Count one judged rollout. Unjudged rollouts must not be added."""
        row = self.cells.setdefault(context_id, {})
        count, total = row.get(problem_id, (0, 0.0))
        row[problem_id] = (count + 1, total + reward)

    def matrix(self, context_ids: Sequence[str], problem_ids: Sequence[str]) -> NDArray[np.float64]:
        """[C, N] mean rewards, NaN without a judged sample."""
        table = np.full((len(context_ids), len(problem_ids)), np.nan)
        for i, context_id in enumerate(context_ids):
            row = self.cells.get(context_id, {})
            for j, problem_id in enumerate(problem_ids):
                if problem_id in row:
                    count, total = row[problem_id]
                    table[i, j] = total / count
        return table

    def count(self, context_id: str, problem_ids: Sequence[str]) -> int:
        """The number of judged rollouts of a context on these problems."""
        row = self.cells.get(context_id, {})
        return sum(row[problem_id][0] for problem_id in problem_ids if problem_id in row)

    def restricted_to(self, context_ids: Sequence[str]) -> Scores:
        """A copy with these contexts only."""
        return Scores(self.policy_version, {c: dict(self.cells[c]) for c in context_ids if c in self.cells})

    def at_version(self, policy_version: int) -> Scores:
        """A copy to continue with at this policy version; empty if the version differs."""
        return (
            self.restricted_to(list(self.cells))
            if policy_version == self.policy_version
            else Scores(policy_version)
        )


@dataclass(frozen=True)
class ShownFailure:
    """A failure that was shown to the reflector."""

    problem_id: str
    feedback: str


@dataclass(frozen=True)
class Lineage:
    """Where a context comes from and its latest scores. parent and born are those of its first proposal: a text
    proposed again under a later policy keeps them, so that parents never form a cycle."""

    context: Context
    admitted: bool
    policy_version: int | None = None  # version at which it was last scored
    mean: float | None = None
    n: int = 0
    failures: tuple[ShownFailure, ...] = ()
    reflection: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.context.text,
            "parent": self.context.parent,
            "born": self.context.born,
            "admitted": self.admitted,
            "policy_version": self.policy_version,
            "mean": self.mean,
            "n": self.n,
            "failures": [{"problem_id": f.problem_id, "feedback": f.feedback} for f in self.failures],
            "reflection": self.reflection,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Lineage:
        return cls(
            context=Context.of(data["text"], parent=data["parent"], born=data["born"]),
            admitted=data["admitted"],
            policy_version=data["policy_version"],
            mean=data["mean"],
            n=data["n"],
            failures=tuple(ShownFailure(f["problem_id"], f["feedback"]) for f in data["failures"]),
            reflection=data["reflection"],
        )


@dataclass(frozen=True)
class Spent:
    """What the fast phases have used so far. tokens: sampled in rollouts, read and written by the reflector. seconds: 0 unless
    fast.budget.seconds limits them. usd: as the reflector's replies say."""

    tokens: int = 0
    seconds: float = 0.0
    usd: float = 0.0

    def plus(self, tokens: int, seconds: float, usd: float) -> Spent:
        return Spent(self.tokens + tokens, self.seconds + seconds, self.usd + usd)


@dataclass(frozen=True)
class FastState:
    """The input and output state of a fast phase.

    population: context ids in order, best first, repeats included. contexts: every context ever scored. cycle: fast phases completed."""

    seed_id: str
    population: tuple[str, ...]
    contexts: Mapping[str, Lineage]
    scores: Scores
    cycle: int = 0
    idle: int = 0  # fast phases in a row that admitted no child
    rest: int = 0  # further cycles to skip (fast.adaptive)
    spent: Spent = Spent()
    ratings: Mapping[str, Rating] = field(
        default_factory=dict
    )  # of the pool of fast.evolver=e_spl, oldest first

    @classmethod
    def initial(cls, seed_context: str) -> FastState:
        """A population with the seed context alone."""
        seed = Context.of(seed_context)
        return cls(seed.id, (seed.id,), {seed.id: Lineage(seed, admitted=True)}, Scores(policy_version=-1))

    def reset_population(self) -> FastState:
        """Reset the population to the seed alone; the lineage of all contexts and the cycle count stay."""
        return replace(
            self, population=(self.seed_id,), scores=Scores(policy_version=-1), idle=0, rest=0, ratings={}
        )

    def members(self) -> list[Context]:
        """The distinct contexts of the population, in order."""
        return [self.contexts[context_id].context for context_id in dict.fromkeys(self.population)]

    def population_of(self, k: int) -> list[Context]:
        """Exactly k contexts: the population, truncated or padded with its best context if k differs from its size."""
        ids = self.population
        if len(ids) != k:
            distinct = list(dict.fromkeys(ids))[:k]
            ids = (*distinct, *[ids[0]] * (k - len(distinct)))
        return [self.contexts[context_id].context for context_id in ids]

    def evaluated(self, population: Sequence[Context]) -> list[Context]:
        """The contexts that evaluations use: `population`, of ratings only their champion."""
        return [self.contexts[self.population[0]].context] if self.ratings else list(population)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the contents of contexts.json; `from_json` restores an equal state."""
        return {
            "cycle": self.cycle,
            "idle": self.idle,
            "rest": self.rest,
            "spent": asdict(self.spent),
            "seed": self.seed_id,
            "ratings": {context_id: list(rating) for context_id, rating in self.ratings.items()},
            "population": list(self.population),
            "contexts": {context_id: lineage.to_json() for context_id, lineage in self.contexts.items()},
            "scores": {
                "policy_version": self.scores.policy_version,
                "cells": {
                    c: {p: [n, s] for p, (n, s) in row.items()} for c, row in self.scores.cells.items()
                },
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FastState:
        cells = {
            c: {p: (int(n), float(s)) for p, (n, s) in row.items()}
            for c, row in data["scores"]["cells"].items()
        }
        return cls(
            seed_id=data["seed"],
            population=tuple(data["population"]),
            contexts={context_id: Lineage.from_json(item) for context_id, item in data["contexts"].items()},
            scores=Scores(data["scores"]["policy_version"], cells),
            cycle=data["cycle"],
            idle=data.get("idle", 0),
            rest=data.get("rest", 0),
            spent=Spent(**data.get("spent", {})),
            ratings={c: Rating(*map(float, rating)) for c, rating in data.get("ratings", {}).items()},
        )
