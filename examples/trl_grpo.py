"""TRL's GRPOTrainer with the head, the log-probabilities and the loss of `fst_kernels`. Runs on the CPU, without a network:

    python examples/trl_grpo.py --steps 8 --loss-type cispo

`FusedGRPOTrainer` is what to copy: it needs torch, TRL 1.16 and fst_kernels. Generation, rewards, advantages, batching, logging and
checkpoints stay TRL's. Two methods are replaced, and neither ever has logits of more than a chunk of rows:

    _get_per_token_logps_and_entropies  log-probabilities and entropies, differentiable: linear_logprob
    _compute_loss                       the training pass: linear_policy_loss, which makes the gradients in its forward, for the losses that
                                        it knows; for all others TRL's own formulas, on what linear_logprob returns

Both run inside the forward of the model's own lm_head, where the weight is whole also under DeepSpeed ZeRO-3. What TRL offers and this
trainer does not reproduce is refused by name when it is made. docs/kernels/own_trainer.md explains the mapping.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PrinterCallback,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

import fst_fast.mini
from fst_fast.mini.world import best_context
from fst_fast.tasks.star_graph import StarGraph
from fst_kernels import PolicyObjective, PolicyStats, linear_logprob, linear_policy_loss

FUSED = ("cispo", "grpo", "bnpo", "dr_grpo", "dapo")
LOSS_TYPES = (*FUSED, "sapo", "luspo", "vespo")

# GRPOConfig field -> its value in a loss that linear_policy_loss computes; any other is TRL's formula on linear_logprob.
PLAIN: dict[str, object] = {
    "importance_sampling_level": "token",
    "delta": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "off_policy_mask_threshold": None,
}

Job = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Untouched(tuple):
    """Results of a job. What a model does to its logits after its lm_head, scaling and soft-capping, leaves them as they are."""

    def _same(self, *_: Any) -> Untouched:
        return self

    __mul__ = __rmul__ = __truediv__ = _same

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Untouched:
        return next(x for x in args if isinstance(x, cls))  # torch.tanh(logits)


@contextmanager
def head_computes(model: nn.Module, job: Job, fp32: bool = False) -> Iterator[None]:
    """While open, model(...).logits is job(hidden [B, T, H], weight [V, H], bias [V] | None). fp32: whatever autocast says."""
    head = model.get_output_embeddings()
    before = head.__dict__.get("forward")  # None: that of its class

    def forward(hidden: Tensor) -> Untouched:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        dtype = torch.float32 if fp32 else dtype
        return Untouched(job(hidden.to(dtype), head.weight.to(dtype), head.bias))

    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def head_arguments(config: PretrainedConfig, temperature: float) -> dict[str, float]:
    """What a model does to its logits behind its lm_head, softcap(scale x), and the temperature, as arguments of the operations, by
    c tanh(s x / c) / t = (c / s) tanh(x / (c / s)) / (t / s). ValueError: a scale that is no number > 0."""
    scale, name = 1.0, "logits_scaling"
    if getattr(config, name, None) is not None:  # HyperCLOVA X multiplies by it, the others divide
        scale = config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    for other in ("lm_head_multiplier", "output_multiplier", "logit_scale"):
        if getattr(config, other, None) is not None:
            scale, name = getattr(config, other), other
    if not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
        raise ValueError(f"model.config.{name} scales the logits by {scale!r}; allowed: a number > 0")
    softcap = getattr(config, "final_logit_softcapping", None)
    return {"temperature": temperature / scale} | ({} if softcap is None else {"softcap": softcap / scale})


class FusedGRPOTrainer(GRPOTrainer):
    """GRPOTrainer for text models whose loss comes from fst_kernels; ValueError where its arguments ask for what is not reproduced.

    Metrics are TRL's; only, where linear_policy_loss computes the loss, `entropy` and `kl` weight tokens as the loss does, and of
    `clip_ratio/*` the minimum and the maximum over sequences are left out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type={self.loss_type!r}; allowed: {', '.join(LOSS_TYPES)}")
        if self.args.use_liger_kernel:
            raise ValueError("use_liger_kernel=True; allowed: False")
        self.head_arguments = head_arguments(self.model.config.get_text_config(), self.temperature)
        if self._is_vlm:
            raise ValueError(
                "processing_class is a processor; allowed: a tokenizer, this trainer is for text models"
            )
        plain = all(getattr(self.args, name) == value for name, value in PLAIN.items())
        self.is_fused = self.loss_type in FUSED and plain and not self.aux_loss_enabled
        if self.is_fused:
            self.objective()  # refuses impossible clips and caps now, not after the first generation

    def objective(self) -> PolicyObjective:
        """epsilon_high is cispo's absolute cap of the ratio, and the upper half of the others' clip around 1."""
        kl = {}
        if self.beta != 0.0:
            kl = {"kl": "k3", "kl_coef": self.beta, "kl_unbiased": self.args.use_bias_correction_kl}
        if self.loss_type == "cispo":
            return PolicyObjective("cispo", ratio_cap=self.epsilon_high, **kl)
        return PolicyObjective("grpo", clip_low=self.epsilon_low, clip_high=self.epsilon_high, **kl)

    def token_weight(self, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        """One over what TRL divides the loss of each token by, gradient accumulation included: mask [B, C] bool -> [B, C]."""
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        sequences, length = mask.shape[0], mask.sum(1, keepdim=True)
        if self.loss_type == "grpo":
            return mask / (steps * sequences * length.clamp(min=1))
        if self.loss_type == "bnpo":
            return mask / (steps * length.sum().clamp(min=1))
        if self.loss_type == "dr_grpo":
            return mask / (steps * sequences * self.max_completion_length)
        # dapo, cispo: num_items_in_batch counts the tokens of all processes and, in training, of all the steps of one generation
        count = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return mask / (count * steps / self.args.steps_per_generation if self.model.training else count)

    def at_head(
        self, model: nn.Module, ids: Tensor, attention: Tensor, mask: Tensor, job: Job, **also: Any
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """job(hidden [M, H], weight, bias), and the routers' loss where it is asked for by also: output_router_logits=True.

        ids and attention [B, P + C], mask [B, C] bool with M of the completions' tokens."""

        def of_tokens(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            return job(hidden[:, :-1][mask], weight, bias)  # a row predicts the token after it

        unwrapped, fp32 = self.accelerator.unwrap_model(model), self.args.cast_lm_head_to_fp32
        with self.accelerator.autocast(), head_computes(unwrapped, of_tokens, fp32):
            keep = mask.shape[1] + 1
            inputs = {
                "input_ids": ids,
                "attention_mask": attention,
                "logits_to_keep": keep,
                "use_cache": False,
            }
            out = model(**inputs, **also)
            return out.logits, out.aux_loss if also else None

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if not self.is_fused:
            return super()._compute_loss(model, inputs)
        mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()  # [B, C]

        def of_tokens(x: Tensor | None) -> Tensor | None:  # [B], [B, 1] or [B, C] -> [M]
            return None if x is None else (x.unsqueeze(1) if x.dim() == 1 else x).expand(mask.shape)[mask]

        labels, advantages = of_tokens(inputs["completion_ids"]), of_tokens(inputs["advantages"])
        n = of_tokens(self.token_weight(mask, inputs))
        old = of_tokens(inputs.get("old_per_token_logps"))  # None: the policy has not moved since it sampled
        ref = of_tokens(inputs.get("ref_per_token_logps"))
        of_loss = {"objective": self.objective(), "token_weight": n, "old_logprob": old, "ref_logprob": ref}
        if self.use_vllm and self.vllm_importance_sampling_correction:
            of_loss["rollout_weight"] = of_tokens(inputs["importance_sampling_ratio"])

        def fused(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            loss, stats = linear_policy_loss(
                hidden, weight, labels, advantages, bias=bias, **self.head_arguments, **of_loss
            )
            return loss, stats.sums

        ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), 1)
        attention = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1)
        (loss, sums), _ = self.at_head(model, ids, attention, mask, fused)
        stats = PolicyStats(self.accelerator.reduce(sums, reduction="sum"))
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["entropy"].append(stats.entropy.item())
        if self.beta != 0.0:
            metrics["kl"].append(stats.kl.item())
        if self.loss_type == "cispo":
            metrics["cispo_clip_ratio"].append(stats.clipped_high_fraction.item())
        else:
            metrics["clip_ratio/low_mean"].append(stats.clipped_low_fraction.item())
            metrics["clip_ratio/high_mean"].append(stats.clipped_high_fraction.item())
            metrics["clip_ratio/region_mean"].append(stats.clipped_region_fraction.item())
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **refused: Any,  # images
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        size = batch_size or max(1, input_ids.shape[0])
        also = {"output_router_logits": True} if compute_aux_loss else {}
        logprobs, entropies, aux_losses = [], [], []
        for ids, attention in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            mask = attention[:, -logits_to_keep:].bool()
            labels = ids[:, -logits_to_keep:][mask]

            def score(
                hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor = labels
            ) -> tuple[Tensor, Tensor]:
                out = linear_logprob(hidden, weight, labels, bias=bias, **self.head_arguments)
                return out.logprob, out.entropy

            scores, aux_loss = self.at_head(model, ids, attention, mask, score, **also)
            aux_losses.append(aux_loss)
            for x, done in zip(scores, (logprobs, entropies), strict=True):
                done.append(x.new_zeros(mask.shape).masked_scatter(mask, x))
        entropy = torch.cat(entropies) if compute_entropy else None
        return torch.cat(logprobs), entropy, torch.stack(aux_losses).mean() if compute_aux_loss else None


# What follows is a demonstration: a small model, a small task, a few steps.


def problems(count: int, seed: int) -> Dataset:
    """Prompts of the star graph task in the words of the mini model, each with its answer."""
    task = StarGraph(form="mini", arms=5, path=4, ids=40, train=count, validation=1, seed=seed)
    context = {"role": "system", "content": best_context("star_graph")}
    return Dataset.from_list(
        [{"prompt": [context, *p.messages], "answer": list(p.answer)} for p in task.problems("train")]
    )


def right_path(completions: list[list[dict[str, str]]], answer: list[list[int]], **_: Any) -> list[float]:
    """1 if the last \\boxed{} holds the path from start to goal, else 0."""
    boxes = [re.findall(r"\\boxed *{([^{}]*)}", completion[0]["content"]) for completion in completions]
    paths = [re.findall(r"[0-9]+", box[-1]) if box else [] for box in boxes]
    return [float(path == [str(node) for node in right]) for path, right in zip(paths, answer, strict=True)]


class PrintLosses(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            names = [name for name in ("loss", "reward", "kl", "entropy", "cispo_clip_ratio") if name in logs]
            print(f"step {state.global_step:3d}", *(f"{name} {logs[name]:.4f}" for name in names), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps; two for every generated batch")
    parser.add_argument("--loss-type", choices=LOSS_TYPES, default="cispo")
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the KL to the model at the start")
    parser.add_argument("--completions", type=int, default=64, help="of a step, a multiple of 16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder,
            loss_type=options.loss_type,
            epsilon_high=4.0 if options.loss_type == "cispo" else 0.28,
            beta=options.beta,
            num_generations=8,
            per_device_train_batch_size=options.completions // 2,
            gradient_accumulation_steps=2,
            num_iterations=2,
            max_completion_length=32,
            max_steps=options.steps,
            learning_rate=3e-4,
            seed=options.seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        trainer = FusedGRPOTrainer(
            AutoModelForCausalLM.from_pretrained(fst_fast.mini.path(), dtype=torch.float32),
            right_path,
            config,
            problems(256, options.seed),
            processing_class=AutoTokenizer.from_pretrained(fst_fast.mini.path()),
            callbacks=[PrintLosses()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
