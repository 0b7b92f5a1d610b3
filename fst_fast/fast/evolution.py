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
itself. `score` and `reflect` are called once per generation with the whole batch; they are the only places where processes communicate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fst_fast.components import components_of, compose, names_one
from fst_fast.config import FastConfig
from fst_fast.config.derived import Size, affordable, screening
from fst_fast.contracts import Context, Problem, ScoredRollout
from fst_fast.fast import pareto
from fst_fast.fast.budget import budget_over
from fst_fast.fast.evaluations import Evaluations
from fst_fast.fast.merge import merge
from fst_fast.fast.population import FastState, Lineage, ShownFailure, Spent
from fst_fast.fast.reflection import Lesson, ReflectionPrompt, Reflector, Refusal, Reply, ask, extract
from fst_fast.fast.request import cut
from fst_fast.fast.scoring import ScoreFn
from fst_fast.fast.selector import revised
from fst_fast.run.callbacks import Admission, Proposal

Log = Callable[[str], None]

KEPT_FEEDBACK_CHARS = 500
"""How much of a shown failure's feedback the lineage stores."""
KEPT_REFLECTION_CHARS = 4000
"""How much of a reflector's reply the lineage stores."""

SHOWN_LESSONS, SHOWN_OTHERS = 2, 3
"""How many admitted edits and other contexts a reflection prompt brings along."""

_STREAM = 0xFA57
"""Separates the fast phase's random stream from others with the same seed."""


@dataclass(frozen=True)
class FastResult:
    """state: to save and continue from. population: exactly K contexts, best first, with possible repeats. sampled:
    every rollout of the phase, for reuse. record: the "cycle" line of metrics.jsonl, without kind and step."""

    state: FastState
    population: list[Context]
    sampled: list[ScoredRollout]
    record: dict[str, Any]


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
        return _carried_unscored(state, config, cycle)
    if config.adaptive and state.rest:
        log(
            f"fast phase of cycle {cycle} skipped (fast.adaptive): no child admitted in the last {state.idle} fast phases that ran"
        )
        return _carried_unscored(dataclasses.replace(state, rest=state.rest - 1), config, cycle)
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
    born: list[str] = []
    refused: Counter[str] = Counter()
    asked = generations = read = written = 0
    usd = 0.0

    def spent() -> Spent:
        tokens = read + written + sum(len(s.rollout.response_ids) for s in evaluations.sampled)
        return state.spent.plus(tokens, clock(), usd)

    for generation in range(config.first_generations if cycle == 0 else config.generations):
        if ended := budget_over(config, spent(), 0):
            log(f"fast phase of cycle {cycle} ends before generation {generation}: {ended}")
            break
        screen = screening(config)
        width = min(config.children, (config.rollout_budget - evaluations.spent - screen) // size.rollouts)
        rng = np.random.default_rng(np.random.SeedSequence([seed, _STREAM, cycle, generation]))
        wanted = config.proposals or config.children
        parents = _choose_parents(
            evaluations, archive, min(width, wanted) if not screen else wanted * (width > 0), rng
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
        prompts = [
            ReflectionPrompt(
                _part(parent, component),
                [evaluations.failure(s) for s in failures],
                successes=[evaluations.failure(s) for s in evaluations.successes],
                others=[_part(c, component) for c in ranked if c.id != parent.id][:SHOWN_OTHERS],
                lessons=[] if component else lessons,  # which are whole contexts
                component=component,
                whole=parent.text if component else "",
            )
            for parent, failures, names in zip(parents, shown, revising, strict=True)
            for component in names
        ]
        seeds = [int(s) for s in rng.integers(0, 2**31, size=len(prompts))]
        replies = ask(reflect, prompts, seeds, functools.partial(_log_generation, log, cycle, generation))
        generations += 1
        asked += len(replies)
        read += sum(reply.prompt_tokens for reply in replies)
        written += sum(reply.completion_tokens for reply in replies)
        usd += sum(reply.cost_usd for reply in replies)

        children: list[tuple[Context, Context]] = []  # (child, its parent)
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
            text, reason = _child_text(
                parent,
                names,
                replies_here,
                functools.partial(
                    extract,
                    count_tokens=count_tokens,
                    max_tokens=config.max_context_tokens,
                    spells_special=spells_special,
                ),
                tried,
            )
            if text:
                tried.add(text)
                reason = "" if fits(Context.of(text)) else "too_long"
            if reason:
                refused[reason] += 1
                emit(Proposal, cycle=cycle, parent=parent, context=None, refused=reason)
                continue
            line = _child_lineage(Context.of(text, parent=parent.id, born=cycle), failures, replies_here)
            # A context tried under an earlier policy keeps its place in the tree.
            line = lineage.setdefault(line.context.id, line)
            emit(Proposal, cycle=cycle, parent=parent, context=line.context, refused="")
            children.append((line.context, parent))
        born += [child.id for child, _ in children]
        if len(children) > width:
            evaluations.judge([child for child, _ in children], screen=config.screen_problems)
            children.sort(key=lambda pair: -(evaluations.mean(pair[0].id)[0] or 0.0))
            del children[width:]
        evaluations.judge([child for child, _ in children])
        for child, parent in children:
            admitted = pareto.admits(
                evaluations.rewards[child.id], evaluations.rewards[parent.id], config.admit_z
            )
            lineage[child.id] = dataclasses.replace(lineage[child.id], admitted=admitted)
            if admitted:
                archive.append(child)
            means = [evaluations.mean(context.id)[0] for context in (child, parent)]
            emit(
                Admission, cycle=cycle, context=child, parent=parent, admitted=admitted, mean=means[0], parent_mean=means[1]
            )  # fmt: skip
    assert evaluations.spent <= config.rollout_budget

    for context_id in evaluations.rewards:
        mean, n = evaluations.mean(context_id)
        line = dataclasses.replace(lineage[context_id], policy_version=policy_version, mean=mean, n=n)
        lineage[context_id] = line
    ids = [context.id for context in archive]
    rewards = np.stack([evaluations.rewards[context_id] for context_id in ids])
    seed_row = ids.index(state.seed_id) if state.seed_id in ids else None
    rows = pareto.select(evaluations.matrix(ids), rewards, config.population, seed=seed_row)
    population = [archive[row] for row in rows]
    kept = tuple(context.id for context in population)
    record = {
        **_empty_record(cycle, [_line(lineage[context_id]) for context_id in kept]),
        "proposed": asked,
        "admitted": len(archive) - len(members),
        "refused": dict(sorted(refused.items())),
        "fast_rollouts": evaluations.spent,
        "reflection_prompt_tokens": read,
        "reflection_completion_tokens": written,
        "reflection_usd": usd,
        "unjudged": evaluations.unjudged,
        "best_mean": lineage[kept[0]].mean,
        "seed_mean": None if seed_row is None else lineage[state.seed_id].mean,
        "waves": generations,
        "anchor_problems": size.problems,
        "samples": size.samples,
        "contexts": [_line(lineage[context_id], birth=True) for context_id in born],
    }
    idle = 0 if len(archive) > len(members) else state.idle + 1
    found = any(context_id != state.seed_id for context_id in kept)
    rest = min(idle, MAX_REST) if config.adaptive and found else 0
    scores = evaluations.scores.restricted_to(kept)
    after = FastState(state.seed_id, kept, lineage, scores, cycle + 1, idle, rest, spent())
    return FastResult(after, population, evaluations.sampled, record)


def _choose_parents(
    evaluations: Evaluations, archive: list[Context], width: int, rng: np.random.Generator
) -> list[Context]:
    """Draw `width` parents, with replacement, among contexts with failures, weighted by problems won; siblings are adjacent."""
    if width <= 0:
        return []
    failing = np.array([bool(evaluations.failures[c.id]) for c in archive])
    weights = np.where(failing, pareto.parent_weights(evaluations.matrix([c.id for c in archive])), 0.0)
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


def _child_lineage(child: Context, failures: Sequence[ScoredRollout], replies: Sequence[Reply]) -> Lineage:
    shown = (
        ShownFailure(s.rollout.problem_id, cut(s.verdict.feedback, KEPT_FEEDBACK_CHARS)) for s in failures
    )
    said = "\n\n".join(reply.text or "" for reply in replies)
    text = said.encode(errors="replace").decode()  # valid UTF-8
    return Lineage(child, admitted=False, failures=tuple(shown), reflection=cut(text, KEPT_REFLECTION_CHARS))


def _carried_unscored(state: FastState, config: FastConfig, cycle: int) -> FastResult:
    population = state.population_of(config.population)
    ids = tuple(context.id for context in population)
    lines = [{**_line(state.contexts[context_id]), "mean": None, "n": 0} for context_id in ids]
    after = dataclasses.replace(state, population=ids, cycle=cycle + 1)
    return FastResult(after, population, [], _empty_record(cycle, lines))


def _empty_record(cycle: int, population: list[dict[str, Any]]) -> dict[str, Any]:
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


def _line(lineage: Lineage, *, birth: bool = False) -> dict[str, Any]:
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


def _log_generation(log: Log, cycle: int, generation: int, text: str) -> None:
    log(f"fast phase of cycle {cycle}, generation {generation}: {text}")
