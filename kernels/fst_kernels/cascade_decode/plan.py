"""Who reads which keys in a decode step: made once, valid for as long as no sequence moves to another node.

A sequence sees the nodes of its path, root first, and then its own suffix. Sequences are ranked so that those below one node are
neighbours. Softmax attention over a long past is exact in *parts*: a part is one chunk of one segment's keys and gives every query that
sees it an output and a log-sum-exp, which are merged root to leaf, suffix last. Where a segment is cut depends on its own length alone,
so a sequence's parts are the same whoever its neighbours are.

A sliding window is the last so many keys of a sequence's past, so a segment also knows how many keys lie above it.

Only the suffixes grow from step to step. Their lengths (and pages) are tensors on the device that the caller overwrites in place: nothing
here is built again and a captured CUDA graph stays valid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fst_kernels.checks import once

CHUNK = 512  # keys in a part, at most
ALIGN = 64  # chunks of a node begin at multiples of this
TILES = (16, 64)  # (query, head) rows that share one reading of a chunk: where 16 do, 16
ITEM = 8  # int32 numbers of a work item; see Work


class KVBytes(NamedTuple):
    """Bytes of keys and values in one decode step of one layer."""

    unique: int  # every key and value once: the floor
    read: int  # what the tiles of the kernels load; above `unique` where more than one tile of queries shares a chunk (from the L2 cache)
    unshared: int  # what attention without sharing loads: every sequence its whole past


class Work(NamedTuple):
    """Work items of the tiles of one size; an item is (tile of query rows, chunk of keys) and is done for every KV head."""

    rows: int  # of the tile
    items: Tensor  # [I, ITEM] int32: first entry in the slot table, first key, last key + 1, sequence whose suffix it is (-1: a node),
    # first ranked query of the segment, first row in the tile (row = query * group + head of the group), rows of the segment, first part
    above: Tensor  # [I] int32: keys that lie above the segment on its path
    suffixes: bool  # whether there are any among them


@dataclass(frozen=True, eq=False)
class CascadePlan:
    """Made by `CascadePlan.build`. Arrays of runs (a node that somebody sees, with the queries below it) are on the host."""

    order: Tensor  # [S] int64 on the host: sequence of each rank
    ranked: Tensor  # [S] int32 on the device: the same
    node: Tensor  # [runs]
    level: Tensor  # [runs]
    first: Tensor  # [runs] first rank below it
    count: Tensor  # [runs] sequences below it
    length: Tensor  # [runs] keys
    above: Tensor  # [runs] keys of the nodes above it
    past: Tensor  # [S] int32 on the device: keys of all nodes that each sequence sees
    part: Tensor  # [runs] first part: (chunk, query) row by row
    suffix_part: int  # first part of the suffixes: rank * suffix_chunks + chunk
    total_parts: int
    node_slots: Tensor  # [nodes, P] on the device: first slot of each page
    suffix_slots: Tensor  # [S, P], the caller's
    suffix_lengths: Tensor  # [S] int32, the caller's
    suffix_capacity: int
    node_page: int  # slots of a page; 0: a segment is one range
    suffix_page: int
    chunk: int
    last_slot: int  # the largest slot that a node reads
    prepared: dict[Any, Any] = field(default_factory=dict, repr=False)  # what a backend derives, by its key

    @property
    def sequences(self) -> int:
        return len(self.order)

    @property
    def suffix_chunks(self) -> int:
        return -(-self.suffix_capacity // self.chunk)

    @classmethod
    def build(
        cls,
        paths: Any,
        *,
        node_slots: Any,
        node_lengths: Any,
        suffix_slots: Tensor,
        suffix_lengths: Tensor,
        suffix_capacity: int,
        page_size: int | None = None,
        chunk: int = CHUNK,
    ) -> CascadePlan:
        """paths [S, L] integers: the nodes that each sequence sees, root first, then -1 (tensor, numpy array or lists; on the host).

        node_lengths [nodes] keys of each node, >= 1. node_slots [nodes]: the pool's slot of each node's first key, the others follow it; or
        [nodes, P]: the first slot of each page of `page_size` slots. Entries of nodes that no path names are not looked at.
        suffix_slots [S] or [S, P], int32 or int64, likewise for each sequence's own keys; suffix_lengths [S] int32, keys each sequence has
        there, the new token's included, 0 <= length <= suffix_capacity. Both lie where q will lie, are kept and not copied: overwrite
        them in place from step to step. chunk: most keys of a part, a multiple of 64 (16 in tests); part of what fixes the rounding.

        Raises ValueError: a path with a hole, a node that stands at two places of the tree, a table too short for a segment, shapes.
        """
        paths = torch.as_tensor(paths, device="cpu").long()
        if paths.ndim != 2:
            raise ValueError(f"paths has shape {list(paths.shape)}; allowed: [S, L]")
        sequences, levels = paths.shape
        device = suffix_lengths.device
        for name, x, dtypes in (
            ("suffix_lengths", suffix_lengths, (torch.int32,)),
            ("suffix_slots", suffix_slots, (torch.int32, torch.int64)),
        ):
            if len(x) != sequences or x.dtype not in dtypes or x.device != device or not x.is_contiguous():
                raise ValueError(
                    f"{name} is {x.dtype} {list(x.shape)} on {x.device}; allowed: contiguous {' or '.join(map(str, dtypes))}, "
                    f"{sequences} rows, on {device} like suffix_lengths"
                )
        if suffix_lengths.ndim != 1 or suffix_capacity < 1 or chunk < 16 or chunk % 16:
            raise ValueError(
                f"suffix_lengths has shape {list(suffix_lengths.shape)}, suffix_capacity={suffix_capacity}, chunk={chunk}; "
                "allowed: [S], at least 1, a multiple of 16"
            )
        lengths = torch.as_tensor(node_lengths, device="cpu").long()
        slots = torch.as_tensor(node_slots, device="cpu").long()
        node_page = _page(slots, "node_slots", page_size)
        suffix_page = _page(suffix_slots, "suffix_slots", page_size)
        if lengths.shape != slots.shape[:1]:
            raise ValueError(
                f"node_lengths has shape {list(lengths.shape)}, node_slots {list(slots.shape)}; allowed: [nodes] each"
            )
        if suffix_page and suffix_slots.shape[1] * suffix_page < suffix_capacity:
            raise ValueError(
                f"suffix_capacity={suffix_capacity} needs more than {suffix_slots.shape[1]} pages of {suffix_page}"
            )
        _check_paths(paths, len(lengths))

        order = torch.arange(sequences)
        for column in reversed(paths.unbind(1)):  # by the last level, then by the one above it, ...
            order = order[column[order].argsort(stable=True)]
        runs = [_runs(paths[order, level], level) for level in range(levels)]
        node, level, first, count = (
            torch.cat([run[i] for run in runs] or [torch.zeros(0, dtype=torch.int64)]) for i in range(4)
        )
        _check_nodes(node, lengths, slots, node_page)
        length = lengths[node]
        each = (
            torch.where(paths >= 0, lengths[paths.clamp(min=0)], 0)
            if len(lengths)
            else torch.zeros_like(paths)
        )
        above = (each.cumsum(1) - each)[order[first], level]
        chunks = -(-length // chunk)
        behind = (chunks * count).cumsum(0)
        part = behind - chunks * count
        suffix_part = int(behind[-1]) if len(behind) else 0
        ends = slots[node] if not node_page else slots[node].amax(1) if len(node) else slots.flatten()[:0]
        extent = length if not node_page else torch.full_like(length, node_page)
        return cls(
            order=order, ranked=order.int().to(device), node=node, level=level, first=first, count=count, length=length, part=part,
            above=above, past=each.sum(1).int().to(device),
            suffix_part=suffix_part, total_parts=suffix_part + sequences * -(-suffix_capacity // chunk),
            node_slots=(slots if node_page else slots[:, None]).int().contiguous().to(device),
            suffix_slots=suffix_slots if suffix_page else suffix_slots[:, None], suffix_lengths=suffix_lengths, suffix_capacity=suffix_capacity,
            node_page=node_page, suffix_page=suffix_page, chunk=chunk, last_slot=int((ends + extent).max()) - 1 if len(node) else -1,
        )  # fmt: skip

    def of_step(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, made again only when suffix_lengths or suffix_slots has been written since."""
        tensors = self.suffix_lengths, self.suffix_slots
        if any(x.is_inference() for x in tensors):  # these do not say when they are written
            return make()
        version = tensors[0]._version, tensors[1]._version
        if self.prepared.get(key, (None,))[0] != version:
            self.prepared[key] = version, make()
        return self.prepared[key][1]

    def check_suffixes(self, slots: int) -> None:
        """ValueError for a suffix whose length is out of range or that reads outside a pool of `slots`. Waits for the device."""
        least, most = int(self.suffix_lengths.min()), int(self.suffix_lengths.max())
        if least < 0 or most > self.suffix_capacity:
            raise ValueError(
                f"suffix_lengths run from {least} to {most}; allowed: 0 to the plan's suffix_capacity={self.suffix_capacity}"
            )
        page = self.suffix_page or self.suffix_capacity
        begin = torch.arange(self.suffix_slots.shape[1], device=self.suffix_slots.device) * page  # [P]
        keys = (self.suffix_lengths[:, None] - begin).clamp(0, page)  # [S, P], read from each page
        last = self.suffix_slots + keys - 1
        outside = (keys > 0) & ((self.suffix_slots < 0) | (last >= slots))
        if outside.any():
            sequence, at = outside.nonzero()[0].tolist()
            raise ValueError(
                f"the suffix of sequence {sequence} reads the slots {int(self.suffix_slots[sequence, at])} to {int(last[sequence, at])}; "
                f"the pool has {slots}"
            )

    def parts(self) -> tuple[Tensor, Tensor]:
        """By rank, on the device: the parts of each sequence's nodes in order, [S, W] int32, and how many these are, [S] int32."""
        return once(self.prepared, "parts", self._parts)

    def _parts(self) -> tuple[Tensor, Tensor]:
        chunks = -(-self.length // self.chunk)
        width = torch.zeros(self.sequences, dtype=torch.int64)
        pieces = []
        for level in torch.unique(self.level).tolist():
            runs = torch.nonzero(self.level == level).squeeze(1)
            count = self.count[runs]
            run = runs.repeat_interleave(count)  # of every rank below the level's nodes, ascending
            rank = (
                self.first[run] + torch.arange(len(run)) - (count.cumsum(0) - count).repeat_interleave(count)
            )
            copies = chunks[run]
            at = torch.arange(int(copies.sum())) - (copies.cumsum(0) - copies).repeat_interleave(copies)
            each, below = run.repeat_interleave(copies), rank.repeat_interleave(copies)
            value = self.part[each] + at * self.count[each] + below - self.first[each]
            pieces.append((below, width[below] + at, value))
            width[rank] += copies
        table = torch.full((self.sequences, max([1, *width.tolist()])), -1, dtype=torch.int32)
        for rank, column, value in pieces:
            table[rank, column] = value.int()
        device = self.suffix_lengths.device
        return table.to(device), width.int().to(device)

    def work(self, group: int, tiles: tuple[int, ...] = TILES) -> list[Work]:
        """The work lists for `group` query heads per KV head, one per size of tile (one or two, ascending), those without items left out."""
        return once(self.prepared, ("work", group, tiles), lambda: self._work(group, tiles))

    def _work(self, group: int, tiles: tuple[int, ...]) -> list[Work]:
        chunks = -(-self.length // self.chunk)
        align = min(ALIGN, self.chunk)
        even = -(-self.length // chunks.clamp(min=1))
        size = -(-even // align) * align
        rows = self.count * group
        lists = []
        for tile in tiles:
            run = torch.nonzero(torch.where(rows <= tiles[0], tiles[0], tiles[-1]) == tile).squeeze(1)
            pieces = -(-rows[run] // tile)
            copies = chunks[run] * pieces
            at = torch.arange(int(copies.sum())) - (copies.cumsum(0) - copies).repeat_interleave(copies)
            pieces, run = pieces.repeat_interleave(copies), run.repeat_interleave(copies)
            chunk, first_row = at // pieces, at % pieces * tile
            begin = chunk * size[run]
            end = torch.minimum(begin + size[run], self.length[run])
            entry = self.node[run] * self.node_slots.shape[1]
            nobody = torch.full_like(run, -1)
            first_part = self.part[run] + chunk * self.count[run]
            items = torch.stack(
                [entry, begin, end, nobody, self.first[run], first_row, rows[run], first_part], 1
            )
            above = self.above[run]
            own = tile == (tiles[0] if group <= tiles[0] else tiles[-1])
            if own:
                suffixes = self._suffix_items(group, tile)
                items = torch.cat([items, suffixes])
                above = torch.cat([above, self.past.cpu()[suffixes[:, 3]]])
            if len(items):
                items, above = (x.int().to(self.suffix_lengths.device) for x in (items, above))
                lists.append(Work(tile, items, above, own))
        return lists

    def _suffix_items(self, group: int, tile: int) -> Tensor:
        tiles = -(-group // tile)
        rank, chunk, piece = (
            x.flatten()
            for x in torch.meshgrid(
                torch.arange(self.sequences),
                torch.arange(self.suffix_chunks),
                torch.arange(tiles),
                indexing="ij",
            )
        )
        sequence = self.order[rank]
        begin = chunk * self.chunk
        end = (begin + self.chunk).clamp(max=self.suffix_capacity)
        part = self.suffix_part + rank * self.suffix_chunks + chunk
        entry = sequence * self.suffix_slots.shape[1]
        return torch.stack(
            [entry, begin, end, sequence, rank, piece * tile, torch.full_like(rank, group), part], 1
        )

    def kv_bytes(self, *, query_heads: int, kv_heads: int, head_dim: int, itemsize: int) -> KVBytes:
        """Of one layer, at the suffix lengths of now (which are fetched from the device)."""
        suffixes = self.suffix_lengths.cpu().long()
        unique = int(self.length.sum() + suffixes.sum())
        unshared = int((self.length * self.count).sum() + suffixes.sum())
        read = 0
        for work in self.work(query_heads // kv_heads):
            _, begin, end, sequence = work.items[:, :4].cpu().long().unbind(1)
            end = torch.where(sequence < 0, end, torch.minimum(end, suffixes[sequence]))
            read += int((end - begin).clamp(min=0).sum())
        token = 2 * kv_heads * head_dim * itemsize
        return KVBytes(unique * token, read * token, unshared * token)


def _page(slots: Tensor, name: str, page_size: int | None) -> int:
    if slots.ndim == 1:
        return 0
    if slots.ndim != 2 or page_size is None or page_size < 1:
        raise ValueError(
            f"{name} has shape {list(slots.shape)} with page_size={page_size}; allowed: one row of first slots, or [rows, P] with a page_size"
        )
    return page_size


def _check_paths(paths: Tensor, nodes: int) -> None:
    wrong = ((paths < -1) | (paths >= nodes)).nonzero()
    if len(wrong):
        s, at = wrong[0].tolist()
        raise ValueError(f"paths[{s}, {at}]={int(paths[s, at])}; allowed: -1 <= node < {nodes}")
    holes = ((paths[:, 1:] >= 0) & (paths[:, :-1] < 0)).nonzero()
    if len(holes):
        s = int(holes[0, 0])
        raise ValueError(
            f"paths[{s}]={paths[s].tolist()} has a hole; allowed: nodes from the root down, then -1"
        )


def _runs(column: Tensor, level: int) -> tuple[Tensor, ...]:
    """node, level, first, count of the neighbours in a column that stand under one node."""
    node, count = torch.unique_consecutive(column, return_counts=True)
    first = count.cumsum(0) - count
    there = node >= 0
    return node[there], torch.full_like(node[there], level), first[there], count[there]


def _check_nodes(node: Tensor, lengths: Tensor, slots: Tensor, page: int) -> None:
    seen, times = torch.unique(node, return_counts=True)
    if (times > 1).any():
        raise ValueError(
            f"node {int(seen[times > 1][0])} stands at two places of the tree; allowed: one parent per node"
        )
    most = slots.shape[1] * page if page else 2**31 - 1
    wrong = node[(lengths[node] < 1) | (lengths[node] > most)]
    if len(wrong):
        raise ValueError(f"node_lengths[{int(wrong[0])}]={int(lengths[wrong[0]])}; allowed: 1 to {most}")
