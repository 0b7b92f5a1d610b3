"""Tree attention through torch's FlexAttention, in Triton (backend "flex") or FlashAttention-4 ("flash"), with the mask of the other backends.

Neither has run on a GPU here. FlashAttention-4 takes blocks of 128 keys, and of 256 queries on compute capability 10 (flash-attention#2727,
attention-gym#212), of 128 on 9. The blocks come from the forest's own bounds (blocks.py) and not from `create_block_mask`, which evaluates every
pair of tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from fst_kernels.tree_attention import blocks
from fst_kernels.tree_attention.mask import TreeMask

KEYS = 128


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, scale: float, window: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    """out [B,Hq,N,D] and lse [B,Hq,N] float32 (natural log, not differentiable). Raises RuntimeError for gradients on a CPU, which FlexAttention lacks."""
    if q.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise RuntimeError(
                f"tree_attention: backend={backend} has no gradient on a CPU; cpu or reference have"
            )
        q, k, v = (x.detach() for x in (q, k, v))  # it refuses them otherwise, also under no_grad
    if not q.numel():
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    run = _compiled() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    options: Any = {"BACKEND": "FLASH" if backend == "flash" else "TRITON"} if q.is_cuda else None
    queries = 2 * KEYS if backend == "flash" and torch.cuda.get_device_capability(q.device)[0] >= 10 else KEYS
    out, aux = run(
        q,
        k,
        v,
        block_mask=block_mask(mask, queries, window),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
        kernel_options=options,
    )
    return out, aux.lse.detach()


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def block_mask(mask: TreeMask, queries: int, window: int | None) -> BlockMask:
    """The mask in blocks of `queries` x KEYS tokens, kept in `mask.prepared`; built on the mask's device without waiting for it."""
    key = ("flex", queries, window)
    if key not in mask.prepared:
        partial, full = _blocks(mask, queries, window)
        counts, names = zip(*map(_ordered, (partial, full)), strict=True)
        n = mask.subtree_end.shape[1]
        mask.prepared[key] = BlockMask.from_kv_blocks(
            counts[0], names[0], counts[1], names[1], (queries, KEYS), _visible(mask, window), (n, n)
        )
    found: BlockMask = mask.prepared[key]
    return found


def _visible(mask: TreeMask, window: int | None) -> Any:
    """FlexAttention's mask_mod: whether key is visible to query."""
    ends, depth = mask.subtree_end, mask.depth
    one = len(ends) == 1

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = 0 if one else batch
        return (key <= query) & (query < ends[row, key])

    if window is None:
        return visible

    def visible_near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = 0 if one else batch
        return visible(batch, head, query, key) & (depth[row, query] - depth[row, key] < window)

    return visible_near


def _blocks(mask: TreeMask, queries: int, window: int | None) -> tuple[Tensor, Tensor]:
    """Which blocks of keys are visible to a block of queries in part, and which to all of it: bool [R, QB, KB]."""
    n = mask.subtree_end.shape[1]
    device = mask.subtree_end.device
    keys = blocks.key_blocks(mask, KEYS)
    first_key = torch.arange(0, n, KEYS, device=device)
    first = torch.arange(0, n, queries, device=device)[:, None]
    last = (first + queries).clamp(max=n) - 1
    some = (first_key <= last) & (keys.largest[:, None] > first)
    full = (first_key + KEYS - 1 <= first) & (keys.smallest[:, None] > last)
    if window is not None:
        near, far = blocks.depths(mask, queries), blocks.depths(mask, KEYS)
        some = some & (near.smallest[..., None] - far.largest[:, None] < window)
        full = full & (near.largest[..., None] - far.smallest[:, None] < window)
    return some & ~full, full


def _ordered(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Of bool [R, QB, KB]: how many are true [R, 1, QB] int32, and which, ascending, in front [R, 1, QB, KB] int32."""
    names = wanted.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    return wanted.sum(-1, dtype=torch.int32)[:, None], names.to(torch.int32)[:, None].contiguous()
