"""E-SPL (arXiv 2602.14697): contexts with TrueSkill ratings, evolved by the rollouts of the slow phase; fast.evolver=e_spl, a rival of evolution.py.

After a slow step its contexts are rated by their mean rewards on the step's problems, as in a match. The best of them is mutated: a reflection
on its failures in this step gives a child with its parent's rating, less certain. With probability fast.crossover there is a second child,
which recombines the best context with those that solved some problem better; its rating is the precision-weighted mean of theirs. Every child
enters the pool. The next step samples under the champion of the pool's RECENT latest (highest lower bound), its challengers (highest upper
bounds) and always the latest. Evaluations use the champion.

Departures from the paper's code: a whole text is edited, not a list of principles; the reflector sees fast.failures_shown failures instead of
summaries of all rollouts; evaluations use the champion, where the code takes the latest context. Its advantages are those of each context
alone: slow.advantage_group=context.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from fst_fast.config import FastConfig
from fst_fast.contracts import Context, Problem, ScoredRollout
from fst_fast.fast import pareto
from fst_fast.fast.budget import budget_over
from fst_fast.fast.evaluations import Evaluations
from fst_fast.fast.outcome import FastResult, Log, Rules, Tally, child_lineage, conclude
from fst_fast.fast.population import FastState
from fst_fast.fast.ratings import Rating, rate
from fst_fast.fast.reflection import Partner, ReflectionPrompt, Reflector, Refusal, ask
from fst_fast.run.callbacks import Admission, Proposal

RECENT = 10
"""How many of the latest contexts may be sampled under."""
BOUND = 2.0
"""Deviations of a rating between its mean and its bounds."""
CHILD_DEVIATION = 1.0
"""What is added, in squares, to the deviation of a child's rating."""
TIE = 0.01
"""Mean rewards that differ by no more are a tie."""

_STREAM = 0xE591
"""Separates its random stream from others with the same seed."""


def evolve(
    state: FastState,
    rollouts: Sequence[ScoredRollout],
    problems: Sequence[Problem],
    *,
    reflect: Reflector,
    config: FastConfig,
    rules: Rules,
    cycle: int,
    policy_version: int,
    seed: int,
    log: Log,
    emit: Callable[..., None] = lambda kind, **fields: None,
) -> FastResult:
    """Rate the contexts of a slow step and propose the next. rollouts: all of the step, in an order that does not depend on the number of
    processes. The result has sampled nothing."""
    evaluations = Evaluations.of(rollouts, problems, policy_version)
    ratings = dict(state.ratings) or {state.seed_id: Rating()}
    lineage = dict(state.contexts)
    played = [c for c in state.members() if evaluations.mean(c.id)[0] is not None]
    tally = Tally()
    if played:
        means = [evaluations.mean(c.id)[0] or 0.0 for c in played]
        after = rate([ratings[c.id] for c in played], means, tie=TIE)
        ratings.update(zip((c.id for c in played), after, strict=True))
        best = played[int(np.argmax(means))]
        prompts, ratings_of_children = [], []
        rng = np.random.default_rng(np.random.SeedSequence([seed, _STREAM, cycle]))
        failed = evaluations.failures[best.id]
        shown = [failed[i] for i in rng.permutation(len(failed))[: config.failures_shown]]
        others = _better_somewhere(evaluations, best, played)
        over = budget_over(config, state.spent, 0)
        if rng.random() < config.crossover and others and not over:
            own, partners = _wins(evaluations, best, played), [o for o, _ in others]
            prompts.append(
                ReflectionPrompt(
                    best.text,
                    [evaluations.failure(r) for r in shown],
                    partners=[Partner(o.text, asked) for o, asked in others],
                    solved=own,
                )
            )
            ratings_of_children.append(crossed([ratings[c.id] for c in (best, *partners)]))
        if shown and not over:
            prompts.append(ReflectionPrompt(best.text, [evaluations.failure(r) for r in shown]))
            ratings_of_children.append(mutated(ratings[best.id]))
        seeds = [int(s) for s in rng.integers(0, 2**31, size=len(prompts))]
        replies = ask(reflect, prompts, seeds, functools.partial(_log_step, log, cycle)) if prompts else []
        tally.waves += bool(prompts)
        tally.count(replies)
        for reply, rating in zip(replies, ratings_of_children, strict=True):
            text = rules.extract(reply, known_texts=[line.context.text for line in lineage.values()])
            reason = text.reason if isinstance(text, Refusal) else rules.refuses(text)
            if isinstance(text, Refusal) or reason:
                tally.refused[reason] += 1
                emit(Proposal, cycle=cycle, parent=best, context=None, refused=reason)
                continue
            child = Context.of(text, parent=best.id, born=cycle)
            lineage[child.id] = dataclasses.replace(child_lineage(child, shown, [reply]), admitted=True)
            ratings[child.id] = rating
            tally.born.append(child.id)
            emit(Proposal, cycle=cycle, parent=best, context=child, refused="")
            emit(
                Admission,
                cycle=cycle,
                context=child,
                parent=best,
                admitted=True,
                mean=None,
                parent_mean=max(means),
            )
    pool = [context_id for context_id in lineage if context_id in ratings][-RECENT:]
    return conclude(
        state,
        evaluations,
        lineage,
        [pool[i] for i in chosen([ratings[context_id] for context_id in pool], config.population)],
        tally,
        admitted=len(tally.born),
        seed_stays=True,
        cycle=cycle,
        spent=tally.spent(state.spent, evaluations, lambda: 0.0),
        ratings={context_id: ratings[context_id] for context_id in pool},
    )


def chosen(ratings: Sequence[Rating], k: int) -> list[int]:
    """k of the ratings (oldest first) by E-SPL's LUCB: the highest lower bound, then the highest upper bounds, the last one always among
    them; the last repeats where there are too few."""
    champion = max(range(len(ratings)), key=lambda i: ratings[i].mean - BOUND * ratings[i].deviation)
    rest = [i for i in range(len(ratings)) if i != champion]
    rest.sort(key=lambda i: -(ratings[i].mean + BOUND * ratings[i].deviation))
    challengers, last = rest[: k - 1], len(ratings) - 1
    if challengers and last not in (champion, *challengers):
        challengers[-1] = last
    found = [champion, *challengers]
    return found + [last] * (k - len(found))


def mutated(parent: Rating) -> Rating:
    """The rating of an edited context."""
    return Rating(parent.mean, math.hypot(parent.deviation, CHILD_DEVIATION))


def crossed(parents: Sequence[Rating]) -> Rating:
    """The rating of a recombination: the means weighted by precision, and the deviation of that mean."""
    precisions = [1 / rating.deviation**2 for rating in parents]
    total = sum(precisions)
    mean = sum(p * rating.mean for p, rating in zip(precisions, parents, strict=True)) / total
    return Rating(mean, math.sqrt(1 / total + CHILD_DEVIATION**2))


def _wins(evaluations: Evaluations, context: Context, played: Sequence[Context]) -> list[str]:
    """The problems, as text, that this context alone solved best in this step."""
    scores = evaluations.matrix([c.id for c in played])
    row = next(i for i, c in enumerate(played) if c.id == context.id)
    others = np.delete(scores, row, axis=0)
    best_other = np.where(np.isnan(others), -np.inf, others).max(axis=0, initial=-np.inf)
    alone = scores[row] > best_other + pareto.TIE
    return [evaluations.question(p) for p, won in zip(evaluations.problem, alone, strict=True) if won]


def _better_somewhere(
    evaluations: Evaluations, best: Context, played: Sequence[Context]
) -> list[tuple[Context, list[str]]]:
    """What to recombine the best context with; nothing where it solves no problem better than all others itself."""
    if len(played) < 2 or not _wins(evaluations, best, played):
        return []
    found = [(c, _wins(evaluations, c, played)) for c in played if c.id != best.id]
    return [(c, asked) for c, asked in found if asked]


def _log_step(log: Log, cycle: int, text: str) -> None:
    log(f"E-SPL after step {cycle + 1}: {text}")
