"""Evolve the contexts: carry the population over, propose and test edits for a few generations, keep K contexts.

The method is FST's fast channel (arXiv 2605.12484, Algorithm 1, line "evolve Phi"); its evolution is GEPA's (arXiv
2507.19457): parents from the per-problem Pareto front, edits proposed by reflection on failures. Differences from GEPA, and why:

- it starts from a population and from a policy that has changed. Every carried context is rescored, on the same
  problems and samples as its children, in one batch;
- all reflections of a generation form one batch, and so do all its children, since a rollout engine is fast on many
  prompts at once;
- a child is admitted by a paired test against its parent (`pareto.admits`), not by comparing two noisy sums;
- the budget is a hard limit: a generation has only as many children as it can pay for in full.

Every decision is a pure function of the state, the anchor set, the scores and the replies, and all randomness derives
from (seed, cycle, generation). So processes with the same scores and replies decide alike, and a resumed run repeats
itself. `score` and `reflect` are called for a whole batch at once; they are the only places where processes communicate.

GEPA's own loop, one candidate at a time, is in plain_gepa.py; evolution by the slow phase's rollouts in e_spl.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fst_fast.config import FastConfig
from fst_fast.config.components import components_of, compose, names_one
from fst_fast.config.derived import Size, affordable, screening, wave_width
from fst_fast.contracts import Context, Problem, ScoredRollout
from fst_fast.fast import pareto, racing
from fst_fast.fast.budget import budget_over
from fst_fast.fast.evaluations import Evaluations
from fst_fast.fast.merge import merge
from fst_fast.fast.outcome import FastResult, Log, Rules, Tally, carried_unscored, child_lineage, conclude
from fst_fast.fast.population import FastState, Lineage
from fst_fast.fast.reflection import Lesson, Partner, ReflectionPrompt, Reflector, Refusal, Reply, ask
from fst_fast.fast.scoring import ScoreFn
from fst_fast.fast.selector import revised
from fst_fast.run.callbacks import Admission, Proposal

SHOWN_LESSONS, SHOWN_OTHERS = 2, 3
"""How many admitted edits and other contexts a reflection prompt brings along."""

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
                f"does not pay one rollout for each of {len(members)} carried contexts and {config.children} children"
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

    archive = list(members)  # carried and admitted contexts: candidates for parents and for the population
    lineage = dict(state.contexts)
    tried = {c.text for c in members}
    tried |= {line.context.text for line in lineage.values() if line.policy_version == policy_version}
    rules = Rules(count_tokens, config.max_context_tokens, fits, spells_special)
    tally = Tally()
    planned = config.first_generations if cycle == 0 else config.generations
    searching = config.search_budget is not None and [c.id for c in members] == [state.seed_id]
    for generation in itertools.count():
        deeper = searching and len(archive) == len(members)  # nothing admitted yet
        if generation >= planned and not deeper:
            break
        if ended := budget_over(config, tally.spent(state.spent, evaluations, clock), 0):
            log(f"fast phase of cycle {cycle} ends before generation {generation}: {ended}")
            break
        budget = (config.search_budget if deeper else None) or config.rollout_budget
        width = wave_width(config, size, budget - evaluations.spent)
        rng = np.random.default_rng(np.random.SeedSequence([seed, _STREAM, cycle, generation]))
        wanted = config.proposals or config.children
        drawn = wanted * (width > 0) if screening(config) else min(width, wanted)
        parents = _choose_parents(
            evaluations, archive, drawn, rng, _weights(config, evaluations, archive, lineage)
        )
        if not parents:  # the budget is used up, or no context fails anywhere
            break
        shown = _choose_failures(evaluations, parents, config.failures_shown, rng)
        merged = (
            merge(evaluations.matrix([c.id for c in archive]), archive, lineage, tried)
            if config.merge
            else None
        )
        if merged:
            parents, shown = parents[:-1], shown[:-1]
        turn = (cycle + generation) * wanted
        revising = (
            revised(config.component_selector, parents, turn, evaluations, lineage)
            if config.components
            else [[""] for _ in parents]
        )
        ranked = sorted(archive, key=lambda c: -(evaluations.mean(c.id)[0] or 0.0))
        lessons = _lessons(lineage)
        partners = [_partners(config, evaluations, archive, parent, rng) for parent in parents]
        prompts = [
            ReflectionPrompt(
                _part(parent, component),
                [evaluations.failure(s) for s in failures],
                successes=[evaluations.failure(s) for s in evaluations.successes],
                others=[_part(c, component) for c in ranked if c.id != parent.id][:SHOWN_OTHERS],
                lessons=[] if component else lessons,  # which are whole contexts
                component=component,
                whole=parent.text if component else "",
                partners=[Partner(_part(p, component), solved) for p, solved in beside],
            )
            for parent, failures, names, beside in zip(parents, shown, revising, partners, strict=True)
            for component in names
        ]
        seeds = [int(s) for s in rng.integers(0, 2**31, size=len(prompts))]
        replies = ask(reflect, prompts, seeds, functools.partial(_log_generation, log, cycle, generation))
        tally.waves += 1
        tally.count(replies)

        children: list[racing.Child] = []
        if merged:
            parent, other, text = merged
            tried.add(text)
            child = Context.of(text, parent=parent.id, born=cycle)
            lineage.setdefault(child.id, Lineage(child, admitted=False, reflection=f"merged with {other.id}"))
            emit(Proposal, cycle=cycle, parent=parent, context=child, refused="")
            children.append((lineage[child.id].context, parent))
        answers = iter(replies)
        for parent, failures, names in zip(parents, shown, revising, strict=True):
            replies_here = [next(answers) for _ in names]
            text, reason = _child_text(parent, names, replies_here, rules.extract, tried)
            if text:
                tried.add(text)
                reason = rules.refuses(text)
            if reason:
                tally.refused[reason] += 1
                emit(Proposal, cycle=cycle, parent=parent, context=None, refused=reason)
                continue
            line = child_lineage(Context.of(text, parent=parent.id, born=cycle), failures, replies_here)
            # A context tried under an earlier policy keeps its place in the tree.
            line = lineage.setdefault(line.context.id, line)
            emit(Proposal, cycle=cycle, parent=parent, context=line.context, refused="")
            children.append((line.context, parent))
        tally.born += [child.id for child, _ in children]
        if len(children) > width:
            evaluations.judge([child for child, _ in children], problems=config.screen_problems, samples=1)
            children.sort(key=lambda pair: -(evaluations.mean(pair[0].id)[0] or 0.0))
            del children[width:]
        finished = racing.race(evaluations, children, config.rungs)
        for child, parent in children:
            admitted = (child, parent) in finished and pareto.admits(
                evaluations.rewards[child.id], evaluations.rewards[parent.id], config.admit_z
            )
            lineage[child.id] = dataclasses.replace(lineage[child.id], admitted=admitted)
            if admitted:
                archive.append(child)
            means = [evaluations.mean(context.id)[0] for context in (child, parent)]
            emit(
                Admission, cycle=cycle, context=child, parent=parent, admitted=admitted, mean=means[0], parent_mean=means[1]
            )  # fmt: skip
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
        rest=min(idle, MAX_REST) if config.adaptive and found else 0,
    )


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


def _partners(
    config: FastConfig,
    evaluations: Evaluations,
    archive: Sequence[Context],
    parent: Context,
    rng: np.random.Generator,
) -> list[tuple[Context, list[str]]]:
    """With probability fast.crossover, the context that wins the most problems that the parent does not win, and those problems."""
    if not config.crossover or rng.random() >= config.crossover:
        return []
    front = pareto.wins(evaluations.matrix([c.id for c in archive]))
    gains = front & ~front[[c.id for c in archive].index(parent.id)]
    best = int(gains.sum(axis=1).argmax())
    if not gains[best].any():
        return []
    asked = [problem for problem, gain in zip(evaluations.problem, gains[best], strict=True) if gain]
    return [(archive[best], [evaluations.question(problem) for problem in asked[: config.failures_shown]])]


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


def _choose_failures(
    evaluations: Evaluations, parents: list[Context], shown: int, rng: np.random.Generator
) -> list[list[ScoredRollout]]:
    """For each child the next `shown` failures of its parent, in random order. Siblings see different ones until all
    are used, then the order repeats."""
    order: dict[str, list[ScoredRollout]] = {}
    used: Counter[str] = Counter()
    chosen = []
    for parent in parents:
        if parent.id not in order:
            failures = evaluations.failures[parent.id]
            order[parent.id] = [failures[i] for i in rng.permutation(len(failures))]
        queue = order[parent.id]
        start = used[parent.id]
        take = min(shown, len(queue))
        chosen.append([queue[(start + i) % len(queue)] for i in range(take)])
        used[parent.id] += take
    return chosen


def _part(context: Context, component: str) -> str:
    """The text of a component; that of the context where it has none."""
    return components_of(context.text)[component] if component else context.text


def _child_text(
    parent: Context,
    names: Sequence[str],
    replies: Sequence[Reply],
    read: Callable[..., str | Refusal],
    tried: Collection[str],
) -> tuple[str, str]:
    """(the child's text, "") or ("", why there is none). Of several components, those without a usable reply stay as they are."""
    if names == [""]:
        text = read(replies[0], known_texts=tried)
        return (text, "") if isinstance(text, str) else ("", text.reason)
    parts = components_of(parent.text)
    reason = ""
    for name, reply in zip(names, replies, strict=True):
        text = read(reply, known_texts=[parts[name]])
        if isinstance(text, Refusal) or names_one(text):
            reason = text.reason if isinstance(text, Refusal) else "ambiguous"
        else:
            parts[name] = text
    child = compose(parts)
    if child == parent.text:
        return "", reason
    return ("", "duplicate") if child in tried else (child, "")


def _lessons(lineage: Mapping[str, Lineage]) -> list[Lesson]:
    """The latest admitted edits, oldest first."""
    edits = [
        (lineage[line.context.parent], line)
        for line in lineage.values()
        if line.admitted and line.context.parent is not None and line.context.parent in lineage
    ]
    return [
        Lesson(before.context.text, [shown.feedback for shown in line.failures], line.context.text)
        for before, line in edits[-SHOWN_LESSONS:]
    ]


def _log_generation(log: Log, cycle: int, generation: int, text: str) -> None:
    log(f"fast phase of cycle {cycle}, generation {generation}: {text}")
