"""Settings that do not go together, each with one sentence, and the keys that an objective sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fst_fast.config.fast import FastConfig
    from fst_fast.config.schema import Config, PolicyConfig, SlowConfig

OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "dapo": {"clip_high": 0.28, "aggregation": "token"},
    "dr_grpo": {"aggregation": "constant", "advantage_scale": "none"},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence"},
}
"""What slow.objective sets of the other keys where they are not given: what its paper uses."""

DEEPSPEED_KEYS = {
    "train_batch_size": "slow.problems_per_step",
    "train_micro_batch_size_per_gpu": "slow.tokens_per_micro_batch",
    "gradient_accumulation_steps": "slow.tokens_per_micro_batch",
    "optimizer": "policy.optimizer, slow.lr, slow.betas and slow.weight_decay",
    "scheduler": "slow.lr_schedule",
    "gradient_clipping": "slow.max_grad_norm",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "zero_optimization.stage": "policy.zero_stage",
    "zero_optimization.offload_optimizer.device": "policy.offload_optimizer",
    "zero_optimization.offload_param.device": "policy.offload_parameters",
    "zero_allow_untested_optimizer": "policy.optimizer",
    "zero_force_ds_cpu_optimizer": "policy.optimizer",
    "gradient_allreduce_op": "the trainer, whose loss counts on the mean",
    "steps_per_print": "the trainer, which logs itself",
    "wall_clock_breakdown": "the trainer, which logs itself",
}
"""Keys of DeepSpeed's configuration that policy.deepspeed may not hold, and what sets them."""


def policy(policy: PolicyConfig) -> None:
    """Raises ValueError."""
    stage = policy.zero_stage
    if policy.offload_optimizer and stage == 0:
        raise ValueError("policy.offload_optimizer=true needs policy.zero_stage >= 1, which is 0")
    if policy.offload_parameters and stage != 3:
        raise ValueError(f"policy.offload_parameters=true needs policy.zero_stage=3, which is {stage}")
    if policy.optimizer == "cpu_adam" and not policy.offload_optimizer:
        raise ValueError("policy.optimizer=cpu_adam needs policy.offload_optimizer=true, which is false")
    if policy.optimizer == "fused_adam" and policy.offload_optimizer:
        raise ValueError(
            "policy.optimizer=fused_adam does not go with policy.offload_optimizer=true, which steps on the CPU; allowed: auto, cpu_adam, "
            "torch_adamw"
        )
    for path, owner in DEEPSPEED_KEYS.items():
        if _holds(policy.deepspeed, path):
            raise ValueError(f"policy.deepspeed.{path} is set by {owner}; leave it out here")
    for path, key, on in (
        ("zero_optimization.offload_optimizer", "offload_optimizer", policy.offload_optimizer),
        ("zero_optimization.offload_param", "offload_parameters", policy.offload_parameters),
    ):
        if not on and _holds(policy.deepspeed, path):
            raise ValueError(f"policy.deepspeed.{path} has no effect without policy.{key}=true")
    if not stage and _holds(policy.deepspeed, "data_types"):
        raise ValueError("policy.deepspeed.data_types needs policy.zero_stage >= 1, which is 0")


def _holds(tree: Any, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def slow(slow: SlowConfig) -> None:
    """Raises ValueError."""
    if slow.lr_schedule == "constant" and slow.lr_min_ratio:
        raise ValueError(
            f"slow.lr_min_ratio={slow.lr_min_ratio:g} has no effect with slow.lr_schedule=constant; allowed with linear, cosine"
        )
    every = slow.reference.every
    if every is not None and (slow.kl == "none" or not slow.kl_coef):
        raise ValueError(
            f"slow.reference.every={every} has no effect without a KL penalty (slow.kl={slow.kl}, slow.kl_coef={slow.kl_coef:g})"
        )
    if slow.mask_overlong and slow.overlong_buffer:
        raise ValueError(
            "slow.mask_overlong=true leaves out the rollouts that slow.overlong_buffer penalises most; choose one of the two"
        )
    if slow.reward_clip is not None and not slow.reward_clip[0] < slow.reward_clip[1]:
        raise ValueError(f"slow.reward_clip={list(slow.reward_clip)}: the first must be below the second")


def fast(fast: FastConfig) -> None:
    """Raises ValueError."""
    prices(fast)
    if fast.merge and not fast.components:
        raise ValueError("fast.merge=true takes components from two contexts; it needs fast.components")
    if fast.rungs > 1 and fast.proposals is not None:
        raise ValueError(
            f"fast.rungs={fast.rungs} and fast.proposals={fast.proposals} both choose among the proposals of a wave; set one of the two"
        )
    if (
        fast.evolver == "waves"
        and fast.parents == "thompson"
        and (fast.rungs > 1 or fast.proposals is not None)
    ):
        key = f"rungs={fast.rungs}" if fast.rungs > 1 else f"proposals={fast.proposals}"
        raise ValueError(
            f"fast.{key} has no effect with fast.parents=thompson, which scores children step by step; with front or improvement it has"
        )
    if fast.keep_seed and fast.population == 1:
        raise ValueError(
            "fast.keep_seed=true leaves no place for another context with fast.population=1; at least 2"
        )
    if fast.search_budget is not None and fast.search_budget < fast.rollout_budget:
        raise ValueError(
            f"fast.search_budget={fast.search_budget} is below fast.rollout_budget={fast.rollout_budget}; at least that, or null"
        )
    if fast.evolver == "waves":
        return
    only_waves = ["rungs", "search_budget", "proposals", "parents", "keep_seed", "adaptive", "components"]
    unused = [*only_waves, "crossover"] if fast.evolver == "gepa" else only_waves
    empty = type(fast).model_fields
    given = [k for k in unused if getattr(fast, k) != empty[k].get_default(call_default_factory=True)]
    if given:
        raise ValueError(
            f"fast.{given[0]}={getattr(fast, given[0])!r} has no effect with fast.evolver={fast.evolver}; it belongs to waves"
        )


def prices(fast: FastConfig) -> None:
    """Raises ValueError where a budget of money has no prices to count with."""
    priced = any(
        fast.reflector_args.get(f"usd_per_million_{kind}_tokens") for kind in ("prompt", "completion")
    )
    if fast.budget.usd is None or ".py:" in fast.reflector or (fast.reflector == "openai" and priced):
        return
    if fast.reflector == "openai":
        raise ValueError(
            "fast.budget.usd needs prices: fast.reflector_args.usd_per_million_prompt_tokens or usd_per_million_completion_tokens"
        )
    raise ValueError(
        f"fast.budget.usd has no effect with fast.reflector={fast.reflector}, which costs nothing"
    )


def recipe(config: Config) -> None:
    """What depends on several sections or, as the warm-up, on slow.steps, which stages may set. Raises ValueError."""
    slow = config.slow
    if slow.lr_schedule != "constant" and slow.warmup_steps >= slow.steps > 0:
        raise ValueError(
            f"slow.lr_schedule={slow.lr_schedule} has no step to fall in: slow.warmup_steps={slow.warmup_steps} of slow.steps={slow.steps}"
        )
    if slow.overlong_buffer > config.rollout.max_response_tokens:
        raise ValueError(
            f"slow.overlong_buffer={slow.overlong_buffer} is longer than a response, rollout.max_response_tokens="
            f"{config.rollout.max_response_tokens}"
        )


def steps(config: Config) -> None:
    """Raises ValueError where the steps of stages and distillation do not add up."""
    total = sum(stage.steps for stage in config.stages)
    if config.stages and total != config.slow.steps:
        raise ValueError(
            f"slow.steps={config.slow.steps} is not the sum of the stages' steps, {total}; leave slow.steps out"
        )
    distil = config.slow.distill_steps
    if distil and config.method != "fst":
        raise ValueError(
            f"slow.distill_steps={distil} needs evolved contexts and weights that move: method=fst, not {config.method}"
        )
    fast = config.fast
    if config.method != "rl" and (fast.phases, fast.evolver) != ("alternate", "waves"):
        if config.method == "gepa" and (fast.phases != "alternate" or fast.evolver == "e_spl"):
            key = f"phases={fast.phases}" if fast.phases != "alternate" else "evolver=e_spl"
            raise ValueError(f"fast.{key} needs slow steps: method=fst, not gepa")
        if fast.phases != "alternate" and fast.evolver == "e_spl":
            raise ValueError(
                f"fast.phases={fast.phases} does not go with fast.evolver=e_spl, which follows every step"
            )
        if distil and (fast.phases == "first_and_last" or fast.evolver == "e_spl"):
            raise ValueError(
                f"slow.distill_steps={distil} ends with the contexts in the weights; it goes with fast.phases=alternate or first and "
                "fast.evolver=waves or gepa"
            )
    shortest = min([stage.steps for stage in config.stages] or [config.slow.steps])
    if distil and distil >= shortest:
        raise ValueError(
            f"slow.distill_steps={distil} leaves no step for the rest of {'a stage' if config.stages else 'the run'} of {shortest} steps"
        )


def ahead(config: Config) -> None:
    """Raises ValueError where rollout.ahead and rollout.sampler_ranks do not go with the rest."""
    rollout, served = config.rollout, config.rollout.backend == "vllm"
    if not rollout.ahead:
        if rollout.sampler_ranks:
            raise ValueError(
                f"rollout.sampler_ranks={rollout.sampler_ranks} has no effect with rollout.ahead=0, where all processes sample and then train"
            )
        return
    if config.method == "gepa":
        raise ValueError(
            f"rollout.ahead={rollout.ahead} has no effect with method=gepa, which trains nothing"
        )
    if served and rollout.sampler_ranks:
        raise ValueError(
            f"rollout.sampler_ranks={rollout.sampler_ranks} does not go with rollout.backend=vllm, whose servers sample"
        )
    if not served and not rollout.sampler_ranks:
        raise ValueError(
            f"rollout.ahead={rollout.ahead} needs processes that sample while others train: rollout.sampler_ranks of at least 1, or "
            "rollout.backend=vllm"
        )
    if config.method == "fst" and rollout.ahead >= config.fast.cycle_steps:
        raise ValueError(
            f"rollout.ahead={rollout.ahead} reaches beyond a cycle of fast.cycle_steps={config.fast.cycle_steps} steps; at most "
            f"{config.fast.cycle_steps - 1}"
        )
    if config.method == "fst" and config.fast.evolver == "e_spl":
        raise ValueError(
            f"rollout.ahead={rollout.ahead} does not go with fast.evolver=e_spl, which evolves after every step"
        )
    if config.slow.distill_steps:
        raise ValueError(
            f"rollout.ahead={rollout.ahead} does not go with slow.distill_steps={config.slow.distill_steps}, whose rollouts must be those of "
            "the newest weights"
        )
    if config.slow.objective == "reinforce" and config.slow.mismatch == "none":
        raise ValueError(
            f"rollout.ahead={rollout.ahead} trains on rollouts of older weights, for which slow.objective=reinforce does not correct; "
            "slow.mismatch=tis or mis does"
        )


def together(config: Config) -> None:
    """Raises ValueError where values of different sections exclude each other."""
    g, k = config.slow.group_size, config.fast.population
    if config.method != "rl" and g % k:
        raise ValueError(
            f"slow.group_size={g} is not a multiple of fast.population={k}; try {-(-g // k) * k}"
        )
    if config.method != "rl" and config.slow.advantage_group == "context" and g < 2 * k:
        raise ValueError(
            f"slow.advantage_group=context compares the {g // k} rollout of a problem under one context with nothing; slow.group_size "
            f"must be at least {2 * k} with fast.population={k}"
        )
    tree = config.policy.attention == "tree"
    if tree != (config.policy.packing == "forest"):
        raise ValueError(
            f"policy.attention={config.policy.attention} does not go with policy.packing={config.policy.packing}; "
            "tree goes with forest, sdpa and flash_attention_2 with padded"
        )
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if config.policy.packing == "forest" and config.slow.tokens_per_micro_batch < longest:
        raise ValueError(
            f"slow.tokens_per_micro_batch={config.slow.tokens_per_micro_batch} does not hold the longest sequence, {longest} tokens "
            f"(rollout.max_prompt_tokens + rollout.max_response_tokens); at least {longest}"
        )
    episode = config.rollout.max_episode_tokens
    if episode is not None and not longest <= episode <= config.slow.tokens_per_micro_batch:
        raise ValueError(
            f"rollout.max_episode_tokens={episode} must hold one turn, {longest} tokens (rollout.max_prompt_tokens + "
            f"rollout.max_response_tokens), and be at most slow.tokens_per_micro_batch={config.slow.tokens_per_micro_batch}"
        )
    if config.rollout.history == "split" and config.slow.distill_steps:
        raise ValueError(
            "rollout.history=split does not go with slow.distill_steps: the teacher would read what the student has not"
        )
    if config.rollout.backend == "native" and config.rollout.backend_args:
        raise ValueError("rollout.backend_args is given, but rollout.backend=native takes none")
    ahead(config)
    save, keep = config.checkpoint.every, config.checkpoint.keep_every
    if keep and (not save or keep % save):
        raise ValueError(
            f"checkpoint.keep_every={keep} is not a multiple of checkpoint.every={save}; "
            + (f"try {-(-keep // save) * save}" if save else "with 0 only the last step has a checkpoint")
        )
    if not all(0 <= beta < 1 for beta in config.slow.betas):
        raise ValueError(f"slow.betas={list(config.slow.betas)}; each must be at least 0 and below 1")
    lookahead = config.slow.problems_per_step * config.fast.cycle_steps
    if config.method != "rl" and config.fast.anchor_size > lookahead:
        raise ValueError(
            f"fast.anchor_size={config.fast.anchor_size} is larger than the lookahead of {lookahead} problems "
            f"(slow.problems_per_step x fast.cycle_steps); at most {lookahead}"
        )
