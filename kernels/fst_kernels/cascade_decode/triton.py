"""Cascade decoding in Triton: tiles and launches. The device code is in triton_kernels.py, the work lists in plan.py;
docs/kernels/cascade_decode.md tells why it is built so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fst_kernels.cascade_decode import triton_kernels
from fst_kernels.cascade_decode.plan import TILES, CascadePlan
from fst_kernels.checks import adjacent

LOG2E = 1 / math.log(2)
LARGEST_DIM = 256
MERGED_HEADS = 8


@dataclass(frozen=True)
class Tile:
    """Keys loaded at a time, warps and stages of the loop, for one number of query rows."""

    keys: int
    warps: int
    stages: int


def padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


# (largest padded head size, query rows) -> tile; scripts/aot_cascade_decode.py shows that none spills and all fit, on sm_80 also into the
# 99 KiB of 8.6 and 8.9.
HALVES = {
    (64, 16): Tile(64, 4, 4),
    (64, 64): Tile(64, 8, 3),
    (128, 16): Tile(64, 4, 3),
    (128, 64): Tile(64, 8, 3),
    (256, 16): Tile(32, 4, 3),
    (256, 64): Tile(32, 8, 2),
}


CONSUMER_HALVES = HALVES | {(128, 64): Tile(32, 8, 4)}  # 12.x: the wider tile spills there


def row_tiles(dtype: torch.dtype) -> tuple[int, ...]:
    return TILES[:1] if dtype == torch.float32 else TILES


def tile(dim: int, rows: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    wide = max(64, padded(dim))
    if dtype == torch.float32:  # no tensor cores: products in full float32
        return Tile(16, 8, 2)
    return (CONSUMER_HALVES if capability[0] == 12 else HALVES)[wide, rows]


def cascade_decode(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    plan: CascadePlan,
    scale: float,
    window: int | None = None,
    tiles: dict[int, Tile] | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments already checked; q not empty. Returns out [S, Hq, D] and lse [S, Hq] float32. tiles: by query rows, chosen unless given.

    Raises ValueError for a head size over 256.
    """
    sequences, heads, dim = q.shape
    if dim > LARGEST_DIM:
        raise ValueError(
            f"head size {dim}: the triton backend computes up to {LARGEST_DIM}, backend='reference' any"
        )
    q = adjacent(q)
    kv_heads, wide = k_pool.shape[1], padded(dim)
    out = torch.empty((sequences, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((sequences, heads), dtype=torch.float32, device=q.device)
    part_out = torch.empty((plan.total_parts, heads, dim), dtype=torch.float32, device=q.device)
    part_lse2 = torch.empty((plan.total_parts, heads), dtype=torch.float32, device=q.device)
    if q.device.type == "cpu":  # interpreted
        tiles = tiles or {16: Tile(16, 4, 1), 64: Tile(32, 4, 1)}
    if tiles is None:
        capability = torch.cuda.get_device_capability(q.device)
        tiles = {rows: tile(dim, rows, q.dtype, capability) for rows in row_tiles(q.dtype)}
    parts, part_count = plan.parts()
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        for work in plan.work(heads // kv_heads, tuple(tiles)):
            taken = tiles[work.rows]
            page = plan.suffix_page if work.suffixes else 0
            whole = (
                page > 0
                and not plan.node_page
                and work.rows == TILES[0]
                and page % taken.keys == plan.chunk % taken.keys == 0
            )
            triton_kernels.part_kernel[(len(work.items) * kv_heads,)](
                q, k_pool, v_pool, plan.node_slots, plan.suffix_slots, plan.suffix_lengths, plan.ranked, work.items, work.above, plan.past,
                part_out, part_lse2, scale * LOG2E, heads, kv_heads, window or 0, heads // kv_heads,
                *q.stride()[:2], *k_pool.stride()[:2], *v_pool.stride()[:2],
                D=dim, DIM=wide, ROWS=work.rows, KEYS=taken.keys, NODE_PAGE=plan.node_page, SUFFIX_PAGE=page, WHOLE=whole,
                PRECISION="ieee", WINDOW=window is not None, num_warps=taken.warps, num_stages=taken.stages,
            )  # fmt: skip
        triton_kernels.merge_kernel[(sequences, triton.cdiv(heads, MERGED_HEADS))](
            part_out, part_lse2, parts, part_count, plan.suffix_lengths, plan.ranked, out, lse,
            heads, parts.shape[1], plan.suffix_part, plan.suffix_chunks, *out.stride()[:2],
            D=dim, DIM=wide, HEADS=MERGED_HEADS, CHUNK=plan.chunk, WINDOW=window is not None, num_warps=4,
        )  # fmt: skip
    return out, lse
