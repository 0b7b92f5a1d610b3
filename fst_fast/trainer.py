"""The cycle (arXiv 2605.12484, Algorithm 1): look ahead, fast phase, T slow steps, evaluate, checkpoint; again.

    fast phase   weights frozen: the population of contexts evolves on an anchor set of the next T minibatches
    slow phase   contexts frozen: T policy-gradient steps over those minibatches, G/K rollouts of every problem under each context

method=rl leaves the first out (the seed context serves all rollouts), method=gepa the second. A run may go through several tasks (stages.py),
and the last steps on each may distil the contexts into the weights (slow/distil.py). Every process runs this same loop and
takes the same decisions; rank 0 alone writes. Built in session.py, resumed from state.py, one step in slow/step.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.contracts import Context, Problem, Sampled
from fst_fast.data.stages import Stage
from fst_fast.data.stream import anchor_set, lookahead, minibatch
from fst_fast.evaluate import CELLS, evaluate
from fst_fast.fast.evolution import fast_phase
from fst_fast.policy.trained import NonFiniteError
from fst_fast.run import recorder, signals
from fst_fast.run.faults import reach
from fst_fast.session import Session
from fst_fast.slow import nonfinite
from fst_fast.slow.distillation import contexts_of, distil
from fst_fast.slow.distillation import groups as groups_to_distil
from fst_fast.slow.groups import cost, make_groups, plan_group
from fst_fast.slow.update import optimise, sequences, skipped


def train(
    config: Config, run_dir: Path, *, resume: bool = False, allow_config_change: bool = False
) -> dict[str, Any] | None:
    """Run `config` in `run_dir` to its last step; returns what is written to summary.json (on every process), None where a signal stopped it."""
    with (
        signals.listening(speak=distributed.rank() == 0),
        Session.open(config, run_dir, resume=resume, allow_config_change=allow_config_change) as s,
    ):
        if s.state.step == 0 and config.eval.every and not s.continued:
            measure(s, final=False)
        while s.state.step < config.slow.steps and not s.stopping():
            s.enter()
            s.forget_prefixes()
            distilling = s.stage.distils(s.state.step)
            if config.method != "rl" and not distilling and s.step_of_stage % config.fast.cycle_steps == 0:
                evolve(s)
            if config.method == "gepa":
                s.state.step = min(s.state.step + config.fast.cycle_steps, s.stage.end)
            elif distilling:
                consolidate(s)
            else:
                learn(s)
            done = s.state.step >= config.slow.steps
            if s.due(config.eval.every) and not done:
                measure(s, final=False)
            if config.stages and s.state.step == s.stage.end and not done:
                measure_stages(s)
            if s.due(config.checkpoint.every) and not done:
                s.checkpoint()
        s.checkpoint()  # before the last evaluation: to continue a run that has ended is to measure it again, to the same figures
        if s.state.step < config.slow.steps:
            n = distributed.world_size()
            how = "fst train" if n == 1 else f"the same launcher, {n} processes and train.py"
            s.console.note(
                f"stopped after step {s.state.step} of {config.slow.steps}; continue with: {how} --run-dir {run_dir} --resume"
            )
            return None
        s.enter()
        result = measure(s, final=True)
        if config.stages:
            measure_stages(s, own=result)
        return s.finish(result)


def evolve(s: Session) -> None:
    """The fast phase of one cycle: contexts move, weights do not."""
    config, state = s.config, s.state
    started = s.begin("fast phase")
    ahead = lookahead(
        s.stage.train, s.step_of_stage, config.fast.cycle_steps, config.slow.problems_per_step, config.seed
    )
    s.at_hand = {p.id: p for p in ahead}
    version = s.policy_version

    def score(wave: Sequence[tuple[Context, Problem, int]]) -> list[Sampled]:
        reach("fast.wave")
        return s.sampler.spread(
            s.models.fast,
            wave,
            stream=(config.seed, "fast", state.cycle),
            policy_version=version,
            temperature=config.rollout.temperature,
        )

    result = fast_phase(
        state.fast,
        anchor=anchor_set(ahead, config.fast.anchor_size, state.cycle, config.seed),
        score=score,
        reflect=s.reflect,
        config=config.fast,
        count_tokens=s.count_tokens,
        cycle=state.cycle,
        policy_version=version,
        seed=config.seed,
        log=s.console.note,
        fits=lambda context: s.fits(context, ahead),
    )
    reach("fast.end")
    state.fast, state.population = result.state, list(result.population)
    state.reusable = s.reusable(result.sampled)
    state.counters.rollouts += len(result.sampled)
    state.counters.fast_rollouts += len(result.sampled)
    s.count_rollout_tokens()
    s.end("fast_s", started)
    recorder.cycle(s, result.record, result.sampled)
    state.cycle += 1


def learn(s: Session) -> None:
    """One slow step: sample G rollouts per problem under the frozen contexts, judge, group, update the weights."""
    config, state = s.config, s.state
    started = s.begin("rollouts")
    problems = minibatch(s.stage.train, s.step_of_stage, config.slow.problems_per_step, config.seed)
    s.at_hand = {p.id: p for p in problems}
    plans = [plan_group(p, state.population, config.slow.group_size) for p in problems]
    claims = [
        s.claim(plan) for plan in plans
    ]  # for all problems on every process, so that all keep the same account
    reused = sum(claim is not None for claims_of_problem in claims for claim in claims_of_problem)
    missing = [sum(c is None for c in claims_of_problem) for claims_of_problem in claims]
    plan = [t for plan_of_problem in distributed.mine_by_cost(plans, missing) for t in plan_of_problem]
    claimed = [
        c for claims_of_problem in distributed.mine_by_cost(claims, missing) for c in claims_of_problem
    ]
    fresh = s.sampler.local(
        s.models.policy,
        [t for t, c in zip(plan, claimed, strict=True) if c is None],
        stream=(config.seed, "slow", state.step),
        policy_version=s.policy_version,
        temperature=config.rollout.temperature,
    )
    arriving = iter(fresh)
    sampled = [c if c is not None else next(arriving) for c in claimed]
    s.count_rollout_tokens()

    s.end_sampling()
    s.begin("update")
    training = time.perf_counter()
    groups = make_groups(
        sampled, config.slow.advantage_eps, by_context=config.slow.advantage_group == "context"
    )
    kept = [g for g in groups if g.advantages is not None]
    kept = distributed.level(kept, [cost(g, s.prompt_of) for g in kept])
    prompts = [[s.prompt_of(m.rollout) for m in g.sampled] for g in kept]
    assert s.policy is not None
    data = sequences(kept, prompts, config.slow.aggregation)
    try:
        numbers = optimise(
            s.policy,
            s.reference,
            data,
            config,
            step=state.step,
            pad_id=s.sampler.pad_id,
        )
    except NonFiniteError as bad:
        s.policy.hand_over()  # the weights as they were, for the dump
        s.non_finite(bad, nonfinite.write(
            s.run_dir, bad, data, kept, config, step=state.step, pad_id=s.sampler.pad_id, model=s.models.policy_module
        ))  # fmt: skip
        numbers = skipped(s.policy.lr(state.step))
    s.warn_of_mismatch(numbers["mismatch_kl"], reused)
    s.policy.hand_over()
    s.add_seconds("train_s", time.perf_counter() - training)
    state.step += 1
    recorder.step(s, sampled, groups, numbers, reused, seconds=time.perf_counter() - started)


def consolidate(s: Session) -> None:
    """One step of context distillation: sample under the seed context, move towards what the frozen weights say under the evolved ones."""
    config, state = s.config, s.state
    started = s.begin("rollouts")
    teacher = s.teach()
    problems = minibatch(s.stage.train, s.step_of_stage, config.slow.problems_per_step, config.seed)
    s.at_hand = {p.id: p for p in problems}
    taught = dict(
        zip(s.at_hand, contexts_of(len(problems), state.step * len(problems), state.population), strict=True)
    )
    sampled = s.sampler.local(
        s.models.policy,
        [
            t
            for p in distributed.mine(problems)
            for t in plan_group(p, [s.seed_context], config.slow.group_size)
        ],
        stream=(config.seed, "distil", state.step),
        policy_version=s.policy_version,
        temperature=config.rollout.temperature,
    )
    s.count_rollout_tokens()

    s.end_sampling()
    s.begin("update")
    training = time.perf_counter()
    assert s.policy is not None
    groups = groups_to_distil(sampled)
    prompts = [[s.prompt_of(m.rollout) for m in g.sampled] for g in groups]
    read = [
        [s.sampler.prompts.ids(taught[g.problem_id], s.at_hand[g.problem_id])] * len(g.sampled)
        for g in groups
    ]
    try:
        numbers = distil(
            s.policy, teacher, groups, prompts, read, config, step=state.step, pad_id=s.sampler.pad_id
        )
    except NonFiniteError as bad:
        s.non_finite(bad, None)
        numbers = skipped(s.policy.lr(state.step))
    s.policy.hand_over()
    s.add_seconds("train_s", time.perf_counter() - training)
    state.step += 1
    recorder.step(
        s, sampled, groups, {**numbers, "distilled": True}, 0, seconds=time.perf_counter() - started
    )


def measure(s: Session, *, final: bool) -> dict[str, Any]:
    """Evaluate on validation problems, the four cells at the end and those of eval.cells before, and write the result."""
    problems, cells = (
        (s.config.eval.final_problems, CELLS) if final else (s.config.eval.problems, s.config.eval.cells)
    )
    result = _cells(s, s.stage, problems, cells)
    recorder.evaluation(s, result, final=final)
    return result


def measure_stages(s: Session, own: dict[str, Any] | None = None) -> None:
    """At a stage's end: the four cells on its task and on those of all stages before, as many problems as the final evaluation has. own: on
    its task, where that is known."""
    for stage in s.stages[: s.stage.number + 1]:
        known = own if stage is s.stage else None
        recorder.stage_end(s, stage, known or _cells(s, stage, s.config.eval.final_problems))


def _cells(s: Session, stage: Stage, problems: int, cells: Sequence[str] = CELLS) -> dict[str, Any]:
    config, state = s.config, s.state
    started = s.begin("evaluation")
    s.forget_prefixes()
    reach("evaluation")
    result = evaluate(
        config,
        s.sampler,
        s.models,
        stage.validation[:problems],
        seed_context=s.seed_context,
        population=state.population,
        policy_version=s.policy_version,
        base_rewards=state.base_rewards,
        cells=cells,
    )
    s.forget_rollout_tokens()
    s.end("eval_s", started)
    return result
