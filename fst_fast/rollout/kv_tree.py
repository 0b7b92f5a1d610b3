"""The KV cache of one call's prompts: a trie whose nodes each own one segment, computed once and never copied per sample.

Nodes are stored in blocks: nodes of one level and similar length that were prefilled together occupy a range of a pool
(kv_pool.py). Memory is allocated and freed by the block. A node can also come from an earlier call (prefixes.py); in
either case it is a row of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fst_fast.rollout.kv_pool import KVPool, Span
from fst_fast.rollout.prompt_tree import Ints, PromptTree


@dataclass
class Block:
    """Keys and values of nodes of one level and similar length: one row per node, padded to the longest, L tokens.

    lengths: [rows]. span: rows * L slots of a pool."""

    lengths: Ints
    span: Span

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @property
    def tokens(self) -> int:
        """Allocated tokens, padding included."""
        return len(self.lengths) * self.longest

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v [rows, Hkv, L, D]"""
        self.span.put(layer, k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1))

    def kv(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, Hkv, L, D]."""
        rows = len(self.lengths)
        k, v = (x.view(rows, -1, *x.shape[1:]).transpose(1, 2) for x in self.span.kv(layer))
        return k, v

    def row(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """k and v [1, Hkv, length, D] of one node."""
        k, v = self.kv(layer)
        length = int(self.lengths[row])
        return k[row : row + 1, :, :length], v[row : row + 1, :, :length]

    def slot(self, row: int) -> int:
        """Pool index of the node's first token."""
        return self.span.first + row * self.longest

    def select(self, rows: Ints, length: int) -> Block:
        """A new block with copies of these rows, none longer than `length`."""
        pool = self.span.pool
        out = Block(self.lengths[rows], pool.take(len(rows) * length))
        for layer in range(len(pool.k)):
            at = torch.as_tensor(rows, device=pool.k[layer].device)
            k, v = (x.index_select(0, at)[:, :, :length].contiguous() for x in self.kv(layer))
            out.put(layer, k, v)
        return out


class TreeCache:
    """The blocks of a PromptTree's nodes, in ranges of `pool`. filled: [nodes] bool, whether a node's keys and values
    are or were cached."""

    def __init__(self, tree: PromptTree, pool: KVPool) -> None:
        self.tree, self.pool = tree, pool
        self.blocks: dict[int, Block] = {}  # by a number that is never reused
        self.filled = np.zeros(len(tree.start), dtype=bool)
        self.block_of = np.full(len(tree.start), -1, dtype=np.int64)  # per node: its block, its row there
        self.row_of = np.full(len(tree.start), -1, dtype=np.int64)
        self._next = 0

    def add(self, block: Block, nodes: Ints, rows: Ints) -> None:
        """Map `nodes` to these rows of `block`."""
        number = next((n for n, known in self.blocks.items() if known is block), self._next)
        self._next = max(self._next, number + 1)
        self.blocks[number] = block
        self.block_of[nodes], self.row_of[nodes] = number, rows
        self.filled[nodes] = True

    def slots_of(self, nodes: Ints) -> Ints:
        """[all nodes] pool index of the first token of each of `nodes`, which must be cached; 0 for other nodes.
        Allocations can move ranges, so do not store the result."""
        out = np.zeros(len(self.block_of), dtype=np.int64)
        where = zip(self.block_of[nodes].tolist(), self.row_of[nodes].tolist(), strict=True)
        out[nodes] = [self.blocks[block].slot(row) for block, row in where]
        return out

    def keep_only(self, nodes: Ints, *, compact: bool = False) -> None:
        """Free the blocks that contain none of `nodes`. compact: also free other rows and the padding of the remaining blocks."""
        kept = set(self.block_of[nodes].tolist())
        self.blocks = {number: block for number, block in self.blocks.items() if number in kept}
        if not compact:
            return
        for number, block in self.blocks.items():
            members = nodes[self.block_of[nodes] == number]
            rows = self.row_of[members]
            longest = int(block.lengths[rows].max())
            if len(np.unique(rows)) * longest < block.tokens:
                self.blocks[number] = block.select(rows, longest)
                self.block_of[self.block_of == number] = -1
                self.block_of[members], self.row_of[members] = number, np.arange(len(members))

    def cached_nodes(self) -> Ints:
        """The nodes whose keys and values are cached now."""
        return np.flatnonzero(np.isin(self.block_of, list(self.blocks)))

    @property
    def tokens(self) -> int:
        """Allocated tokens of all blocks."""
        return sum(block.tokens for block in self.blocks.values())


def length_bucket(length: int) -> int:
    """Lengths in one bucket differ by less than a factor of two; lengths up to 32 tokens share one bucket."""
    return max(int(length) - 1, 31).bit_length()


def group_blocks(levels: Ints, lengths: Ints) -> list[Ints]:
    """Which of the nodes of these levels and lengths make a block each: their indices."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (level, length) in enumerate(zip(levels.tolist(), lengths.tolist(), strict=True)):
        groups.setdefault((level, length_bucket(length)), []).append(i)
    return [np.asarray(members, dtype=np.int64) for members in groups.values()]


def allocate_blocks(levels: Ints, lengths: Ints, *, pool: KVPool) -> list[tuple[Ints, Block]]:
    """Allocate blocks for nodes of these levels and lengths; returns (indices of the nodes, their block) per block."""
    out = []
    for own in group_blocks(levels, lengths):
        span = pool.take(len(own) * int(lengths[own].max()))
        out.append((own, Block(lengths[own], span)))
    return out


def token_bytes(layers: int, kv_heads: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token, over all layers."""
    return 2 * layers * kv_heads * dim * dtype.itemsize
