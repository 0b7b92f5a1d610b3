"""Advantage groups: all rollouts of a problem, across contexts, are ONE group (arXiv 2605.12484, Eq. 3).

The group key is the problem id, never the prompt text: the same problem under K contexts is one group of G rollouts, G/K under each.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fst_fast.contracts import Context, Problem, Rollout, RolloutRequest, ScoredRollout, alike
from fst_fast.slow.rewards import Rewards


def plan_group(problem: Problem, population: Sequence[Context], group_size: int) -> list[RolloutRequest]:
    """The G requests of one problem, G/K under each of the K contexts.

    A context that is twice in the population (fewer distinct texts than K) gets further sample numbers, not the same ones again.
    """
    per_context = group_size // len(population)
    seen: Counter[str] = Counter()
    plan = []
    for context in population:
        for _ in range(per_context):
            plan.append(RolloutRequest(context, problem, seen[context.id]))
            seen[context.id] += 1
    return plan


def advantages(
    rewards: Sequence[float], eps: float, scale: Literal["std", "none"] = "std"
) -> NDArray[np.float32] | None:
    """(r - mean) / (std + eps) with the population std, with scale="none" r - mean; None for a group without variance, which carries no
    gradient [ScaleRL].

    A spread at the level of rounding (contracts.alike) is no variance: divided by itself it would be advantages of order 1."""
    r = np.asarray(rewards, dtype=np.float64)
    if len(r) < 2 or alike(r):
        return None
    centred = r - r.mean()
    found: NDArray[np.float32] = (centred / (r.std() + eps) if scale == "std" else centred).astype(np.float32)
    return found


@dataclass(frozen=True)
class Group:
    """The judged rollouts of one problem and their advantages (None: dropped, no variance). rewards: that the advantages are made of."""

    problem_id: str
    members: list[ScoredRollout]
    advantages: NDArray[np.float32] | None
    rewards: list[float] = field(default_factory=list)


def make_groups(
    sampled: Sequence[ScoredRollout],
    eps: float,
    *,
    by_context: bool = False,
    scale: Literal["std", "none"] = "std",
    rewards: Rewards | None = None,
) -> list[Group]:
    """Group by problem id in order of first appearance. A rollout that could not be judged counts as no sample, never as 0.

    by_context: a rollout's advantage is taken among those of its context alone, 0 where they are all alike; the group stays one, so that
    problems weigh the same. rewards: makes the rewards of a problem's judged rollouts; None: those of their verdicts."""
    by_problem: dict[str, list[ScoredRollout]] = defaultdict(list)
    for s in sampled:
        members = by_problem[s.rollout.problem_id]
        if s.verdict.reward is not None:
            members.append(s)
    groups = []
    for problem_id, members in by_problem.items():
        given = [_reward(m) for m in members] if rewards is None else rewards(members)
        found = _by_context(members, given, eps, scale) if by_context else advantages(given, eps, scale)
        groups.append(Group(problem_id, members, found, given))
    return groups


def without_overlong(group: Group) -> Group:
    """The group without the rollouts that were cut for their length, or their episode's, which have had their part in its mean and deviation."""
    if group.advantages is None:
        return group
    kept = [i for i, m in enumerate(group.members) if m.rollout.finish not in ("length", "max_tokens")]
    return replace(
        group, members=[group.members[i] for i in kept], advantages=group.advantages[kept] if kept else None
    )


def _by_context(
    members: Sequence[ScoredRollout], rewards: Sequence[float], eps: float, scale: Literal["std", "none"]
) -> NDArray[np.float32] | None:
    """Advantages within each context; None where no context's rewards differ."""
    out = np.zeros(len(members), np.float32)
    contexts = [m.rollout.context_id for m in members]
    found = False
    for context in dict.fromkeys(contexts):
        mine = [i for i, c in enumerate(contexts) if c == context]
        own = advantages([rewards[i] for i in mine], eps, scale)
        if own is not None:
            out[mine], found = own, True
    return out if found else None


def _reward(sampled: ScoredRollout) -> float:
    assert sampled.verdict.reward is not None
    return sampled.verdict.reward


def cost(group: Group, prompt_of: Callable[[Rollout], NDArray[np.int64]]) -> int:
    """What a group costs an update, in tokens: its responses, what was read between them, and each of its prompts once (contexts that groups
    share are counted in each)."""
    prompts = {m.rollout.context_id: len(prompt_of(m.rollout)) for m in group.members}
    between = sum(len(turn.added) for m in group.members for turn in m.rollout.turns[1:])
    return sum(prompts.values()) + between + sum(len(m.rollout.response_ids) for m in group.members)


def token_weights(groups: Sequence[Group], aggregation: str) -> tuple[list[list[float]], float]:
    """Unnormalised weight of each token of each rollout of each kept group, and their sum over this process's groups.

    problem: mean over the tokens of a problem, then over problems (the paper); token: mean over all tokens; sequence: mean over a
    sequence's tokens, then over sequences; constant: their sum, over a denominator that the caller knows. Dividing by the sum over all processes makes one global denominator. What has no token, an
    empty response or a problem with nothing else, has weight 0 and is not counted in the denominator.
    """
    weights: list[list[float]] = []
    denominator = 0.0
    for group in groups:
        lengths = [len(m.rollout.response_ids) for m in group.members]
        match aggregation:
            case "problem":
                each = 1.0 / sum(lengths) if any(lengths) else 0.0
                weights.append([each] * len(lengths))
                denominator += float(any(lengths))
            case "token" | "constant":
                weights.append([1.0] * len(lengths))
                denominator += sum(lengths)
            case "sequence":
                weights.append([1.0 / n if n else 0.0 for n in lengths])
                denominator += sum(n > 0 for n in lengths)
            case _:
                raise ValueError(f"aggregation={aggregation!r}; allowed: problem, token, sequence, constant")
    return weights, denominator
