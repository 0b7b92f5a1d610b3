"""The numbers that follow from a configuration: what a fast phase can pay for, and the batch sizes that `--dry-run` prints."""

from __future__ import annotations

from dataclasses import dataclass

from fst_fast.config.fast import FastConfig
from fst_fast.config.schema import Config

FIRST = 2
"""Rollouts that a child gets before anything is known of it, with fast.parents=thompson."""


@dataclass(frozen=True)
class Size:
    """The cost of scoring one context: problems x samples rollouts."""

    problems: int
    samples: int

    @property
    def rollouts(self) -> int:
        return self.problems * self.samples


def affordable(config: FastConfig, *, members: int, anchor: int) -> Size:
    """How much of the anchor set the budget pays for: the carried contexts and one full generation of children must fit.

    If they do not, first the number of samples shrinks, then the anchor set (to its first problems): breadth over
    problems is worth more than repetition. 0 problems: the budget does not pay for one rollout per context, so the phase does nothing."""

    def fits(problems: int, samples: int) -> bool:
        size = Size(problems, samples)
        return members * size.rollouts + wave_cost(config, config.children, size) <= config.rollout_budget

    problems = next((n for n in range(anchor, 0, -1) if fits(n, 1)), 0)
    samples = next((n for n in range(config.samples, 0, -1) if fits(problems, n)), 0) if problems else 0
    return Size(problems, samples)


def rungs(children: int, problems: int, count: int) -> list[tuple[int, int]]:
    """(children, problems) of each rung of a race, fast.rungs: half as many children, twice as many problems each time, at last all problems."""
    return [(-(-children // 2**r), -(-problems // 2 ** (count - 1 - r))) for r in range(count)]


def wave_cost(config: FastConfig, children: int, size: Size) -> int:
    """The most rollouts of a wave of so many children, its first comparison of proposals included. With fast.parents=thompson: what a
    phase is to have for its children at least, three times their first rollouts, or a third of the budget, and two contexts in full."""
    if config.parents == "thompson":
        return min(3 * children * FIRST, config.rollout_budget // 3) + 2 * size.rollouts
    total = before = 0
    for running, problems in rungs(children, size.problems, config.rungs):
        total += running * (problems - before) * size.samples
        before = problems
    return total + screening(config)


def reserve(size: Size, left: int) -> int:
    """With fast.parents=thompson: of the rollouts that are left, those kept for contexts to be scored in full at the end, two if that is at most half."""
    return size.rollouts * (2 if left >= 4 * size.rollouts else 1)


def wave_width(config: FastConfig, size: Size, left: int) -> int:
    """How many of fast.children `left` rollouts pay for in full."""
    return next((n for n in range(config.children, 0, -1) if wave_cost(config, n, size) <= left), 0)


def screening(config: FastConfig) -> int:
    """The most rollouts of one wave that choose among more proposals than children."""
    proposals = config.proposals or config.children
    return proposals * config.screen_problems if proposals > config.children else 0


def derived(config: Config, world_size: int = 1) -> dict[str, int | str]:
    """Name -> number, in the order in which a run meets them. One unit: problems per step, over all processes."""
    slow, k = config.slow, config.eval.samples
    samplers = config.rollout.sampler_ranks
    population = 1 if config.method == "rl" else config.fast.population
    numbers: dict[str, int | str] = {
        "processes": world_size,
        **({"of these, processes that sample": samplers} if samplers else {}),
        "contexts in the population": population,
        "steps": slow.steps,
        "problems per step": slow.problems_per_step,
        "problems per step on one process": _share(slow.problems_per_step, max(world_size - samplers, 1)),
    }
    if config.method != "rl":
        numbers |= _fast(config)
    if config.method != "gepa":
        numbers |= {
            "rollouts per problem": slow.group_size,
            "rollouts per problem under one context": slow.group_size // population,
            "rollouts per step": slow.problems_per_step * slow.group_size,
            "slow rollouts, whole run": slow.steps * slow.problems_per_step * slow.group_size,
        }
        if slow.dynamic_sampling:
            most = (1 + slow.dynamic_sampling) * slow.problems_per_step * slow.group_size
            numbers["rollouts per step, with dynamic sampling at most"] = most
            numbers["slow rollouts, whole run, with dynamic sampling at most"] = slow.steps * most
    return numbers | {
        "rollouts of one cell, periodic evaluation": config.eval.problems * k,
        "rollouts of one cell, final evaluation": config.eval.final_problems * k,
        "longest sequence, tokens": config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
        "tokens of one micro-batch on one process": slow.tokens_per_micro_batch,
    }


def phases_once(config: Config) -> int:
    """Fast phases of a run whose contexts evolve once or twice in each stage."""
    return max(1, len(config.stages)) * (2 if config.fast.phases == "first_and_last" else 1)


def _fast(config: Config) -> dict[str, int | str]:
    fast = config.fast
    if fast.evolver == "e_spl":
        return {"cycles": config.slow.steps}
    cycles = -(-config.slow.steps // fast.cycle_steps) if fast.phases == "alternate" else phases_once(config)
    numbers: dict[str, int | str] = {
        "cycles": cycles,
        "lookahead, problems per cycle": config.slow.problems_per_step * fast.cycle_steps,
    }
    of_waves = (
        ("first cycle", 1, fast.first_generations),
        ("later cycles", fast.population, fast.generations),
    )
    for when, members, generations in of_waves if fast.evolver == "waves" else ():
        size = affordable(fast, members=members, anchor=fast.anchor_size)
        waves = generations if size.rollouts and fast.parents == "thompson" else 0
        if size.rollouts and not waves:  # the last wave may be narrower than fast.children
            left = fast.rollout_budget - members * size.rollouts
            while waves < generations and (width := wave_width(fast, size, left)):
                left, waves = left - wave_cost(fast, width, size), waves + 1
        numbers[f"anchor problems x samples, {when}"] = f"{size.problems} x {size.samples}"
        numbers[f"proposal waves, {when}"] = waves
    return numbers | {
        "fast rollouts per cycle, at most": fast.rollout_budget,
        "fast rollouts, whole run, at most": cycles * fast.rollout_budget
        + max(0, (fast.search_budget or 0) - fast.rollout_budget),
    }


def _share(total: int, processes: int) -> int | str:
    low, high = total // processes, -(-total // processes)
    return low if low == high else f"{low} or {high}"
