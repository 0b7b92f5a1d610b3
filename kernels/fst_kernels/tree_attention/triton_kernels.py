"""The device code of tree attention: forward, dQ, dK/dV with its reduction, and the lists of key blocks.

Key i is visible to query j iff i <= j < end[i]. The tokens that a query sees are one path of the forest, so a block of keys concerns
the queries [q0, q1) iff b0 <= q1 - 1 and max(end) > q0, and needs no mask iff b1 - 1 <= q0 and min(end) >= q1. `list_kernel` writes, for
every block of queries, its mask-free key blocks from the left end of a row and the others from the right end; forward and dQ loop over
the two. For dK/dV no list is needed: the queries that see a block of keys are exactly the range [b0, max(end)).

Under a sliding window (WINDOW=True) a key is visible only where depth[j] - depth[i] < window besides. The smallest and largest depth of a block
say exactly which blocks need no mask, but only roughly which ones matter: `thin_kernel` looks at the pairs of the others and drops those
without a visible one. The queries near enough to a block of keys are no range any more, so `tile_list_kernel` writes a list for dK/dV too.

Nothing is added atomically. A program owns its output rows; the query heads of a group are summed one after the other; where a range of
queries is cut into parts, each part writes float32 sums of its own, and `reduce_kernel` adds them in order.

Scores are kept in units of log2 (`scale2` = scale * log2 e), and so is the log-sum-exp handed from the forward to the backward: a key
that holds all of a query's weight then gives exactly exp2(0) = 1, however large its score.

Operands may be pointers with strides, or, on sm_90 and later, TMA descriptors of [B, H, N, D] (TMA=True; the strides are then unused).
The interpreter multiplies in float32 only; tile sizes are chosen by the caller. Sizes that change from forest to forest are not specialised
on: every kernel is compiled once, not again, in the middle of a run, for the first forest whose size is a multiple of 16.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

# Names of arguments that belong together share a line.
# fmt: off


@triton.jit(do_not_specialize=["n", "width", "key_blocks"])
def list_kernel(
    block_max,  # [R, KB] int32
    block_min,
    key_low,  # [R, KB] int32: the smallest depth, and the largest
    key_high,
    query_low,  # [R, QB]
    query_high,
    lists,  # [R, QB, width] int32
    counts,  # [2, R, QB] int32: mask-free, others
    n, rows, width, key_blocks, window,
    BM: tl.constexpr, BN: tl.constexpr, SCAN: tl.constexpr, WINDOW: tl.constexpr,
):
    """One program per block of queries: tests SCAN key blocks at a time and appends those that matter."""
    query_block, row, query_blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    q0 = query_block * BM
    q1 = tl.minimum(q0 + BM, n)
    at = row * query_blocks + query_block
    here = lists + at.to(tl.int64) * width
    free, masked = 0, 0
    stop = tl.cdiv(q1, BN)
    shallow, deep = 0, 0
    if WINDOW:
        shallow, deep = tl.load(query_low + at), tl.load(query_high + at)
    for first in range(0, stop, SCAN):
        block = first + tl.arange(0, SCAN)
        inside = block < stop
        largest = tl.load(block_max + row * key_blocks + block, mask=inside, other=0)
        smallest = tl.load(block_min + row * key_blocks + block, mask=inside, other=0)
        matters = inside & (largest > q0)
        whole = matters & ((block + 1) * BN - 1 <= q0) & (smallest >= q1)
        if WINDOW:
            low = tl.load(key_low + row * key_blocks + block, mask=inside, other=0)
            high = tl.load(key_high + row * key_blocks + block, mask=inside, other=0)
            matters = matters & (shallow - high < window)
            whole = whole & (deep - low < window)
        part = matters & (whole == 0)
        whole_rank = tl.cumsum(whole.to(tl.int32), 0)
        part_rank = tl.cumsum(part.to(tl.int32), 0)
        tl.store(here + free + whole_rank - 1, block, mask=whole)
        tl.store(here + width - masked - part_rank, block, mask=part)
        free += tl.sum(whole.to(tl.int32), 0)
        masked += tl.sum(part.to(tl.int32), 0)
    tl.store(counts + at, free)
    tl.store(counts + rows * query_blocks + at, masked)


@triton.jit(do_not_specialize=["key_blocks", "query_blocks", "total"])
def tile_list_kernel(
    units,  # [R, U, 4]
    block_min,  # [R, KB]
    key_low,  # [R, KB]
    key_high,
    query_low,  # [R, QB]: of tiles of BM queries
    query_high,
    tiles,  # [R, total] int32
    bounds,  # [2, R, U] int32
    counts,  # [2, R, U] int32
    rows, key_blocks, query_blocks, total, window,
    BM: tl.constexpr, BN: tl.constexpr, SCAN: tl.constexpr,
):
    """Under a window, one program per unit: the tiles of its range that may matter. BN is a multiple of BM."""
    unit, row, unit_count = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    at = row * unit_count + unit
    block = tl.load(units + at * 4)
    free, masked = 0, 0
    if block >= 0:
        start, stop = tl.load(units + at * 4 + 1) // BM, tl.cdiv(tl.load(units + at * 4 + 2), BM)
        smallest = tl.load(block_min + row * key_blocks + block)
        low, high = tl.load(key_low + row * key_blocks + block), tl.load(key_high + row * key_blocks + block)
        here = tiles + row.to(tl.int64) * total
        left, right = tl.load(bounds + at), tl.load(bounds + rows * unit_count + at)
        for first in range(start, stop, SCAN):
            tile = first + tl.arange(0, SCAN)
            inside = tile < stop
            shallow = tl.load(query_low + row * query_blocks + tile, mask=inside, other=0)
            deep = tl.load(query_high + row * query_blocks + tile, mask=inside, other=0)
            matters = inside & (shallow - high < window)
            whole = matters & ((block + 1) * BN - 1 <= tile * BM) & (smallest >= (tile + 1) * BM)
            whole = whole & (deep - low < window)
            part = matters & (whole == 0)
            whole_rank = tl.cumsum(whole.to(tl.int32), 0)
            part_rank = tl.cumsum(part.to(tl.int32), 0)
            tl.store(here + left + free + whole_rank - 1, tile, mask=whole)
            tl.store(here + right - masked - part_rank, tile, mask=part)
            free += tl.sum(whole.to(tl.int32), 0)
            masked += tl.sum(part.to(tl.int32), 0)
    tl.store(counts + at, free)
    tl.store(counts + rows * unit_count + at, masked)


@triton.jit(do_not_specialize=["n"])
def thin_kernel(
    end, depth,  # [R, N] int32
    entries,  # int32: lines of blocks, the masked ones from the right end of each
    ends,  # [R, lines] int64: behind the last entry of each line
    owner,  # [R, lines] int32: the block that the line belongs to (-1: none)
    counts,  # [2, R, lines] int32
    n, rows, window,
    BM: tl.constexpr, BN: tl.constexpr, OF_KEYS: tl.constexpr,
):
    """Drops the masked entries without a single visible pair. OF_KEYS: lines belong to blocks of keys and list blocks of queries."""
    line, row, lines = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    at = row * lines + line
    mine, last = tl.load(owner + at), tl.load(ends + at) - 1
    masked = tl.load(counts + rows * lines + at)
    end += row.to(tl.int64) * n
    depth += row.to(tl.int64) * n
    kept = 0
    for t in range(0, masked):
        other = tl.load(entries + last - t)
        if OF_KEYS:
            query, key = other * BM + tl.arange(0, BM), mine * BN + tl.arange(0, BN)
        else:
            query, key = mine * BM + tl.arange(0, BM), other * BN + tl.arange(0, BN)
        key_end = tl.load(end + key, mask=key < n, other=0)
        key_depth = tl.load(depth + key, mask=key < n, other=0)
        query_depth = tl.load(depth + query, mask=query < n, other=0)
        seen = _visible(query[:, None], key[None, :], key_end[None, :])
        seen = seen & (query_depth[:, None] - key_depth[None, :] < window)
        # The place written to is one that was read before, by every thread: the maximum below waits for all of them.
        tl.store(entries + last - kept, other)
        kept += tl.max(tl.max(seen.to(tl.int32), 1), 0)
    tl.store(counts + rows * lines + at, kept)


@triton.jit
def _tile(
    x, batch, head, first, stride_b, stride_h, stride_n, n,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, EDGE: tl.constexpr, TMA: tl.constexpr,
):
    """Tokens first..first+ROWS-1 of one head, [ROWS, DIM]; zeros behind D and, with EDGE, behind the last token."""
    if TMA:
        tile = x.load([batch, head, first, 0]).reshape(ROWS, DIM)
    else:
        row, column = tl.arange(0, ROWS), tl.arange(0, DIM)
        base = x + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + first.to(tl.int64) * stride_n
        pointers = base + row[:, None] * stride_n + column[None, :]
        if EDGE and D == DIM:
            tile = tl.load(pointers, mask=(first + row < n)[:, None], other=0.0)
        elif EDGE:
            tile = tl.load(pointers, mask=(first + row < n)[:, None] & (column < D)[None, :], other=0.0)
        elif D == DIM:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(column < D)[None, :], other=0.0)
    return tile


@triton.jit
def _keep(
    x, value, batch, head, first, stride_b, stride_h, stride_n, n,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):
    """Store [ROWS, DIM], without what lies behind D or the last token."""
    row, column = tl.arange(0, ROWS), tl.arange(0, DIM)
    base = x + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + first.to(tl.int64) * stride_n
    inside = (first + row < n)[:, None] & (column < D)[None, :]
    tl.store(base + row[:, None] * stride_n + column[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _visible(query, key, key_end):
    """Broadcasts; key_end is 0 behind the last token, which hides such a key from everyone."""
    return (key <= query) & (query < key_end)


@triton.jit
def _attend(
    acc, total, top, q_tile, k, v, end, depth, batch, kv_head, query, block, scale2, n, window,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    D: tl.constexpr, DIM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """One block of keys into the running softmax. With MASKED a row may have seen no key yet: its `top` stays -inf."""
    first = block * BN
    k_tile = _tile(k, batch, kv_head, first, stride_kb, stride_kh, stride_kn, n, D, DIM, BN, MASKED, TMA)
    score = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * scale2
    if MASKED:
        key = first + tl.arange(0, BN)
        key_end = tl.load(end + key, mask=key < n, other=0)
        seen = _visible(query[:, None], key[None, :], key_end[None, :])
        if WINDOW:
            query_depth = tl.load(depth + query, mask=query < n, other=0)
            key_depth = tl.load(depth + key, mask=key < n, other=0)
            seen = seen & (query_depth[:, None] - key_depth[None, :] < window)
        score = tl.where(seen, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    if MASKED:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    else:
        base = new_top
    weight = tl.exp2(score - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weight, 1)
    v_tile = _tile(v, batch, kv_head, first, stride_vb, stride_vh, stride_vn, n, D, DIM, BN, MASKED, TMA)
    acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_top


@triton.jit(do_not_specialize=["n", "width", "query_blocks"])
def forward_kernel(
    q, k, v,
    end,  # [R, N] int32; R = 1 or B rows
    depth,  # [R, N] int32
    lists,  # [R, QB, width]
    counts,  # [2, R, QB]
    order,  # [R, QB]: blocks of queries, longest first
    out,
    lse2,  # [B, Hq, N] float32, in units of log2
    scale2, n, window, batches, heads,
    group,  # query heads per key head
    rows, width, query_blocks,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    D: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % heads
    batch = program // heads % batches
    kv_head = head // group
    row = tl.minimum(batch, rows - 1)
    block_of_queries = tl.load(order + row * query_blocks + program // heads // batches)
    at = row * query_blocks + block_of_queries
    free, masked = tl.load(counts + at), tl.load(counts + rows * query_blocks + at)
    here = lists + at.to(tl.int64) * width
    end += row.to(tl.int64) * n
    depth += row.to(tl.int64) * n

    first = block_of_queries * BM
    query = first + tl.arange(0, BM)
    q_tile = _tile(q, batch, head, first, stride_qb, stride_qh, stride_qn, n, D, DIM, BM, True, TMA)
    acc = tl.zeros([BM, DIM], tl.float32)
    total = tl.zeros([BM], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    for t in range(0, free):
        acc, total, top = _attend(
            acc, total, top, q_tile, k, v, end, depth, batch, kv_head, query, tl.load(here + t), scale2, n, window,
            stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, D, DIM, BN, False, TMA, PRECISION, WINDOW,
        )
    for t in range(0, masked):
        acc, total, top = _attend(
            acc, total, top, q_tile, k, v, end, depth, batch, kv_head, query, tl.load(here + width - 1 - t), scale2, n, window,
            stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, D, DIM, BN, True, TMA, PRECISION, WINDOW,
        )
    safe = tl.where(total == 0.0, 1.0, total)  # rows behind the last token saw nothing
    _keep(out, acc / safe[:, None], batch, head, first, stride_ob, stride_oh, stride_on, n, D, DIM, BM)
    tl.store(lse2 + (batch * heads + head).to(tl.int64) * n + query, top + tl.log2(safe), mask=query < n)


@triton.jit(do_not_specialize=["n"])
def delta_kernel(
    out, dout,
    delta,  # [B, Hq, N] float32
    n, heads,
    stride_ob, stride_oh, stride_on,
    stride_db, stride_dh, stride_dn,
    D: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr,
):
    """delta = sum over D of out * dout: what the softmax's backward subtracts from every score's gradient."""
    first, pair = tl.program_id(0) * BM, tl.program_id(1)
    batch, head = pair // heads, pair % heads
    a = _tile(out, batch, head, first, stride_ob, stride_oh, stride_on, n, D, DIM, BM, True, False)
    b = _tile(dout, batch, head, first, stride_db, stride_dh, stride_dn, n, D, DIM, BM, True, False)
    row = first + tl.arange(0, BM)
    value = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    tl.store(delta + pair.to(tl.int64) * n + row, value, mask=row < n)


@triton.jit
def _dq_block(
    dq, q_tile, dout_tile, lse2, delta, k, v, end, depth, batch, kv_head, query, block, scale2, n, window,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    D: tl.constexpr, DIM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
):
    first = block * BN
    k_tile = _tile(k, batch, kv_head, first, stride_kb, stride_kh, stride_kn, n, D, DIM, BN, MASKED, TMA)
    v_tile = _tile(v, batch, kv_head, first, stride_vb, stride_vh, stride_vn, n, D, DIM, BN, MASKED, TMA)
    score = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * scale2
    weight = tl.exp2(score - lse2[:, None])
    if MASKED:
        key = first + tl.arange(0, BN)
        key_end = tl.load(end + key, mask=key < n, other=0)
        seen = _visible(query[:, None], key[None, :], key_end[None, :])
        if WINDOW:
            query_depth = tl.load(depth + query, mask=query < n, other=0)
            key_depth = tl.load(depth + key, mask=key < n, other=0)
            seen = seen & (query_depth[:, None] - key_depth[None, :] < window)
        weight = tl.where(seen, weight, 0.0)
    dweight = tl.dot(dout_tile, v_tile.T, input_precision=PRECISION)
    dscore = weight * (dweight - delta[:, None])
    return tl.dot(dscore.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["n", "width", "query_blocks"])
def dq_kernel(
    q, k, v, dout,
    lse2,  # [B, Hq, N]
    delta,  # [B, Hq, N]
    end, depth, lists, counts, order, dq, scale, scale2, n, window, batches, heads, group, rows, width, query_blocks,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_db, stride_dh, stride_dn,
    stride_gb, stride_gh, stride_gn,
    D: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % heads
    batch = program // heads % batches
    kv_head = head // group
    row = tl.minimum(batch, rows - 1)
    block_of_queries = tl.load(order + row * query_blocks + program // heads // batches)
    at = row * query_blocks + block_of_queries
    free, masked = tl.load(counts + at), tl.load(counts + rows * query_blocks + at)
    here = lists + at.to(tl.int64) * width
    end += row.to(tl.int64) * n
    depth += row.to(tl.int64) * n

    first = block_of_queries * BM
    query = first + tl.arange(0, BM)
    line = (batch * heads + head).to(tl.int64) * n
    q_tile = _tile(q, batch, head, first, stride_qb, stride_qh, stride_qn, n, D, DIM, BM, True, TMA)
    dout_tile = _tile(dout, batch, head, first, stride_db, stride_dh, stride_dn, n, D, DIM, BM, True, TMA)
    top = tl.load(lse2 + line + query, mask=query < n, other=float("inf"))
    mean = tl.load(delta + line + query, mask=query < n, other=0.0)
    acc = tl.zeros([BM, DIM], tl.float32)
    for t in range(0, free):
        acc = _dq_block(
            acc, q_tile, dout_tile, top, mean, k, v, end, depth, batch, kv_head, query, tl.load(here + t), scale2, n, window,
            stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, D, DIM, BN, False, TMA, PRECISION, WINDOW,
        )
    for t in range(0, masked):
        acc = _dq_block(
            acc, q_tile, dout_tile, top, mean, k, v, end, depth, batch, kv_head, query,
            tl.load(here + width - 1 - t), scale2, n, window, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, D, DIM, BN, True, TMA, PRECISION, WINDOW,
        )
    _keep(dq, acc * scale, batch, head, first, stride_gb, stride_gh, stride_gn, n, D, DIM, BM)


@triton.jit
def _dkdv_block(
    dk, dv, k_tile, v_tile, q, dout, lse2, delta, depth, key, key_end, key_depth, batch, head, first, scale2, n, window,
    stride_qb, stride_qh, stride_qn,
    stride_db, stride_dh, stride_dn,
    D: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr,
):
    """Queries first..first+BM-1; everything transposed: keys are rows. DK and DV: which of the two is wanted."""
    query = first + tl.arange(0, BM)
    q_tile = _tile(q, batch, head, first, stride_qb, stride_qh, stride_qn, n, D, DIM, BM, MASKED, TMA)
    if MASKED:
        top = tl.load(lse2 + query, mask=query < n, other=float("inf"))
        mean = tl.load(delta + query, mask=query < n, other=0.0)
    else:
        top, mean = tl.load(lse2 + query), tl.load(delta + query)
    score = tl.dot(k_tile, q_tile.T, input_precision=PRECISION) * scale2
    weight = tl.exp2(score - top[None, :])
    if MASKED:
        seen = _visible(query[None, :], key[:, None], key_end[:, None])
        if WINDOW:
            query_depth = tl.load(depth + query, mask=query < n, other=0)
            seen = seen & (query_depth[None, :] - key_depth[:, None] < window)
        weight = tl.where(seen, weight, 0.0)
    dout_tile = _tile(dout, batch, head, first, stride_db, stride_dh, stride_dn, n, D, DIM, BM, MASKED, TMA)
    if DV:
        dv = tl.dot(weight.to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
    if DK:
        dweight = tl.dot(v_tile, dout_tile.T, input_precision=PRECISION)
        dscore = weight * (dweight - mean[None, :])
        dk = tl.dot(dscore.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["n", "key_blocks", "unit_count", "total", "slots"])
def dkdv_kernel(
    q, k, v, dout, lse2, delta, end, depth,
    block_min,  # [R, KB]
    units,  # [R, U, 4] int32: block of keys (-1: nothing to do), first query, last query + 1, slot of the partial sums (-1: none)
    tiles,  # [R, total] int32: under a window, the tiles of queries that concern each unit
    bounds,  # [2, R, U]
    counts,  # [2, R, U]
    dk, dv,
    partials,  # [B, Hkv, slots, 2, BN, DIM] float32
    scale, scale2, n, window, batches, kv_heads, group, rows, key_blocks, unit_count, total, slots,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_db, stride_dh, stride_dn,
    stride_gb, stride_gh, stride_gn,  # of dk
    stride_wb, stride_wh, stride_wn,  # of dv
    D: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WINDOW: tl.constexpr,
):
    program = tl.program_id(0)
    kv_head = program % kv_heads
    batch = program // kv_heads % batches
    row = tl.minimum(batch, rows - 1)
    at = row * unit_count + program // kv_heads // batches
    unit = units + at * 4
    block = tl.load(unit)
    if block < 0:
        return
    low, high, slot = tl.load(unit + 1), tl.load(unit + 2), tl.load(unit + 3)
    smallest = tl.load(block_min + row * key_blocks + block)
    end += row.to(tl.int64) * n
    depth += row.to(tl.int64) * n

    first = block * BN
    key = first + tl.arange(0, BN)
    key_end = tl.load(end + key, mask=key < n, other=0)
    key_depth = key
    if WINDOW:
        key_depth = tl.load(depth + key, mask=key < n, other=0)
        here = tiles + row.to(tl.int64) * total
        left, right = tl.load(bounds + at), tl.load(bounds + rows * unit_count + at)
        free, masked = tl.load(counts + at), tl.load(counts + rows * unit_count + at)
        free_from, free_to, before = low, low, 0
    else:
        # Queries low..high-1: the tiles on the block itself and those behind the smallest end are masked, all between are not.
        free_from = tl.minimum(tl.maximum(low, first + tl.cdiv(BN, BM) * BM), high)
        free_to = tl.maximum(free_from, tl.minimum(high, first + tl.maximum(smallest - first, 0) // BM * BM))
        before = tl.cdiv(free_from - low, BM)
        free, masked = tl.cdiv(free_to - free_from, BM), before + tl.cdiv(high - free_to, BM)

    k_tile = _tile(k, batch, kv_head, first, stride_kb, stride_kh, stride_kn, n, D, DIM, BN, True, TMA)
    v_tile = _tile(v, batch, kv_head, first, stride_vb, stride_vh, stride_vn, n, D, DIM, BN, True, TMA)
    dk_sum = tl.zeros([BN, DIM], tl.float32)
    dv_sum = tl.zeros([BN, DIM], tl.float32)
    for g in range(0, group):
        head = kv_head * group + g
        line = (batch * group * kv_heads + head).to(tl.int64) * n
        for t in range(0, free):
            if WINDOW:
                query = tl.load(here + left + t) * BM
            else:
                query = free_from + t * BM
            dk_sum, dv_sum = _dkdv_block(
                dk_sum, dv_sum, k_tile, v_tile, q, dout, lse2 + line, delta + line, depth, key, key_end, key_depth, batch, head,
                query, scale2, n, window, stride_qb, stride_qh, stride_qn, stride_db, stride_dh, stride_dn,
                D, DIM, BM, False, TMA, PRECISION, DK, DV, WINDOW,
            )
        for t in range(0, masked):
            if WINDOW:
                query = tl.load(here + right - 1 - t) * BM
            else:
                query = tl.where(t < before, low + t * BM, free_to + (t - before) * BM)
            dk_sum, dv_sum = _dkdv_block(
                dk_sum, dv_sum, k_tile, v_tile, q, dout, lse2 + line, delta + line, depth, key, key_end, key_depth, batch, head,
                query, scale2, n, window, stride_qb, stride_qh, stride_qn, stride_db, stride_dh, stride_dn,
                D, DIM, BM, True, TMA, PRECISION, DK, DV, WINDOW,
            )
    place = ((batch * kv_heads + kv_head).to(tl.int64) * slots + slot) * (2 * BN * DIM)
    inner = tl.arange(0, BN)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    if DK:
        if slot < 0:
            _keep(dk, dk_sum * scale, batch, kv_head, first, stride_gb, stride_gh, stride_gn, n, D, DIM, BN)
        else:
            tl.store(partials + place + inner, dk_sum * scale)
    if DV:
        if slot < 0:
            _keep(dv, dv_sum, batch, kv_head, first, stride_wb, stride_wh, stride_wn, n, D, DIM, BN)
        else:
            tl.store(partials + place + BN * DIM + inner, dv_sum)


@triton.jit(do_not_specialize=["n", "split_count", "slots"])
def reduce_kernel(
    partials,
    splits,  # [R, T, 3] int32: block of keys (-1: none), its first slot, how many
    dk, dv, n, kv_heads, rows, split_count, slots,
    stride_gb, stride_gh, stride_gn,
    stride_wb, stride_wh, stride_wn,
    D: tl.constexpr, DIM: tl.constexpr, BN: tl.constexpr,
):
    """Adds the parts of one block of keys, first to last."""
    pair = tl.program_id(1)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    split = splits + (tl.minimum(batch, rows - 1) * split_count + tl.program_id(0)) * 3
    block = tl.load(split)
    if block < 0:
        return
    slot, parts = tl.load(split + 1), tl.load(split + 2)
    inner = tl.arange(0, BN)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    place = partials + (pair.to(tl.int64) * slots + slot) * (2 * BN * DIM)
    dk_sum = tl.zeros([BN, DIM], tl.float32)
    dv_sum = tl.zeros([BN, DIM], tl.float32)
    for part in range(0, parts):
        here = place + part * (2 * BN * DIM) + inner
        dk_sum += tl.load(here)
        dv_sum += tl.load(here + BN * DIM)
    first = block * BN
    _keep(dk, dk_sum, batch, kv_head, first, stride_gb, stride_gh, stride_gn, n, D, DIM, BN)
    _keep(dv, dv_sum, batch, kv_head, first, stride_wb, stride_wh, stride_wn, n, D, DIM, BN)
