"""Prefix cache across calls with the same weights: the longest cached prefix of a prompt is reused instead of recomputed.

A call stores its prompt tree with the blocks that are still allocated and the logits at the ends of its prompts. The
next call walks its own tree along the stored ones. A node, or its beginning, that is cached becomes rows of an earlier
block: shared if a stored node matches entirely, else copied (copying a token's keys and values costs a thousandth of computing them).

The caller must know that the weights are the same. It also decides whether to reuse at all: logits computed in another
batch agree only up to rounding, so a run that must be bit-reproducible clears the cache at every point that it can be resumed from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fst_fast.forest import Forest
from fst_fast.rollout.kv_tree import Block, TreeCache, allocate_blocks
from fst_fast.rollout.prompt_tree import Ints, common

KEEP_CALLS = 4
"""A stored call is dropped after this many calls in a row that reused nothing of it."""


@dataclass(frozen=True)
class Segment:
    """Tokens [begin, end) of a cached node."""

    block: Block
    row: int
    begin: int
    end: int

    def whole(self) -> bool:
        return self.begin == 0 and self.end == int(self.block.lengths[self.row])


@dataclass
class PrefixMatch:
    """The cached part of each node of a new forest: the number of tokens, where they are stored, and the logits at the
    node's end, if known."""

    cuts: Ints  # [nodes]; a whole node only if its final logits are known or not needed
    segments: list[list[Segment]]
    logits: list[Tensor | None]  # [V] each


@dataclass
class CachedCall:
    """One earlier call. logits: [V], by the node at whose end a prompt ended."""

    cache: TreeCache
    logits: dict[int, Tensor]
    unused: int = 0  # calls in a row that reused nothing of it
    # node (-1: none) -> first token -> child
    branches: dict[int, dict[int, list[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tree = self.cache.tree
        for node in self.cache.cached_nodes().tolist():
            first = int(tree.token_ids[tree.start[node]])
            self.branches.setdefault(int(tree.parent[node]), {}).setdefault(first, []).append(node)

    def follow(self, at: tuple[int, int], ids: Ints) -> tuple[list[Segment], tuple[int, int]]:
        """Walk on from `at` = (node, offset in the node) along `ids`; returns the segments passed and the final position."""
        tree = self.cache.tree
        node, offset = at
        segments: list[Segment] = []
        while len(ids):
            if node < 0 or offset == tree.end[node] - tree.start[node]:
                children = self.branches.get(node, {}).get(int(ids[0]), [])
                same, child = max(((self._common(c, 0, ids), c) for c in children), default=(0, -1))
                if not same:
                    break
                node, offset = child, 0
            else:
                same = self._common(node, offset, ids)
                if not same:
                    break
            block = self.cache.blocks[int(self.cache.block_of[node])]
            segments.append(Segment(block, int(self.cache.row_of[node]), offset, offset + same))
            ids, offset = ids[same:], offset + same
        return segments, (node, offset)

    def _common(self, node: int, offset: int, ids: Ints) -> int:
        """How many of `ids` match the node's tokens from `offset` on."""
        tree = self.cache.tree
        return common(tree.token_ids[int(tree.start[node]) + offset : int(tree.end[node])], ids)


class PrefixCache:
    """The stored calls, newest first."""

    def __init__(self) -> None:
        self.calls: list[CachedCall] = []

    @property
    def tokens(self) -> int:
        """Allocated tokens of all stored blocks."""
        blocks = {id(block): block for call in self.calls for block in call.cache.blocks.values()}
        return sum(block.tokens for block in blocks.values())

    def forget(self) -> None:
        self.calls.clear()

    def keep(self, cache: TreeCache, logits: dict[int, Tensor]) -> None:
        if cache.blocks:
            self.calls.insert(0, CachedCall(cache, logits))

    def find(self, forest: Forest) -> PrefixMatch:
        """The longest cached prefixes of a forest's nodes. A call counts as unused if newer calls have as much of everything."""
        ends = set(forest.leaf_node.tolist())
        count = len(forest.node_start)
        found = PrefixMatch(np.zeros(count, np.int64), [[] for _ in range(count)], [None] * count)
        used: set[int] = set()
        reached: list[dict[int, tuple[int, int]]] = []  # per node: call -> its position at the node's end
        rows = zip(
            forest.node_start.tolist(), forest.node_end.tolist(), forest.node_parent.tolist(), strict=True
        )
        for node, (start, end, parent) in enumerate(rows):
            ids = forest.token_ids[start:end]
            before = dict.fromkeys(range(len(self.calls)), (-1, 0)) if parent < 0 else reached[parent]
            reached.append({})
            for number, at in before.items():
                call = self.calls[number]
                segments, now = call.follow(at, ids)
                covered = sum(s.end - s.begin for s in segments)
                logits = None
                if covered == len(ids):
                    reached[node][number] = now
                    length = call.cache.tree.end[now[0]] - call.cache.tree.start[now[0]]
                    logits = call.logits.get(now[0]) if now[1] == length else None
                    if node in ends and logits is None:  # the last token must be recomputed for its logits
                        segments, covered = _shortened(segments), covered - 1
                if covered > found.cuts[node] or (covered == found.cuts[node] and found.logits[node] is None and logits is not None):  # fmt: skip
                    found.cuts[node], found.segments[node], found.logits[node] = covered, segments, logits
                    used.add(number)
        for number, call in enumerate(self.calls):
            call.unused = 0 if number in used else call.unused + 1
        self.calls = [call for call in self.calls if call.unused < KEEP_CALLS]
        return found


def _shortened(segments: list[Segment]) -> list[Segment]:
    last = segments[-1]
    rest = [Segment(last.block, last.row, last.begin, last.end - 1)] * (last.end - last.begin > 1)
    return segments[:-1] + rest


def adopt(cache: TreeCache, forest: Forest, found: PrefixMatch, *, layers: int) -> dict[int, Tensor]:
    """Enter the matches into the cache of the tree that was cut at them; returns the known logits by tree node."""
    tree = cache.tree
    node_of = np.searchsorted(tree.start, forest.node_start)  # the first piece of each node of the forest
    logits: dict[int, Tensor] = {}
    copied: list[tuple[int, list[Segment]]] = []
    for node in np.flatnonzero(found.cuts).tolist():
        piece, segments, known = int(node_of[node]), found.segments[node], found.logits[node]
        if len(segments) == 1 and segments[0].whole():
            cache.add(segments[0].block, np.array([piece]), np.array([segments[0].row]))
        else:
            copied.append((piece, segments))
        if known is not None:
            logits[piece] = known
    nodes = np.array([piece for piece, _ in copied], dtype=np.int64)
    lengths = tree.end[nodes] - tree.start[nodes]
    for own, block in allocate_blocks(tree.level[nodes], lengths, pool=cache.pool):
        for layer in range(layers):
            both = []
            for which in (0, 1):
                rows = [
                    [s.block.row(layer, s.row)[which][0, :, s.begin : s.end] for s in copied[i][1]]
                    for i in own
                ]
                first = rows[0][0]  # [Hkv, n, D]
                whole = first.new_zeros(len(own), len(first), int(block.lengths.max()), first.shape[2])
                for target, parts in zip(whole, rows, strict=True):
                    joined = torch.cat(parts, dim=1)
                    target[:, : joined.shape[1]] = joined
                both.append(whole)
            block.put(layer, *both)
        cache.add(block, nodes[own], np.arange(len(own)))
    return logits
