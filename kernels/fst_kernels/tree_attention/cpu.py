"""Tree attention on a CPU in C++ (csrc/cpu/tree_attention.cpp), float32: the forward. The backward is the reference's.

A segment's descendants are the neighbours that see all of its keys; what a token sees of its own segment is its suffix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fst_kernels.checks import once
from fst_kernels.cpu import TreeAttention, attend
from fst_kernels.tree_attention.mask import TreeMask
from fst_kernels.tree_attention.reference import token_major


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """As reference.forward: out [B,Hq,N,D], token-major underneath, and lse [B,Hq,N]."""
    arguments = once(mask.prepared, "cpu", lambda: _arguments(mask))
    batch, heads, n, dim = q.shape
    q, k, v = (token_major(x) for x in (q, k, v))
    out, lse = torch.empty(q.shape), torch.empty(q.shape[:2])
    wrong = attend(arguments, q, k, v, out, lse, scale, mask.binding(window))
    assert wrong < 0, f"token {wrong} of a mask that was checked"
    lse = lse.view(batch, n, heads).transpose(1, 2).contiguous()
    return out.view(batch, n, heads, dim).transpose(1, 2), lse


def _arguments(mask: TreeMask) -> TreeAttention:
    s = mask.segments
    length, below = s.end - s.start, s.last - s.end
    of = torch.repeat_interleave(length)  # [T], the segment of each token
    runs = (below > 0).nonzero()[:, 0]
    runs = runs[s.level[runs].argsort(stable=True)]
    level = s.level[runs]
    levels = int(level.max()) + 1 if len(level) else 0
    tokens = torch.arange(len(of))
    return TreeAttention.of(
        queries=len(of),
        order=tokens,
        levels=levels,
        level_begin=torch.searchsorted(level, torch.arange(levels + 1)),
        run_first=s.end[runs].int(),
        run_count=below[runs].int(),
        run_length=length[runs].int(),
        run_above=s.depth[runs].int(),
        run_entry=runs.int(),
        node_slots=s.start.int(),
        node_page=0,
        suffix_slots=s.start[of],
        suffix_slots_are_wide=1,
        suffix_pages=1,
        suffix_page=0,
        suffix_lengths=(tokens - s.start[of] + 1).int(),
        suffix_capacity=int(length.max()) if len(length) else 1,
        past=s.depth[of].int(),
    )
