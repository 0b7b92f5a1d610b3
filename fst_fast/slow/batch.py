"""A batch: all judged rollouts of one step, sampled before the step is taken (rollout.ahead). What travels from samplers to trainers and into checkpoints.

Groups and advantages are made from it where it is trained on, by each trainer for its share of the problems.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.contracts import Context, Problem, ScoredRollout
from fst_fast.rollout.models import SamplingModels
from fst_fast.rollout.reuse import ReusePool
from fst_fast.rollout.sampler import Sampler
from fst_fast.slow.slow_phase import StepGroups, sample_groups


@dataclass(frozen=True)
class Batch:
    """rollouts: by problem, the step's own first, then those of `refill_groups` of dynamic sampling; each says which version of the weights sampled it.
    tokens: computed, and without sharing. unverified: see Sampler.unverified. seconds: by kind, of the first sampler."""

    step: int
    rollouts: list[ScoredRollout]
    reused: int
    refill_rounds: int
    refill_groups: int
    tokens: tuple[int, int]
    unverified: Mapping[str, int]
    seconds: Mapping[str, float] = field(default_factory=dict)
    reused_tokens: int = 0

    @property
    def staleness(self) -> float | None:
        """Optimiser steps between the weights that sampled and those that are trained, mean over the rollouts; None without any."""
        behind = [self.step - s.rollout.policy_version for s in self.rollouts]
        return float(np.mean(behind)) if behind else None


def sample_batch(
    problems: Sequence[Problem],
    population: Sequence[Context],
    *,
    config: Config,
    step: int,
    policy_version: int,
    sampler: Sampler,
    models: SamplingModels,
    reusable: ReusePool,
    spare: Iterator[Problem],
) -> Batch:
    """The batch of `step`, sampled from the weights of `policy_version`. All processes that sample call it and get the same."""
    found = sample_groups(
        problems, population, config=config, step=step, policy_version=policy_version, sampler=sampler, models=models, reusable=reusable,
        spare=spare,
    )  # fmt: skip
    at = {p.id: i for i, p in enumerate(found.problems)}
    everywhere = distributed.concat_shards(distributed.all_gather(found.rollouts))
    return Batch(
        step=step,
        rollouts=sorted(everywhere, key=lambda s: at[s.rollout.problem_id]),
        reused=found.reused,
        refill_rounds=found.refill_rounds,
        refill_groups=found.refill_groups,
        tokens=models.new_tokens(),
        unverified=sampler.unverified(),
        reused_tokens=found.reused_tokens,
    )


def share_of(batch: Batch, problems: Sequence[Problem], config: Config) -> StepGroups:
    """This trainer's share of the batch, grouped. problems: all of the batch's, in its order. All trainers call it. Raises UserError where
    slow.reward_shaping fails."""
    by_problem: dict[str, list[ScoredRollout]] = {problem.id: [] for problem in problems}
    for scored in batch.rollouts:
        by_problem[scored.rollout.problem_id].append(scored)
    lengths = [sum(len(s.rollout.response_ids) for s in of_one) for of_one in by_problem.values()]
    mine = distributed.local_shard_by_cost(list(by_problem.values()), lengths)
    found = StepGroups(
        reused=batch.reused,
        reused_tokens=batch.reused_tokens,
        refill_rounds=batch.refill_rounds,
        refill_groups=batch.refill_groups,
    )
    found.add(config, problems, [s for of_one in mine for s in of_one])
    return found
