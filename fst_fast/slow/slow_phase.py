"""The slow phase: optimiser steps on the weights while the contexts are frozen (arXiv 2605.12484, Algorithm 1).

    slow_step            sample G rollouts per problem, G/K under each context; judge; group; advantages; one policy-gradient update
    distillation_step    the same shape, but the loss is the KL to the frozen weights under the evolved contexts (distillation.py)

Groups and advantages are in groups.py, the rewards they are made of in rewards.py, the loss and the update in update.py, what happens to NaN and Inf in nonfinite.py. A new loss:
docs/extending.md lists every place; its formula goes into kernels/fst_kernels/linear_policy_loss/objective.py.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fst_fast import distributed
from fst_fast.config import Config, SlowConfig
from fst_fast.contracts import Context, Problem, Rollout, RolloutRequest, ScoredRollout
from fst_fast.policy.scoring import Batching
from fst_fast.policy.sequence_loss import Mismatch
from fst_fast.policy.trained import NonFiniteError, TrainedPolicy
from fst_fast.rollout.models import SamplingModels
from fst_fast.rollout.reuse import ReusePool
from fst_fast.rollout.sampler import Sampler
from fst_fast.run.memory import restart_peak
from fst_fast.run.recorder import Recorder, StepReport
from fst_fast.slow import distillation, nonfinite
from fst_fast.slow.groups import Group, cost, make_groups, plan_group, without_overlong
from fst_fast.slow.rewards import training_rewards
from fst_fast.slow.update import Reference, optimise, sequences
from fst_kernels import PolicyObjective


def slow_step(
    problems: Sequence[Problem],
    population: Sequence[Context],
    *,
    config: Config,
    step: int,
    sampler: Sampler,
    models: SamplingModels,
    policy: TrainedPolicy,
    reference: nn.Module,
    reusable: ReusePool,
    spare: Iterator[Problem],
    recorder: Recorder,
) -> StepReport:
    """One policy-gradient step on `problems` under the contexts of `population`. All processes call it with the same arguments.

    reusable: rollouts of the cycle's fast phase, used before new ones are sampled. spare: problems outside the minibatch, for dynamic sampling.
    Raises UserError if a log-probability, an advantage, the loss or a gradient is NaN or Inf and on_nonfinite=stop, and where
    slow.reward_shaping fails."""
    started = time.perf_counter()
    recorder.begin("rollouts", step)
    sampled = sample_groups(
        problems, population, config=config, step=step, policy_version=step, sampler=sampler, models=models, reusable=reusable, spare=spare
    )  # fmt: skip
    return train_groups(
        sampled, population, config=config, step=step, sampler=sampler, models=models, policy=policy, reference=reference,
        recorder=recorder, started=started,
    )  # fmt: skip


def train_groups(
    sampled: StepGroups,
    population: Sequence[Context],
    *,
    config: Config,
    step: int,
    sampler: Sampler,
    models: SamplingModels,
    policy: TrainedPolicy,
    reference: nn.Module,
    recorder: Recorder,
    started: float,
) -> StepReport:
    """The policy-gradient update on what a step has sampled. started: when the step began, by time.perf_counter. All processes that train call it. Raises
    UserError as `slow_step` does."""
    prompt_of = sampler.prompts.of_rollouts(population, sampled.problems)
    update_started = _begin_update(models, policy, recorder, step)
    kept = [g for g in sampled.groups if g.advantages is not None]
    # From here on this process trains groups that it may not have sampled: equal work for all.
    kept = distributed.rebalance(kept, [cost(g, prompt_of) for g in kept])
    prompts = [[prompt_of(m.rollout) for m in g.members] for g in kept]
    data = sequences(kept, prompts, config.slow.aggregation, constant_denominator(config))
    try:
        metrics = optimise(
            policy,
            Reference(reference),
            data,
            objective_of(config.slow),
            Batching.of(config, sampler.pad_id),
            step=step,
            mismatch=Mismatch.of(config.slow),
        )
    except NonFiniteError as error:
        policy.hand_over()  # the weights as they were, for the dump
        changed_reference = None if reference is models.base_module else reference
        dump = nonfinite.write_dump(
            recorder.run_dir, error, data, kept, config, step=step, pad_id=sampler.pad_id, model=models.trained_module, reference=changed_reference
        )  # fmt: skip
        metrics = nonfinite.skip_or_stop(error, dump, config.on_nonfinite, policy, step, recorder.note)
    policy.hand_over()
    recorder.stopwatch.add("train_s", time.perf_counter() - update_started)
    return _report(sampled, metrics, started, prompt_text(sampler, prompt_of))


@dataclass
class StepGroups:
    """What a step has sampled. problems: those of all processes; rollouts, groups: this process's. shaped: whether the training rewards differ
    from the verdicts'. reused, reused_tokens: rollouts of the fast phase and the tokens of their responses, over all processes.
    refill_rounds, refill_groups: of dynamic sampling, on all processes together."""

    problems: list[Problem] = field(default_factory=list)
    rollouts: list[ScoredRollout] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    shaped: bool = False
    reused: int = 0
    reused_tokens: int = 0
    refill_rounds: int = 0
    refill_groups: int = 0

    def add(self, config: Config, problems: Sequence[Problem], rollouts: Sequence[ScoredRollout]) -> None:
        """Group judged rollouts of further problems. All processes call it with the same problems, each with its own rollouts. Raises UserError."""
        slow = config.slow
        rewards = training_rewards(slow, config.rollout.max_response_tokens, problems)
        grouped = functools.partial(
            make_groups, rollouts, slow.advantage_eps, by_context=slow.advantage_group == "context", scale=slow.advantage_scale,
            rewards=rewards,
        )  # fmt: skip
        groups = grouped() if slow.reward_shaping is None else distributed.agree(grouped)
        self.problems += problems
        self.rollouts += rollouts
        self.shaped = rewards is not None
        self.groups += map(without_overlong, groups) if slow.mask_overlong else groups


def sample_groups(
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
) -> StepGroups:
    """Sample and judge the groups of a step from the weights of `policy_version`. Dynamic sampling (DAPO, arXiv 2503.14476) then replaces groups
    without variance by groups of `spare` problems, for up to slow.dynamic_sampling rounds. All processes call it with the same arguments."""
    slow, step_groups = config.slow, StepGroups()
    batch = list(problems)
    while True:
        requests = [plan_group(p, population, slow.group_size) for p in batch]
        # Every process claims for all problems, so that the pools stay identical. Refill rounds claim nothing: these rollouts are for later steps.
        claims = [[None] * len(r) if step_groups.problems else reusable.claim(r) for r in requests]
        rollouts = _sample_shard(
            requests, claims, config=config, step=step, policy_version=policy_version, sampler=sampler, models=models
        )  # fmt: skip
        reused = [claim for of_group in claims for claim in of_group if claim is not None]
        step_groups.reused += len(reused)
        step_groups.reused_tokens += sum(len(claim.rollout.response_ids) for claim in reused)
        step_groups.add(config, batch, rollouts)
        if step_groups.refill_rounds == slow.dynamic_sampling:
            return step_groups
        [kept] = distributed.all_reduce_sum([sum(g.advantages is not None for g in step_groups.groups)])
        batch = list(itertools.islice(spare, len(problems) - int(kept)))
        if not batch:
            return step_groups
        step_groups.refill_rounds += 1
        step_groups.refill_groups += len(batch)


def _sample_shard(
    group_requests: Sequence[Sequence[RolloutRequest]],
    group_claims: Sequence[Sequence[ScoredRollout | None]],
    *,
    config: Config,
    step: int,
    policy_version: int,
    sampler: Sampler,
    models: SamplingModels,
) -> list[ScoredRollout]:
    """This process's rollouts: reused ones where claimed, the others sampled now."""
    expected = sampler.expected_tokens([requests[0].problem for requests in group_requests])
    costs = [
        tokens * sum(claim is None for claim in claims)
        for tokens, claims in zip(expected, group_claims, strict=True)
    ]
    my_requests = [r for requests in distributed.local_shard_by_cost(group_requests, costs) for r in requests]
    my_claims = [c for claims in distributed.local_shard_by_cost(group_claims, costs) for c in claims]
    fresh = iter(
        sampler.local(
            models.trained,
            [request for request, claim in zip(my_requests, my_claims, strict=True) if claim is None],
            stream=(config.seed, "slow", step),
            policy_version=policy_version,
            temperature=config.rollout.temperature,
        )
    )
    sampled = [next(fresh) if claim is None else claim for claim in my_claims]
    mine = [(s.rollout.problem_id, len(s.rollout.response_ids)) for s in sampled]
    sampler.lengths.remember(pair for of_process in distributed.all_gather(mine) for pair in of_process)
    return sampled


def constant_denominator(config: Config) -> float | None:
    """The maximum number of response tokens of a step, Dr. GRPO's fixed denominator; None for other aggregations."""
    if config.slow.aggregation != "constant":
        return None
    return float(config.slow.problems_per_step * config.slow.group_size * config.rollout.max_response_tokens)


def distillation_step(
    problems: Sequence[Problem],
    population: Sequence[Context],
    seed_context: Context,
    teacher: nn.Module,
    *,
    config: Config,
    step: int,
    sampler: Sampler,
    models: SamplingModels,
    policy: TrainedPolicy,
    recorder: Recorder,
) -> StepReport:
    """One step of context distillation: sample under the seed context, minimise the KL to the frozen `teacher` that reads the evolved contexts.

    All processes call it with the same arguments. Raises UserError as `slow_step` does."""
    started = time.perf_counter()
    recorder.begin("rollouts", step)
    rollouts = sampler.local(
        models.trained,
        [
            r
            for p in distributed.local_shard(problems)
            for r in plan_group(p, [seed_context], config.slow.group_size)
        ],
        stream=(config.seed, "distil", step),
        policy_version=step,
        temperature=config.rollout.temperature,
    )
    prompt_of = sampler.prompts.of_rollouts([seed_context], problems)

    update_started = _begin_update(models, policy, recorder, step)
    groups = distillation.distillation_groups(rollouts)
    student_prompts = [[prompt_of(m.rollout) for m in g.members] for g in groups]
    data = sequences(groups, student_prompts, config.slow.aggregation, constant_denominator(config))
    contexts = distillation.teacher_contexts(len(problems), step * len(problems), population)
    teacher_reads = {p.id: (context, p) for p, context in zip(problems, contexts, strict=True)}
    problem_ids = [m.rollout.problem_id for g in groups for m in g.members if len(m.rollout.response_ids)]
    teacher_prompts = [sampler.prompts.ids(*teacher_reads[problem_id]) for problem_id in problem_ids]
    # `sequences` makes one leaf for each response that is not empty, in this order.
    leaves = [replace(leaf, prompt_ids=ids) for ids, leaf in zip(teacher_prompts, data.leaves, strict=True)]
    batching = Batching.of(config, sampler.pad_id)
    try:
        metrics = optimise(
            policy,
            distillation.Teacher(teacher, leaves, batching),
            data,
            distillation.OBJECTIVE,
            batching,
            step=step,
        )
    except NonFiniteError as error:
        metrics = nonfinite.skip_or_stop(error, None, config.on_nonfinite, policy, step, recorder.note)
    policy.hand_over()
    recorder.stopwatch.add("train_s", time.perf_counter() - update_started)
    metrics["distilled"] = True
    sampled = StepGroups(list(problems), rollouts, groups)
    return _report(sampled, metrics, started, prompt_text(sampler, prompt_of))


def objective_of(slow: SlowConfig) -> PolicyObjective:
    """The policy-gradient loss that the configuration describes."""
    return PolicyObjective(
        # Dr. GRPO is grpo with another aggregation and advantage scale.
        kind="grpo" if slow.objective == "dr_grpo" else slow.objective,
        ratio_cap=slow.ratio_cap,
        clip_low=slow.clip_low,
        clip_high=slow.clip_high,
        kl=None if slow.kl == "none" or slow.kl_coef == 0 else slow.kl,
        kl_coef=slow.kl_coef,
        entropy_coef=slow.entropy_coef,
    )


def _begin_update(models: SamplingModels, policy: TrainedPolicy, recorder: Recorder, step: int) -> float:
    """Free the memory of sampling for the update; returns the start time."""
    models.forget_prefixes()
    policy.release()
    restart_peak()
    recorder.begin("update", step)
    return time.perf_counter()


def _report(
    sampled: StepGroups, metrics: dict[str, Any], started: float, prompt_text: Callable[[Rollout], str]
) -> StepReport:
    # By identity: two rollouts may be equal in everything.
    advantage_of = {
        id(member): float(advantage)
        for group in sampled.groups
        if group.advantages is not None
        for member, advantage in zip(group.members, group.advantages, strict=True)
    }
    return StepReport(
        rollouts=sampled.rollouts,
        advantages=[advantage_of.get(id(rollout), 0.0) for rollout in sampled.rollouts],
        groups=len(sampled.groups),
        groups_kept=sum(g.advantages is not None for g in sampled.groups),
        refill_rounds=sampled.refill_rounds,
        refill_groups=sampled.refill_groups,
        shaped_rewards=[r for g in sampled.groups for r in g.rewards] if sampled.shaped else [],
        skipped=metrics.pop("skipped", False),
        numbers=metrics,
        reused=sampled.reused,
        reused_tokens=sampled.reused_tokens,
        seconds=time.perf_counter() - started,
        prompt_text=prompt_text,
    )


def prompt_text(sampler: Sampler, prompt: Callable[[Rollout], NDArray[np.int64]]) -> Callable[[Rollout], str]:
    """The text of the prompt whose ids `prompt` gives."""
    return lambda rollout: str(sampler.tokenizer.decode(prompt(rollout)))
