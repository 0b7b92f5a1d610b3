"""Attention of one token per sequence over a tree of keys and values: cascade attention (KERNELS.md, section 3) in plain torch calls.

Softmax attention over a sequence's whole past is exact when it is done segment by segment: each part gives (out, lse), and parts merge with
weights softmax(lse) in fp32, always in the order root, ..., leaf, own suffix. So one decode step reads each shared segment once for all
the sequences below it: nodes of one level lie side by side in a *block*, and a whole block is one batched attention call, the query heads
of a KV group and the sequences below a node folded into the query length.

No autograd here: this is for sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fst_fast.rollout.kv_tree import TreeCache
from fst_fast.rollout.prompt_tree import Ints
from fst_kernels.cascade_decode.partial import Sight, partial_attention, seen_attention


@dataclass
class _Call:
    """One batched attention call: sequences grouped under the rows of a block."""

    block: int
    span: slice  # of the block's rows
    at: Tensor | None  # rows within the span, where they lie too far apart for a view
    rows: int  # n
    width: int  # most sequences under one row
    members: Ints  # [sequences in this call]
    lane: Ints  # likewise: row * width + lane of each
    depth: Ints  # [rows], of the first key in each row


class PathAttention:
    """Attention of S sequences, one query each, over the prompt nodes they stand under, and whatever part the caller adds.

    paths: [S, levels], nodes from the root down, then -1. The work list holds as long as nobody comes or goes. positions: [S], the depth
    of each sequence's query, which layers with a sliding window ask for; set anew where it changes.
    """

    def __init__(self, cache: TreeCache, paths: Ints, device: torch.device) -> None:
        self.cache, self.device, self.sequences = cache, device, len(paths)
        self.levels = [level for level in range(paths.shape[1]) if (paths[:, level] >= 0).any()]
        self.calls = [(part, call) for part, level in enumerate(self.levels) for call in _calls(cache, paths[:, level], device)]  # fmt: skip
        self._heads = (0, 0)
        self._positions: Ints | None = None
        self._sights: dict[int, list[Sight]] = {}  # by window, of each call

    def stand_at(self, positions: Ints) -> None:
        """Where the queries are from now on: [S] depths."""
        self._positions, self._sights = positions, {}

    def _sight(self, window: int, group: int, dtype: torch.dtype) -> list[Sight]:
        """What the queries of each call see of its keys through a sliding window: those less than `window` above them."""
        assert self._positions is not None, "stand_at comes first"
        if window not in self._sights:
            found = []
            for _, call in self.calls:
                lengths = self.cache.block(call.block).lengths[call.span]
                if call.at is not None:
                    lengths = lengths[call.at.cpu().numpy()]
                column = np.arange(int(self.cache.block(call.block).lengths.max()))
                position = np.zeros(call.rows * call.width, dtype=np.int64)
                position[call.lane] = self._positions[call.members]
                depth = call.depth[:, None] + column  # [rows, L]
                near = (
                    depth[:, None] > position.reshape(call.rows, -1)[..., None] - window
                )  # [rows, width, L]
                seen = near & (column < lengths[:, None])[:, None]
                each = torch.as_tensor(np.repeat(seen, group, axis=1), device=self.device)
                found.append(Sight.of(each, dtype))
            self._sights[window] = found
        return self._sights[window]

    def _lay_out(self, heads: int, kv_heads: int, extra: bool) -> None:
        """Where each (sequence, head) finds its queries and partial results: rows (row, lane, head of the group, kv head) of each call,
        one call after the other, behind the S * Hq rows of the extra part."""
        group, number = heads // kv_heads, np.arange(heads)
        offset = self.sequences * heads if extra else 0
        head = number % group * kv_heads + number // group  # the place of each query head in a lane
        nowhere = offset + heads * sum(call.rows * call.width for _, call in self.calls)
        where = np.full((len(self.levels) + extra, self.sequences, heads), nowhere, dtype=np.int64)
        if extra:
            where[-1] = np.arange(self.sequences)[:, None] * heads + head
        queries = []
        for part, call in self.calls:
            lanes = call.rows * call.width
            where[part, call.members] = offset + call.lane[:, None] * heads + head
            take = np.zeros(
                lanes, dtype=np.int64
            )  # a lane without a sequence computes sequence 0's, for nobody
            take[call.lane] = call.members
            place = np.empty((lanes, heads), dtype=np.int64)
            place[:, head] = take[:, None] * heads + number
            queries.append(place.reshape(-1))
            offset += lanes * heads
        self.queries = torch.as_tensor(np.concatenate(queries), device=self.device)
        self.where = torch.as_tensor(where.reshape(-1), device=self.device)
        self._heads = (heads, kv_heads)

    def attend(
        self,
        layer: int,
        q: Tensor,
        kv_heads: int,
        scale: float,
        extra: tuple[Tensor, Tensor] | None,
        window: int | None = None,
    ) -> Tensor:
        """q [S, Hq, D] -> [S, Hq, D]. extra: (out [S, Hkv, G, D], lse [S, Hkv, G]) over further keys of each sequence."""
        sequences, heads, dim = q.shape
        if self._heads != (heads, kv_heads):
            self._lay_out(heads, kv_heads, extra is not None)
        group = heads // kv_heads
        spread = q.reshape(-1, dim).index_select(0, self.queries)
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        begin = 0
        if extra is not None:
            _collect(extra, outs, lses)
        sights = None if window is None else self._sight(window, group, q.dtype)
        for number, (_, call) in enumerate(self.calls):
            size = call.rows * call.width * heads
            mine = spread[begin : begin + size].view(call.rows, call.width * group, kv_heads, dim)
            block = self.cache.block(call.block)
            key, value = (x[call.span] for x in block.kv(layer))
            mask = None if block.mask is None else block.mask[call.span]
            if call.at is not None:
                key, value = key.index_select(0, call.at), value.index_select(0, call.at)
                mask = None if mask is None else mask.index_select(0, call.at)
            mine = mine.transpose(1, 2)
            if sights is None:
                _collect(partial_attention(mine, key, value, scale, mask), outs, lses)
            else:
                _collect(seen_attention(mine, key, value, scale, sights[number]), outs, lses)
            begin += size
        outs.append(outs[0].new_zeros(1, outs[0].shape[1]))  # of those who stand under no node of a level
        lses.append(lses[0].new_full((1,), float("-inf")))
        weights = torch.cat(lses).index_select(0, self.where).view(-1, sequences * heads).softmax(0)
        parts = torch.cat(outs).index_select(0, self.where).float().view(len(weights), sequences * heads, -1)
        return parts.mul_(weights.unsqueeze(-1)).sum(0).to(q.dtype).view(sequences, heads, -1)


def _collect(part: tuple[Tensor, Tensor], outs: list[Tensor], lses: list[Tensor]) -> None:
    out, lse = part  # [n, Hkv, Q, D], in memory [n, Q, Hkv, D] where flash attention made it
    outs.append(out.transpose(1, 2).reshape(-1, out.shape[-1]))
    lses.append(lse.transpose(1, 2).reshape(-1))


def _calls(cache: TreeCache, nodes: Ints, device: torch.device) -> list[_Call]:
    calls = []
    for members, block, rows in _group(cache, nodes):
        unique, row = np.unique(rows, return_inverse=True)
        order = np.argsort(row, kind="stable")
        count = np.bincount(row)
        lane = np.empty(len(row), dtype=np.int64)
        lane[order] = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        first, n = int(unique[0]), int(unique[-1] + 1 - unique[0])
        whole = 2 * len(unique) > n  # dense enough: a view, holes and all; else a copy
        width = int(count.max())
        calls.append(
            _Call(
                block=block,
                span=slice(first, first + n),
                at=None if whole else torch.as_tensor(unique - first, device=device),
                rows=n if whole else len(unique),
                width=width,
                members=members,
                lane=(rows - first if whole else row) * width + lane,
                depth=_depths(
                    cache, nodes[members], rows - first if whole else row, n if whole else len(unique)
                ),
            )
        )
    return calls


def _depths(cache: TreeCache, nodes: Ints, rows: Ints, count: int) -> Ints:
    """Depth of the first key in each of `count` rows that these nodes stand in; 0 where none does."""
    out = np.zeros(count, dtype=np.int64)
    out[rows] = cache.tree.depth[cache.tree.start[nodes]]
    return out


def _group(cache: TreeCache, nodes: Ints) -> list[tuple[Ints, int, Ints]]:
    """Sequences that share a call at one level: (sequences, block, row of each), by block, and inside a block by how crowded their node is.

    Width is padded to the fullest node of a call, so one crowded node must not widen many lonely ones: where padding would more than
    quadruple the work, nodes are grouped by the order of magnitude (base 4) of the sequences under them.
    """
    groups = []
    present = np.flatnonzero(nodes >= 0)
    blocks = cache.block_of[nodes[present]]
    for block in np.unique(blocks):
        members = present[blocks == block]
        rows = cache.row_of[nodes[members]]
        _, row, count = np.unique(rows, return_inverse=True, return_counts=True)
        crowd = np.zeros(len(count), dtype=np.int64)
        if len(count) * int(count.max()) > 4 * len(members):
            crowd = np.floor(np.log2(count) / 2).astype(np.int64)
        for value in np.unique(crowd):
            chosen = crowd[row] == value
            groups.append((members[chosen], int(block), rows[chosen]))
    return groups


class Suffixes:
    """Keys and values of the sampled tokens: per layer [slots, capacity, Hkv, D], grown by doubling."""

    def __init__(self, layers: int, slots: int, limit: int) -> None:
        self.slots, self.limit = slots, limit
        self.capacity = min(32, limit)
        self.k: list[Tensor | None] = [None] * layers
        self.v: list[Tensor | None] = [None] * layers

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [slots, Hkv, D] at rows (slot * capacity + offset); returns the layer's two buffers."""
        if (
            self.k[layer] is None
        ):  # zeros, not empty: an idle slot's result is thrown away but must stay finite
            self.k[layer] = k.new_zeros(self.slots, self.capacity, *k.shape[1:])
            self.v[layer] = v.new_zeros(self.slots, self.capacity, *v.shape[1:])
        key, value = self.k[layer], self.v[layer]
        assert key is not None
        assert value is not None
        key.view(-1, *key.shape[2:]).index_copy_(0, rows, k)
        value.view(-1, *value.shape[2:]).index_copy_(0, rows, v)
        return key, value

    def rows(self, offset: Ints) -> Ints:
        """Where the token with this offset [slots] in its response goes."""
        return np.arange(self.slots) * self.capacity + offset

    def grow(self, tokens: int) -> bool:
        """Make room for `tokens` per slot; True if that moved the rows."""
        if tokens <= self.capacity:
            return False
        more = min(max(2 * self.capacity, tokens), self.limit) - self.capacity
        for buffers in (self.k, self.v):
            for layer, old in enumerate(buffers):
                if old is not None:
                    buffers[layer] = torch.cat(
                        [old, old.new_zeros(old.shape[0], more, *old.shape[2:])], dim=1
                    )
        self.capacity += more
        return True

    def keep(self, slots: Tensor) -> None:
        """Keep only these slots, renumbered in this order."""
        for buffers in (self.k, self.v):
            for layer, old in enumerate(buffers):
                if old is not None:
                    buffers[layer] = old.index_select(0, slots)
        self.slots = len(slots)


class DecodePlan:
    """Attention of one new token per slot: over its prompt's nodes, then over its own suffix.

    `step` sets what changes with every token. A slot with path -1 everywhere would see its suffix only: idle slots keep their last path.
    In layers with a sliding window (`window` of attend) keys farther back are kept and not attended to.
    """

    windows = True

    def __init__(self, cache: TreeCache, paths: Ints, suffixes: Suffixes, *, device: torch.device) -> None:
        self.prompts = PathAttention(cache, paths, device)
        self.suffixes, self.device = suffixes, device
        self.seen, self.rows = 0, torch.empty(0)  # set by step()
        self.mask: Tensor | None = None  # likewise
        self._lengths = np.zeros(0, dtype=np.int64)  # likewise
        self._sights: dict[int, Sight] = {}  # by window

    def step(self, rows: Tensor, lengths: Ints, dtype: torch.dtype, positions: Ints | None = None) -> None:
        """rows: [slots], where the new token goes (Suffixes.rows); lengths: [slots], suffix tokens each slot sees, the new one included;
        positions: [slots], the new token's depth, for models with a sliding window."""
        self.rows, self.seen, self.mask = rows, int(lengths.max()), None
        self._lengths, self._sights = lengths, {}
        if positions is not None:
            self.prompts.stand_at(positions)
        if int(lengths.min()) < self.seen:
            hidden = torch.as_tensor(lengths, device=self.device)[:, None] <= torch.arange(
                self.seen, device=self.device
            )
            self.mask = torch.zeros(hidden.shape, device=self.device, dtype=dtype).masked_fill_(
                hidden, float("-inf")
            )[:, None, None]

    def tokens(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """q [S, Hq, D], k and v [S, Hkv, D] -> [S, Hq, D]."""
        slots, heads, dim = q.shape
        kv_heads = k.shape[1]
        keys, values = self.suffixes.write(layer, self.rows, k, v)
        parts = (
            q.reshape(slots, kv_heads, heads // kv_heads, dim),
            keys[:, : self.seen].transpose(1, 2),
            values[:, : self.seen].transpose(1, 2),
        )
        if window is None:
            own = partial_attention(*parts, scale, self.mask)
        else:
            own = seen_attention(*parts, scale, self._sight(window, heads // kv_heads, q.dtype))
        return self.prompts.attend(layer, q, kv_heads, scale, own, window)

    def _sight(self, window: int, group: int, dtype: torch.dtype) -> Sight:
        """What each slot sees of its suffix through a sliding window: itself and the window - 1 tokens before it."""
        if window not in self._sights:
            column, last = np.arange(self.seen), self._lengths[:, None] - 1
            seen = (column <= last) & (column > last - window)  # [slots, seen]
            each = torch.as_tensor(np.repeat(seen[:, None], group, axis=1), device=self.device)
            self._sights[window] = Sight.of(each, dtype)
        return self._sights[window]

    def last(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor) -> Tensor:
        """Every slot has one token, and every token is read."""
        raise AssertionError("a decode step asks for all rows")

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """For the transformers forward: q [S, Hq, 1, D], k and v [S, Hkv, 1, D] -> [S, 1, Hq, D]."""
        return self.tokens(layer, q.squeeze(2), k.squeeze(2), v.squeeze(2), scale, window)[:, None]
