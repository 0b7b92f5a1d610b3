"""The cycle (arXiv 2605.12484, Algorithm 1): every T = fast.cycle_steps steps a fast phase, then T slow steps.
Evaluations and checkpoints come at intervals of their own.

    fast phase   weights frozen: the population of contexts evolves on an anchor set of the next T minibatches   fast/fast_phase.py
    slow phase   contexts frozen: T policy-gradient steps over those minibatches                                 slow/slow_phase.py

method=rl has no fast phase (the seed context serves all rollouts), method=gepa no slow phase. A run may go through several tasks
(data/stages.py), and the last steps on each may distill the contexts into the weights (slow/distillation.py). Every process runs this same
loop and makes the same decisions; rank 0 alone writes. startup.py builds or resumes the run; state.py is what a checkpoint keeps of it.
"""

from __future__ import annotations

import functools
import resource
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fst_fast import distributed
from fst_fast.ahead import run_ahead
from fst_fast.config import Config
from fst_fast.contracts import CELLS, Judged, Problem
from fst_fast.data.stages import Stage, stage_at, step_problems
from fst_fast.data.stream import lookahead
from fst_fast.evaluate import evaluate
from fst_fast.fast.budget import budget_over
from fst_fast.fast.fast_phase import fast_phase, rate_and_propose
from fst_fast.fast.outcome import FastResult
from fst_fast.rollout.reuse import ReusePool
from fst_fast.run import signals
from fst_fast.run.callbacks import Callback, RunEnd, RunStart
from fst_fast.run.faults import reach
from fst_fast.run.identity import identity
from fst_fast.slow.slow_phase import distillation_step, prompt_text, slow_step
from fst_fast.startup import Run, build_run


def train(
    config: Config,
    run_dir: Path,
    *,
    resume: bool = False,
    allow_config_change: bool = False,
    allow_data_change: bool = False,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any] | None:
    """Run `config` in `run_dir` to its last step; returns what is written to summary.json (on every process), None if a signal stopped it.

    Raises UserError on bad input."""
    with signals.stop_on_signals(announce=distributed.rank() == 0):
        opened = build_run(
            config,
            run_dir,
            resume=resume,
            allow_config_change=allow_config_change,
            allow_data_change=allow_data_change,
            callbacks=callbacks,
        )
        if not isinstance(opened, Run):
            return opened
        with opened as run:
            return take_steps(run)


def take_steps(run: Run) -> dict[str, Any] | None:
    """From where the run is to its last step, or to the one in which it is asked to stop; returns what `train` returns."""
    config, state, send = run.config, run.state, run.recorder.callbacks.send
    if signals.remove_stop_file(run.run_dir):
        run.recorder.note(f"{run.run_dir / signals.STOP_FILE} was there from an earlier stop; it is removed")
    send(RunStart, step=state.step, config=config.model_dump(mode="json"), resumed=run.resumed)
    if state.step == 0 and config.eval.every and not run.resumed:
        evaluate_now(run, run.stages[0], final=False)
    while state.step < config.slow.steps and not signals.stop_requested(run.run_dir):
        stage, step_before = advance_stage(run), state.step
        run.models.forget_prefixes()
        distilling = stage.distils(state.step)
        if not distilling and evolves_before(config, stage, state.step):
            run_fast_phase(run, stage)
        elif stage.local_step(state.step) % config.fast.cycle_steps == 0:
            state.reusable = ReusePool()  # what is left is for the problems of the cycle before
        if config.method == "gepa":
            spent = budget_over(config.fast, state.fast.spent, state.fast.idle)
            state.step = stage.end if spent else min(state.step + config.fast.cycle_steps, stage.end)
        elif config.rollout.ahead:
            run_ahead(run, stage, functools.partial(meets_after, config))
        else:
            run_slow_step(run, stage, distilling)
        if config.fast.phases == "first_and_last" and config.method == "fst" and state.step == stage.end:
            run_fast_phase(run, stage)
        done = state.step >= config.slow.steps
        if not done and due(step_before, state.step, config.eval.every):
            evaluate_now(run, stage, final=False)
        if not done and config.stages and state.step == stage.end:
            evaluate_stages(run, stage)
        if not done and due(step_before, state.step, config.checkpoint.every):
            run.save_checkpoint()
    run.save_checkpoint()  # before the final evaluation: a run that resumes after a crash repeats it with the same results
    signals.remove_stop_file(run.run_dir)
    summary = finish(run) if state.step >= config.slow.steps else None
    if summary is None:
        run.recorder.note(how_to_continue(run))
    send(RunEnd, step=state.step, summary=summary)
    return summary


def evolves_before(config: Config, stage: Stage, step: int) -> bool:
    """Whether a fast phase comes before this step (fast.phases, fast.evolver)."""
    if config.method == "rl" or config.fast.evolver == "e_spl":
        return False
    done = stage.local_step(step)
    return done % config.fast.cycle_steps == 0 if config.fast.phases == "alternate" else done == 0


def due(before: int, step: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, step]; never for every=0."""
    return bool(every) and step // every > before // every


def meets_after(config: Config, step: int) -> bool:
    """Whether an evaluation or a checkpoint is due after this step."""
    return any(due(step - 1, step, every) for every in (config.eval.every, config.checkpoint.every))


def advance_stage(run: Run) -> Stage:
    """The stage of the next step, asked before every step; what it changes, it changes at the border of two stages.

    After distillation the population starts again from the seed context, since the contexts are in the weights now."""
    state = run.state
    stage = stage_at(run.stages, state.step)
    if run.teacher is not None and not stage.distils(state.step):
        run.teacher = None
        state.fast = state.fast.reset_population()
        state.population = [run.seed_context]
    if stage.number and state.step == stage.first:
        state.fast = replace(state.fast, idle=0, rest=0)  # the counts belong to the task before
        run.recorder.note(
            f"stage {stage.number + 1} of {len(run.stages)}: {stage.task}, steps {stage.first + 1} to {stage.end}"
        )
    return stage


def run_fast_phase(run: Run, stage: Stage) -> None:
    """Evolve the contexts on the problems of the next T steps."""
    config, state = run.config, run.state
    upcoming = lookahead(
        stage.train, stage.local_step(state.step), config.fast.cycle_steps, config.slow.problems_per_step, config.seed
    )  # fmt: skip
    result = fast_phase(
        state.fast,
        upcoming,
        config=config,
        cycle=state.cycle,
        step=state.step,
        policy_version=run.policy_version,
        sampler=run.sampler,
        models=run.models,
        reflect=run.reflect,
        validation=stage.validation[: max(config.eval.problems, config.eval.final_problems)],
        recorder=run.recorder,
    )
    take_contexts(run, result, upcoming)


def take_contexts(run: Run, result: FastResult, problems: Sequence[Problem]) -> None:
    """Go on with the contexts of a fast phase, and record it. problems: those of its rollouts."""
    config, state = run.config, run.state
    state.fast, state.population = result.state, list(result.population)
    reuse = config.fast.reuse_rollouts and config.method == "fst"
    state.reusable = ReusePool.of(result.sampled, state.population) if reuse else ReusePool()
    state.counters.rollouts += len(result.sampled)
    state.counters.fast_rollouts += len(result.sampled)
    state.counters.add_tokens(*run.models.new_tokens())
    contexts = [line.context for line in state.fast.contexts.values()]
    shown = prompt_text(run.sampler, run.sampler.prompts.of_rollouts(contexts, problems))
    lineage = {context_id: line.to_json() for context_id, line in state.fast.contexts.items()}
    run.recorder.cycle(
        result.record, result.sampled, state.population, lineage, step=state.step, cycle=state.cycle, prompt_text=shown
    )  # fmt: skip
    state.cycle += 1


def run_slow_step(run: Run, stage: Stage, distilling: bool) -> None:
    """Take one optimiser step: policy gradient, or distillation of the contexts."""
    config, state = run.config, run.state
    assert run.policy is not None
    problems, spare = step_problems(config, stage, state.step)
    reference = run.kl_reference()
    if distilling:
        report = distillation_step(
            problems,
            state.population,
            run.seed_context,
            run.distillation_teacher(),
            config=config,
            step=state.step,
            sampler=run.sampler,
            models=run.models,
            policy=run.policy,
            recorder=run.recorder,
        )
    else:
        report = slow_step(
            problems,
            state.population,
            config=config,
            step=state.step,
            sampler=run.sampler,
            models=run.models,
            policy=run.policy,
            reference=reference,
            reusable=state.reusable,
            spare=spare,
            recorder=run.recorder,
        )
    state.step += 1
    state.counters.add_tokens(*run.models.new_tokens())
    run.recorder.step(
        report,
        step=state.step,
        cycle=state.current_cycle,
        counters=state.counters,
        unverified=run.sampler.unverified(),
        served=run.models.served(),
    )
    if config.fast.evolver == "e_spl" and config.method == "fst" and not distilling:
        rated = rate_and_propose(
            state.fast,
            problems,
            report.rollouts,
            config=config,
            cycle=state.cycle,
            step=state.step,
            policy_version=state.step - 1,
            sampler=run.sampler,
            reflect=run.reflect,
            validation=stage.validation[: max(config.eval.problems, config.eval.final_problems)],
            recorder=run.recorder,
        )
        take_contexts(run, rated, problems)


def evaluate_now(run: Run, stage: Stage, *, final: bool) -> dict[str, Any]:
    """Evaluate on validation problems and record the result: all four cells in the final evaluation, eval.cells in the others."""
    config = run.config
    seen: dict[str, list[Judged]] = {}
    problems: int = config.eval.problems
    cells: Sequence[str] = config.eval.cells
    if final:
        problems, cells = config.eval.final_problems, list(CELLS)
    result = _evaluate(run, stage, problems, cells, seen)
    stage_fields = {"stage": stage.number, "task": stage.task} if config.stages else {}
    run.recorder.evaluation(
        result, stage.validation, seen, step=run.state.step, final=final, counters=run.state.counters, stage_fields=stage_fields
    )  # fmt: skip
    return result


def evaluate_stages(run: Run, stage: Stage, own: dict[str, Any] | None = None) -> None:
    """At the end of `stage`: the four cells on its task and on those of all stages before. own: the result on its own task, if already computed."""
    for past in run.stages[: stage.number + 1]:
        result = own if past is stage else None
        result = result or _evaluate(run, past, run.config.eval.final_problems, list(CELLS))
        run.recorder.stage_end(
            result, step=run.state.step, after_stage=stage.number, stage=past.number, task=past.task
        )


def _evaluate(
    run: Run, stage: Stage, problems: int, cells: Sequence[str], seen: dict[str, list[Judged]] | None = None
) -> dict[str, Any]:
    state = run.state
    run.recorder.begin("evaluation", state.step)
    run.models.forget_prefixes()
    reach("evaluation")
    with run.recorder.stopwatch.phase("eval_s"):
        result = evaluate(
            run.config,
            run.sampler,
            run.models,
            stage.validation[:problems],
            seed_context=run.seed_context,
            population=state.fast.evaluated(state.population),
            policy_version=run.policy_version,
            base_rewards=state.base_rewards,
            cells=cells,
            seen=seen,
        )
    run.models.skip_tokens()
    return result


def finish(run: Run) -> dict[str, Any]:
    """Measure the four cells, write summary.json and return it."""
    config, state = run.config, run.state
    stage = advance_stage(run)
    result = evaluate_now(run, stage, final=True)
    if config.stages:
        evaluate_stages(run, stage, own=result)
    peak = max(distributed.all_gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
    summary = {
        **identity(config),
        "channels": result["channels"],
        "k": result["k"],
        "steps": 0 if config.method == "gepa" else state.step,
        **asdict(state.counters),
        "seconds": run.recorder.stopwatch.total(),
        "kl_seed": result["kl_seed"],
        "kl_evolved": result["kl_evolved"],
        "peak_memory_bytes": peak,
    }
    if config.stages:
        summary["stages"] = run.recorder.stage_ends
    run.recorder.summary(summary, step=state.step)
    return summary


def how_to_continue(run: Run) -> str:
    """The message of a run that a signal has stopped."""
    n = distributed.world_size()
    how = "fst train" if n == 1 else f"the same launcher, {n} processes and train.py"
    return f"stopped after step {run.state.step} of {run.config.slow.steps}; continue with: {how} --run-dir {run.run_dir} --resume"
