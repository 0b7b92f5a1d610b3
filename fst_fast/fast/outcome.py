"""What a fast phase returns and records, whichever evolver ran it (fast.evolver)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from fst_fast.config import FastConfig
from fst_fast.contracts import Context, ScoredRollout
from fst_fast.fast.evaluations import Evaluations
from fst_fast.fast.population import FastState, Lineage, ShownFailure, Spent
from fst_fast.fast.reflection import Refusal, Reply, extract
from fst_fast.fast.request import cut

Log = Callable[[str], None]

KEPT_FEEDBACK_CHARS = 500
"""How much of a shown failure's feedback the lineage stores."""
KEPT_REFLECTION_CHARS = 4000
"""How much of a reflector's reply the lineage stores."""


@dataclass(frozen=True)
class FastResult:
    """state: to save and continue from. population: exactly K contexts, best first, with possible repeats. sampled:
    every rollout of the phase, for reuse. record: the "cycle" line of metrics.jsonl, without kind and step."""

    state: FastState
    population: list[Context]
    sampled: list[ScoredRollout]
    record: dict[str, Any]


@dataclass(frozen=True)
class Rules:
    """What a proposed text must satisfy. fits: whether a context leaves room for every problem in the prompt. spells_special: as in
    `reflection.extract`."""

    count_tokens: Callable[[str], int]
    max_tokens: int
    fits: Callable[[Context], bool] = lambda context: True
    spells_special: Callable[[str], bool] = lambda text: False

    def extract(self, reply: Reply, *, known_texts: Collection[str]) -> str | Refusal:
        return extract(
            reply,
            known_texts=known_texts,
            count_tokens=self.count_tokens,
            max_tokens=self.max_tokens,
            spells_special=self.spells_special,
        )

    def refuses(self, text: str) -> str:
        """ "too_long" where the context leaves no room for a problem, else ""."""
        return "" if self.fits(Context.of(text)) else "too_long"


@dataclass
class Tally:
    """What a cycle has asked of the reflector. waves: proposal waves run; born: children scored, by id."""

    asked: int = 0
    read: int = 0
    written: int = 0
    usd: float = 0.0
    waves: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    born: list[str] = field(default_factory=list)

    def count(self, replies: Sequence[Reply]) -> None:
        self.asked += len(replies)
        self.read += sum(reply.prompt_tokens for reply in replies)
        self.written += sum(reply.completion_tokens for reply in replies)
        self.usd += sum(reply.cost_usd for reply in replies)

    def spent(self, before: Spent, evaluations: Evaluations, clock: Callable[[], float]) -> Spent:
        """What the fast phases have used, with this one so far. clock: seconds since it began."""
        sampled = sum(len(s.rollout.response_ids) for s in evaluations.sampled)
        return before.plus(self.read + self.written + sampled, clock(), self.usd)

    def record(self, lineage: dict[str, Lineage]) -> dict[str, Any]:
        """Its part of the cycle's record."""
        return {
            "proposed": self.asked,
            "refused": dict(sorted(self.refused.items())),
            "reflection_prompt_tokens": self.read,
            "reflection_completion_tokens": self.written,
            "reflection_usd": self.usd,
            "waves": self.waves,
            "contexts": [line_record(lineage[context_id], birth=True) for context_id in self.born],
        }


def conclude(
    state: FastState,
    evaluations: Evaluations,
    lineage: dict[str, Lineage],
    kept: Sequence[str],
    tally: Tally,
    *,
    admitted: int,
    seed_stays: bool,
    cycle: int,
    **changes: Any,
) -> FastResult:
    """The result of a phase that has scored contexts. kept: K ids, best first. seed_stays: whether the seed was still a candidate.
    changes: of the state, besides population, lineage, scores and cycle."""
    for context_id in evaluations.rewards:
        mean, n = evaluations.mean(context_id)
        version = evaluations.scores.policy_version
        lineage[context_id] = dataclasses.replace(lineage[context_id], policy_version=version, mean=mean, n=n)
    record = {
        **empty_record(cycle, [line_record(lineage[context_id]) for context_id in kept]),
        **tally.record(lineage),
        "admitted": admitted,
        "fast_rollouts": evaluations.spent,
        "unjudged": evaluations.unjudged,
        "best_mean": lineage[kept[0]].mean,
        "seed_mean": lineage[state.seed_id].mean if seed_stays else None,
        "anchor_problems": len(evaluations.problem),
        "samples": evaluations.samples,
    }
    after = dataclasses.replace(
        state,
        population=tuple(kept),
        contexts=lineage,
        scores=evaluations.scores.restricted_to(kept),
        cycle=cycle + 1,
        **changes,
    )
    return FastResult(after, [lineage[c].context for c in kept], evaluations.sampled, record)


def child_lineage(child: Context, failures: Sequence[ScoredRollout], replies: Sequence[Reply]) -> Lineage:
    shown = (
        ShownFailure(s.rollout.problem_id, cut(s.verdict.feedback, KEPT_FEEDBACK_CHARS)) for s in failures
    )
    said = "\n\n".join(reply.text or "" for reply in replies)
    text = said.encode(errors="replace").decode()  # valid UTF-8
    return Lineage(child, admitted=False, failures=tuple(shown), reflection=cut(text, KEPT_REFLECTION_CHARS))


def with_room(state: FastState, fits: Callable[[Context], bool], log: Log, cycle: int) -> FastState:
    """The state without the contexts of the population that leave no room for a problem of this cycle, which were not there when they were
    proposed; the seed context stays, as the run's problems must fit behind it."""
    members = [context.id for context in state.members()]
    kept = [i for i in members if i == state.seed_id or fits(state.contexts[i].context)]
    if kept == members:
        return state
    log(
        f"fast phase of cycle {cycle}: {len(members) - len(kept)} of {len(members)} contexts leave no room for a problem of this cycle "
        "(rollout.max_prompt_tokens) and are dropped"
    )
    return dataclasses.replace(state, population=tuple(kept) or (state.seed_id,))


def carried_unscored(state: FastState, config: FastConfig, cycle: int) -> FastResult:
    population = state.population_of(config.population)
    ids = tuple(context.id for context in population)
    lines = [{**line_record(state.contexts[context_id]), "mean": None, "n": 0} for context_id in ids]
    after = dataclasses.replace(state, population=ids, cycle=cycle + 1)
    return FastResult(after, population, [], empty_record(cycle, lines))


def empty_record(cycle: int, population: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of a cycle that samples nothing.

    proposed: reflections requested, each of which is refused, scored and rejected, or admitted. best_mean: of the kept
    contexts on this cycle's anchor problems, biased upwards because the same samples chose them. seed_mean: None once
    the seed is dropped. waves: generations run. contexts: every child scored in this cycle. reflection_*_tokens: read
    and written by the reflector, if it reports them."""
    zero = ("fast_rollouts", "reflection_prompt_tokens", "reflection_completion_tokens", "unjudged")
    return {
        **{"cycle": cycle, "population": population, "proposed": 0, "admitted": 0, "refused": {}},
        **dict.fromkeys(zero, 0),
        "reflection_usd": 0.0,
        **{
            "best_mean": None,
            "seed_mean": None,
            "waves": 0,
            "anchor_problems": 0,
            "samples": 0,
            "contexts": [],
        },
    }


def line_record(lineage: Lineage, *, birth: bool = False) -> dict[str, Any]:
    context = lineage.context
    line: dict[str, Any] = {
        "id": context.id,
        "text": context.text,
        "parent": context.parent,
        "born": context.born,
        "mean": lineage.mean,
        "n": lineage.n,
    }
    if birth:
        line["admitted"] = lineage.admitted
        line["failures"] = [dataclasses.asdict(shown) for shown in lineage.failures]
        line["reflection"] = lineage.reflection
    return line
