"""The device code of tree attention: forward, dQ, dK/dV with its reduction.

Key i is visible to query j iff i <= j < end[i], and with WINDOW only where depth[j] - depth[i] < window besides. Forward and dQ loop over the two
lists of key blocks that list_kernels.py makes for every block of queries. For dK/dV no list is needed without a window: the queries that see
a block of keys are exactly the range [b0, max(end)).

Nothing is added atomically. A program owns its output rows; the query heads of a group are summed one after the other; where a range of
queries is cut into parts, each part writes float32 sums of its own, and `reduce_kernel` adds them in order.

Scores are kept in units of log2 (`scale2` = scale * log2 e), and so is the log-sum-exp handed from the forward to the backward: a key
that holds all of a query's weight then gives exactly exp2(0) = 1, however large its score.

Operands may be pointers with strides, or, on sm_90 and later, TMA descriptors of [B, H, N, D] (TMA=True; the strides are then unused).
The interpreter multiplies in float32 only; tile sizes are chosen by the caller. Sizes that change from forest to forest are not specialised
on: every kernel is compiled once, not again, in the middle of a run, for the first forest whose size is a multiple of 16. Every grid has one
axis: the second and the third end at 65,535, which batch x heads may exceed.

The loops carry the number of the next block (`upcoming`): loaded inside the block's own iteration, it would be pipelined like the operands and
take one of their buffers. scripts/aot_tree_attention.py counts the buffers.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from fst_kernels.tree_attention.list_kernels import visible

# Names of arguments that belong together share a line.
# fmt: off


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
        seen = visible(query[:, None], key[None, :], key_end[None, :])
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
    upcoming = tl.load(here)
    for t in range(0, free):
        block, upcoming = upcoming, tl.load(here + tl.minimum(t + 1, free - 1))
        acc, total, top = _attend(
            acc, total, top, q_tile, k, v, end, depth, batch, kv_head, query, block, scale2, n, window,
            stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, D, DIM, BN, False, TMA, PRECISION, WINDOW,
        )
    last = here + width - 1
    upcoming = tl.load(last)
    for t in range(0, masked):
        block, upcoming = upcoming, tl.load(last - tl.minimum(t + 1, masked - 1))
        acc, total, top = _attend(
            acc, total, top, q_tile, k, v, end, depth, batch, kv_head, query, block, scale2, n, window,
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
    program, blocks = tl.program_id(0), tl.cdiv(n, BM)
    first, pair = program % blocks * BM, program // blocks
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
        seen = visible(query[:, None], key[None, :], key_end[None, :])
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
    upcoming = tl.load(here)
    for t in range(0, free):
        block, upcoming = upcoming, tl.load(here + tl.minimum(t + 1, free - 1))
        acc = _dq_block(
            acc, q_tile, dout_tile, top, mean, k, v, end, depth, batch, kv_head, query, block, scale2, n, window,
            stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, D, DIM, BN, False, TMA, PRECISION, WINDOW,
        )
    last = here + width - 1
    upcoming = tl.load(last)
    for t in range(0, masked):
        block, upcoming = upcoming, tl.load(last - tl.minimum(t + 1, masked - 1))
        acc = _dq_block(
            acc, q_tile, dout_tile, top, mean, k, v, end, depth, batch, kv_head, query, block, scale2, n, window,
            stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, D, DIM, BN, True, TMA, PRECISION, WINDOW,
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
        seen = visible(query[None, :], key[:, None], key_end[:, None])
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
        upcoming = 0
        if WINDOW:
            upcoming = tl.load(here + left, mask=free > 0, other=0)
        for t in range(0, free):
            if WINDOW:
                query, upcoming = upcoming * BM, tl.load(here + left + tl.minimum(t + 1, free - 1))
            else:
                query = free_from + t * BM
            dk_sum, dv_sum = _dkdv_block(
                dk_sum, dv_sum, k_tile, v_tile, q, dout, lse2 + line, delta + line, depth, key, key_end, key_depth, batch, head,
                query, scale2, n, window, stride_qb, stride_qh, stride_qn, stride_db, stride_dh, stride_dn,
                D, DIM, BM, False, TMA, PRECISION, DK, DV, WINDOW,
            )
        if WINDOW:
            upcoming = tl.load(here + right - 1, mask=masked > 0, other=0)
        for t in range(0, masked):
            if WINDOW:
                query, upcoming = upcoming * BM, tl.load(here + right - 1 - tl.minimum(t + 1, masked - 1))
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
    program = tl.program_id(0)
    pair = program // split_count
    batch, kv_head = pair // kv_heads, pair % kv_heads
    split = splits + (tl.minimum(batch, rows - 1) * split_count + program % split_count) * 3
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
