"""Evolve the contexts: carry the population over, propose and test edits for a few generations, keep K contexts.

The method is FST's fast channel (arXiv 2605.12484, Algorithm 1, line "evolve Phi"); its evolution is GEPA's (arXiv
2507.19457): parents from the per-problem Pareto front, edits proposed by reflection on failures. Differences from GEPA, and why:

- it starts from a population and from a policy that has changed. Every carried context is rescored, on the same
  problems and samples as its children, in one batch;
- all reflections of a generation form one batch, and so do all its children, since a rollout engine is fast on many
  prompts at once;
- children are scored as far as they deserve, and parents drawn, by Thompson sampling over all contexts of the phase (thompson.py,
  `_step_by_step`); or, with fast.parents=front and improvement, every child in full (`_in_full`);
- a child is admitted by a paired test against what it comes from (`pareto.admits`), not by comparing two noisy sums;
- the budget is a hard limit: no batch is asked for that it does not pay for.

Every decision is a pure function of the state, the anchor set, the scores and the replies, and all randomness derives
from (seed, cycle, generation). So processes with the same scores and replies decide alike, and a resumed run repeats
itself. `score` and `reflect` are called for a whole batch at once; they are the only places where processes communicate.

GEPA's own loop, one candidate at a time, is in plain_gepa.py; evolution by the slow phase's rollouts in e_spl.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fst_fast.config import FastConfig
from fst_fast.config.derived import FIRST, Size, affordable, reserve, screening, wave_width
from fst_fast.contracts import Context, Problem
from fst_fast.fast import pareto, racing
from fst_fast.fast.budget import budget_over
from fst_fast.fast.candidates import Candidates
from fst_fast.fast.evaluations import Evaluations
from fst_fast.fast.outcome import FastResult, Log, Rules, carried_unscored, conclude, with_room
from fst_fast.fast.population import FastState, Lineage
from fst_fast.fast.reflection import Reflector
from fst_fast.fast.scoring import ScoreFn
from fst_fast.fast.thompson import SPARE, Search

_STREAM = 0xFA57
"""Separates the fast phase's random stream from others with the same seed."""

MAX_REST = 3  # cycles that fast.adaptive skips in a row


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
    """Evolve the population for one cycle.

    anchor: the problems on which contexts are compared; duplicate ids count once. fits: whether a context leaves room
    for every problem in the prompt; if not, it is refused as too long. spells_special: as
    in `reflection.extract`. emit: receives the Proposal and Admission events. clock: seconds since this phase began, the same on every process.

    Cycle 0 is the first and runs config.first_generations generations, later ones config.generations. Never uses more
    than config.rollout_budget rollouts. A budget of config.budget that is used up ends the evolution, before a generation at the latest. If
    the reflector fails, the generation yields no children and the phase continues."""
    state = with_room(state, fits, log, cycle)
    if ended := budget_over(config, state.spent, state.idle):
        log(f"fast phase of cycle {cycle} skipped: {ended}")
        return carried_unscored(state, config, cycle)
    if config.adaptive and state.rest:
        log(
            f"fast phase of cycle {cycle} skipped (fast.adaptive): no child admitted in the last {state.idle} fast phases that ran"
        )
        return carried_unscored(dataclasses.replace(state, rest=state.rest - 1), config, cycle)
    problems = list({problem.id: problem for problem in anchor}.values())
    members = state.members()
    if config.keep_seed and state.seed_id not in state.population:
        members.append(state.contexts[state.seed_id].context)
    size = affordable(config, members=len(members), anchor=len(problems))
    if size.problems == 0:
        if config.rollout_budget > 0:
            log(
                f"fast phase of cycle {cycle} skipped: fast.rollout_budget={config.rollout_budget} over {len(problems)} anchor problems "
                f"does not pay for {len(members)} carried contexts and a wave of children on one problem"
            )
        return carried_unscored(state, config, cycle)
    if size != Size(len(problems), config.samples):
        log(
            f"fast phase of cycle {cycle}: fast.rollout_budget={config.rollout_budget} pays for {size.problems} of {len(problems)} anchor "
            f"problems with {size.samples} of {config.samples} samples per context"
        )
    evaluations = Evaluations(
        problems[: size.problems], size.samples, state.scores.at_version(policy_version), score
    )
    evaluations.judge(members)

    candidates = Candidates(config, cycle, evaluations, list(members), dict(state.contexts), reflect, log, emit,
        Rules(count_tokens, config.max_context_tokens, fits, spells_special),
        {c.text for c in members} | _tested(state, policy_version, size if config.parents == "thompson" else Size(0, 0)),
    )  # fmt: skip
    archive, lineage, tally = candidates.archive, candidates.lineage, candidates.tally

    def rng_of(generation: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([seed, _STREAM, cycle, generation]))

    def over(generation: int) -> bool:
        ended = budget_over(config, tally.spent(state.spent, evaluations, clock), 0)
        if ended:
            log(f"fast phase of cycle {cycle} ends before generation {generation}: {ended}")
        return bool(ended)

    planned = config.first_generations if cycle == 0 else config.generations
    alone = [c.id for c in members] == [state.seed_id]
    deeper = max(config.search_budget or 0, config.rollout_budget) if alone else config.rollout_budget
    waves = _Waves(size, planned, deeper, rng_of, over)
    if config.parents == "thompson":
        search = Search(evaluations, members, width=config.children, key=[seed, _STREAM, cycle])
        _step_by_step(candidates, search, waves)
    else:
        _in_full(candidates, waves)
    assert evaluations.spent <= max(config.rollout_budget, config.search_budget or 0)

    ids = [context.id for context in archive]
    rewards = np.stack([evaluations.rewards[context_id] for context_id in ids])
    seed_row = ids.index(state.seed_id) if state.seed_id in ids else None
    rows = pareto.select(evaluations.matrix(ids), rewards, config.population, seed=seed_row)
    if config.keep_seed and seed_row is not None and seed_row not in rows:
        rows[-1] = seed_row
    kept = [ids[row] for row in rows]
    admitted_now = len(archive) - len(members)
    idle = 0 if admitted_now else state.idle + 1
    found = any(context_id != state.seed_id for context_id in kept)
    return conclude(
        state,
        evaluations,
        lineage,
        kept,
        tally,
        admitted=admitted_now,
        seed_stays=seed_row is not None,
        cycle=cycle,
        spent=tally.spent(state.spent, evaluations, clock),
        idle=idle,
        rest=min(idle if found else max(idle - 1, 0), MAX_REST) if config.adaptive else 0,
    )


class _Waves(NamedTuple):
    """How long a phase goes on. planned: waves. deeper: the most rollouts while nothing is found. over: whether a budget ends it before a wave."""

    size: Size
    planned: int
    deeper: int
    rng_of: Callable[[int], np.random.Generator]
    over: Callable[[int], bool]


def _step_by_step(candidates: Candidates, search: Search, waves: _Waves) -> None:
    """The waves of fast.parents=thompson: `planned`, and as long as nothing is found so many more as `deeper` rollouts pay for."""
    size, planned, deeper, rng_of, over = waves
    config, evaluations, budget = candidates.config, candidates.evaluations, candidates.config.rollout_budget
    before = evaluations.spent

    def left() -> int:
        return budget - evaluations.spent

    def width() -> int:
        return min(config.children, max(left() - reserve(size, left()), 0) // FIRST)

    def finish() -> None:
        candidates.decide(search.finish(config.population + SPARE, min(left(), reserve(size, budget))))

    for generation in itertools.count():
        if generation >= planned or not width():
            finish()
            nothing_came = generation and evaluations.spent == before
            if deeper == config.rollout_budget or candidates.found() or nothing_came:
                break
            before = evaluations.spent
            budget, planned = deeper, generation + config.generations
        rng = rng_of(generation)
        parents = [] if over(generation) else search.parents(width(), rng)
        if not parents:  # a budget is used up, or no context fails anywhere
            finish()
            break
        children = candidates.propose(parents, generation, rng)
        candidates.decide(search.score(children, rng, left() - reserve(size, left())))
    candidates.close()


def _in_full(candidates: Candidates, waves: _Waves) -> None:
    """The waves in which every child is scored in full, or races: `planned`, and until one is admitted so many more as `deeper` rollouts pay for."""
    size, planned, deeper, rng_of, over = waves
    config, evaluations, archive = candidates.config, candidates.evaluations, candidates.archive
    carried = len(archive)
    for generation in itertools.count():
        searching = deeper > config.rollout_budget and len(archive) == carried
        if (generation >= planned and not searching) or over(generation):
            break
        width = wave_width(config, size, (deeper if searching else config.rollout_budget) - evaluations.spent)
        wanted = config.proposals or config.children
        drawn = wanted * (width > 0) if screening(config) else min(width, wanted)
        rng = rng_of(generation)
        weights = _weights(config, evaluations, archive, candidates.lineage)
        parents = _choose_parents(evaluations, archive, drawn, rng, weights)
        if not parents:  # the budget is used up, or no context fails anywhere
            break
        children = candidates.propose(parents, generation, rng)
        if not children and generation >= planned:  # a reflector that has no more to say
            break
        if len(children) > width:
            evaluations.judge([child for child, _ in children], problems=config.screen_problems, samples=1)
            children.sort(key=lambda pair: -(evaluations.mean(pair[0].id)[0] or 0.0))
            del children[width:]
        candidates.decide([child for child, _ in racing.race(evaluations, children, config.rungs)])
        candidates.close()


def _weights(
    config: FastConfig,
    evaluations: Evaluations,
    archive: Sequence[Context],
    lineage: Mapping[str, Lineage],
) -> NDArray[np.float64]:
    """How often each context of the archive is to be a parent, fast.parents."""
    ids = [c.id for c in archive]
    if config.parents == "front":
        return pareto.parent_weights(evaluations.matrix(ids))
    rewards = np.stack([evaluations.rewards[context_id] for context_id in ids])
    return pareto.expected_improvement(rewards, _edit_gains(evaluations, lineage))


def _edit_gains(evaluations: Evaluations, lineage: Mapping[str, Lineage]) -> list[float]:
    """What the edits that are scored in this phase gained over their parents, in mean reward."""
    means = {context_id: evaluations.mean(context_id)[0] for context_id in evaluations.rewards}
    pairs = [(means[c], means.get(lineage[c].context.parent or "")) for c in means]
    return [child - parent for child, parent in pairs if child is not None and parent is not None]


def _choose_parents(
    evaluations: Evaluations,
    archive: list[Context],
    width: int,
    rng: np.random.Generator,
    weights: NDArray[np.float64],
) -> list[Context]:
    """Draw `width` parents, with replacement and by weight, among contexts with failures; siblings are adjacent."""
    if width <= 0:
        return []
    failing = np.array([bool(evaluations.failures[c.id]) for c in archive])
    weights = np.where(failing, weights, 0.0)
    if weights.sum() == 0:  # every possible parent is perfect, so there is nothing to learn from
        return []
    drawn = rng.choice(len(archive), size=width, p=weights / weights.sum())
    return [archive[row] for row in sorted(int(d) for d in drawn)]


def _tested(state: FastState, policy_version: int, size: Size) -> set[str]:
    """The texts that have been scored under this policy, with as many rollouts as `size` has at least: they are not proposed again."""
    lines = [line for line in state.contexts.values() if line.policy_version == policy_version]
    return {line.context.text for line in lines if line.n >= size.rollouts}
