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
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fst_fast.config import FastConfig
from fst_fast.config.components import components_of, compose, names_one
from fst_fast.config.derived import FIRST, Size, affordable, reserve, screening, wave_width
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
from fst_fast.fast.thompson import SPARE, Search
from fst_fast.run.callbacks import Admission, Proposal

SHOWN_LESSONS, SHOWN_OTHERS = 2, 3
"""How many admitted edits and other contexts a reflection prompt brings along."""

FOUND_Z = 3.0
"""By how many standard errors a context is to exceed the seed context for a deeper search (fast.search_budget) to end."""

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

    phase = _Phase(config, cycle, evaluations, list(members), dict(state.contexts), reflect, log, emit,
        Rules(count_tokens, config.max_context_tokens, fits, spells_special),
        {c.text for c in members} | {line.context.text for line in state.contexts.values() if line.policy_version == policy_version},
    )  # fmt: skip
    archive, lineage, tally = phase.archive, phase.lineage, phase.tally

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
    if config.parents == "thompson":
        search = Search(evaluations, members, width=config.children, key=[seed, _STREAM, cycle])
        _step_by_step(phase, search, size, planned, deeper, rng_of, over)
    else:
        _in_full(phase, size, planned, deeper, rng_of, over)
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


def _step_by_step(
    phase: _Phase,
    search: Search,
    size: Size,
    planned: int,
    deeper: int,
    rng_of: Callable[[int], np.random.Generator],
    over: Callable[[int], bool],
) -> None:
    """The waves of fast.parents=thompson: `planned`, and as long as nothing is found so many more as `deeper` rollouts pay for."""
    config, evaluations, budget = phase.config, phase.evaluations, phase.config.rollout_budget
    before = evaluations.spent

    def left() -> int:
        return budget - evaluations.spent

    def width() -> int:
        return min(config.children, max(left() - reserve(size, left()), 0) // FIRST)

    for generation in itertools.count():
        if generation >= planned or not width():
            phase.decide(search.finish(config.population + SPARE, min(left(), reserve(size, budget))))
            nothing_came = generation and evaluations.spent == before
            if deeper == config.rollout_budget or phase.found() or nothing_came:
                break
            before = evaluations.spent
            budget, planned = deeper, generation + config.generations
        if over(generation):
            break
        rng = rng_of(generation)
        parents = search.parents(width(), rng)
        if not parents:  # the budget is used up, or no context fails anywhere
            break
        children = phase.propose(parents, generation, rng)
        phase.decide(search.score(children, rng, left() - reserve(size, left())))
    phase.close()


def _in_full(
    phase: _Phase,
    size: Size,
    planned: int,
    deeper: int,
    rng_of: Callable[[int], np.random.Generator],
    over: Callable[[int], bool],
) -> None:
    """The waves in which every child is scored in full, or races: `planned`, and until one is admitted so many more as `deeper` rollouts pay for."""
    config, evaluations, archive = phase.config, phase.evaluations, phase.archive
    carried = len(archive)
    for generation in itertools.count():
        searching = deeper > config.rollout_budget and len(archive) == carried
        if (generation >= planned and not searching) or over(generation):
            break
        width = wave_width(config, size, (deeper if searching else config.rollout_budget) - evaluations.spent)
        wanted = config.proposals or config.children
        drawn = wanted * (width > 0) if screening(config) else min(width, wanted)
        rng = rng_of(generation)
        weights = _weights(config, evaluations, archive, phase.lineage)
        parents = _choose_parents(evaluations, archive, drawn, rng, weights)
        if not parents:  # the budget is used up, or no context fails anywhere
            break
        children = phase.propose(parents, generation, rng)
        if not children and generation >= planned:  # a reflector that has no more to say
            break
        if len(children) > width:
            evaluations.judge([child for child, _ in children], problems=config.screen_problems, samples=1)
            children.sort(key=lambda pair: -(evaluations.mean(pair[0].id)[0] or 0.0))
            del children[width:]
        phase.decide([child for child, _ in racing.race(evaluations, children, config.rungs)])
        phase.close()


@dataclass
class _Phase:
    """What one phase knows: its scores, the contexts that may be kept (archive: carried and admitted), and where every context comes from."""

    config: FastConfig
    cycle: int
    evaluations: Evaluations
    archive: list[Context]
    lineage: dict[str, Lineage]
    reflect: Reflector
    log: Log
    emit: Callable[..., None]
    rules: Rules
    tried: set[str]
    tally: Tally = field(default_factory=Tally)
    parents: dict[str, Context] = field(default_factory=dict)  # of every child of this phase, by its id
    undecided: dict[Context, Context] = field(default_factory=dict)  # children, with their parents

    def propose(
        self, parents: list[Context], generation: int, rng: np.random.Generator
    ) -> list[racing.Child]:
        """The children of these parents, one for each whose reply is usable."""
        config, evaluations, archive, lineage = self.config, self.evaluations, self.archive, self.lineage
        shown = _choose_failures(evaluations, parents, config.failures_shown, rng)
        merged = (
            merge(evaluations.matrix([c.id for c in archive]), archive, lineage, self.tried)
            if config.merge
            else None
        )
        if merged:
            parents, shown = parents[:-1], shown[:-1]
        turn = (self.cycle + generation) * (config.proposals or config.children)
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
        replies = ask(
            self.reflect, prompts, seeds, functools.partial(_log_generation, self.log, self.cycle, generation)
        )
        self.tally.waves += 1
        self.tally.count(replies)

        children: list[racing.Child] = []
        if merged:
            parent, other, text = merged
            line = Lineage(
                Context.of(text, parent=parent.id, born=self.cycle),
                admitted=False,
                reflection=f"merged with {other.id}",
            )
            children.append((self._add(line, parent), parent))
        answers = iter(replies)
        for parent, failures, names in zip(parents, shown, revising, strict=True):
            replies_here = [next(answers) for _ in names]
            text, reason = _child_text(parent, names, replies_here, self.rules.extract, self.tried)
            if text:
                self.tried.add(text)
                reason = self.rules.refuses(text)
            if reason:
                self.tally.refused[reason] += 1
                self.emit(Proposal, cycle=self.cycle, parent=parent, context=None, refused=reason)
                continue
            line = child_lineage(Context.of(text, parent=parent.id, born=self.cycle), failures, replies_here)
            children.append((self._add(line, parent), parent))
        self.tally.born += [child.id for child, _ in children]
        self.parents |= {child.id: parent for child, parent in children}
        self.undecided |= dict(children)
        return children

    def found(self) -> bool:
        """Whether a context of the archive is beyond doubt better than the first, which is the only one carried."""
        rewards = self.evaluations.rewards
        first, *others = (rewards[context.id] for context in self.archive)
        return any(pareto.admits(other, first, FOUND_Z) for other in others)

    def decide(self, finished: Sequence[Context]) -> None:
        """Admit those of these children, scored in full, that are better than the nearest context of the archive that they come from."""
        rewards = self.evaluations.rewards
        for child in finished:
            before = self.undecided[child]
            while before not in self.archive:
                before = self.parents[before.id]
            admitted = pareto.admits(rewards[child.id], rewards[before.id], self.config.admit_z)
            if admitted:
                self.archive.append(child)
            self._say(child, admitted)

    def close(self) -> None:
        """The children that were not scored in full are not admitted."""
        for child in list(self.undecided):
            self._say(child, admitted=False)

    def _say(self, child: Context, admitted: bool) -> None:
        parent = self.undecided.pop(child)
        self.lineage[child.id] = dataclasses.replace(self.lineage[child.id], admitted=admitted)
        means = [self.evaluations.mean(context.id)[0] for context in (child, parent)]
        self.emit(
            Admission, cycle=self.cycle, context=child, parent=parent, admitted=admitted, mean=means[0], parent_mean=means[1]
        )  # fmt: skip

    def _add(self, line: Lineage, parent: Context) -> Context:
        """The child of a lineage. One that was tried under an earlier policy keeps its place in the tree."""
        self.tried.add(line.context.text)
        child = self.lineage.setdefault(line.context.id, line).context
        self.emit(Proposal, cycle=self.cycle, parent=parent, context=child, refused="")
        return child


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
    among = [*archive, parent] if parent not in archive else archive
    front = pareto.wins(evaluations.matrix([c.id for c in among]))
    gains = front & ~front[among.index(parent)]
    best = int(gains.sum(axis=1).argmax())
    if not gains[best].any():
        return []
    asked = [problem for problem, gain in zip(evaluations.problem, gains[best], strict=True) if gain]
    return [(among[best], [evaluations.question(problem) for problem in asked[: config.failures_shown]])]


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
