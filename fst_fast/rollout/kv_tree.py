"""The keys and values of the prompts of one call: a trie, every node of which owns one segment, computed once and never copied per sample.

Nodes are stored in blocks, those of one level and similar length that were prefilled together, so that attention over a whole block is
one batched operation. Memory is held and given back by the block. A node may come from an earlier call (prefixes.py); whatever it came
from, it is a row of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fst_fast.rollout.prompt_tree import Ints, PromptTree


@dataclass
class Block:
    """Keys and values of nodes of one level and similar length, one row per node, padded to the longest.

    lengths: [rows]. k, v: per layer [rows, Hkv, L, D]. mask: additive [rows, 1, 1, L], None where all are of length L.
    """

    lengths: Ints
    mask: Tensor | None
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that it takes the memory of, padding included."""
        return len(self.lengths) * int(self.lengths.max())

    def part(self, rows: Ints, length: int) -> Block:
        """A block of these rows, none of them longer than `length`."""
        at = torch.as_tensor(rows, device=self.k[0].device)
        return Block(
            self.lengths[rows],
            None if self.mask is None else self.mask.index_select(0, at)[..., :length],
            [k.index_select(0, at)[:, :, :length].contiguous() for k in self.k],
            [v.index_select(0, at)[:, :, :length].contiguous() for v in self.v],
        )

    def row(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """k and v [1, Hkv, length, D] of one node."""
        length = int(self.lengths[row])
        return self.k[layer][row : row + 1, :, :length], self.v[layer][row : row + 1, :, :length]


class TreeCache:
    """The blocks of a PromptTree's nodes. filled: [nodes] bool, whether a node's keys and values are there or were."""

    def __init__(self, tree: PromptTree) -> None:
        self.tree = tree
        self.blocks: dict[int, Block] = {}  # by a number that is never used twice
        self.filled = np.zeros(len(tree.start), dtype=bool)
        self.block_of = np.full(len(tree.start), -1, dtype=np.int64)  # per node: its block, its row there
        self.row_of = np.full(len(tree.start), -1, dtype=np.int64)
        self._next = 0

    def add(self, block: Block, nodes: Ints, rows: Ints) -> None:
        """Let `nodes` be these rows of `block`."""
        number = next((n for n, known in self.blocks.items() if known is block), self._next)
        self._next = max(self._next, number + 1)
        self.blocks[number] = block
        self.block_of[nodes], self.row_of[nodes] = number, rows
        self.filled[nodes] = True

    def block(self, number: int) -> Block:
        return self.blocks[number]

    def keep_only(self, nodes: Ints, *, tight: bool = False) -> None:
        """Give back the blocks of which no node is in `nodes`; tight: and the other rows and the padding of those that stay."""
        kept = set(self.block_of[nodes].tolist())
        self.blocks = {number: block for number, block in self.blocks.items() if number in kept}
        if not tight:
            return
        for number, block in self.blocks.items():
            members = nodes[self.block_of[nodes] == number]
            rows = self.row_of[members]
            longest = int(block.lengths[rows].max())
            if len(np.unique(rows)) * longest < block.tokens:
                self.blocks[number] = block.part(rows, longest)
                self.block_of[self.block_of == number] = -1
                self.block_of[members], self.row_of[members] = number, np.arange(len(members))

    def held(self) -> Ints:
        """The nodes whose keys and values are there now."""
        return np.flatnonzero(np.isin(self.block_of, list(self.blocks)))

    @property
    def tokens(self) -> int:
        """Tokens that the blocks take the memory of."""
        return sum(block.tokens for block in self.blocks.values())


def length_class(length: int) -> int:
    """Lengths of one class differ by less than a factor of two; everything up to 32 tokens is one class."""
    return max(int(length) - 1, 31).bit_length()


def blocks_of(
    levels: Ints, lengths: Ints, *, device: torch.device, dtype: torch.dtype
) -> list[tuple[Ints, Block, Ints]]:
    """Empty blocks for nodes of these levels and lengths: (which of the nodes, the block, [rows, L] the offset in its node of each place
    of the block, -1 in padding)."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (level, length) in enumerate(zip(levels.tolist(), lengths.tolist(), strict=True)):
        groups.setdefault((level, length_class(length)), []).append(i)
    out = []
    for members in groups.values():
        own = np.asarray(members, dtype=np.int64)
        column = np.arange(int(lengths[own].max()))
        there = column < lengths[own][:, None]  # [rows, L]
        mask = None
        if not there.all():
            mask = torch.zeros(len(own), 1, 1, len(column), device=device, dtype=dtype)
            mask.masked_fill_(torch.as_tensor(~there, device=device)[:, None, None, :], float("-inf"))
        out.append((own, Block(lengths[own], mask), np.where(there, column, -1)))
    return out


def token_bytes(layers: int, kv_heads: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token, over all layers."""
    return 2 * layers * kv_heads * dim * dtype.itemsize
