"""Fast-Slow Training in one file: the whole method over the parts of fst-fast, on the mini model, in about a minute on two cores.

    python examples/minimal_fst.py [STEPS]

What the trainer adds is left out: checkpoints, several processes, evaluation of the four cells, reuse of rollouts, logs. Equations are
those of arXiv 2605.12484; the comments say where each part is in the trainer.
"""

from __future__ import annotations

import sys

import numpy as np

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.contracts import Context, Problem, RolloutRequest, ScoredRollout
from fst_fast.data.stream import anchor_set, lookahead, minibatch
from fst_fast.fast.evolution import evolve
from fst_fast.fast.population import FastState
from fst_fast.fast.reflectors import make_reflector
from fst_fast.policy.scoring import Batching
from fst_fast.policy.trained import TrainedPolicy, load
from fst_fast.rollout.sampler import Sampler
from fst_fast.run.environment import prepare_environment
from fst_fast.slow.groups import make_groups
from fst_fast.slow.update import Reference, optimise, sequences
from fst_fast.tasks.registry import load_task
from fst_kernels import PolicyObjective

SEED = 0
CYCLE_STEPS = 4  # T: slow steps between two fast phases
PROBLEMS = 8  # per step
CONTEXTS = 4  # K: size of the population
GROUP = 8  # G: rollouts of one problem, G/K under each context

CONFIG = Config.model_validate(
    {
        "task": "formula_choice",
        "task_args": {"level": "hard"},
        "model": {"path": "mini"},
        "rollout": {"max_response_tokens": 32},
        "slow": {"lr": 3e-4, "warmup_steps": 4, "group_size": GROUP},
        "fast": {
            "population": CONTEXTS,
            "anchor_size": 16,
            "rollout_budget": 320,
            "cycle_steps": CYCLE_STEPS,
        },
    }
)


def main(steps: int) -> list[float]:
    """Train for `steps` optimiser steps; returns the mean reward of each."""
    prepare_environment()
    distributed.init()
    task = load_task(CONFIG.task, CONFIG.task_args)
    problems = task.problems("train")
    reference = load(CONFIG)  # the base model, frozen
    policy = TrainedPolicy(CONFIG, reference)  # the slow weights
    fast = FastState.initial(CONFIG.fast.seed_context)  # the fast weights
    population = [Context.of(CONFIG.fast.seed_context)] * CONTEXTS
    reflect = make_reflector("mini", {}, generate=None)  # reads failures, proposes edits
    rewards = []

    with Sampler.open(CONFIG) as sampler:  # prompts, verifying processes
        engine = sampler.engine(policy.rollout_model)
        for step in range(steps):
            # -- fast phase: contexts evolve, weights are frozen (fst_fast/fast/fast_phase.py) --------------------------------------
            if step % CYCLE_STEPS == 0:
                engine.forget()
                ahead = lookahead(problems, step, CYCLE_STEPS, PROBLEMS, SEED)
                cycle = step // CYCLE_STEPS

                def score(
                    requests: list[RolloutRequest], step: int = step, cycle: int = cycle
                ) -> list[ScoredRollout]:
                    return sampler.local(
                        engine, requests, stream=(SEED, "fast", cycle), policy_version=step, temperature=1.0
                    )

                result = evolve(
                    fast,
                    anchor=anchor_set(ahead, CONFIG.fast.anchor_size, cycle, SEED),
                    score=score,
                    reflect=reflect,
                    config=CONFIG.fast,
                    count_tokens=sampler.count_tokens,
                    cycle=cycle,
                    policy_version=step,
                    seed=SEED,
                    log=print,
                )
                fast, population = result.state, result.population
                print(
                    f"step {step}: best context {population[0].text!r}, reward {result.record['best_mean']:.2f}"
                )

            # -- slow phase: weights learn, contexts are frozen (fst_fast/slow/slow_phase.py) ---------------------------------------
            batch = minibatch(problems, step, PROBLEMS, SEED)
            rollouts = sampler.local(
                engine,
                plan(batch, population),
                stream=(SEED, "slow", step),
                policy_version=step,
                temperature=1.0,
            )
            # All G rollouts of a problem, over its contexts, are one advantage group: A = (r - mean) / (std + eps)  (Eq. 3).
            groups = [g for g in make_groups(rollouts, eps=1e-6) if g.advantages is not None]
            prompt = sampler.prompts.of_rollouts(population, batch)
            data = sequences(groups, [[prompt(m.rollout) for m in g.members] for g in groups], "problem")
            # CISPO: -min(pi / pi_behaviour, cap) A log pi, the weight without gradient (Eq. 4), and a k3 KL to the base.
            objective = PolicyObjective("cispo", ratio_cap=4.0, kl="k3", kl_coef=1e-3)
            numbers = optimise(
                policy, Reference(reference), data, objective, Batching.of(CONFIG, sampler.pad_id), step=step
            )
            policy.hand_over()  # the rollouts sample from the new weights
            engine.forget()  # keys and values of the old ones
            rewards.append(
                float(np.mean([r.verdict.reward for r in rollouts if r.verdict.reward is not None]))
            )
            print(f"step {step + 1}: reward {rewards[-1]:.2f}, KL to the base {numbers['kl']:.4f}")
    return rewards


def plan(problems: list[Problem], population: list[Context]) -> list[RolloutRequest]:
    """G/K samples of every problem under every context; a context that occurs twice gets further sample numbers."""
    each = GROUP // len(population)
    return [
        RolloutRequest(context, problem, k * each + sample)
        for problem in problems
        for k, context in enumerate(population)
        for sample in range(each)
    ]


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
