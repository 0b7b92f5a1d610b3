"""The learning rate of a step, which implementation of AdamW takes it, and what DeepSpeed says to its configuration before a run begins."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from fst_fast.config import Config, SlowConfig
from fst_fast.errors import UserError

Adam = Literal["torch_adamw", "torch_fused", "fused_adam", "cpu_adam"]


def learning_rate(slow: SlowConfig, step: int) -> float:
    """Of optimiser step `step` (from 0): a linear warm-up, then slow.lr_schedule over the steps that are left.

    With p from 0 to 1 over them: linear 1 - p, cosine (1 + cos(pi p)) / 2, and m + (1 - m) times it for lr_min_ratio m, times slow.lr."""
    if step < slow.warmup_steps:
        return slow.lr * min(1.0, (step + 1) / slow.warmup_steps)
    if slow.lr_schedule == "constant":
        return slow.lr * 1.0
    progress = min(1.0, (step - slow.warmup_steps) / (slow.steps - slow.warmup_steps))
    falls = 1 - progress if slow.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return slow.lr * (slow.lr_min_ratio + (1 - slow.lr_min_ratio) * falls)


def choice(config: Config) -> Adam:
    """What policy.optimizer means on this machine. torch_fused: torch's in one kernel, as fast as FusedAdam; it needs no compiler and takes every
    ZeRO stage."""
    policy = config.policy
    if policy.optimizer != "auto":
        return policy.optimizer
    if not torch.cuda.is_available():
        return "torch_adamw"
    return "cpu_adam" if policy.offload_optimizer else "torch_fused"


def parameters(config: Config) -> dict[str, Any]:
    """What DeepSpeed hands to the AdamW of `choice`."""
    slow, name = config.slow, choice(config)
    settings = {"lr": slow.lr, "betas": list(slow.betas), "eps": 1e-8, "weight_decay": slow.weight_decay}
    settings["torch_adam"] = name in ("torch_adamw", "torch_fused")
    return settings | ({"fused": True} if name == "torch_fused" else {})


def check(config: Config, settings: dict[str, Any]) -> None:
    """Refuse an optimiser that this machine does not have, and keys that DeepSpeed refuses or does not know. settings: see
    trained.deepspeed_config. Raises UserError. After distributed.init."""
    name = choice(config)
    said = f"policy.optimizer={config.policy.optimizer}"
    if name == "fused_adam" and config.model.dtype == "bfloat16" and not config.policy.zero_stage:
        raise UserError(
            f"{said} with weights in bfloat16 needs policy.zero_stage >= 1, which is 0; torch_adamw takes every stage"
        )
    if name == "fused_adam" and not torch.cuda.is_available():
        raise UserError(
            f"{said} needs a GPU, and this process has none; allowed here: auto, torch_adamw, cpu_adam"
        )
    if name in ("fused_adam", "cpu_adam"):
        from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

        try:
            (CPUAdamBuilder if name == "cpu_adam" else FusedAdamBuilder)().load(verbose=False)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{said}: DeepSpeed cannot build {name}: {reason}; policy.optimizer=torch_adamw needs no build"
            ) from error
    if config.policy.deepspeed:
        _check_keys(config.policy.deepspeed, settings)


class _Read(dict[str, Any]):
    """A dictionary that notes which of its keys were asked for."""

    def __init__(self, tree: dict[str, Any]) -> None:
        super().__init__(tree)
        self.asked: set[Any] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self) -> Any:
        return self  # so that `in config.keys()` is noted, too


def _check_keys(given: dict[str, Any], settings: dict[str, Any]) -> None:
    """DeepSpeed itself passes over keys that it does not know."""
    from deepspeed.runtime.config import DeepSpeedConfig

    read = _Read(settings)
    try:
        DeepSpeedConfig(read)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"policy.deepspeed={given}: DeepSpeed refuses it: {reason}") from error
    unknown = [key for key in given if key not in read.asked]
    if unknown:
        raise UserError(
            f"policy.deepspeed.{unknown[0]} is no key that DeepSpeed reads; see its configuration page"
        )
