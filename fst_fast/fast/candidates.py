"""What one fast phase knows of its contexts: propose children of them, and decide who is admitted (evolution.py says when)."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fst_fast.config import FastConfig
from fst_fast.config.components import components_of, compose, names_one
from fst_fast.contracts import FULL_REWARD, Context, ScoredRollout
from fst_fast.fast import pareto, racing
from fst_fast.fast.evaluations import Evaluations
from fst_fast.fast.merge import merge
from fst_fast.fast.outcome import Log, Rules, Tally, child_lineage
from fst_fast.fast.population import Lineage
from fst_fast.fast.reflection import Lesson, Partner, ReflectionPrompt, Reflector, Refusal, Reply, ask
from fst_fast.fast.selector import revised
from fst_fast.run.callbacks import Admission, Proposal

SHOWN_LESSONS, SHOWN_OTHERS = 2, 3
"""How many admitted edits and other contexts a reflection prompt brings along."""
FOUND_Z = 3.0
"""By how many standard errors a context is to exceed the seed context for a deeper search (fast.search_budget) to end."""


@dataclass
class Candidates:
    """The contexts of one phase: their scores, the contexts that may be kept (archive: carried and admitted), and where every context comes from."""

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
        # Two long components, from different contexts, may be too long together.
        if merged and (reason := self.rules.refuses(merged[2])):
            self.tried.add(merged[2])
            self.emit(Proposal, cycle=self.cycle, parent=merged[0], context=None, refused=reason)
            merged = None
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
        return any(pareto.admits(other, first, FOUND_Z) or _all_solved(other) for other in others)

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
            self._note_decision(child, before, admitted)

    def close(self) -> None:
        """The children that were not scored in full are not admitted."""
        for child, parent in list(self.undecided.items()):
            self._note_decision(child, parent, admitted=False)

    def _note_decision(self, child: Context, parent: Context, admitted: bool) -> None:
        del self.undecided[child]
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
    scores = evaluations.matrix([c.id for c in among])
    front = pareto.wins(scores)
    row = among.index(parent)
    gains = front & ~front[row] & ~np.isnan(scores[row])  # of those that the parent has met
    best = int(gains.sum(axis=1).argmax())
    if not gains[best].any():
        return []
    asked = [problem for problem, gain in zip(evaluations.problem, gains[best], strict=True) if gain]
    return [(among[best], [evaluations.question(problem) for problem in asked[: config.failures_shown]])]


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
    """The latest admitted edits, oldest first, each with the nearest admitted context that it comes from."""

    def before(line: Lineage) -> Lineage | None:
        above = lineage.get(line.context.parent or "")
        while above is not None and not above.admitted:
            above = lineage.get(above.context.parent or "")
        return above

    edits = [(above, line) for line in lineage.values() if line.admitted and (above := before(line))]
    return [
        Lesson(above.context.text, [shown.feedback for shown in line.failures], line.context.text)
        for above, line in edits[-SHOWN_LESSONS:]
    ]


def _log_generation(log: Log, cycle: int, generation: int, text: str) -> None:
    log(f"fast phase of cycle {cycle}, generation {generation}: {text}")


def _all_solved(rewards: NDArray[np.float64]) -> bool:
    """Whether every judged rollout has the full reward, and there is one."""
    judged = rewards[~np.isnan(rewards)]
    return bool(len(judged) and judged.min() >= FULL_REWARD)
