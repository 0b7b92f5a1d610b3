"""The plain way to sample: left-padded prompts, transformers' own cache, a copy of the prompt for every sequence.

Used for models whose attention cannot be packed, and as the test oracle of the forest path, with which it shares only
the sampling of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from fst_fast.rollout.prompt_tree import Ints
from fst_fast.rollout.responses import Responses


def decode_padded(
    model: Any, prompts: Sequence[Ints], responses: Responses, *, max_batch: int, pad_id: int
) -> int:
    """Fill `responses`, `max_batch` prompts of similar length at a time; returns the number of positions computed, padding included."""
    device = model.get_output_embeddings().weight.device
    lengths = np.array([len(p) for p in prompts], dtype=np.int64)
    order = np.argsort(lengths, kind="stable")
    computed = 0
    for begin in range(0, len(order), max_batch):
        who = order[begin : begin + max_batch]
        width = int(lengths[who].max())
        ids = np.full((len(who), width), pad_id, dtype=np.int64)
        for row, sequence in enumerate(who):
            ids[row, width - lengths[sequence] :] = prompts[sequence]
        column = np.arange(width)
        mask = (column >= width - lengths[who][:, None]).astype(np.int64)  # [B, width]
        position = np.maximum(column - (width - lengths[who][:, None]), 0)
        cache = DynamicCache(config=model.config)
        live = np.ones(len(who), dtype=bool)
        while live.any():
            logits = model(
                input_ids=torch.as_tensor(ids, device=device),
                attention_mask=torch.as_tensor(mask, device=device),
                position_ids=torch.as_tensor(position, device=device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            computed += ids.size
            ids = responses.draw(logits, who, live)[:, None]
            live &= ~responses.ended(who)
            mask = np.concatenate([mask, np.ones((len(who), 1), dtype=np.int64)], axis=1)
            position = position[:, -1:] + 1
    return computed
