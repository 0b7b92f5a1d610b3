"""Leaves as model input: as one forest, in which every shared prefix occurs once, or as a right-padded batch, the test oracle.

Both give the same labels in the same order; only the rows that predict them differ. So everything computed from a
PackedBatch (log-probs, losses, gradients) must agree between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fst_fast.forest import Leaf, Share, label_arrays, pack, unshared_tokens
from fst_fast.policy.attention import AttentionPlan, TreePlan


@dataclass
class PackedBatch:
    """M labels of some leaves over B x N tokens. The model's inputs are on the device, the labels on the host."""

    input_ids: Tensor  # [B, N] int64, on the device like position_ids and the plan
    position_ids: Tensor  # [B, N] int64
    plan: AttentionPlan | None  # None: padded, plain causal attention
    rows: Tensor  # [M] int64, flat index into B * N of the token that predicts the label
    labels: Tensor  # [M] int64
    leaf: Tensor  # [M] int64, index into the leaves given
    offset: Tensor  # [M] int64, which token of that leaf's response
    tokens: int  # tokens computed: B * N
    unshared: int  # tokens of the same leaves without sharing or padding


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """Copy a host tensor to `device`, without waiting for a GPU."""
    if torch.device(device).type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def forest_batch(leaves: Sequence[Leaf], *, share: Share, device: torch.device | str) -> PackedBatch:
    """All leaves as one row of N tokens in depth-first order; position ids are depths."""
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
    """One row per leaf, padded on the right. No mask is needed: under causal attention no token attends to the padding after it."""
    lengths = [len(leaf) for leaf in leaves]
    width = max(lengths, default=0)
    input_ids = np.full((len(leaves), width), pad_id, np.int64)
    for row, leaf in zip(input_ids, leaves, strict=True):
        row[: len(leaf)] = np.concatenate([leaf.prompt_ids, leaf.response_ids])
    first = np.array([i * width + len(leaf.prompt_ids) - 1 for i, leaf in enumerate(leaves)], np.int64)
    labels, leaf_of, offset = label_arrays(leaves)

    return PackedBatch(
        input_ids=to_device(torch.from_numpy(input_ids), device),
        position_ids=torch.arange(width, device=device).expand(len(leaves), width),
        plan=None,
        rows=torch.from_numpy(first[leaf_of] + offset),
        labels=torch.from_numpy(labels),
        leaf=torch.from_numpy(leaf_of),
        offset=torch.from_numpy(offset),
        tokens=input_ids.size,
        unshared=sum(lengths),
    )


def model_inputs(batch: PackedBatch) -> dict[str, Any]:
    """Keyword arguments for a transformers model. It must be loaded with attention="tree" for a forest, with another for a padded batch."""
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    if batch.plan is not None:
        inputs["plan"] = batch.plan
    return inputs
