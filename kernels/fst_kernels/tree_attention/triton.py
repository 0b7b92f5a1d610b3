"""Tree attention in Triton: which tiles, the launches, and the autograd function. The device code is in triton_kernels.py, what it knows
of the forest in blocks.py; docs/kernels/tree_attention.md tells why it is built so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from fst_kernels.tree_attention import blocks, triton_kernels
from fst_kernels.tree_attention.mask import TreeMask

LOG2E = 1 / math.log(2)
LARGEST_DIM = 256
SCAN = 1024  # key blocks tested at a time while the lists are built
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


# (first compute capability, largest padded head size) -> tiles; scripts/aot_tree_attention.py shows that none spills and all fit. Those of 8.0
# fit into the 99 KiB of 8.6 and 8.9 too, and serve 12.x, which has neither wgmma nor tcgen05.
AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)
TILES = {
    (AMPERE, 64): Tiling(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), False),
    (AMPERE, 128): Tiling(Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(32, 64, 8, 2), False),
    (AMPERE, 256): Tiling(Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 8, 2), False),
    (HOPPER, 64): Tiling(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), True),
    (HOPPER, 128): Tiling(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), True),
    (HOPPER, 256): Tiling(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2), True, apart=True),
    (BLACKWELL, 64): Tiling(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), True),
    (BLACKWELL, 128): Tiling(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 1), True),
    (BLACKWELL, 256): Tiling(Tile(128, 64, 8, 2), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), True, apart=True),
}


def tiling(dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiling:
    """The tiles for a head size, a dtype and a compute capability."""
    wide = max(64, padded(dim))
    if dtype == torch.float32:  # no tensor cores: products in full float32
        small = Tile(32, 32, 8, 1) if wide <= 128 else Tile(16, 16, 8, 1)
        return Tiling(small, small, small, False)
    generation = HOPPER if capability[0] == 9 else BLACKWELL if capability[0] in (10, 11) else AMPERE
    tiles = TILES[generation, wide]
    return tiles if dim % 8 == 0 else replace(tiles, tma=False)  # TMA reads rows of whole 16 bytes


def lists(mask: TreeMask, tile: Tile) -> blocks.Lists:
    """Which key blocks concern which block of queries, built on the mask's device."""
    key = ("lists", tile.queries, tile.keys)
    if key not in mask.prepared:
        rows, n = mask.subtree_end.shape
        per_block = blocks.key_blocks(mask, tile.keys)
        width, count = (
            blocks.list_width(mask, tile.queries, tile.keys),
            triton.cdiv(n, tile.queries),
        )
        table = torch.empty((rows, count, width), dtype=torch.int32, device=mask.subtree_end.device)
        counts = torch.empty((2, rows, count), dtype=torch.int32, device=table.device)
        triton_kernels.list_kernel[(count, rows)](
            per_block.largest, per_block.smallest, table, counts, n, rows, width, per_block.largest.shape[1],
            BM=tile.queries, BN=tile.keys, SCAN=min(SCAN, padded(triton.cdiv(n, tile.keys))),
        )  # fmt: skip
        order = counts.sum(0).sort(dim=1, descending=True, stable=True).indices.to(torch.int32)
        mask.prepared[key] = blocks.Lists(table, counts, order)
    found: blocks.Lists = mask.prepared[key]
    return found


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


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, scale: float, tiles: Tiling
) -> tuple[Tensor, Tensor]:
    """out [B,Hq,N,D] and the log-sum-exp in units of log2 [B,Hq,N] float32."""
    batch, heads, n, dim = q.shape
    out, lse2 = _tokens_first(q), torch.empty((batch, heads, n), dtype=torch.float32, device=q.device)
    tile, known = tiles.forward, lists(mask, tiles.forward)
    rows, query_blocks, width = known.lists.shape
    triton_kernels.forward_kernel[(query_blocks * batch * heads,)](
        _operand(q, tile.queries, tiles.tma), _operand(k, tile.keys, tiles.tma), _operand(v, tile.keys, tiles.tma),
        mask.subtree_end, known.lists, known.counts, known.order, out, lse2,
        scale * LOG2E, n, batch, heads, heads // k.shape[1], rows, width, query_blocks, *_strides(q, k, v, out),
        D=dim, DIM=padded(dim), BM=tile.queries, BN=tile.keys, TMA=tiles.tma, PRECISION="ieee", **tile.launch,
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
    tiles: Tiling,
    target: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; at least `target` units of dK/dV work per row where long ranges have to be cut for it."""
    batch, heads, n, dim = q.shape
    kv_heads, wide, tma = k.shape[1], padded(q.shape[3]), tiles.tma
    delta = torch.empty_like(lse2)
    triton_kernels.delta_kernel[(triton.cdiv(n, 64), batch * heads)](
        out, dout, delta, n, heads, *_strides(out, dout), D=dim, DIM=wide, BM=64
    )

    dq, dk, dv = _tokens_first(q), _tokens_first(k), _tokens_first(v)
    tile, known = tiles.dq, lists(mask, tiles.dq)
    rows, query_blocks, width = known.lists.shape
    triton_kernels.dq_kernel[(query_blocks * batch * heads,)](
        _operand(q, tile.queries, tma), _operand(k, tile.keys, tma), _operand(v, tile.keys, tma),
        _operand(dout, tile.queries, tma), lse2, delta, mask.subtree_end, known.lists, known.counts, known.order, dq,
        scale, scale * LOG2E, n, batch, heads, heads // kv_heads, rows, width, query_blocks, *_strides(q, k, v, dout, dq),
        D=dim, DIM=wide, BM=tile.queries, BN=tile.keys, TMA=tma, PRECISION="ieee", **tile.launch,
    )  # fmt: skip

    tile = tiles.dkdv
    ends, work = blocks.key_blocks(mask, tile.keys), blocks.units(mask, tile.keys, tile.queries, target)
    partials = torch.empty(
        (batch, kv_heads, work.slots, 2, tile.keys, wide), dtype=torch.float32, device=q.device
    )
    for do_dk, do_dv in ((True, False), (False, True)) if tiles.apart else ((True, True),):
        triton_kernels.dkdv_kernel[(work.units.shape[1] * batch * kv_heads,)](
            _operand(q, tile.queries, tma), _operand(k, tile.keys, tma), _operand(v, tile.keys, tma),
            _operand(dout, tile.queries, tma), lse2, delta, mask.subtree_end, ends.largest, ends.smallest, work.units, dk, dv,
            partials, scale, scale * LOG2E, n, batch, kv_heads, heads // kv_heads, rows, ends.largest.shape[1],
            work.units.shape[1], work.slots, *_strides(q, k, v, dout, dk, dv),
            D=dim, DIM=wide, BM=tile.queries, BN=tile.keys, TMA=tma, PRECISION="ieee", DK=do_dk, DV=do_dv, **tile.launch,
        )  # fmt: skip
    triton_kernels.reduce_kernel[(work.splits.shape[1], batch * kv_heads)](
        partials, work.splits, dk, dv, n, kv_heads, rows, work.splits.shape[1], work.slots, *_strides(dk, dv),
        D=dim, DIM=wide, BN=tile.keys, num_warps=8,
    )  # fmt: skip
    return dq, dk, dv


class TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, scale: float, tiles: Tiling, target: int
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_readable(x, tiles.tma) for x in (q, k, v))
        out, lse2 = forward(q, k, v, mask, scale, tiles)
        ctx.save_for_backward(q, k, v, out, lse2)
        ctx.mask, ctx.scale, ctx.tiles, ctx.target = mask, scale, tiles, target
        lse = lse2 * math.log(2)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
        dout = _readable(dout, ctx.tiles.tma)
        q, k, v, out, lse2 = ctx.saved_tensors
        grads = backward(dout, q, k, v, out, lse2, ctx.mask, ctx.scale, ctx.tiles, ctx.target)
        return (*grads, None, None, None, None)


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TreeMask,
    scale: float,
    tiles: Tiling | None = None,
    target: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments already checked; the mask may have one row for the whole batch. Returns out [B,Hq,N,D] and lse [B,Hq,N] float32.

    tiles and target (see `backward`) are chosen from the device unless given. Raises ValueError for a head size over 256.
    """
    dim = q.shape[3]
    if dim > LARGEST_DIM:
        raise ValueError(
            f"head size {dim}: the triton backend computes up to {LARGEST_DIM}, backend='reference' any"
        )
    if not q.numel():
        return torch.zeros_like(q), q.new_zeros(q.shape[:3], dtype=torch.float32)
    if q.device.type == "cpu":  # interpreted
        small = Tile(16, 16, 4, 1)
        tiles, target = tiles or Tiling(small, small, small, False), target or 1
    if tiles is None:
        tiles = tiling(dim, q.dtype, torch.cuda.get_device_capability(q.device))
    if target is None:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        target = max(1, triton.cdiv(UNITS_PER_PROCESSOR * processors, k.shape[0] * k.shape[1]))
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        out, lse = TreeAttention.apply(q, k, v, mask, scale, tiles, target)  # type: ignore[no-untyped-call]
    return out, lse
