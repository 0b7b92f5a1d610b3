"""Tree attention in plain PyTorch, forward and backward, without any N x N mask: the definition of the op, on any device.

Every (query, key) pair that is visible lies in exactly one of two kinds of block:
  own:        a segment's tokens on the segment's own keys, causal;
  descendant: all descendants of a segment (one contiguous range) on the segment's keys, no mask.
Each block gives a normalised output and its log-sum-exp; blocks of one query are merged by log-sum-exp, in order of the key's level:
    out = lerp(out, out_block, sigmoid(lse_block - lse)),   lse = logaddexp(lse, lse_block).
The backward of softmax attention needs only the final out and lse of a query: p = exp(score - lse), ds = p (dout v - dout out). So each
block's backward is called with the *merged* out and lse and yields that block's exact share of dq, dk and dv.

Small blocks are gathered into batches and padded to equal lengths, because on a CPU a launch costs as much as thousands of (query, key)
pairs; an exact dynamic program over the sorted lengths chooses which blocks go together. A padded query repeats the last real token of
its own block and gets dout = 0, so nothing it touches is finite-but-wrong; padded keys are behind every real query in an own block, and
masked in a descendant block.

On the CPU a block is `aten._scaled_dot_product_flash_attention_for_cpu`, which returns the log-sum-exp, and its `_backward`; otherwise,
and for float64, matmul and logsumexp over slices of queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from fst_kernels.tree_attention.mask import TreeMask

LAUNCH_PAIRS = 2048  # (query, key) pairs that cost about as much as launching one block more
DP_ITEMS = 256  # the dynamic program is quadratic; longer lists of distinct lengths are cut
QUERY_SLICE = 1024  # queries of one block whose scores exist at one time, matmul path


@dataclass(frozen=True)
class Rows:
    """The tokens of one side of a block: a range, or a padded index table."""

    count: int  # blocks in the batch
    length: int  # tokens of each, padding included
    range: slice | None  # one block: its tokens
    table: Tensor | None  # [count * length], padding repeats the block's last token
    real: Tensor | None  # positions in the table that are no padding; None: all
    padding: Tensor | None  # the others
    tokens: Tensor | None  # table[real]: the tokens, each once

    def take(self, x: Tensor) -> Tensor:
        """x [T, H, D] or [T, H] -> [count, H, length, D] or [count, H, length]"""
        picked = x[self.range] if self.table is None else x.index_select(0, self.table)
        return picked.view(self.count, self.length, *x.shape[1:]).transpose(1, 2)

    def flat(self, y: Tensor) -> Tensor:
        """The inverse layout, padding dropped: [count, H, length, ...] -> [tokens, H, ...]"""
        y = y.transpose(1, 2).reshape(self.count * self.length, y.shape[1], *y.shape[3:])
        return y if self.real is None else y.index_select(0, self.real)

    def put(self, x: Tensor, y: Tensor) -> None:
        if self.tokens is None:
            x[self.range] = y
        else:
            x.index_copy_(0, self.tokens, y.to(x.dtype))

    def add(self, x: Tensor, y: Tensor) -> None:
        if self.tokens is None:
            x[self.range] += y
        else:
            x.index_add_(0, self.tokens, y.to(x.dtype))


@dataclass(frozen=True)
class Block:
    queries: Rows
    keys: Rows
    own: bool
    key_bias: Tensor | None  # [count, 1, 1, length]: 0, and -inf at padded keys


def blocks(mask: TreeMask) -> list[Block]:
    """All blocks of a mask, own blocks first, then by level: computed once, kept in the mask."""
    if "blocks" not in mask.prepared:
        mask.prepared["blocks"] = list(_blocks(mask))
    prepared: list[Block] = mask.prepared["blocks"]
    return prepared


def _blocks(mask: TreeMask) -> Iterator[Block]:
    device = mask.subtree_end.device
    length, below = mask.end - mask.start, mask.last - mask.end
    for group in _group(np.arange(len(length)), length, length):
        rows = _rows(mask.start[group], length[group], device)
        yield Block(rows, rows, True, None)
    for level in range(int(mask.level.max(initial=0)) + 1):
        inner = np.flatnonzero((mask.level == level) & (below > 0))
        for group in _group(inner, length, below):
            queries = _rows(mask.end[group], below[group], device)
            keys = _rows(mask.start[group], length[group], device)
            key_bias = None
            if keys.padding is not None:
                key_bias = torch.zeros(keys.count * keys.length, device=device)
                key_bias[keys.padding] = -torch.inf
                key_bias = key_bias.view(keys.count, 1, 1, keys.length)
            yield Block(queries, keys, False, key_bias)


def _group(
    items: NDArray[np.int64], keys: NDArray[np.int64], queries: NDArray[np.int64]
) -> Iterator[NDArray[np.int64]]:
    """Which segments to compute together: sorted by size and cut so that padded pairs + launches are fewest."""
    items = items[np.lexsort((queries[items], keys[items]))]
    if not len(items):
        return
    sizes = np.stack([keys[items], queries[items]], axis=1)
    first = np.flatnonzero(
        np.any(np.diff(sizes, axis=0, prepend=-1) != 0, axis=1)
    )  # first of each distinct size
    bounds = np.append(first, len(items))
    for begin in range(0, len(first), DP_ITEMS):
        chunk = bounds[begin : begin + DP_ITEMS + 1]
        k, q = sizes[chunk[:-1], 0], sizes[chunk[:-1], 1]
        best, cut = (
            [0.0],
            [0],
        )  # cheapest way to cover the first j distinct sizes, and where its last group begins
        for j in range(1, len(chunk)):
            widest = np.maximum.accumulate(q[:j][::-1])[::-1]  # of sizes i..j-1, for each i
            cost = np.array(best) + LAUNCH_PAIRS + (chunk[j] - chunk[:j]) * widest * float(k[j - 1])
            cut.append(int(cost.argmin()))
            best.append(float(cost[cut[-1]]))
        j, groups = len(chunk) - 1, []
        while j:
            groups.append(np.sort(items[chunk[cut[j]] : chunk[j]]))
            j = cut[j]
        yield from reversed(groups)


def _rows(start: NDArray[np.int64], length: NDArray[np.int64], device: torch.device) -> Rows:
    width = int(length.max())
    if len(start) == 1:
        return Rows(1, width, slice(int(start[0]), int(start[0]) + width), None, None, None, None)
    column = np.arange(width)
    table = torch.from_numpy(start[:, None] + np.minimum(column, length[:, None] - 1)).flatten()
    padded = torch.from_numpy(column >= length[:, None]).flatten()
    if not padded.any():
        table = table.to(device)
        return Rows(len(start), width, None, table, None, None, table)
    real, padding = (~padded).nonzero()[:, 0], padded.nonzero()[:, 0]
    return Rows(len(start), width, None, *(t.to(device) for t in (table, real, padding, table[real])))


class Kernel(Protocol):
    """One batch of blocks: q [b,Hq,nq,D], k and v [b,Hkv,nk,D], bias [b,1,1,nk] or None."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class Flash:
    """The CPU's flash attention: float32, bfloat16, float16; key heads are shared by groups of query heads inside the op."""

    forward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        bias = None if bias is None else bias.to(q.dtype)
        out, lse = self.forward_op(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        bias = None if bias is None else bias.to(q.dtype)
        dq, dk, dv = self.backward_op(dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale)
        return dq, dk, dv


class Matmul:
    """Any device, any float type: scores of at most QUERY_SLICE queries at a time, in float32 (float64 for float64)."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=_accumulator(q.dtype))
        for part, score in self._scores(q, k, causal, bias, scale):
            total = score.logsumexp(-1)
            lse[:, :, part] = total.flatten(1, 2)
            weight = (score - total[..., None]).exp()
            out[:, :, part] = (weight @ v[:, :, None].to(weight.dtype)).flatten(1, 2).to(q.dtype)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind, kv_heads = lse.dtype, k.shape[1]
        dq, dk, dv = (torch.zeros_like(x, dtype=kind) for x in (q, k, v))
        for part, score in self._scores(q, k, causal, bias, scale):
            queries, go, o = (
                _grouped(x[:, :, part], kv_heads).to(kind) for x in (q, dout, out)
            )  # [b,Hkv,G,n,D]
            weight = (score - _grouped(lse[:, :, part, None], kv_heads)).exp()
            dv += (weight.mT @ go).sum(2)
            dscore = weight * (go @ v[:, :, None].to(kind).mT - (go * o).sum(-1, keepdim=True)) * scale
            dq[:, :, part] = (dscore @ k[:, :, None].to(kind)).flatten(1, 2)
            dk += (dscore.mT @ queries).sum(2)
        return dq, dk, dv

    def _scores(
        self, q: Tensor, k: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> Iterator[tuple[slice, Tensor]]:
        kind, nq = _accumulator(q.dtype), q.shape[2]
        keys = k[:, :, None].to(kind).mT  # [b,Hkv,1,D,nk]
        for begin in range(0, nq, QUERY_SLICE):
            part = slice(begin, min(begin + QUERY_SLICE, nq))
            score = (_grouped(q[:, :, part], k.shape[1]).to(kind) @ keys) * scale  # [b,Hkv,G,n,nk]
            if causal:
                later = (
                    torch.arange(k.shape[2], device=q.device)
                    > torch.arange(part.start, part.stop, device=q.device)[:, None]
                )
                score = score.masked_fill(later, -torch.inf)
            yield part, score if bias is None else score + bias[:, :, None].to(kind)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[b,Hq,n,D] -> [b,Hkv,G,n,D]"""
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def flash_shares_heads() -> bool:
    """Whether this torch's CPU flash attention takes fewer key heads than query heads, as newer ones do; tried, not guessed."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 3, 8, generator=generator)
    k, v = torch.randn(2, 1, 2, 3, 8, generator=generator)
    try:
        shared, lse = Flash().forward(q, k, v, True, None, 1.0)
        grads = Flash().backward(q, q, k, v, shared, lse, True, None, 1.0)
    except (AttributeError, RuntimeError):
        return False
    plain, plain_lse = Matmul().forward(q, k, v, True, None, 1.0)
    plain_grads = Matmul().backward(q, q, k, v, plain, plain_lse, True, None, 1.0)
    pairs = zip((shared, *grads), (plain, *plain_grads), strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def kernel_for(q: Tensor) -> Kernel:
    if (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and flash_shares_heads()
    ):
        return Flash()
    return Matmul()


def _token_major(x: Tensor) -> Tensor:
    """[B,H,N,D] -> [B*N,H,D]: a view for the layout that transformers' projections leave."""
    return x.transpose(1, 2).reshape(x.shape[0] * x.shape[2], x.shape[1], x.shape[3])


class TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, scale: float, kernel: Kernel
    ) -> tuple[Tensor, Tensor]:
        batch, heads, n, dim = q.shape
        q_, k_, v_ = _token_major(q), _token_major(k), _token_major(v)  # [T,H,D]
        kind = _accumulator(q.dtype)
        out, lse = q_.new_empty(q_.shape, dtype=kind), q_.new_empty(q_.shape[:2], dtype=kind)
        for block in blocks(mask):
            rows = block.queries
            part_out, part_lse = kernel.forward(
                rows.take(q_), block.keys.take(k_), block.keys.take(v_), block.own, block.key_bias, scale
            )
            part_out, part_lse = rows.flat(part_out).to(kind), rows.flat(part_lse)
            if block.own:
                rows.put(out, part_out)
                rows.put(lse, part_lse)
            else:
                _merge(rows, out, lse, part_out, part_lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q_, k_, v_, out, lse)
        ctx.mask, ctx.scale, ctx.kernel, ctx.shape = mask, scale, kernel, (batch, n)
        lse_out = lse.float().view(batch, n, heads).transpose(1, 2)
        ctx.mark_non_differentiable(lse_out)
        return out.view(batch, n, heads, dim).transpose(1, 2), lse_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout = _token_major(dout)
        dq, dk, dv = (torch.empty_like(x, dtype=lse.dtype) for x in (q, k, v))
        for block in blocks(ctx.mask):
            queries, keys = block.queries, block.keys
            go = queries.take(dout)
            if queries.padding is not None:
                # take() returned a gathered copy, token-major underneath
                go.transpose(1, 2).view(-1, *dout.shape[1:]).index_fill_(0, queries.padding, 0)
            gq, gk, gv = ctx.kernel.backward(
                go,
                queries.take(q),
                keys.take(k),
                keys.take(v),
                queries.take(out),
                queries.take(lse),
                block.own,
                block.key_bias,
                ctx.scale,
            )
            write: Callable[[Rows, Tensor, Tensor], None] = Rows.put if block.own else Rows.add
            for rows, total, share in ((queries, dq, gq), (keys, dk, gk), (keys, dv, gv)):
                write(rows, total, rows.flat(share))
        batch, n = ctx.shape
        grads = (g.to(q.dtype).view(batch, n, *g.shape[1:]).transpose(1, 2) for g in (dq, dk, dv))
        return (*grads, None, None, None)


def _merge(rows: Rows, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    if rows.tokens is None:
        out_before, lse_before = out[rows.range], lse[rows.range]
    else:
        out_before, lse_before = out.index_select(0, rows.tokens), lse.index_select(0, rows.tokens)
    rows.put(out, torch.lerp(out_before, part_out, torch.sigmoid(part_lse - lse_before)[..., None]))
    rows.put(lse, torch.logaddexp(lse_before, part_lse))


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, scale: float, kernel: Kernel | None = None
) -> tuple[Tensor, Tensor]:
    """Arguments already checked. Returns out [B,Hq,N,D] and lse [B,Hq,N] float32."""
    out, lse = TreeAttention.apply(q, k, v, mask, scale, kernel or kernel_for(q))  # type: ignore[no-untyped-call]
    return out, lse
