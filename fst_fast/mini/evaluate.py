"""Mean reward of a model under given contexts, by plain transformers generation. Used for builds and their tests, not for training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fst_fast.contracts import Problem, Task


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    context: str,
    *,
    seed: int,
    temperature: float = 1.0,
    max_new_tokens: int = 40,
) -> list[str]:
    """Sample one response per problem under the context. Seeds torch's global generator."""
    system = [{"role": "system", "content": context}]
    prompts = [
        tokenizer.apply_chat_template([*system, *p.messages], add_generation_prompt=True, tokenize=False)
        for p in problems
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(seed)
    output: Any = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
    )
    sampled = output[:, batch["input_ids"].shape[1] :]  # [B, T]
    return [str(text) for text in tokenizer.batch_decode(sampled, skip_special_tokens=True)]


def measure_contexts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    contexts: Mapping[str, str],
    *,
    problems: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """For each named context: mean reward at temperature 1 on the first validation problems, its standard error, and mean metrics."""
    chosen = list(task.problems("validation")[:problems])
    scores: dict[str, dict[str, Any]] = {}
    for name, context in contexts.items():
        responses = sample_responses(model, tokenizer, chosen, context, seed=seed)
        verdicts = [task.verify(p, r) for p, r in zip(chosen, responses, strict=True)]
        rewards = np.array([v.reward for v in verdicts], dtype=float)
        scores[name] = {
            "context": context,
            "mean": round(float(rewards.mean()), 4),
            "stderr": round(float(rewards.std() / np.sqrt(len(rewards))), 4),
            **{k: round(float(np.mean([v.metrics[k] for v in verdicts])), 4) for k in verdicts[0].metrics},
        }
    return scores
