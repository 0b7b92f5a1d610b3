"""The slow phase: optimiser steps on the weights while the contexts are frozen (arXiv 2605.12484, Algorithm 1).

    slow_step            sample G rollouts per problem, G/K under each context; judge; group; advantages; one policy-gradient update
    distillation_step    the same shape, but the loss is the KL to the frozen weights under the evolved contexts (distillation.py)

Groups and advantages are in groups.py, the loss and the update in update.py, what happens to NaN and Inf in nonfinite.py. A new loss:
docs/extending.md lists every place; its formula goes into fst_kernels/linear_policy_loss/objective.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fst_fast import distributed
from fst_fast.config import Config, SlowConfig
from fst_fast.contracts import Context, Problem, Rollout, ScoredRollout
from fst_fast.policy.scoring import Batching
from fst_fast.policy.trained import NonFiniteError, TrainedPolicy
from fst_fast.rollout.models import SamplingModels
from fst_fast.rollout.reuse import ReusePool
from fst_fast.rollout.sampler import Sampler
from fst_fast.run.recorder import Recorder, StepReport
from fst_fast.slow import distillation, nonfinite
from fst_fast.slow.groups import Group, cost, make_groups, plan_group
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
    recorder: Recorder,
) -> StepReport:
    """One policy-gradient step on `problems` under the contexts of `population`. All processes call it with the same arguments.

    Groups claim rollouts of the cycle's fast phase from `reusable` first. Raises UserError where the step is not finite and
    on_nonfinite=stop."""
    started = time.perf_counter()
    recorder.begin("rollouts", step)
    group_requests = [plan_group(p, population, config.slow.group_size) for p in problems]
    # Every process claims for all problems, so that the pools stay equal.
    group_claims = [reusable.claim(requests) for requests in group_requests]
    unclaimed = [sum(claim is None for claim in claims) for claims in group_claims]
    my_requests = [
        r for requests in distributed.local_shard_by_cost(group_requests, unclaimed) for r in requests
    ]
    my_claims = [c for claims in distributed.local_shard_by_cost(group_claims, unclaimed) for c in claims]
    fresh = iter(
        sampler.local(
            models.trained,
            [request for request, claim in zip(my_requests, my_claims, strict=True) if claim is None],
            stream=(config.seed, "slow", step),
            policy_version=step,
            temperature=config.rollout.temperature,
        )
    )
    rollouts = [next(fresh) if claim is None else claim for claim in my_claims]
    prompt_of = sampler.prompts.of_rollouts(population, problems)

    updating = _begin_update(models, policy, recorder, step)
    by_context = config.slow.advantage_group == "context"
    groups = make_groups(rollouts, config.slow.advantage_eps, by_context=by_context)
    kept = [g for g in groups if g.advantages is not None]
    kept = distributed.rebalance(kept, [cost(g, prompt_of) for g in kept])
    data = sequences(kept, [[prompt_of(m.rollout) for m in g.members] for g in kept], config.slow.aggregation)
    try:
        numbers = optimise(
            policy,
            Reference(reference),
            data,
            objective_of(config.slow),
            Batching.of(config, sampler.pad_id),
            step=step,
        )
    except NonFiniteError as error:
        policy.hand_over()  # the weights as they were, for the dump
        dump = nonfinite.write_dump(
            recorder.run_dir, error, data, kept, config, step=step, pad_id=sampler.pad_id, model=models.trained_module
        )  # fmt: skip
        numbers = nonfinite.skip_or_stop(error, dump, config.on_nonfinite, policy, step, recorder.note)
    policy.hand_over()
    recorder.stopwatch.add("train_s", time.perf_counter() - updating)
    reused = sum(claim is not None for claims in group_claims for claim in claims)
    return _report(rollouts, groups, numbers, reused, started, _prompt_text(sampler, prompt_of))


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
    """One step of context distillation: sample under the seed context, move towards the frozen `teacher` under the evolved contexts.

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

    updating = _begin_update(models, policy, recorder, step)
    groups = distillation.distillation_groups(rollouts)
    data = sequences(
        groups, [[prompt_of(m.rollout) for m in g.members] for g in groups], config.slow.aggregation
    )
    shown = distillation.teacher_contexts(len(problems), step * len(problems), population)
    read = {p.id: (context, p) for p, context in zip(problems, shown, strict=True)}
    trained = [m.rollout.problem_id for g in groups for m in g.members if len(m.rollout.response_ids)]
    prompts = [sampler.prompts.ids(*read[problem_id]) for problem_id in trained]
    leaves = [replace(leaf, prompt_ids=ids) for ids, leaf in zip(prompts, data.leaves, strict=True)]
    batching = Batching.of(config, sampler.pad_id)
    try:
        numbers = optimise(
            policy,
            distillation.Teacher(teacher, leaves, batching),
            data,
            distillation.OBJECTIVE,
            batching,
            step=step,
        )
    except NonFiniteError as error:
        numbers = nonfinite.skip_or_stop(error, None, config.on_nonfinite, policy, step, recorder.note)
    policy.hand_over()
    recorder.stopwatch.add("train_s", time.perf_counter() - updating)
    numbers["distilled"] = True
    return _report(rollouts, groups, numbers, 0, started, _prompt_text(sampler, prompt_of))


def objective_of(slow: SlowConfig) -> PolicyObjective:
    """The policy-gradient loss that the configuration describes."""
    return PolicyObjective(
        kind=slow.objective,
        ratio_cap=slow.ratio_cap,
        clip_low=slow.clip_low,
        clip_high=slow.clip_high,
        kl=None if slow.kl == "none" or slow.kl_coef == 0 else slow.kl,
        kl_coef=slow.kl_coef,
        entropy_coef=slow.entropy_coef,
    )


def _begin_update(models: SamplingModels, policy: TrainedPolicy, recorder: Recorder, step: int) -> float:
    """End sampling, so that the update may have its memory; returns the time."""
    models.forget_prefixes()
    policy.release()
    recorder.begin("update", step)
    return time.perf_counter()


def _report(
    rollouts: list[ScoredRollout],
    groups: Sequence[Group],
    numbers: dict[str, Any],
    reused: int,
    started: float,
    prompt_text: Callable[[Rollout], str],
) -> StepReport:
    found = {
        id(member): float(advantage)
        for group in groups
        if group.advantages is not None
        for member, advantage in zip(group.members, group.advantages, strict=True)
    }
    return StepReport(
        rollouts=rollouts,
        advantages=[found.get(id(rollout), 0.0) for rollout in rollouts],
        groups=len(groups),
        groups_kept=sum(g.advantages is not None for g in groups),
        skipped=numbers.pop("skipped", False),
        numbers=numbers,
        reused=reused,
        seconds=time.perf_counter() - started,
        prompt_text=prompt_text,
    )


def _prompt_text(
    sampler: Sampler, prompt: Callable[[Rollout], NDArray[np.int64]]
) -> Callable[[Rollout], str]:
    return lambda rollout: str(sampler.tokenizer.decode(prompt(rollout)))
