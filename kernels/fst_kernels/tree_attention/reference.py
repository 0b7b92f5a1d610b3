"""Tree attention in plain PyTorch, forward and backward, without any N x N mask: the definition of the op, on any device.

Every (query, key) pair that is visible lies in exactly one of two kinds of block:
  own:        a segment's tokens on the segment's own keys, causal;
  descendant: all descendants of a segment (one contiguous range) on the segment's keys, no mask.
Each block gives a normalised output and its log-sum-exp; blocks of one query are merged by log-sum-exp, in order of the key's level:
    out = lerp(out, out_block, sigmoid(lse_block - lse)),   lse = logaddexp(lse, lse_block).
The backward of softmax attention needs only the final out and lse of a query: p = exp(score - lse), ds = p (dout v - dout out). So each
block's backward is called with the *merged* out and lse and yields that block's exact share of dq, dk and dv.

Under a sliding window segments are first cut into pieces of at most half a window, so that an own block needs no window. Of a piece's
descendants those that are near enough see all of its keys, some see the last few (a block with a mask of its own size), and the rest
are left out; all by depth, which inside a piece grows by one.

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
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from fst_kernels.checks import adjacent, once
from fst_kernels.tree_attention.mask import TreeMask

LAUNCH_PAIRS = 2048  # (query, key) pairs that cost about as much as launching one block more
ALONE = 300  # queries + keys of a block beyond which to gather it into a batch costs more than a launch; alone, it is a view
BATCH_TOKENS = 8192  # queries + keys of a batch: larger ones leave the caches
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
    key_bias: Tensor | None = None  # [count, 1, 1, nk]: 0, and -inf at padded keys
    # [count, 1, nq, 1] int32, with `limit`: key visible where nearness < limit
    nearness: Tensor | None = None
    limit: Tensor | None = None  # [count, 1, 1, nk] int32: the key's depth + window; lowest at padded keys

    def bias(self) -> Tensor | None:
        """What is added to the scores: [count, 1, 1 or nq, nk]"""
        if self.nearness is None or self.limit is None:
            return self.key_bias
        hidden = self.nearness >= self.limit
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)


def blocks(mask: TreeMask, window: int | None = None) -> list[Block]:
    """All blocks of a mask, own blocks first, then by level: computed once, kept in the mask."""
    window = mask.binding(window)
    made = _blocks(mask) if window is None else _windowed_blocks(mask, window)
    return once(mask.prepared, ("blocks", window), lambda: list(made))


def _blocks(mask: TreeMask) -> Iterator[Block]:
    segments, device = mask.segments, mask.subtree_end.device
    length, below = segments.end - segments.start, segments.last - segments.end
    yield from _own_blocks(segments.start, length, device)
    for level in range(int(segments.level.max()) + 1 if len(length) else 0):
        inner = ((segments.level == level) & (below > 0)).nonzero()[:, 0]
        for group in _group(inner, length, below):
            queries = _rows(segments.end[group], below[group], device)
            keys = _rows(segments.start[group], length[group], device)
            yield Block(queries, keys, False, _key_bias(keys, device))


def _own_blocks(start: Tensor, length: Tensor, device: torch.device) -> Iterator[Block]:
    for group in _group(torch.arange(len(length)), length, length):
        rows = _rows(start[group], length[group], device)
        yield Block(rows, rows, True)


def _windowed_blocks(mask: TreeMask, window: int) -> Iterator[Block]:
    segments, device = mask.segments, mask.subtree_end.device
    size = -(-window // 2)
    lengths = segments.end - segments.start
    count = -(-lengths // size)
    of = torch.repeat_interleave(count)  # [P] the segment of each piece
    nth = torch.arange(len(of)) - (count.cumsum(0) - count)[of]
    start = segments.start[of] + nth * size
    end = torch.minimum(start + size, segments.end[of])
    level, piece_depth = (segments.path_sum(count) - count)[of] + nth, segments.depth[of] + nth * size
    length, depth = end - start, mask.depth.flatten().cpu().long()
    yield from _own_blocks(start, length, device)

    # The descendants of every piece that see all of it, and those that see its end only: places in `depth`, one piece after the other.
    near: list[Tensor] = []
    far: list[Tensor] = []
    for from_, to, at, long in zip(
        end.tolist(), segments.last[of].tolist(), piece_depth.tolist(), length.tolist(), strict=True
    ):
        below = depth[from_:to]
        near.append((below < at + window).nonzero()[:, 0] + from_)
        far.append(((below >= at + window) & (below < at + window + long - 1)).nonzero()[:, 0] + from_)
    for at in range(int(level.max()) + 1 if len(level) else 0):
        for part, partial in ((near, False), (far, True)):
            seen = torch.tensor([len(x) for x in part])
            for group in _group(((level == at) & (seen > 0)).nonzero()[:, 0], length, seen):
                tokens = torch.cat([part[i] for i in group.tolist()])
                queries = _rows(seen[group].cumsum(0) - seen[group], seen[group], device, tokens)
                keys = _rows(start[group], length[group], device)
                if not partial:
                    yield Block(queries, keys, False, _key_bias(keys, device))
                    continue
                all_depths = mask.depth.flatten()[:, None]
                limit = keys.take(all_depths) + window  # [b, 1, nk]
                if keys.padding is not None:
                    limit = limit.flatten().index_fill(0, keys.padding, torch.iinfo(torch.int32).min)
                    limit = limit.view(keys.count, 1, keys.length)
                yield Block(
                    queries, keys, False, None, queries.take(all_depths)[..., None], limit[:, :, None]
                )


def _key_bias(keys: Rows, device: torch.device) -> Tensor | None:
    if keys.padding is None:
        return None
    bias = torch.zeros(keys.count * keys.length, device=device)
    bias[keys.padding] = -torch.inf
    return bias.view(keys.count, 1, 1, keys.length)


def _group(items: Tensor, keys: Tensor, queries: Tensor) -> Iterator[Tensor]:
    """Which pieces to compute together: sorted by size and cut so that padded pairs + launches are fewest."""
    if not len(items):
        return
    items = items[queries[items].argsort(stable=True)]
    items = items[keys[items].argsort(stable=True)]
    k, q = keys[items], queries[items]
    new = torch.ones(len(items), dtype=torch.bool)
    new[1:] = (k[1:] != k[:-1]) | (q[1:] != q[:-1])
    bounds = torch.cat([new.nonzero()[:, 0], torch.tensor([len(items)])])  # of the distinct sizes
    for begin in range(0, len(bounds) - 1, DP_ITEMS):
        chunk = bounds[begin : begin + DP_ITEMS + 1]
        cuts = chunk[_cheapest_cuts(k[chunk[:-1]], q[chunk[:-1]], chunk)].tolist()
        for i, j in pairwise(cuts):
            group = items[i:j].sort().values
            tokens = int(keys[group].max() + queries[group].max())
            yield from torch.split(group, 1 if tokens > ALONE else BATCH_TOKENS // tokens)


def _cheapest_cuts(k: Tensor, q: Tensor, bounds: Tensor) -> list[int]:
    """k, q [n]: sizes, ascending by k; bounds [n + 1]: how many come before each. Where the groups begin and end: 0, ..., n."""
    n = len(k)
    widest = q.expand(n, n).triu().cummax(1).values  # [i, j] of sizes i..j
    cost = (LAUNCH_PAIRS + (bounds[None, 1:] - bounds[:-1, None]) * widest * k).double().T.contiguous()
    best = torch.zeros(n + 1, dtype=torch.float64)  # the cheapest way to cover the first j sizes
    begins = [0]  # where its last group begins
    for j in range(1, n + 1):
        least = (best[:j] + cost[j - 1, :j]).min(0)
        best[j] = least.values
        begins.append(int(least.indices))
    cuts = [n]
    while cuts[-1]:
        cuts.append(begins[cuts[-1]])
    return cuts[::-1]


def _rows(start: Tensor, length: Tensor, device: torch.device, tokens: Tensor | None = None) -> Rows:
    """Runs of tokens, or with `tokens` runs of places in it."""
    width = int(length.max())
    if len(start) == 1:
        first, final = (int(start), int(start) + width - 1) if tokens is None else tokens[[0, -1]].tolist()
        if final - first == width - 1:
            return Rows(1, width, slice(first, final + 1), None, None, None, None)
    column = torch.arange(width)
    table = (start[:, None] + torch.minimum(column, length[:, None] - 1)).flatten()
    table = table if tokens is None else tokens[table]
    padded = (column >= length[:, None]).flatten()
    if not padded.any():
        table = table.to(device)
        return Rows(len(start), width, None, table, None, None, table)
    real, padding = (~padded).nonzero()[:, 0], padded.nonzero()[:, 0]
    return Rows(len(start), width, None, *(t.to(device) for t in (table, real, padding, table[real])))


class Kernel(Protocol):
    """One batch of blocks: q [b,Hq,nq,D], k and v [b,Hkv,nk,D], bias [b,1,1 or nq,nk] or None."""

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
            # [b,Hkv,G,n,D]
            queries, go, o = (_grouped(x[:, :, part], kv_heads).to(kind) for x in (q, dout, out))
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
            if bias is not None:
                here = bias if bias.shape[2] == 1 else bias[:, :, part]
                score = score + here[:, :, None].to(kind)
            yield part, score


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[b,Hq,n,D] -> [b,Hkv,G,n,D]"""
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def flash_shares_heads() -> bool:
    """Whether this torch's CPU flash attention takes fewer key heads than query heads, as newer ones do; tried, not guessed."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 3, 8, generator=generator, dtype=torch.float32, device="cpu")
    k, v = torch.randn(2, 1, 2, 3, 8, generator=generator, dtype=torch.float32, device="cpu")
    with torch.autocast("cpu", enabled=False):
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


def token_major(x: Tensor) -> Tensor:
    """[B,H,N,D] -> [B*N,H,D], the D numbers side by side, as flash attention takes them without looking at their stride: a view for
    the layout that transformers' projections leave."""
    return adjacent(x.transpose(1, 2).reshape(x.shape[0] * x.shape[2], x.shape[1], x.shape[3]))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    scale: float,
    window: int | None,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments already checked. out [B,Hq,N,D] and lse [B,Hq,N] in float32, float64 for float64; out is token-major underneath."""
    kernel, (batch, heads, n, dim) = kernel or kernel_for(q), q.shape
    q_, k_, v_ = token_major(q), token_major(k), token_major(v)  # [T,H,D]
    kind = _accumulator(q.dtype)
    out, lse = q_.new_empty(q_.shape, dtype=kind), q_.new_empty(q_.shape[:2], dtype=kind)
    for block in blocks(mask, window):
        rows = block.queries
        part_out, part_lse = kernel.forward(
            rows.take(q_), block.keys.take(k_), block.keys.take(v_), block.own, block.bias(), scale
        )
        part_out, part_lse = rows.flat(part_out).to(kind), rows.flat(part_lse)
        if block.own:
            rows.put(out, part_out)
            rows.put(lse, part_lse)
        else:
            _merge(rows, out, lse, part_out, part_lse)
    out = out.to(q.dtype).view(batch, n, heads, dim)
    return out.transpose(1, 2), lse.view(batch, n, heads).transpose(1, 2).contiguous()


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: TreeMask,
    scale: float,
    window: int | None,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtype of q; out and lse are those of `forward`."""
    kernel, (batch, heads, n, _) = kernel or kernel_for(q), q.shape
    dout, q, k, v, out = (token_major(x) for x in (dout, q, k, v, out))
    lse = lse.transpose(1, 2).reshape(batch * n, heads)
    dq, dk, dv = (torch.empty(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    for block in blocks(mask, window):
        queries, keys = block.queries, block.keys
        go = queries.take(dout)
        if queries.padding is not None:
            # take() returned a gathered copy, token-major underneath
            go.transpose(1, 2).view(-1, *dout.shape[1:]).index_fill_(0, queries.padding, 0)
        gq, gk, gv = kernel.backward(
            go,
            queries.take(q),
            keys.take(k),
            keys.take(v),
            queries.take(out),
            queries.take(lse),
            block.own,
            block.bias(),
            scale,
        )
        write: Callable[[Rows, Tensor, Tensor], None] = Rows.put if block.own else Rows.add
        for rows, total, share in ((queries, dq, gq), (keys, dk, gk), (keys, dv, gv)):
            write(rows, total, rows.flat(share))
    dq, dk, dv = (g.to(q.dtype).view(batch, n, *g.shape[1:]).transpose(1, 2) for g in (dq, dk, dv))
    return dq, dk, dv


def _merge(rows: Rows, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    if rows.tokens is None:
        out_before, lse_before = out[rows.range], lse[rows.range]
    else:
        out_before, lse_before = out.index_select(0, rows.tokens), lse.index_select(0, rows.tokens)
    rows.put(out, torch.lerp(out_before, part_out, torch.sigmoid(part_lse - lse_before)[..., None]))
    rows.put(lse, torch.logaddexp(lse_before, part_lse))
