"""The fast phase of one cycle: the contexts evolve while the weights are frozen (arXiv 2605.12484, Algorithm 1).

    fast_phase      draw the anchor set from the lookahead, let evolution.py evolve the population on it, score through the sampler
    rate_and_propose    fast.evolver=e_spl: evolve by the rollouts of a slow step instead (e_spl.py)

How a child is proposed is in reflection.py and reflectors/, how it is admitted and who is kept in pareto.py (`admits`, `select`), the order
of it all in evolution.py.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.contracts import Context, Problem, RolloutRequest, ScoredRollout
from fst_fast.data.stream import anchor_set
from fst_fast.errors import UserError
from fst_fast.fast import e_spl, evolution, plain_gepa
from fst_fast.fast.outcome import FastResult, Rules
from fst_fast.fast.population import FastState
from fst_fast.fast.reflection import ReflectionPrompt, Reflector, Reply
from fst_fast.rollout.models import SamplingModels
from fst_fast.rollout.sampler import Sampler
from fst_fast.run.callbacks import CycleStart
from fst_fast.run.faults import reach
from fst_fast.run.recorder import Recorder


def fast_phase(
    state: FastState,
    lookahead: Sequence[Problem],
    *,
    config: Config,
    cycle: int,
    step: int,
    policy_version: int,
    sampler: Sampler,
    models: SamplingModels,
    reflect: Reflector,
    validation: Sequence[Problem],
    recorder: Recorder,
) -> FastResult:
    """Evolve the population on problems of the lookahead. All processes call it with the same arguments and get the same result.

    validation: problems that evaluations will pose; a context must leave room for them in the prompt, as for the lookahead."""
    recorder.begin("fast phase", step)
    seed_context = state.contexts[state.seed_id].context
    emit = functools.partial(recorder.callbacks.send, step=step)
    emit(CycleStart, cycle=cycle, population=state.members())

    def score(requests: Sequence[RolloutRequest]) -> list[ScoredRollout]:
        reach("fast.wave")
        return sampler.spread(
            models.fast,
            requests,
            stream=(config.seed, "fast", cycle),
            policy_version=policy_version,
            temperature=config.rollout.temperature,
        )

    began = time.monotonic()

    def clock() -> float:
        limited = config.fast.budget.seconds is not None
        return distributed.broadcast(time.monotonic() - began) if limited else 0.0

    with recorder.stopwatch.phase("fast_s"):
        evolve = plain_gepa.evolve if config.fast.evolver == "gepa" else evolution.evolve
        result = evolve(
            state,
            anchor=anchor_set(lookahead, config.fast.anchor_size, cycle, config.seed),
            score=score,
            reflect=_timed(reflect, recorder),
            config=config.fast,
            count_tokens=sampler.count_tokens,
            cycle=cycle,
            policy_version=policy_version,
            seed=config.seed,
            log=recorder.note,
            spells_special=lambda text: spells_special(text, lookahead[0], sampler),
            fits=lambda context: leaves_room(context, seed_context, [*lookahead, *validation], sampler),
            emit=emit,
            clock=clock,
        )
        reach("fast.end")
    return result


def rate_and_propose(
    state: FastState,
    problems: Sequence[Problem],
    rollouts: Sequence[ScoredRollout],
    *,
    config: Config,
    cycle: int,
    step: int,
    policy_version: int,
    sampler: Sampler,
    reflect: Reflector,
    validation: Sequence[Problem],
    recorder: Recorder,
) -> FastResult:
    """Evolve by the rollouts that this process has of a slow step on `problems`. All processes call it and get the same result."""
    recorder.begin("fast phase", step)
    seed_context = state.contexts[state.seed_id].context
    emit = functools.partial(recorder.callbacks.send, step=step)
    emit(CycleStart, cycle=cycle, population=state.members())
    place = {problem.id: i for i, problem in enumerate(problems)}
    with recorder.stopwatch.phase("fast_s"):
        gathered = distributed.concat_shards(distributed.all_gather(list(rollouts)))
        known = [r for r in gathered if r.rollout.problem_id in place]  # not those of dynamic sampling
        known.sort(key=lambda r: (place[r.rollout.problem_id], r.rollout.context_id, r.rollout.sample))
        return e_spl.evolve(
            state,
            known,
            problems,
            reflect=_timed(reflect, recorder),
            config=config.fast,
            rules=Rules(
                sampler.count_tokens,
                config.fast.max_context_tokens,
                lambda context: leaves_room(context, seed_context, [*problems, *validation], sampler),
                lambda text: spells_special(text, problems[0], sampler),
            ),
            cycle=cycle,
            policy_version=policy_version,
            seed=config.seed,
            log=recorder.note,
            emit=emit,
        )


def _timed(reflect: Reflector, recorder: Recorder) -> Reflector:
    def timed(prompts: Sequence[ReflectionPrompt], *, seeds: Sequence[int]) -> list[Reply]:
        with recorder.stopwatch.part("reflect_s"):
            return reflect(prompts, seeds=seeds)

    return timed


def leaves_room(
    context: Context, seed_context: Context, problems: Sequence[Problem], sampler: Sampler
) -> bool:
    """Whether the prompt of the longest of `problems` under `context` has at most rollout.max_prompt_tokens tokens."""
    prompts = sampler.prompts
    known = prompts.openable(problems)
    if not known:
        return True
    longest = max(known, key=lambda problem: len(prompts.ids(seed_context, problem)))
    return len(prompts.prompt(context, longest)) <= prompts.max_prompt_tokens


def spells_special(text: str, problem: Problem, sampler: Sampler) -> bool:
    """Whether a context contains a special token, or text that the chat template rejects."""
    chat = sampler.prompts.chat
    if chat.special.spelt(text) is not None:
        return True
    try:
        sampler.prompts.prompt(Context.of(text), problem)
    except UserError:
        return True
    return False
