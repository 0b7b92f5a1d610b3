"""What the Triton kernels know of a forest: built on its device without waiting for it, once per mask, kept in `TreeMask.prepared`.

*Per block of keys*: the largest and smallest subtree_end in it; under a window also the smallest and largest depth, of blocks of queries too.
*Per block of queries* (forward, dQ): the key blocks that concern it. Each block of queries tests every key block up to its own, 1024 at
a time. That is quadratic in N / block, but with a constant so small (86k tokens: 672 programs of two vector steps; a million: 134 million
comparisons) that it costs less than one step of attention, and it spares each of the heads, layers and passes that share the mask a scan
of their own: at 86k tokens a scan in the attention loop would test 1344 blocks to find about 40. A row of the table is as wide as the
longest path in blocks, which the host knows from the mask's segments (as wide as the forest for a device tensor it never looked at).
*Units of work* (dK/dV): a block of keys with its range of queries, [b0, largest end), longest first. Ranges longer than `chunk` are cut.
With chunk = (sum of all ranges) / TARGET there are at most KB + TARGET units and at most 2 TARGET partial sums in float32 whatever the
forest, so the host can size the grid and the buffers without asking; and the longest unit is at most 1 / TARGET of the whole.
Under a window the queries near enough to a block are no range any more: every unit then has a list of the tiles of its range that matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fst_kernels.checks import once
from fst_kernels.tree_attention.mask import TreeMask


@dataclass(frozen=True)
class KeyBlocks:
    largest: Tensor  # [R, KB] int32: max of subtree_end; R = 1 or B rows
    smallest: Tensor  # [R, KB] int32: min; 0 for a block that N ends in


@dataclass(frozen=True)
class Depths:
    smallest: Tensor  # [R, blocks] int32
    largest: Tensor  # [R, blocks] int32


@dataclass(frozen=True)
class Lists:
    lists: Tensor  # [R, QB, width] int32: mask-free key blocks from the left end, the others from the right
    counts: Tensor  # [2, R, QB] int32
    order: Tensor  # [R, QB] int32: blocks of queries, longest list first


@dataclass(frozen=True)
class Units:
    units: Tensor  # [R, U, 4] int32: key block (-1: none), first query, last query + 1, slot of its partial sums (-1: no cut)
    splits: Tensor  # [R, target, 3] int32: key block that was cut (-1: none), first slot, number of slots
    slots: int  # at most so many partial sums per row


@dataclass(frozen=True)
class Tiles:
    """Under a window: the tiles of queries that concern each unit, and the units again, longest list first."""

    units: Tensor  # [R, U, 4] int32
    tiles: Tensor  # [R, total] int32: per unit, mask-free tiles from the left end of its part, the others from the right
    bounds: Tensor  # [2, R, U] int32: where each unit's part begins and ends
    counts: Tensor  # [2, R, U] int32


def key_blocks(mask: TreeMask, size: int) -> KeyBlocks:
    def make() -> KeyBlocks:
        end = mask.subtree_end
        n = end.shape[1]
        padded = torch.nn.functional.pad(end, (0, -n % size)).view(len(end), -1, size)
        # A device tensor may hold anything: no range of queries must reach past the last token.
        return KeyBlocks(padded.amax(2).clamp(max=n), padded.amin(2).clamp(max=n))

    return once(mask.prepared, ("key blocks", size), make)


def depths(mask: TreeMask, size: int) -> Depths:
    """The smallest and largest depth in each block of `size` tokens."""
    depth = mask.depth

    def blocks(fill: int) -> Tensor:
        missing = -depth.shape[1] % size
        return torch.nn.functional.pad(depth, (0, missing), value=fill).view(len(depth), -1, size)

    def make() -> Depths:
        return Depths(blocks(torch.iinfo(torch.int32).max).amin(2), blocks(-1).amax(2))

    return once(mask.prepared, ("depths", size), make)


def list_width(mask: TreeMask, queries: int, keys: int) -> int:
    """At most so many blocks of `keys` tokens concern one block of `queries` tokens. On the host, from the segments where it knows them."""
    n = mask.subtree_end.shape[1]
    if not n or mask.known is None:
        return -(-n // keys)
    segments = mask.known
    origin = segments.start // n * n
    touched = (segments.end - 1 - origin) // keys - (segments.start - origin) // keys + 1
    path = int(segments.path_sum(touched).max())
    return min(path + -(-queries // keys) + 1, -(-n // keys))


def tile_total(mask: TreeMask, keys: int, queries: int) -> int:
    """At most so many tiles of `queries` tokens lie in the ranges of all key blocks of a row. On the host likewise."""
    rows, n = mask.subtree_end.shape
    first = torch.arange(0, n, keys)
    if mask.known is None:
        return int((-(-(n - first) // queries)).sum())
    segments = mask.known
    last = torch.repeat_interleave(segments.last - segments.start // n * n, segments.end - segments.start)
    padded = torch.nn.functional.pad(last.view(rows, n), (0, -n % keys)).view(rows, -1, keys)
    return int((-(-(padded.amax(2) - first) // queries)).sum(1).max())


def units(mask: TreeMask, keys: int, queries: int, target: int) -> Units:
    """`target` units of work are wanted at least, if ranges have to be cut for it; parts are whole multiples of `queries` tokens."""
    largest = key_blocks(mask, keys).largest
    return once(
        mask.prepared, ("units", keys, queries, target), lambda: _units(largest, keys, queries, target)
    )


def _units(largest: Tensor, keys: int, queries: int, target: int) -> Units:
    rows, blocks = largest.shape
    device = largest.device
    first = torch.arange(blocks, device=device) * keys
    length = largest - first  # [R, KB] int64, at least 1
    chunk = -(-length.sum(1, keepdim=True) // target)
    chunk = -(-chunk // queries) * queries  # [R, 1]
    parts = -(-length // chunk)
    behind = parts.cumsum(1)
    cut = parts > 1
    slots_behind = (parts * cut).cumsum(1)
    first_slot = slots_behind - parts

    at = torch.arange(blocks + target, device=device).expand(rows, -1).contiguous()
    block = torch.searchsorted(behind, at, right=True)
    real = block < blocks
    block = block.clamp(max=blocks - 1)
    part = at - (behind - parts).gather(1, block)
    low = block * keys + part * chunk
    high = torch.minimum(low + chunk, largest.gather(1, block))
    slot = torch.where(cut.gather(1, block), first_slot.gather(1, block) + part, -1)
    order = torch.where(real, high - low, -1).sort(dim=1, descending=True, stable=True).indices
    table = torch.stack([torch.where(real, block, -1), low, high, slot], 2).to(torch.int32)
    table = table.gather(1, order[..., None].expand(-1, -1, 4))

    most = min(target, blocks)
    chosen = cut.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    names = torch.where(cut.gather(1, chosen), chosen, -1)
    splits = torch.stack([names, first_slot.gather(1, chosen), parts.gather(1, chosen)], 2).to(torch.int32)
    return Units(table.contiguous(), splits.contiguous(), 2 * target)


def tile_bounds(work: Units, queries: int) -> Tensor:
    """Where each unit's part of a list of all units' tiles begins and ends: [2, R, U] int32."""
    tiles = torch.where(work.units[..., 0] < 0, 0, -(-(work.units[..., 2] - work.units[..., 1]) // queries))
    end = tiles.cumsum(1)
    return torch.stack([end - tiles, end]).to(torch.int32)


def longest_first(work: Units, tiles: Tensor, bounds: Tensor, counts: Tensor) -> Tiles:
    order = counts.sum(0).sort(dim=1, descending=True, stable=True).indices  # [R, U]
    pairs = order.expand(2, -1, -1)
    ordered = work.units.gather(1, order[..., None].expand(-1, -1, 4))
    return Tiles(
        ordered.contiguous(),
        tiles,
        bounds.gather(2, pairs).contiguous(),
        counts.gather(2, pairs).contiguous(),
    )
