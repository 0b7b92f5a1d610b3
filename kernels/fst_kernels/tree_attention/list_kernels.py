"""The device code that lists which blocks of keys and queries concern each other.

The tokens that a query sees are one path of the forest, so a block of keys [b0, b1) concerns the queries [q0, q1) iff b0 <= q1 - 1 and
max(end) > q0, and needs no mask iff b1 - 1 <= q0 and min(end) >= q1. `list_kernel` writes, for every block of queries, its mask-free key
blocks from the left end of a row and the others from the right end; forward and dQ loop over the two.

Under a sliding window (WINDOW=True) a key is visible only where depth[j] - depth[i] < window besides. The smallest and largest depth of a block
say exactly which blocks need no mask, but only roughly which ones matter: `thin_kernel` looks at the pairs of the others and drops those
without a visible one. The queries near enough to a block of keys are no range any more, so `tile_list_kernel` writes a list for dK/dV too.

Every grid has one axis: the second and the third end at 65,535, which the rows of a batch may exceed.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

# Names of arguments that belong together share a line.
# fmt: off


@triton.jit
def visible(query, key, key_end):
    """Broadcasts; key_end is 0 behind the last token, which hides such a key from everyone."""
    return (key <= query) & (query < key_end)


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
    program, query_blocks = tl.program_id(0), tl.cdiv(n, BM)
    query_block, row = program % query_blocks, program // query_blocks
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


@triton.jit(do_not_specialize=["unit_count", "key_blocks", "query_blocks", "total"])
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
    rows, unit_count, key_blocks, query_blocks, total, window,
    BM: tl.constexpr, BN: tl.constexpr, SCAN: tl.constexpr,
):
    """Under a window, one program per unit: the tiles of its range that may matter. BN is a multiple of BM."""
    at = tl.program_id(0)
    row = at // unit_count
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


@triton.jit(do_not_specialize=["n", "lines"])
def thin_kernel(
    end, depth,  # [R, N] int32
    entries,  # int32: lines of blocks, the masked ones from the right end of each
    ends,  # [R, lines] int64: behind the last entry of each line
    owner,  # [R, lines] int32: the block that the line belongs to (-1: none)
    counts,  # [2, R, lines] int32
    n, rows, lines, window,
    BM: tl.constexpr, BN: tl.constexpr, OF_KEYS: tl.constexpr,
):
    """Drops the masked entries without a single visible pair. OF_KEYS: lines belong to blocks of keys and list blocks of queries."""
    at = tl.program_id(0)
    row = at // lines
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
        seen = visible(query[:, None], key[None, :], key_end[None, :])
        seen = seen & (query_depth[:, None] - key_depth[None, :] < window)
        # The place written to is one that was read before, by every thread: the maximum below waits for all of them.
        tl.store(entries + last - kept, other)
        kept += tl.max(tl.max(seen.to(tl.int32), 1), 0)
    tl.store(counts + rows * lines + at, kept)
