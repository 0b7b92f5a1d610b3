"""The four cells: weights (base | trained) x context (seed | evolved), mean@k and pass@k, and the exact KL to the base model.

neither = base weights, seed context; context = base weights, evolved contexts; weights = trained weights, seed context; both = trained
weights, evolved contexts. The evolved cells draw the context uniformly from the population, as the objective does (arXiv 2605.12484,
Eq. 6): sample j of problem i is taken under context (i + j) mod K. All cells meet the same random numbers, so their differences are
paired. Cells that are the same by construction (method=rl has no evolved contexts, method=gepa no trained weights) are sampled once, and
so is each sample of the base model: its weights and random numbers are the same in every evaluation of a run.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.contracts import CELLS, FULL_REWARD, Context, Judged, Problem, RolloutRequest, alike
from fst_fast.policy.scoring import Batching, kl_to_reference
from fst_fast.rollout.models import SamplingModels
from fst_fast.rollout.sampler import Sampler
from fst_fast.rollout.turns import leaves_of


def cell(rewards: Sequence[tuple[str, float | None]], k: int) -> dict[str, float | int | None]:
    """mean@k with its standard error (over problems), pass@k, and the number of problems judged, of (problem id, reward). Unjudged samples
    (None) do not count. None: not measured, without a judged problem all of them, with one the standard error."""
    by_problem: dict[str, list[float]] = {}
    for problem_id, reward in rewards:
        if reward is not None:
            by_problem.setdefault(problem_id, []).append(reward)
    means = np.array([np.mean(r) for r in by_problem.values()])
    if not len(means):
        return {"mean": None, "stderr": None, "pass_at_k": None, "n": 0, "k": k}
    stderr = None
    if len(means) > 1:
        stderr = 0.0 if alike(means) else float(means.std(ddof=1) / math.sqrt(len(means)))
    solved = [max(r) >= FULL_REWARD for r in by_problem.values()]
    return {
        "mean": float(means.mean()),
        "stderr": stderr,
        "pass_at_k": float(np.mean(solved)),
        "n": len(means),
        "k": k,
    }


def requests_of(problems: Sequence[Problem], contexts: Sequence[Context], k: int) -> list[RolloutRequest]:
    """k samples of every problem, the contexts taking turns; ordered by context so that shared prefixes stay together."""
    requests = [
        RolloutRequest(contexts[(i + j) % len(contexts)], p, j)
        for i, p in enumerate(problems)
        for j in range(k)
    ]
    return sorted(requests, key=lambda request: request.context.id)


def evaluate(
    config: Config,
    sampler: Sampler,
    models: SamplingModels,
    problems: Sequence[Problem],
    *,
    seed_context: Context,
    population: Sequence[Context],
    policy_version: int,
    base_rewards: dict[str, dict[str, float]] | None = None,
    cells: Collection[str] = CELLS,
    seen: dict[str, list[Judged]] | None = None,
) -> dict[str, Any]:
    """Sample and judge the cells on `problems`, on all processes together; returns {"channels", "kl_seed", "kl_evolved", "k"}. The KL under
    the seed context belongs to the cell `weights`, that under the evolved ones to `both`; without its cell it is None.

    base_rewards: context id -> "problem id/sample" -> reward, of the base model, from earlier evaluations of the run; what is in it is not
    sampled again, and it is brought up to date. A sample that could not be judged is tried again.
    seen: receives, for each cell, what was judged.
    """
    trained = config.method != "gepa" and policy_version > 0
    evolved = any(c.id != seed_context.id for c in population)
    k = config.eval.samples
    channels: dict[str, Any] = {}
    by_cell: dict[str, list[Judged]] = {}
    memory = {} if base_rewards is None else base_rewards
    for gone in set(memory) - {c.id for c in (seed_context, *population)}:
        del memory[gone]
    context, weights = ("context" if evolved else "neither"), ("weights" if trained else "neither")
    both = "both" if trained and evolved else weights if trained else context
    same_as = {"neither": "neither", "context": context, "weights": weights, "both": both}
    wanted = [name for name in CELLS if name in cells]
    for name in wanted:
        origin = same_as[name]
        if origin not in channels:
            requests = requests_of(
                problems, [seed_context] if origin in ("neither", "weights") else list(population), k
            )
            base = origin in ("neither", "context")
            judged = _judge(config, sampler, models, requests, policy_version, memory if base else None)
            channels[origin] = cell([(each.problem_id, each.reward) for each in judged], k)
            by_cell[origin] = judged
        channels[name] = channels[origin]
        by_cell[name] = by_cell[origin]
    if seen is not None:
        seen.update({name: by_cell[name] for name in wanted})
    held_out = list(problems[: config.eval.kl_problems])
    # cells whose weights are trained ones; the others have not moved
    under = {"weights": [seed_context], "both": list(population)}
    drift = {
        name: kl(config, sampler, models, held_out, under[name], policy_version) if name in under else 0.0
        for name in dict.fromkeys(same_as[name] for name in wanted if name in ("weights", "both"))
    }
    return {
        "channels": {name: channels[name] for name in wanted},
        "k": k,
        "kl_seed": drift[same_as["weights"]] if "weights" in wanted else None,
        "kl_evolved": drift[same_as["both"]] if "both" in wanted else None,
    }


def _judge(
    config: Config,
    sampler: Sampler,
    models: SamplingModels,
    requests: Sequence[RolloutRequest],
    policy_version: int,
    memory: dict[str, dict[str, float]] | None,
) -> list[Judged]:
    """The requests, judged, under the trained model, or, given its memory, under the base model."""
    known = {} if memory is None else {(c, key): r for c, of in memory.items() for key, r in of.items()}
    keys = [(context.id, f"{problem.id}/{sample}") for context, problem, sample in requests]
    fresh = [request for request, key in zip(requests, keys, strict=True) if key not in known]
    sampled = []
    if fresh:
        sampled = sampler.spread(
            models.trained if memory is None else models.base,
            fresh,
            stream=(config.seed, "eval"),
            policy_version=policy_version,
            temperature=config.eval.temperature,
            top_p=config.eval.top_p,
            paired=True,
            remember=False,
        )
    new = iter(sampled)
    judged = []
    for key, (context, problem, _) in zip(keys, requests, strict=True):
        if key in known:
            judged.append(Judged(problem.id, context.id, known[key], None, None))
            continue
        answer = next(new)
        reward = answer.verdict.reward
        judged.append(Judged(problem.id, context.id, reward, answer.response, answer.verdict.feedback))
        if memory is not None and reward is not None:
            memory.setdefault(key[0], {})[key[1]] = reward
    return judged


def kl(
    config: Config,
    sampler: Sampler,
    models: SamplingModels,
    problems: Sequence[Problem],
    contexts: Sequence[Context],
    policy_version: int,
) -> float | None:
    """KL(train||base), exact over the vocabulary, mean over the tokens sampled from the trained policy, at training temperature; None where
    no token was sampled.

    Base and trained model both see the context.
    """
    plan = distributed.local_shard(requests_of(problems, contexts, 1))
    sampled = sampler.local(
        models.trained,
        plan,
        stream=(config.seed, "kl"),
        policy_version=policy_version,
        temperature=config.rollout.temperature,
        paired=True,
    )
    prompt_of = sampler.prompts.of_rollouts(contexts, problems)
    leaves = [leaf for s in sampled for leaf, _ in leaves_of(prompt_of(s.rollout), s.rollout)]
    summed, count = 0.0, 0
    if leaves:
        summed, count = kl_to_reference(
            models.trained_module, models.base_module, leaves, Batching.of(config, sampler.pad_id)
        )
    summed, tokens = distributed.all_reduce_sum([summed, count])
    return summed / tokens if tokens else None
