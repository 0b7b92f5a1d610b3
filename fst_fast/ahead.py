"""Steps while later ones are sampled (rollout.ahead = N): samplers are up to N steps ahead of the trainers.

    step          trainers                       samplers
    t             train batch t  -> weights t+1  sample batch t+N from weights t
    t+1           train batch t+1 -> ...         sample batch t+1+N from weights t+1

The weights of a batch follow from its step alone: batch t is sampled from the weights after step t - N, or, near the start of a segment, from those that the segment
began with. No response spans two versions. So the same seed gives the same run, however fast either side is. A segment ends where a fast phase, a
stage or the run does: then nothing is under way, and the first batch after it is sampled by all processes together. Within a segment all processes meet for
evaluations and checkpoints, on the same weights; batches that are sampled by then wait, and a checkpoint holds them. Behaviour log-probs are the
samplers', so the importance ratio corrects for staleness (slow/update.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.data.stages import Stage, step_problems
from fst_fast.errors import UserError
from fst_fast.rollout.link import Link, Order
from fst_fast.rollout.models import SamplingModels
from fst_fast.rollout.reuse import ReusePool
from fst_fast.run import signals
from fst_fast.slow.batch import Batch, sample_batch, share_of
from fst_fast.slow.groups import plan_group
from fst_fast.slow.slow_phase import train_groups
from fst_fast.startup import Run


def segment_end(config: Config, stage: Stage, step: int) -> int:
    """The step before which the pipeline drains: of the next fast phase, or the end of the stage."""
    if config.method == "rl":
        return stage.end
    cycle = config.fast.cycle_steps
    return min(stage.end, stage.first + (stage.local_step(step) // cycle + 1) * cycle)


def last_sampled(step: int, ahead: int, end: int) -> int:
    """The last batch that is sampled from the weights after `step` steps, in a segment that ends before `end`."""
    return min(step + ahead, end - 1)


def run_ahead(run: Run, stage: Stage, meets: Callable[[int], bool]) -> None:
    """Take steps until the segment ends, `meets` says that all processes meet after a step, or a signal stops the run. All processes call it."""
    link = run.link
    assert link is not None
    state, end, started = run.state, segment_end(run.config, stage, run.state.step), time.perf_counter()
    if not state.ahead:
        sample = _Sampling(run, stage, run.models, state.reusable)
        state.ahead = [sample(state.step, state.step)]
    # Later batches are claimed for twice, by those who sample them and by the trainers as they arrive: both pools stay equal.
    sample = _Sampling(
        run, stage, run.sampling_models or run.models, ReusePool(list(state.reusable.rollouts))
    )
    first, version = state.step + len(state.ahead), state.step
    split = distributed.split()
    with distributed.part():
        if link.samples:
            try:
                state.step = _sample_ahead(link, sample, first, version, run.config.rollout.ahead, end)
            except (UserError, FloatingPointError) as error:
                link.put(error)
                raise
            state.reusable = sample.reusable
        else:
            with link.sampling(
                lambda: _sample_ahead(link, sample, first, version, run.config.rollout.ahead, end)
            ):
                _train(run, link, stage, end, meets, started)
    if split is not None:
        state.counters, state.ahead = distributed.broadcast((state.counters, state.ahead))
    elif run.sampler.hosts:
        run.sampler.hosts.agree()


@dataclass
class _Sampling:
    """Samples the batch of a step from the weights of a version, which `models` hold."""

    run: Run
    stage: Stage
    models: SamplingModels
    reusable: ReusePool

    def __call__(self, step: int, version: int) -> Batch:
        problems, spare = step_problems(self.run.config, self.stage, step)
        return sample_batch(
            problems,
            self.run.state.population,
            config=self.run.config,
            step=step,
            policy_version=version,
            sampler=self.run.sampler,
            models=self.models,
            reusable=self.reusable,
            spare=spare,
        )


def _sample_ahead(link: Link, sample: _Sampling, step: int, version: int, ahead: int, end: int) -> int:
    """Sample batches from `step` on until the trainers say that all meet; returns after how many steps that is."""
    run, separate = sample.run, distributed.split() is not None
    while True:
        while step <= last_sampled(version, ahead, end):
            if separate:
                run.recorder.begin("rollouts", step)
                run.recorder.stopwatch.take()
            sample.models.forget_prefixes()
            batch = sample(step, version)
            if separate:
                spent = run.recorder.stopwatch.take()
                batch = replace(batch, seconds={kind: spent[kind] for kind in ("rollout_s", "verify_s")})
            link.put((batch, signals.stop_requested(run.run_dir)))
            step += 1
        order = link.receive()
        version = order.step
        if order.pause:
            return version


def _train(
    run: Run, link: Link, stage: Stage, end: int, meets: Callable[[int], bool], started: float
) -> None:
    """Train batch after batch, until all processes meet and what is being sampled has arrived. started: when the first step began, by
    time.perf_counter."""
    config, state = run.config, run.state
    assert run.policy is not None
    arrived = state.step + len(state.ahead) - 1  # the last batch that has
    pause = False
    while not pause:
        if not state.ahead:
            run.recorder.begin("rollouts", state.step)
            _receive(run, link, stage)
            arrived += 1
        batch = state.ahead.pop(0)
        assert batch.step == state.step
        problems, spare = step_problems(config, stage, state.step)
        report = train_groups(
            share_of(batch, [*problems, *islice(spare, batch.refill_groups)], config),
            state.population,
            config=config,
            step=state.step,
            sampler=run.sampler,
            models=run.models,
            policy=run.policy,
            reference=run.kl_reference(),
            recorder=run.recorder,
            started=started,
        )
        report.numbers["rollout_staleness"] = batch.staleness
        state.step += 1
        pause = state.step == end or meets(state.step) or signals.stop_requested(run.run_dir)
        link.send(run.policy.rollout_model, Order(state.step, pause))
        state.counters.add_tokens(*batch.tokens)
        for kind, seconds in batch.seconds.items():
            run.recorder.stopwatch.add(kind, seconds)
        while pause and arrived < last_sampled(state.step - 1, config.rollout.ahead, end):
            _receive(run, link, stage)
            arrived += 1
        ended = time.perf_counter()
        run.recorder.step(
            replace(report, seconds=ended - started),
            step=state.step,
            cycle=state.current_cycle,
            counters=state.counters,
            unverified=batch.unverified,
            served=run.models.served(),
        )
        started = ended


def _receive(run: Run, link: Link, stage: Stage) -> None:
    """Wait for the next batch, on all trainers. Raises what ended the sampling."""
    state, config = run.state, run.config
    said = distributed.broadcast(link.take() if distributed.rank() == 0 else None)
    if isinstance(said, BaseException):
        raise said
    batch, stop = said
    if stop:
        signals.request_stop()
    for problem in step_problems(config, stage, batch.step)[0]:
        state.reusable.claim(plan_group(problem, state.population, config.slow.group_size))
    state.ahead.append(batch)
    if distributed.split() is not None:  # what the samplers have learned of lengths
        run.sampler.lengths.note(s.rollout for s in batch.rollouts)
