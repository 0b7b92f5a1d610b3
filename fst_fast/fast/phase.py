"""One fast phase: carry the population over, evolve it for a few narrow generations, keep K contexts.

The method is FST's fast channel (arXiv 2605.12484, Algorithm 1, line "evolve Phi"), its evolution GEPA's (arXiv 2507.19457): parents from
the per-problem Pareto front, edits proposed by reflection on failures. What differs from GEPA, and why:

- it starts from a population and from a policy that has moved: every carried context is scored afresh, on the same problems and samples as
  its children, in one batch;
- the waves are wide (all reflections one batch, all children one batch), since a rollout engine is fast on many prompts at once;
- a child enters by a paired test against its parent (`pareto.admits`), not by a bare comparison of two noisy sums;
- the budget is a hard cap: a wave takes as many children as it can still pay for in full.

Every decision is a pure function of the state, the anchor set, the scores and the replies, and all randomness comes from (seed, cycle,
wave): processes that see the same scores and replies decide alike, and a resumed run repeats itself. `score` and `reflect` are called
once a wave with the whole batch, so they are the only places where processes have to talk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fst_fast.config import FastConfig
from fst_fast.contexts import pareto
from fst_fast.contexts.population import FastState, Lineage, Scores, Shown
from fst_fast.contexts.reflection import Failure, ReflectionPrompt, Reflector, Refusal, ask, cut, extract
from fst_fast.contexts.scoring import Sampled, ScoreFn
from fst_fast.contracts import Context, Problem

__all__ = ["FastResult", "FastState", "Sampled", "ScoreFn", "Size", "affordable", "fast_phase"]

Log = Callable[[str], None]

KEPT_FEEDBACK_CHARS = 500
"""Of a shown failure's feedback, what the lineage keeps."""
KEPT_REFLECTION_CHARS = 4000
"""Of a reflector's reply, what the lineage keeps."""

_STREAM = 0xFA57
"""Keeps the fast phase's random numbers apart from everybody else's under the same seed."""


@dataclass(frozen=True)
class FastResult:
    """state: to go on from and to save. population: exactly K contexts, the best first; it may repeat. sampled: every rollout of the
    phase, for reuse. record: the "cycle" line of metrics.jsonl, without kind and step."""

    state: FastState
    population: list[Context]
    sampled: list[Sampled]
    record: dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What scoring one context costs: problems x samples rollouts."""

    problems: int
    samples: int

    @property
    def rollouts(self) -> int:
        return self.problems * self.samples


def affordable(config: FastConfig, *, members: int, anchor: int) -> Size:
    """How much of the anchor set a budget pays for: the carried contexts and one full generation of children must fit.

    If they do not, first the samples shrink, then the anchor set (to its first problems): breadth over problems tells more than repetition.
    0 problems: the budget does not even pay one rollout for each of them, so the phase does nothing.
    """
    contexts = members + config.children
    if anchor == 0 or contexts > config.rollout_budget:
        return Size(0, 0)
    problems = min(anchor, config.rollout_budget // contexts)
    return Size(problems, min(config.samples, config.rollout_budget // (contexts * problems)))


def fast_phase(
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
) -> FastResult:
    """Run one fast phase. anchor: the problems contexts are compared on; an id that occurs twice counts once.

    cycle 0 is the first and runs config.first_generations waves, later ones config.generations. Never uses more than
    config.rollout_budget rollouts. A reflector that is down costs the wave its proposals and nothing else.
    """
    problems = list({problem.id: problem for problem in anchor}.values())
    members = state.members()
    size = affordable(config, members=len(members), anchor=len(problems))
    if size.problems == 0:
        if config.rollout_budget > 0:
            log(
                f"fast phase of cycle {cycle} skipped: fast.rollout_budget={config.rollout_budget} over {len(problems)} anchor problems "
                f"does not pay one rollout for each of {len(members)} carried contexts and {config.children} children"
            )
        return _carried_unscored(state, config, cycle)
    shrunk = size != Size(len(problems), config.samples)
    if shrunk:
        log(
            f"fast phase of cycle {cycle}: fast.rollout_budget={config.rollout_budget} pays for {size.problems} of {len(problems)} anchor "
            f"problems with {size.samples} of {config.samples} samples per context"
        )
    round = _Round(problems[: size.problems], size.samples, state.scores.at(policy_version), score)
    round.judge(members)

    archive = list(members)  # the carried and the admitted: what may be a parent or be kept
    lineage = dict(state.contexts)
    tried = {c.text for c in members} | {
        n.context.text for n in lineage.values() if n.policy_version == policy_version
    }
    scored: list[str] = [c.id for c in members]  # whose lineage gets this cycle's mean
    births: list[str] = []
    refused: Counter[str] = Counter()
    proposed = admitted = waves = 0
    for wave in range(config.first_generations if cycle == 0 else config.generations):
        width = min(config.children, (config.rollout_budget - round.spent) // size.rollouts)
        rng = _rng(seed, cycle, wave)
        parents = _choose_parents(round, archive, width, rng)
        if not parents:  # the budget is used up, or nothing fails
            break
        waves += 1
        shown = _choose_failures(round, parents, config.failures_shown, rng)
        prompts = [
            ReflectionPrompt(
                parent.text, [_failure(round.problem[s.rollout.problem_id], s) for s in failures]
            )
            for parent, failures in zip(parents, shown, strict=True)
        ]
        log_wave = functools.partial(_log_wave, log, cycle, wave)
        seeds = [int(s) for s in rng.integers(0, 2**31, size=len(prompts))]
        replies = ask(reflect, prompts, seeds, log_wave)
        proposed += len(replies)

        children: list[tuple[Context, Context]] = []  # (child, parent)
        for parent, failures, reply in zip(parents, shown, replies, strict=True):
            text = extract(
                reply, known_texts=tried, count_tokens=count_tokens, max_tokens=config.max_context_tokens
            )
            if isinstance(text, Refusal):
                refused[text.reason] += 1
                continue
            tried.add(text)
            child = Context.of(text, parent=parent.id, born=cycle)
            if child.id in lineage:  # tried under an earlier policy: same text, same place in the tree
                child = lineage[child.id].context
            else:
                lineage[child.id] = Lineage(
                    child,
                    admitted=False,
                    failures=tuple(
                        Shown(s.rollout.problem_id, cut(s.verdict.feedback, KEPT_FEEDBACK_CHARS))
                        for s in failures
                    ),
                    reflection=cut(_clean(reply.text or ""), KEPT_REFLECTION_CHARS),
                )
            children.append((child, parent))
        round.judge([child for child, _ in children])
        for child, parent in children:
            accepted = pareto.admits(round.rewards[child.id], round.rewards[parent.id], config.admit_z)
            lineage[child.id] = dataclasses.replace(lineage[child.id], admitted=accepted)
            scored.append(child.id)
            births.append(child.id)
            if accepted:
                admitted += 1
                archive.append(child)
    assert round.spent <= config.rollout_budget

    for context_id in scored:
        mean, n = round.mean(context_id)
        lineage[context_id] = dataclasses.replace(
            lineage[context_id], policy_version=policy_version, mean=mean, n=n
        )
    ids = [context.id for context in archive]
    rows = pareto.select(
        round.matrix(ids), config.population, seed=ids.index(state.seed_id) if state.seed_id in ids else None
    )
    population = [archive[row] for row in rows]
    kept = [context.id for context in population]
    means = [round.mean(context_id)[0] for context_id in ids]
    record = {
        "cycle": cycle,
        "population": [_line(lineage[context_id]) for context_id in kept],
        "proposed": proposed,  # reflections asked for: refused, rejected or admitted
        "admitted": admitted,
        "refused": dict(sorted(refused.items())),
        "fast_rollouts": round.spent,
        "unjudged": round.unjudged,
        "best_mean": max((mean for mean in means if mean is not None), default=None),
        "seed_mean": round.mean(state.seed_id)[0] if state.seed_id in ids else None,
        "waves": waves,
        "anchor_problems": size.problems,
        "samples": size.samples,
        "shrunk": shrunk,
        "contexts": [_line(lineage[context_id], born=True) for context_id in births],
    }
    after = FastState(state.seed_id, tuple(kept), lineage, round.scores.only(kept), cycle + 1)
    return FastResult(after, population, round.sampled, record)


class _Round:
    """What has been sampled in this phase: rewards by (problem, sample) for the paired test, counts and sums for the front."""

    def __init__(self, problems: list[Problem], samples: int, scores: Scores, score: ScoreFn) -> None:
        self.problem = {problem.id: problem for problem in problems}
        self.samples = samples
        self.scores = scores
        self.score = score
        self.rewards: dict[str, NDArray[np.float64]] = {}  # context id -> [N, S], NaN where unjudged
        self.failures: dict[
            str, list[Sampled]
        ] = {}  # context id -> the first failed sample of each failed problem
        self.sampled: list[Sampled] = []
        self.unjudged = 0

    @property
    def spent(self) -> int:
        return len(self.sampled)

    def judge(self, contexts: Sequence[Context]) -> None:
        """Score these contexts on every problem and sample, as one batch."""
        items = [(c, p, k) for c in contexts for p in self.problem.values() for k in range(self.samples)]
        if not items:
            return
        answers = self.score(items)
        assert len(answers) == len(items), f"score returned {len(answers)} rollouts for {len(items)}"
        self.sampled += answers
        column = {problem_id: j for j, problem_id in enumerate(self.problem)}
        for context in contexts:
            self.rewards[context.id] = np.full((len(column), self.samples), np.nan)
            self.failures[context.id] = []
        failed: set[tuple[str, str]] = set()
        for (context, problem, sample), answer in zip(items, answers, strict=True):
            rollout, reward = answer.rollout, answer.verdict.reward
            assert (rollout.context_id, rollout.problem_id, rollout.sample) == (
                context.id,
                problem.id,
                sample,
            )
            assert rollout.policy_version == self.scores.policy_version, "a rollout of another policy"
            if reward is None:
                self.unjudged += 1
                continue
            self.rewards[context.id][column[problem.id], sample] = reward
            self.scores.add(context.id, problem.id, reward)
            if reward < 1.0 and (context.id, problem.id) not in failed:
                failed.add((context.id, problem.id))
                self.failures[context.id].append(answer)

    def matrix(self, context_ids: Sequence[str]) -> pareto.Matrix:
        return self.scores.matrix(context_ids, list(self.problem))

    def mean(self, context_id: str) -> tuple[float | None, int]:
        """Mean over this phase's problems of the mean reward there, and the number of judged rollouts."""
        n = self.scores.count(context_id, list(self.problem))
        return (float(pareto.row_means(self.matrix([context_id]))[0]) if n else None), n


def _choose_parents(
    round: _Round, archive: list[Context], width: int, rng: np.random.Generator
) -> list[Context]:
    """`width` draws, with replacement, among the contexts that failed somewhere, by problems won; siblings stand together."""
    if width <= 0:
        return []
    failing = np.array([bool(round.failures[c.id]) for c in archive])
    if not failing.any():
        return []
    weights = np.where(failing, pareto.parent_weights(round.matrix([c.id for c in archive])), 0.0)
    if weights.sum() == 0:  # the winners are perfect: the others may still learn
        weights = failing.astype(np.float64)
    drawn = rng.choice(len(archive), size=width, p=weights / weights.sum())
    return [archive[row] for row in sorted(int(d) for d in drawn)]


def _choose_failures(
    round: _Round, parents: list[Context], shown: int, rng: np.random.Generator
) -> list[list[Sampled]]:
    """For each parent's children, in random order, the next `shown` of its failed problems: siblings see different ones as far as
    there are enough, then the order starts over."""
    order: dict[str, list[Sampled]] = {}
    used: Counter[str] = Counter()
    chosen = []
    for parent in parents:
        if parent.id not in order:
            failures = round.failures[parent.id]
            order[parent.id] = [failures[i] for i in rng.permutation(len(failures))]
        queue = order[parent.id]
        start = used[parent.id]
        take = min(shown, len(queue))
        chosen.append([queue[(start + i) % len(queue)] for i in range(take)])
        used[parent.id] += take
    return chosen


def _failure(problem: Problem, sampled: Sampled) -> Failure:
    assert sampled.verdict.reward is not None
    text = "\n\n".join(
        m["content"] if m["role"] == "user" else f"{m['role']}: {m['content']}" for m in problem.messages
    )
    return Failure(text, sampled.response, sampled.verdict.feedback, sampled.verdict.reward)


def _carried_unscored(state: FastState, config: FastConfig, cycle: int) -> FastResult:
    population = state.population_of(config.population)
    ids = tuple(context.id for context in population)
    record = {
        "cycle": cycle,
        "population": [{**_line(state.contexts[context_id]), "mean": None, "n": 0} for context_id in ids],
        "proposed": 0,
        "admitted": 0,
        "refused": {},
        "fast_rollouts": 0,
        "unjudged": 0,
        "best_mean": None,
        "seed_mean": None,
        "waves": 0,
        "anchor_problems": 0,
        "samples": 0,
        "shrunk": config.rollout_budget > 0,
        "contexts": [],
    }
    return FastResult(dataclasses.replace(state, population=ids, cycle=cycle + 1), population, [], record)


def _line(lineage: Lineage, *, born: bool = False) -> dict[str, Any]:
    context = lineage.context
    line: dict[str, Any] = {
        "id": context.id,
        "text": context.text,
        "parent": context.parent,
        "born": context.born,
        "mean": lineage.mean,
        "n": lineage.n,
    }
    if born:
        line["admitted"] = lineage.admitted
        line["failures"] = [dataclasses.asdict(shown) for shown in lineage.failures]
        line["reflection"] = lineage.reflection
    return line


def _log_wave(log: Log, cycle: int, wave: int, text: str) -> None:
    log(f"fast phase of cycle {cycle}, wave {wave}: {text}")


def _clean(text: str) -> str:
    """Text that any UTF-8 file can hold."""
    return text.encode(errors="replace").decode()


def _rng(seed: int, cycle: int, wave: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, _STREAM, cycle, wave]))
