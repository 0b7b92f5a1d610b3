"""GEPA's own loop (arXiv 2507.19457), as FST's description uses it: fast.evolver=gepa, a rival of evolution.py.

One candidate at a time: draw a parent from the per-problem front, sample it on a few problems, reflect on those, sample the child on the same
problems, and if its sum is strictly higher (over the problems judged both times), score it on the whole anchor set and take it in. There is no test against noise. Until the budget is
used up; then the K best of the front are kept. Carried contexts are scored anew first. The decisions are those of gepa 0.1.4
(tests/test_gepa_oracle.py); the anchor set serves as its training and validation set. Where the budget does not pay for the next step, the
phase ends.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from fst_fast.config import FastConfig
from fst_fast.contracts import FULL_REWARD, Context, Problem, RolloutRequest, ScoredRollout
from fst_fast.fast import pareto
from fst_fast.fast.budget import budget_over
from fst_fast.fast.evaluations import Evaluations
from fst_fast.fast.outcome import (
    FastResult,
    Log,
    Rules,
    Tally,
    carried_unscored,
    child_lineage,
    conclude,
    with_room,
)
from fst_fast.fast.population import FastState
from fst_fast.fast.reflection import ReflectionPrompt, Reflector, Refusal, ask
from fst_fast.fast.scoring import ScoreFn
from fst_fast.run.callbacks import Admission, Proposal

_STREAM = 0x6E9A
"""Separates its random stream from others with the same seed."""


def evolve(
    state: FastState,
    *,
    anchor: Sequence[Problem],
    score: ScoreFn,
    reflect: Reflector,
    config: FastConfig,
    count_tokens: Callable[[str], int],
    cycle: int,
    policy_version: int,
    seed: int,
    log: Log,
    fits: Callable[[Context], bool] = lambda context: True,
    spells_special: Callable[[str], bool] = lambda text: False,
    emit: Callable[..., None] = lambda kind, **fields: None,
    clock: Callable[[], float] = lambda: 0.0,
) -> FastResult:
    """One fast phase, with the arguments and the result of `evolution.evolve`. The minibatch has fast.failures_shown problems."""
    state = with_room(state, fits, log, cycle)
    if ended := budget_over(config, state.spent, state.idle):
        log(f"fast phase of cycle {cycle} skipped: {ended}")
        return carried_unscored(state, config, cycle)
    problems = list({problem.id: problem for problem in anchor}.values())
    members = state.members()
    size = len(problems) * config.samples
    if not problems or len(members) * size > config.rollout_budget:
        log(
            f"fast phase of cycle {cycle} skipped: fast.rollout_budget={config.rollout_budget} does not pay for {len(members)} carried "
            f"contexts on {len(problems)} anchor problems with {config.samples} samples"
        )
        return carried_unscored(state, config, cycle)
    evaluations = Evaluations(problems, config.samples, state.scores.at_version(policy_version), score)
    evaluations.judge(members)
    pool, lineage = list(members), dict(state.contexts)
    rules = Rules(count_tokens, config.max_context_tokens, fits, spells_special)
    rng = np.random.default_rng(np.random.SeedSequence([seed, _STREAM, cycle]))
    batches, tally, extra = _Minibatches(problems, config.failures_shown, rng), Tally(), _Extra(evaluations)
    while evaluations.spent + 2 * batches.size + size <= config.rollout_budget:
        if ended := budget_over(config, tally.spent(state.spent, evaluations, clock), 0):
            log(f"fast phase of cycle {cycle} ends before proposal {tally.waves}: {ended}")
            break
        weights = pareto.parent_weights(evaluations.matrix([c.id for c in pool]))
        parent = pool[int(rng.choice(len(pool), p=weights))]
        batch = batches.draw()
        before = extra.sample(parent, batch)
        failed = [r for r in before if r.verdict.reward is not None and r.verdict.reward < FULL_REWARD]
        if not failed:
            continue  # nothing to learn from (gepa's skip_perfect_score)
        prompt = ReflectionPrompt(parent.text, [evaluations.failure(r) for r in failed])
        said = functools.partial(_log_iteration, log, cycle, tally.waves)
        replies = ask(reflect, [prompt], [int(rng.integers(0, 2**31))], said)
        tally.waves += 1
        tally.count(replies)
        text = rules.extract(replies[0], known_texts=[c.text for c in pool])
        reason = text.reason if isinstance(text, Refusal) else rules.refuses(text)
        if isinstance(text, Refusal) or reason:
            tally.refused[reason] += 1
            emit(Proposal, cycle=cycle, parent=parent, context=None, refused=reason)
            continue
        line = child_lineage(Context.of(text, parent=parent.id, born=cycle), failed, replies)
        line = lineage.setdefault(line.context.id, line)
        child = line.context
        emit(Proposal, cycle=cycle, parent=parent, context=child, refused="")
        after = extra.sample(child, batch)
        admitted = _gain(before, after) > pareto.TIE
        if admitted:
            evaluations.judge([child])
            pool.append(child)
        tally.born.append(child.id)
        lineage[child.id] = dataclasses.replace(lineage[child.id], admitted=admitted)
        emit(
            Admission,
            cycle=cycle,
            context=child,
            parent=parent,
            admitted=admitted,
            mean=_mean(after),
            parent_mean=_mean(before),
        )
    assert evaluations.spent <= config.rollout_budget

    ids = [context.id for context in pool]
    scores = evaluations.matrix(ids)
    front = np.flatnonzero(pareto.undominated(scores))
    means = np.nan_to_num(pareto.row_means(scores))
    rows = sorted(front.tolist(), key=lambda row: (-means[row], row))[: config.population]
    rows += [rows[0]] * (config.population - len(rows))
    return conclude(
        state,
        evaluations,
        lineage,
        [ids[row] for row in rows],
        tally,
        admitted=len(pool) - len(members),
        seed_stays=state.seed_id in ids,
        cycle=cycle,
        spent=tally.spent(state.spent, evaluations, clock),
        idle=0 if len(pool) > len(members) else state.idle + 1,
    )


class _Minibatches:
    """Problems in random order, `size` at a time, shuffled anew after each pass, as gepa's epoch-shuffled sampler gives them."""

    def __init__(self, problems: Sequence[Problem], size: int, rng: np.random.Generator) -> None:
        self.problems, self.size, self.rng = problems, min(size, len(problems)), rng
        self.queue: list[int] = []

    def draw(self) -> list[Problem]:
        if len(self.queue) < self.size:
            self.queue = [int(i) for i in self.rng.permutation(len(self.problems))]
        drawn, self.queue = self.queue[: self.size], self.queue[self.size :]
        return [self.problems[i] for i in drawn]


class _Extra:
    """Rollouts on minibatches: they count as spent, but not into the scores on the anchor set, as in gepa."""

    def __init__(self, evaluations: Evaluations) -> None:
        self.evaluations = evaluations
        self.number: dict[tuple[str, str], int] = {}  # of the next sample

    def sample(self, context: Context, problems: Sequence[Problem]) -> list[ScoredRollout]:
        requests = []
        for problem in problems:
            number = self.number.get((context.id, problem.id), self.evaluations.samples)
            self.number[context.id, problem.id] = number + 1
            requests.append(RolloutRequest(context, problem, number))
        answers = self.evaluations.score(requests)
        self.evaluations.sampled += answers
        self.evaluations.unjudged += sum(answer.verdict.reward is None for answer in answers)
        return answers


def _gain(before: Sequence[ScoredRollout], after: Sequence[ScoredRollout]) -> float:
    """What the sum of rewards gains on the problems that were judged both times."""
    rewards = [(a.verdict.reward, b.verdict.reward) for a, b in zip(before, after, strict=True)]
    both = [(a, b) for a, b in rewards if a is not None and b is not None]
    return sum(b for _, b in both) - sum(a for a, _ in both)


def _mean(rollouts: Sequence[ScoredRollout]) -> float | None:
    rewards = [r.verdict.reward for r in rollouts if r.verdict.reward is not None]
    return sum(rewards) / len(rewards) if rewards else None


def _log_iteration(log: Log, cycle: int, number: int, text: str) -> None:
    log(f"fast phase of cycle {cycle}, proposal {number}: {text}")
