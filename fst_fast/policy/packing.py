"""Leaves as the model's input: as one forest, every shared prefix once, or as a plain right-padded batch, the oracle of the other.

Both give the same labels in the same order; only the rows that predict them lie elsewhere. So whatever is computed from a PackedBatch
(log-probs, losses, gradients) must agree between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fst_fast.forest import Leaf, Share, pack, unshared_tokens
from fst_fast.policy.attention import AttentionPlan, TreePlan


@dataclass
class PackedBatch:
    """M labels of some leaves over B x N tokens. What the model reads lies on the device, what the labels say on the host."""

    input_ids: Tensor  # [B, N] int64, on the device like position_ids and the plan
    position_ids: Tensor  # [B, N] int64
    plan: AttentionPlan | None  # None: padded, plain causal attention
    rows: Tensor  # [M] int64, flat index into B * N of the token that predicts the label
    labels: Tensor  # [M] int64
    leaf: Tensor  # [M] int64, index into the leaves given
    offset: Tensor  # [M] int64, which token of that leaf's response
    tokens: int  # computed: B * N
    unshared: int  # of the same leaves, nothing shared and no padding


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on `device`; nobody waits for a GPU to take it."""
    if torch.device(device).type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def forest_batch(leaves: Sequence[Leaf], *, share: Share, device: torch.device | str) -> PackedBatch:
    """All leaves as one row of N tokens in depth-first order; positions are depths."""
    forest = pack(leaves, share=share)

    return PackedBatch(
        input_ids=to_device(torch.from_numpy(forest.token_ids)[None], device),
        position_ids=to_device(torch.from_numpy(forest.depth).long()[None], device),
        plan=TreePlan.of(forest, device),
        rows=torch.from_numpy(forest.rows),
        labels=torch.from_numpy(forest.labels),
        leaf=torch.from_numpy(forest.leaf),
        offset=torch.from_numpy(forest.offset),
        tokens=len(forest.token_ids),
        unshared=unshared_tokens(leaves),
    )


def padded_batch(leaves: Sequence[Leaf], *, pad_id: int, device: torch.device | str) -> PackedBatch:
    """One row per leaf, padded on the right. No mask is needed: under causal attention no real token sees the padding behind it."""
    lengths = [len(leaf) for leaf in leaves]
    width = max(lengths, default=0)
    input_ids = np.full((len(leaves), width), pad_id, np.int64)
    for row, leaf in zip(input_ids, leaves, strict=True):
        row[: len(leaf)] = np.concatenate([leaf.prompt_ids, leaf.response_ids])
    responses = [len(leaf.response_ids) for leaf in leaves]
    first = np.array([i * width + len(leaf.prompt_ids) - 1 for i, leaf in enumerate(leaves)], np.int64)
    offset = np.concatenate([np.empty(0, np.int64), *(np.arange(n) for n in responses)])

    return PackedBatch(
        input_ids=to_device(torch.from_numpy(input_ids), device),
        position_ids=torch.arange(width, device=device).expand(len(leaves), width),
        plan=None,
        rows=torch.from_numpy(np.repeat(first, responses) + offset),
        labels=torch.from_numpy(
            np.concatenate([np.empty(0, np.int64), *(leaf.response_ids for leaf in leaves)])
        ),
        leaf=torch.from_numpy(np.repeat(np.arange(len(leaves)), responses)),
        offset=torch.from_numpy(offset),
        tokens=input_ids.size,
        unshared=sum(lengths),
    )


def model_inputs(batch: PackedBatch) -> dict[str, Any]:
    """Keyword arguments for a transformers model: loaded with attention="tree" for a forest, with another for a padded batch."""
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    if batch.plan is not None:
        inputs["plan"] = batch.plan
    return inputs
