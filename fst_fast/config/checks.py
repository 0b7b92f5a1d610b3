"""Settings of the slow phase and of DeepSpeed that do not go together, each with one sentence, and the keys that an objective sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    if (
        config.policy.optimizer == "fused_adam"
        and config.model.dtype == "bfloat16"
        and not config.policy.zero_stage
    ):
        raise ValueError(
            "policy.optimizer=fused_adam with model.dtype=bfloat16 needs policy.zero_stage >= 1, which is 0; torch_adamw takes every stage"
        )
