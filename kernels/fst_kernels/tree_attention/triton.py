"""Tree attention in Triton: which tiles, the lists that the device builds, and the launches. The device code is in triton_kernels.py and list_kernels.py,
what it knows of the forest in blocks.py; docs/kernels/tree_attention.md tells why it is built so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fst_kernels.tree_attention import blocks, list_kernels, triton_kernels
from fst_kernels.tree_attention.mask import TreeMask

LOG2E = 1 / math.log(2)
LARGEST_DIM = 256
SCAN = 1024  # key blocks tested at a time while the lists are built
DELTA_ROWS = 32
UNITS_PER_PROCESSOR = 4  # of dK/dV, where ranges have to be cut for it


@dataclass(frozen=True)
class Tile:
    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of the three passes; whether operands come through TMA descriptors; whether dK and dV are passes of their own."""

    forward: Tile
    dq: Tile
    dkdv: Tile
    tma: bool
    apart: bool = False


def padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


# (first compute capability, largest padded head size) -> tiles; scripts/aot_tree_attention.py shows that none spills, all fit, and each loop has its
# buffers: `stages` with wgmma and tcgen05, one fewer with mma.sync, whose last stage is in registers. Two stages of mma.sync are therefore one
# buffer, which is filled and waited for at once. Tiles of 8.0 fit into the 99 KiB of 8.6, 8.9 and 12.x, which have neither wgmma nor tcgen05.
AMPERE, HOPPER, BLACKWELL, CONSUMER = (8, 0), (9, 0), (10, 0), (12, 0)
TILES = {
    (AMPERE, 64): Tiling(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 128, 8, 3), False),
    (AMPERE, 128): Tiling(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 64, 8, 2), False),
    (AMPERE, 256): Tiling(Tile(64, 16, 8, 3), Tile(64, 16, 8, 3), Tile(32, 32, 8, 3), False),
    (CONSUMER, 128): Tiling(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 64, 8, 3), False),
    (HOPPER, 64): Tiling(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 3), True),
    (HOPPER, 128): Tiling(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), True),
    (HOPPER, 256): Tiling(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 3), True, apart=True),
    (BLACKWELL, 64): Tiling(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), True),
    (BLACKWELL, 128): Tiling(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 1), True),
    (BLACKWELL, 256): Tiling(Tile(128, 64, 8, 2), Tile(64, 64, 8, 1), Tile(32, 64, 8, 1), True, apart=True),
}


# The comparison of depths takes registers: where it makes a pass of TILES spill, that pass under a window.
WINDOW_DQ = {(HOPPER, 256): Tile(64, 32, 8, 3)}
WINDOW_DKDV = {(BLACKWELL, 128): Tile(32, 64, 8, 2)}


def tiling(dim: int, dtype: torch.dtype, capability: tuple[int, int], window: bool = False) -> Tiling:
    """The tiles for a head size, a dtype and a compute capability; with `window` for attention through a sliding one."""
    wide = max(64, padded(dim))
    if dtype == torch.float32:  # no tensor cores: products in full float32
        small = {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)}[wide]
        return Tiling(small, small, small, False)
    generation = {9: HOPPER, 10: BLACKWELL, 11: BLACKWELL, 12: CONSUMER}.get(capability[0], AMPERE)
    if (generation, wide) not in TILES:
        generation = AMPERE
    tiles = TILES[generation, wide]
    if window:
        tiles = replace(
            tiles,
            dq=WINDOW_DQ.get((generation, wide), tiles.dq),
            dkdv=WINDOW_DKDV.get((generation, wide), tiles.dkdv),
        )
    return tiles if dim % 8 == 0 else replace(tiles, tma=False)  # TMA reads rows of whole 16 bytes


def lists(mask: TreeMask, tile: Tile, window: int | None = None) -> blocks.Lists:
    """Which key blocks concern which block of queries, built on the mask's device."""
    key = ("lists", tile.queries, tile.keys, window)
    if key not in mask.prepared:
        rows, n = mask.subtree_end.shape
        per_block = blocks.key_blocks(mask, tile.keys)
        of_keys = of_queries = blocks.Depths(per_block.smallest, per_block.largest)  # not read
        if window is not None:
            of_keys, of_queries = blocks.depths(mask, tile.keys), blocks.depths(mask, tile.queries)
        width, count = blocks.list_width(mask, tile.queries, tile.keys), triton.cdiv(n, tile.queries)
        table = torch.empty((rows, count, width), dtype=torch.int32, device=mask.subtree_end.device)
        counts = torch.empty((2, rows, count), dtype=torch.int32, device=table.device)
        list_kernels.list_kernel[(count * rows,)](
            per_block.largest, per_block.smallest, of_keys.smallest, of_keys.largest, of_queries.smallest, of_queries.largest,
            table, counts, n, rows, width, per_block.largest.shape[1], window or 0,
            BM=tile.queries, BN=tile.keys, SCAN=min(SCAN, padded(triton.cdiv(n, tile.keys))), WINDOW=window is not None,
        )  # fmt: skip
        if mask.read is not None:
            block = torch.nn.functional.pad(mask.read, (0, count * tile.queries - n))
            counts *= block.view(rows, count, tile.queries).any(2)
        if window is not None:
            owner = torch.arange(count, dtype=torch.int32, device=table.device).repeat(rows, 1)
            ends = torch.arange(1, rows * count + 1, device=table.device) * width
            _thin(mask, table, ends, owner, counts, tile, window, of_keys=False)
        order = counts.sum(0).sort(dim=1, descending=True, stable=True).indices.to(torch.int32)
        mask.prepared[key] = blocks.Lists(table, counts, order)
    found: blocks.Lists = mask.prepared[key]
    return found


def tile_lists(mask: TreeMask, tile: Tile, target: int, window: int) -> blocks.Tiles:
    """Which tiles of queries concern which unit of dK/dV under a window, likewise."""
    key = ("tile lists", tile.queries, tile.keys, target, window)
    if key not in mask.prepared:
        assert tile.keys % tile.queries == 0, (
            f"tiles of {tile.queries} queries do not divide blocks of {tile.keys} keys"
        )
        work, per_block = (
            blocks.units(mask, tile.keys, tile.queries, target),
            blocks.key_blocks(mask, tile.keys),
        )
        of_keys, of_queries = blocks.depths(mask, tile.keys), blocks.depths(mask, tile.queries)
        rows, count = work.units.shape[:2]
        total = blocks.tile_total(mask, tile.keys, tile.queries)
        bounds = blocks.tile_bounds(work, tile.queries)
        table = torch.empty((rows, total), dtype=torch.int32, device=bounds.device)
        counts = torch.empty_like(bounds)
        query_blocks = of_queries.smallest.shape[1]
        list_kernels.tile_list_kernel[(count * rows,)](
            work.units, per_block.smallest, of_keys.smallest, of_keys.largest, of_queries.smallest, of_queries.largest,
            table, bounds, counts, rows, count, per_block.smallest.shape[1], query_blocks, total, window,
            BM=tile.queries, BN=tile.keys, SCAN=min(SCAN, padded(query_blocks)),
        )  # fmt: skip
        ends = bounds[1].long() + torch.arange(rows, device=bounds.device)[:, None] * total
        _thin(mask, table, ends, work.units[..., 0].contiguous(), counts, tile, window, of_keys=True)
        mask.prepared[key] = blocks.longest_first(work, table, bounds, counts)
    found: blocks.Tiles = mask.prepared[key]
    return found


def _thin(
    mask: TreeMask,
    entries: Tensor,
    ends: Tensor,
    owner: Tensor,
    counts: Tensor,
    tile: Tile,
    window: int,
    of_keys: bool,
) -> None:
    rows, lines = owner.shape
    list_kernels.thin_kernel[(lines * rows,)](
        mask.subtree_end, mask.depth, entries, ends, owner, counts, mask.subtree_end.shape[1], rows, lines, window,
        BM=tile.queries, BN=tile.keys, OF_KEYS=of_keys,
    )  # fmt: skip


def _operand(x: Tensor, rows: int, tma: bool) -> Any:
    return (
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, padded(x.shape[3])]) if tma else x
    )


def _readable(x: Tensor, tma: bool) -> Tensor:
    """x itself where the kernels can read it as it lies, else a contiguous copy."""
    if x.stride(3) != 1:
        return x.contiguous()
    if tma and (x.data_ptr() % 16 or any(s == 0 or s * x.element_size() % 16 for s in x.stride()[:3])):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _tokens_first(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor like x [B,H,N,D] that lies in memory as [B,N,H,D], which is what the model's next product reads."""
    batch, heads, n, dim = x.shape
    return torch.empty((batch, n, heads, dim), dtype=dtype or x.dtype, device=x.device).transpose(1, 2)


def _strides(*tensors: Tensor) -> list[int]:
    return [s for x in tensors for s in x.stride()[:3]]


def natural(total: Tensor) -> Tensor:
    """The log-sum-exp, from its value in units of log2."""
    return total * math.log(2)


def _check(q: Tensor) -> None:
    if q.shape[3] > LARGEST_DIM:
        raise ValueError(
            f"head size {q.shape[3]}: the triton backend computes up to {LARGEST_DIM}, backend='reference' any"
        )


def _tiles_for(q: Tensor, window: int | None) -> Tiling:
    if q.device.type == "cpu":  # interpreted
        small = Tile(16, 16, 4, 1)
        return Tiling(small, small, small, False)
    return tiling(q.shape[3], q.dtype, torch.cuda.get_device_capability(q.device), window is not None)


def _target_for(k: Tensor) -> int:
    if k.device.type == "cpu":
        return 1
    processors = torch.cuda.get_device_properties(k.device).multi_processor_count
    return max(1, -(-UNITS_PER_PROCESSOR * processors // (k.shape[0] * k.shape[1])))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    scale: float,
    window: int | None = None,
    tiles: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B,Hq,N,D] and the log-sum-exp in units of log2 [B,Hq,N] float32.

    Arguments already checked; the mask may have one row for the whole batch. tiles are chosen from the device unless given. Raises
    ValueError for a head size over 256.
    """
    _check(q)
    batch, heads, n, dim = q.shape
    out, lse2 = _tokens_first(q), torch.empty((batch, heads, n), dtype=torch.float32, device=q.device)
    if not q.numel():
        return out, lse2
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        window = mask.binding(window)
        tiles = tiles or _tiles_for(q, window)
        q, k, v = (_readable(x, tiles.tma) for x in (q, k, v))
        tile, known = tiles.forward, lists(mask, tiles.forward, window)
        rows, query_blocks, width = known.lists.shape
        triton_kernels.forward_kernel[(query_blocks * batch * heads,)](
            _operand(q, tile.queries, tiles.tma), _operand(k, tile.keys, tiles.tma), _operand(v, tile.keys, tiles.tma),
            mask.subtree_end, mask.depth, known.lists, known.counts, known.order, out, lse2,
            scale * LOG2E, n, window or 0, batch, heads, heads // k.shape[1], rows, width, query_blocks, *_strides(q, k, v, out),
            D=dim, DIM=padded(dim), BM=tile.queries, BN=tile.keys, TMA=tiles.tma, PRECISION="ieee",
            WINDOW=window is not None, **tile.launch,
        )  # fmt: skip
    return out, lse2


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse2: Tensor,
    mask: TreeMask,
    scale: float,
    window: int | None = None,
    tiles: Tiling | None = None,
    target: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; at least `target` units of dK/dV work per row where long ranges have to be cut for it. out, lse2: of `forward`."""
    dq, dk, dv = _tokens_first(q), _tokens_first(k), _tokens_first(v)
    if not q.numel():
        return dq, dk, dv
    batch, heads, n, dim = q.shape
    kv_heads, wide = k.shape[1], padded(q.shape[3])
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        window = mask.binding(window)
        tiles, target = tiles or _tiles_for(q, window), target or _target_for(k)
        tma, windowed = tiles.tma, window is not None
        q, k, v, dout = (_readable(x, tma) for x in (q, k, v, dout))
        delta = torch.empty_like(lse2)
        triton_kernels.delta_kernel[(triton.cdiv(n, DELTA_ROWS) * batch * heads,)](
            out, dout, delta, n, heads, *_strides(out, dout), D=dim, DIM=wide, BM=DELTA_ROWS
        )

        tile, known = tiles.dq, lists(mask, tiles.dq, window)
        rows, query_blocks, width = known.lists.shape
        triton_kernels.dq_kernel[(query_blocks * batch * heads,)](
            _operand(q, tile.queries, tma), _operand(k, tile.keys, tma), _operand(v, tile.keys, tma),
            _operand(dout, tile.queries, tma), lse2, delta, mask.subtree_end, mask.depth,
            known.lists, known.counts, known.order, dq, scale, scale * LOG2E, n, window or 0, batch, heads, heads // kv_heads,
            rows, width, query_blocks, *_strides(q, k, v, dout, dq),
            D=dim, DIM=wide, BM=tile.queries, BN=tile.keys, TMA=tma, PRECISION="ieee", WINDOW=windowed, **tile.launch,
        )  # fmt: skip

        tile = tiles.dkdv
        smallest = blocks.key_blocks(mask, tile.keys).smallest
        work = blocks.units(mask, tile.keys, tile.queries, target)
        if window is None:
            # the tables are not read
            units, tables, total = (work.units, (work.units, work.units, work.units), 0)
        else:
            near = tile_lists(mask, tile, target, window)
            units, tables, total = near.units, (near.tiles, near.bounds, near.counts), near.tiles.shape[1]
        partials = torch.empty(
            (batch, kv_heads, work.slots, 2, tile.keys, wide), dtype=torch.float32, device=q.device
        )
        for do_dk, do_dv in ((True, False), (False, True)) if tiles.apart else ((True, True),):
            triton_kernels.dkdv_kernel[(units.shape[1] * batch * kv_heads,)](
                _operand(q, tile.queries, tma), _operand(k, tile.keys, tma), _operand(v, tile.keys, tma),
                _operand(dout, tile.queries, tma), lse2, delta, mask.subtree_end, mask.depth, smallest, units, *tables, dk, dv,
                partials, scale, scale * LOG2E, n, window or 0, batch, kv_heads, heads // kv_heads, rows, smallest.shape[1],
                units.shape[1], total, work.slots, *_strides(q, k, v, dout, dk, dv),
                D=dim, DIM=wide, BM=tile.queries, BN=tile.keys, TMA=tma, PRECISION="ieee", DK=do_dk, DV=do_dv,
                WINDOW=windowed, **tile.launch,
            )  # fmt: skip
        triton_kernels.reduce_kernel[(work.splits.shape[1] * batch * kv_heads,)](
            partials, work.splits, dk, dv, n, kv_heads, rows, work.splits.shape[1], work.slots, *_strides(dk, dv),
            D=dim, DIM=wide, BN=tile.keys, num_warps=8,
        )  # fmt: skip
    return dq, dk, dv
