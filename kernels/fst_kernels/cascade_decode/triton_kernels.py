"""The device code of cascade decoding: one kernel for the parts, one that merges them.

A program of `part_kernel` takes one work item (a tile of query rows below a segment, a chunk of its keys; plan.Work) and one KV head. Rows
of the tile are (query, head of the group) pairs: the keys and values are loaded once for all of them. It writes the softmax output over
its keys and the log-sum-exp, in float32; suffixes are items whose last key is read from the device. `merge_kernel` adds the parts of one
sequence in their order, root first. No atomics: every part has one writer, every output too.

Scores are kept in units of log2 (scale2 = scale * log2 e). The interpreter multiplies in float32 only; tiles are chosen by the caller.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

# Names of arguments that belong together share a line.
# fmt: off


@triton.jit
def _slot(table, first_slot, key, inside, PAGE: tl.constexpr):
    """Slots of a segment's keys; `table` points at its first entry. PAGE = 0: one range."""
    if PAGE == 0:
        slot = first_slot + key
    else:
        slot = tl.load(table + key // PAGE, mask=inside, other=0).to(tl.int64) + key % PAGE
    return slot


@triton.jit
def _start(suffix_slots, entry, first_slot, first, sequence, PAGE: tl.constexpr):
    """Slot of a tile's first key, where a tile lies within a page: of a suffix by its page, of a node, which is one range, by `first_slot`."""
    page = tl.load(suffix_slots + entry + first // PAGE, mask=sequence >= 0, other=0).to(tl.int64)
    return tl.where(sequence >= 0, page + first % PAGE, first_slot + first)


@triton.jit
def _finite(top, WINDOW: tl.constexpr):
    """What exponents are taken from: a largest score of -inf, of rows that have seen no key yet, would give NaN."""
    if WINDOW:
        top = tl.where(top == float("-inf"), 0.0, top)
    return top


@triton.jit(do_not_specialize=["window"])
def part_kernel(
    q, k_pool, v_pool,
    node_slots, suffix_slots,  # tables of first slots
    suffix_lengths,  # [S] int32
    ranked,  # [S] int32: sequence of each rank
    items, above,  # [I, 8] and [I] int32; see plan.Work
    past,  # [S] int32: keys of the nodes that each sequence sees
    part_out,  # [parts, Hq, D] float32
    part_lse2,  # [parts, Hq] float32, in units of log2
    scale2, heads, kv_heads,
    window,  # with WINDOW a sequence sees the last so many keys of its past
    group,  # query heads per KV head
    stride_qs, stride_qh,
    stride_ks, stride_kh,
    stride_vs, stride_vh,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    NODE_PAGE: tl.constexpr, SUFFIX_PAGE: tl.constexpr, WHOLE: tl.constexpr,  # WHOLE: nodes are ranges, and no tile crosses a page
    PRECISION: tl.constexpr, WINDOW: tl.constexpr,
):
    program = tl.program_id(0)
    kv_head = program % kv_heads
    item = items + (program // kv_heads).to(tl.int64) * 8
    entry, begin, end, sequence = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    first_query, first_row, rows, first_part = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6), tl.load(item + 7)
    if sequence >= 0:
        end = tl.minimum(end, tl.load(suffix_lengths + sequence))
    if begin < end:
        row, column = first_row + tl.arange(0, ROWS), tl.arange(0, DIM)
        live, wide = row < rows, column < D
        query = row // group
        head = kv_head * group + row % group
        at = tl.load(ranked + first_query + query, mask=live, other=0).to(tl.int64)
        q_tile = tl.load(
            q + (at * stride_qs + head * stride_qh)[:, None] + column[None, :], mask=live[:, None] & wide[None, :], other=0.0
        )
        acc = tl.zeros([ROWS, DIM], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        lowest = row  # first key of the segment that each row sees
        if WINDOW:
            length = tl.load(past + at, mask=live, other=0) + tl.load(suffix_lengths + at, mask=live, other=0)
            lowest = length - window - tl.load(above + program // kv_heads)
            least = tl.min(tl.where(live, lowest, 2147483647))
            begin += tl.maximum(tl.minimum(least, end) - begin, 0) // KEYS * KEYS
        first_slot = tl.zeros((), tl.int64)  # of a range; loaded once, so that the loop's loads wait for nothing but the loop
        if sequence >= 0:
            if SUFFIX_PAGE == 0:
                first_slot = tl.load(suffix_slots + entry).to(tl.int64)
        else:
            if NODE_PAGE == 0:
                first_slot = tl.load(node_slots + entry).to(tl.int64)
        upcoming = first_slot
        if WHOLE:
            upcoming = _start(suffix_slots, entry, first_slot, begin, sequence, SUFFIX_PAGE)
        k_head, v_head = k_pool + kv_head.to(tl.int64) * stride_kh, v_pool + kv_head.to(tl.int64) * stride_vh
        for first in range(begin, end, KEYS):
            key = first + tl.arange(0, KEYS)
            inside = key < end
            if NODE_PAGE == 0 and SUFFIX_PAGE == 0:
                slot = first_slot + key
            elif WHOLE:
                slot = upcoming + tl.arange(0, KEYS)
                # Loaded in its own iteration it would go through the pipeline and take a buffer.
                upcoming = _start(suffix_slots, entry, first_slot, tl.minimum(first + KEYS, end - 1), sequence, SUFFIX_PAGE)
            elif sequence >= 0:
                slot = _slot(suffix_slots + entry, first_slot, key, inside, SUFFIX_PAGE)
            else:
                slot = _slot(node_slots + entry, first_slot, key, inside, NODE_PAGE)
            there = inside[:, None] & wide[None, :]
            k_tile = tl.load(k_head + (slot * stride_ks)[:, None] + column[None, :], mask=there, other=0.0)
            v_tile = tl.load(v_head + (slot * stride_vs)[:, None] + column[None, :], mask=there, other=0.0)
            score = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * scale2
            seen = inside[None, :]
            if WINDOW:
                seen = seen & (key[None, :] >= lowest[:, None])
            score = tl.where(seen, score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            base = _finite(new_top, WINDOW)
            weight = tl.exp2(score - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(weight, 1)
            acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
            top = new_top
        if WINDOW:
            total = tl.where(total == 0.0, 1.0, total)  # a row that sees no key of this part: zeros and -inf
        part = (first_part + query).to(tl.int64) * heads + head
        tl.store(part_out + (part * D)[:, None] + column[None, :], acc / total[:, None], mask=live[:, None] & wide[None, :])
        tl.store(part_lse2 + part, top + tl.log2(total), mask=live)


@triton.jit
def _add_part(
    acc, total, top, part_out, part_lse2, part, head, column, inside, there, heads, D: tl.constexpr, WINDOW: tl.constexpr
):
    at = part.to(tl.int64) * heads + head
    lse2 = tl.load(part_lse2 + at, mask=inside, other=0.0)
    value = tl.load(part_out + (at * D)[:, None] + column[None, :], mask=there, other=0.0)
    new_top = tl.maximum(top, lse2)
    base = _finite(new_top, WINDOW)
    shrink, weight = tl.exp2(top - base), tl.exp2(lse2 - base)
    return acc * shrink[:, None] + value * weight[:, None], total * shrink + weight, new_top


@triton.jit(do_not_specialize=["width", "suffix_part", "suffix_chunks"])
def merge_kernel(
    part_out, part_lse2,
    parts,  # [S, W] int32: the parts of each rank's nodes, in order
    part_count,  # [S] int32
    suffix_lengths, ranked,
    out,
    lse,  # [S, Hq] float32, natural log
    heads, width, suffix_part, suffix_chunks,
    stride_os, stride_oh,
    D: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr,
):
    rank = tl.program_id(0)
    head, column = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, DIM)
    inside = head < heads
    there = inside[:, None] & (column < D)[None, :]
    sequence = tl.load(ranked + rank).to(tl.int64)
    acc = tl.zeros([HEADS, DIM], tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    for i in range(0, tl.load(part_count + rank)):
        part = tl.load(parts + rank.to(tl.int64) * width + i)
        acc, total, top = _add_part(acc, total, top, part_out, part_lse2, part, head, column, inside, there, heads, D, WINDOW)
    for i in range(0, tl.cdiv(tl.load(suffix_lengths + sequence), CHUNK)):
        part = suffix_part + rank * suffix_chunks + i
        acc, total, top = _add_part(acc, total, top, part_out, part_lse2, part, head, column, inside, there, heads, D, WINDOW)
    some = tl.where(total == 0.0, 1.0, total)  # a sequence that sees no key: zeros and -inf
    tl.store(
        out + sequence * stride_os + (head * stride_oh)[:, None] + column[None, :],
        (acc / some[:, None]).to(out.dtype.element_ty), mask=there,
    )
    tl.store(lse + sequence * heads + head, (top + tl.log2(some)) * 0.6931471805599453, mask=inside)
