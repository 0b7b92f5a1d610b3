"""Cascade decoding on a CPU in C++ (csrc/cpu/tree_attention.cpp), float32, reached through its C interface with ctypes.

One call a layer: a task takes sixteen neighbouring sequences and one KV head down the tree, so that keys are found once for all
sequences below a node and stay in the cache while these meet them. Nothing is padded, copied or masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fst_kernels.cascade_decode.plan import CascadePlan
from fst_kernels.checks import adjacent, once
from fst_kernels.cpu import TreeAttention, attend


def _runs(plan: CascadePlan) -> dict[str, Tensor]:
    """The runs as the kernel reads them."""
    levels = int(plan.level.max()) + 1 if len(plan.level) else 0
    assert bool((plan.level.diff() >= 0).all()), "runs go level by level"
    arrays = {f"run_{name}": getattr(plan, name).int() for name in ("first", "count", "length", "above")}
    arrays["run_entry"] = (plan.node * plan.node_slots.shape[1]).int()
    arrays["level_begin"] = torch.searchsorted(plan.level, torch.arange(levels + 1))
    return {name: x.contiguous() for name, x in arrays.items()}


def _arguments(plan: CascadePlan) -> TreeAttention:
    """What of the arguments the plan fixes."""
    runs = _runs(plan)
    return TreeAttention.of(
        queries=plan.sequences,
        order=plan.order,
        levels=len(runs["level_begin"]) - 1,
        **runs,
        node_slots=plan.node_slots,
        node_page=plan.node_page,
        suffix_slots=plan.suffix_slots,
        suffix_slots_are_wide=plan.suffix_slots.dtype == torch.int64,
        suffix_pages=plan.suffix_slots.shape[1],
        suffix_page=plan.suffix_page,
        suffix_lengths=plan.suffix_lengths,
        suffix_capacity=plan.suffix_capacity,
        past=plan.past,
    )


def cascade_decode(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    plan: CascadePlan,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """out [S, Hq, D] and lse [S, Hq]. ValueError as plan.check_suffixes."""
    arguments = once(plan.prepared, "cpu", lambda: _arguments(plan))
    out = torch.empty(q.shape)
    lse = torch.empty(q.shape[:2])
    wrong = attend(arguments, adjacent(q), k_pool, v_pool, out, lse, scale, window)
    if wrong >= 0:
        plan.check_suffixes(len(k_pool))
        raise AssertionError(f"the kernel refuses the suffix of sequence {wrong}, the plan does not")
    return out, lse
