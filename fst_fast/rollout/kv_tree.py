"""The KV cache as a tree, and the attention over it.

The prompts of a batch form a trie; every trie node owns one segment of keys and values, computed once and never copied per sample.
Softmax attention over a sequence's whole past is exact when it is done segment by segment: each part gives (out, lse), and parts merge with
weights softmax(lse) in fp32, always in the order root, ..., leaf, own suffix. So one decode step reads each shared segment once for all the
sequences below it: nodes of one level lie side by side in a *block*, and a whole block is one batched attention call, the query heads of
a KV group and the sequences below a node folded into the query length.

Prefill goes through the nodes in depth-first order, a window of whole nodes at a time. Whatever the window misses of its past is then the
one path of ancestors of its first node, and the queries that see such an ancestor are the first ones of the window.

No autograd here: this is for sampling. The design is that of KERNELS.md, section 3 (cascade attention), in plain torch calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fst_fast.rollout.prompt_tree import Ints, PromptTree
from fst_kernels.tree_attention import TreeMask, tree_attention


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention over part of the keys: out [B, H, Q, D] and, in float32, lse [B, H, Q].

    q [B, H, Q, D], k and v [B, H, L, D], mask additive [B, 1, 1, L]. On the CPU torch's flash attention, which returns the lse.
    """
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=mask, scale=scale
        )
        return out, lse
    return plain_partial_attention(q, k, v, scale, mask)


def plain_partial_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in float32 matrix products, on any device."""
    scores = torch.matmul(q.float() * scale, k.float().transpose(-1, -2))  # [B, H, Q, L]
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, dim=-1)
    return torch.matmul((scores - lse.unsqueeze(-1)).exp_(), v.float()), lse


@dataclass
class Block:
    """Keys and values of nodes of one level and similar length, one row per node, padded to the longest.

    nodes: [rows], ascending. k, v: per layer [rows, Hkv, L, D]. mask: additive [rows, 1, 1, L], None where all are of length L.
    """

    nodes: Ints
    lengths: Ints
    k: list[Tensor]
    v: list[Tensor]
    mask: Tensor | None


class TreeCache:
    """The prefilled nodes of a PromptTree, in blocks."""

    def __init__(self, tree: PromptTree) -> None:
        self.tree = tree
        self.blocks: list[Block] = []
        self.filled = 0  # nodes [0, filled) went through the model
        self.block_of = np.full(len(tree.start), -1, dtype=np.int64)  # per node: index in blocks, row in it
        self.row_of = np.full(len(tree.start), -1, dtype=np.int64)

    def add(self, blocks: Sequence[Block], filled: int) -> None:
        for block in blocks:
            self.block_of[block.nodes] = len(self.blocks)
            self.row_of[block.nodes] = np.arange(len(block.nodes))
            self.blocks.append(block)
        self.filled = filled

    def keep_only(self, nodes: Ints) -> None:
        """Free the blocks of which no node is in `nodes`."""
        held = self.block_of[nodes]
        kept = np.unique(held[held >= 0])
        if len(kept) == len(self.blocks):
            return
        renumber = np.full(
            len(self.blocks) + 1, -1, dtype=np.int64
        )  # the last one stands for "not filled" (-1)
        renumber[kept] = np.arange(len(kept))
        self.block_of = renumber[self.block_of]
        self.blocks = [self.blocks[i] for i in kept]

    def key(self, layer: int, node: int) -> tuple[Tensor, Tensor]:
        """k and v [1, Hkv, length, D] of one node."""
        block, row = self.blocks[self.block_of[node]], self.row_of[node]
        length = int(block.lengths[row])
        return block.k[layer][row : row + 1, :, :length], block.v[layer][row : row + 1, :, :length]


def _length_class(length: int) -> int:
    """Lengths of one class differ by less than a factor of two; everything up to 32 tokens is one class."""
    return max(int(length) - 1, 31).bit_length()


class PrefillPlan:
    """Attention for nodes [cache.filled, upto) of the tree, all their tokens in one forward; keeps their keys and values in new blocks."""

    def __init__(self, cache: TreeCache, upto: int, *, device: torch.device, dtype: torch.dtype) -> None:
        tree, first = cache.tree, cache.filled
        self.cache = cache
        self.begin, self.stop = int(tree.start[first]), int(tree.end[upto - 1])
        nodes = np.arange(first, upto)
        lengths = tree.end[nodes] - tree.start[nodes]
        node_of = np.repeat(nodes, lengths)
        subtree_end = np.minimum(tree.last[node_of], self.stop) - self.begin
        self.mask = TreeMask.from_subtree_end(torch.as_tensor(subtree_end.astype(np.int32), device=device))
        self.ancestors: list[
            tuple[int, int]
        ] = []  # (node, its queries are the first ones of the window), root first
        above = int(tree.parent[first])
        while above >= 0:
            self.ancestors.append((above, min(int(tree.last[above]), self.stop) - self.begin))
            above = int(tree.parent[above])
        self.ancestors.reverse()

        groups: dict[tuple[int, int], list[int]] = {}
        for node, length in zip(nodes, lengths, strict=True):
            groups.setdefault((int(tree.level[node]), _length_class(length)), []).append(int(node))
        self.blocks: list[Block] = []
        self.gather: list[Tensor] = []  # per block [rows * L], tokens of the window
        for members in groups.values():
            own = np.asarray(members, dtype=np.int64)
            length = tree.end[own] - tree.start[own]
            column = np.arange(int(length.max()))
            there = column < length[:, None]  # [rows, L]
            index = np.where(there, tree.start[own][:, None] - self.begin + column, 0)
            self.gather.append(torch.as_tensor(index.reshape(-1), device=device))
            mask = None
            if not there.all():
                mask = torch.zeros(len(own), 1, 1, len(column), device=device, dtype=dtype)
                mask.masked_fill_(torch.as_tensor(~there, device=device)[:, None, None, :], float("-inf"))
            self.blocks.append(Block(own, length, [], [], mask))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [1, Hq, N, D], k and v [1, Hkv, N, D] -> [1, N, Hq, D]; stores k and v."""
        heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[-1]
        for block, index in zip(self.blocks, self.gather, strict=True):
            for kept, new in ((block.k, k), (block.v, v)):
                assert len(kept) == layer, f"layer {layer} came after {len(kept)} layers"
                rows = new[0].index_select(1, index)  # [Hkv, rows * L, D]
                kept.append(rows.view(kv_heads, len(block.nodes), -1, new.shape[-1]).transpose(0, 1))
        out, lse = tree_attention(q, k, v, self.mask, scale=scale, return_lse=True)
        out = out.float()
        for node, seen in reversed(self.ancestors):  # from the window's parent up to the root
            key, value = self.cache.key(layer, node)
            queries = q[:, :, :seen].reshape(1, kv_heads, heads // kv_heads * seen, dim)
            part, part_lse = partial_attention(queries, key, value, scale, None)
            part_lse = part_lse.reshape(1, heads, seen)
            total = torch.logaddexp(lse[:, :, :seen], part_lse)
            out[:, :, :seen] *= (lse[:, :, :seen] - total).exp().unsqueeze(-1)
            out[:, :, :seen] += part.reshape(1, heads, seen, -1) * (part_lse - total).exp().unsqueeze(-1)
            lse[:, :, :seen] = total
        return out.to(q.dtype).transpose(1, 2)


class Suffixes:
    """Keys and values of the sampled tokens: per layer [slots, capacity, Hkv, D], grown by doubling."""

    def __init__(self, layers: int, slots: int, limit: int) -> None:
        self.slots, self.limit = slots, limit
        self.capacity = min(64, limit)
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


@dataclass
class _Call:
    """One batched attention call of a decode step: sequences grouped under the rows of a block."""

    k: list[Tensor]  # per layer [n, Hkv, L, D]
    v: list[Tensor]
    mask: Tensor | None
    rows: int  # n
    width: int  # most sequences under one row
    begin: int  # its place in the list of partial results


class DecodePlan:
    """Attention of one new token per slot: over its prompt's nodes, level by level, then over its own suffix.

    The work list depends on which node each slot stands under and is built once for as long as that holds; `step` sets what changes with
    every token. A slot with path -1 everywhere would see its suffix only: idle slots keep their last path.
    """

    def __init__(
        self, cache: TreeCache, paths: Ints, suffixes: Suffixes, *, layers: int, device: torch.device
    ) -> None:
        slots = len(paths)
        self.suffixes, self.slots, self.device = suffixes, slots, device
        self.tokens, self.rows = 0, torch.empty(0)  # set by step()
        self.mask: Tensor | None = None  # likewise
        self.calls: list[_Call] = []
        queries: list[Ints] = []
        nowhere = slots  # partial results: the suffixes, one that weighs nothing, then the calls
        used = slots + 1
        levels = [level for level in range(paths.shape[1]) if (paths[:, level] >= 0).any()]
        where = np.full(
            (len(levels) + 1, slots), nowhere, dtype=np.int64
        )  # [parts, slots], root first, the suffix last
        where[-1] = np.arange(slots)
        for part, level in enumerate(levels):
            for members, block, rows in _group(cache, paths[:, level]):
                unique, row = np.unique(rows, return_inverse=True)
                order = np.argsort(row, kind="stable")
                count = np.bincount(row)
                lane = np.empty(len(row), dtype=np.int64)
                lane[order] = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
                whole = (
                    2 * len(unique) > unique[-1] + 1 - unique[0]
                )  # dense enough: a view, holes and all; else a copy
                position = rows - unique[0] if whole else row
                n, width = (int(unique[-1] + 1 - unique[0]) if whole else len(unique)), int(count.max())
                take = np.zeros(
                    n * width, dtype=np.int64
                )  # a lane without a sequence computes slot 0's, for nobody
                take[position * width + lane] = members
                where[part, members] = used + position * width + lane
                queries.append(take)
                stored = cache.blocks[block]
                at = None if whole else torch.as_tensor(unique, device=device)
                span = slice(int(unique[0]), int(unique[-1]) + 1)
                pick = partial(_pick, span=span, at=at)
                self.calls.append(
                    _Call(
                        k=[pick(stored.k[layer]) for layer in range(layers)],
                        v=[pick(stored.v[layer]) for layer in range(layers)],
                        mask=None if stored.mask is None else pick(stored.mask),
                        rows=n,
                        width=width,
                        begin=used,
                    )
                )
                used += n * width
        self.queries = torch.as_tensor(np.concatenate(queries), device=device)
        self.where = torch.as_tensor(where.reshape(-1), device=device)
        self.parts = len(levels) + 1
        self.used = used
        self.out: Tensor | None = None  # partial results of one layer: [used, Hkv, G, D] and [used, Hkv, G]
        self.lse: Tensor | None = None

    def step(self, rows: Tensor, lengths: Ints, dtype: torch.dtype) -> None:
        """rows: [slots], where in the suffix buffers the new token goes; lengths: [slots], suffix tokens each slot sees, the new one included."""
        self.rows, self.tokens, self.mask = rows, int(lengths.max()), None
        if int(lengths.min()) < self.tokens:
            seen = torch.as_tensor(lengths, device=self.device)[:, None] > torch.arange(
                self.tokens, device=self.device
            )
            self.mask = torch.zeros(seen.shape, device=self.device, dtype=dtype).masked_fill_(
                ~seen, float("-inf")
            )[:, None, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [S, Hq, 1, D], k and v [S, Hkv, 1, D] -> [S, 1, Hq, D]."""
        slots, heads, _, dim = q.shape
        kv_heads, value_dim = k.shape[1], v.shape[-1]
        group = heads // kv_heads
        keys, values = self.suffixes.write(layer, self.rows, k.squeeze(2), v.squeeze(2))
        q = q.reshape(slots, kv_heads, group, dim)
        part, lse = partial_attention(
            q,
            keys[:, : self.tokens].transpose(1, 2),
            values[:, : self.tokens].transpose(1, 2),
            scale,
            self.mask,
        )
        if self.out is None or self.lse is None:
            self.out = part.new_zeros(self.used, kv_heads, group, value_dim)
            self.lse = lse.new_full((self.used, kv_heads, group), float("-inf"))
        self.out[:slots] = part
        self.lse[:slots] = lse
        spread = q.index_select(0, self.queries)  # every call's queries, one after the other
        taken = 0
        for call in self.calls:
            size = call.rows * call.width
            mine = (
                spread[taken : taken + size].view(call.rows, call.width, kv_heads, group, dim).transpose(1, 2)
            )
            part, lse = partial_attention(
                mine.reshape(call.rows, kv_heads, call.width * group, dim),
                call.k[layer],
                call.v[layer],
                scale,
                call.mask,
            )
            at = slice(call.begin, call.begin + size)
            self.out[at].view(call.rows, call.width, kv_heads, group, value_dim).copy_(
                part.view(call.rows, kv_heads, call.width, group, value_dim).transpose(1, 2)
            )
            self.lse[at].view(call.rows, call.width, kv_heads, group).copy_(
                lse.reshape(call.rows, kv_heads, call.width, group).transpose(1, 2)
            )
            taken += size
        weights = torch.softmax(
            self.lse.index_select(0, self.where).view(self.parts, slots, kv_heads, group), dim=0
        )
        merged = self.out.index_select(0, self.where).view(self.parts, slots, kv_heads, group, value_dim)
        return (merged * weights.unsqueeze(-1)).sum(0).to(q.dtype).view(slots, 1, heads, value_dim)


def _pick(stored: Tensor, *, span: slice, at: Tensor | None) -> Tensor:
    return stored[span] if at is None else stored.index_select(0, at)


def _group(cache: TreeCache, nodes: Ints) -> list[tuple[Ints, int, Ints]]:
    """Slots that share a call at one level: (slots, block, row of each), by block, and inside a block by how crowded their node is.

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
