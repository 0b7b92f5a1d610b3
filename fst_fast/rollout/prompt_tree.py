"""The trie of a batch's prompts, in the arrays that prefill and decoding look things up in. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fst_fast.forest import Leaf, pack

Ints = NDArray[np.int64]
_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class PromptTree:
    """The trie of a batch's prompts, nodes numbered in depth-first preorder, tokens laid out in the same order.

    token_ids, depth: [N]; start, end (token range), parent (-1 at roots), level (0 at roots), last (exclusive end of the node's subtree
    in tokens): [nodes]; leaf: [prompts], node at whose end each prompt ends; path: [prompts, levels], its nodes from the root, then -1.
    """

    token_ids: Ints
    depth: Ints
    start: Ints
    end: Ints
    parent: Ints
    level: Ints
    last: Ints
    leaf: Ints
    path: Ints


def prompt_tree(prompts: Sequence[Ints], *, max_node_tokens: int) -> PromptTree:
    """Merge equal prefixes. A segment longer than `max_node_tokens` becomes a chain of nodes, so that one can be prefilled at a time."""
    forest = pack([Leaf(np.asarray(prompt, dtype=np.int64), _NONE) for prompt in prompts])
    start: list[int] = []
    end: list[int] = []
    parent: list[int] = []
    final: list[int] = []  # the last piece of each node of the forest
    for lo, hi, up in zip(forest.node_start, forest.node_end, forest.node_parent, strict=True):
        above = final[up] if up >= 0 else -1
        for piece in range(int(lo), int(hi), max_node_tokens):
            start.append(piece)
            end.append(min(piece + max_node_tokens, int(hi)))
            parent.append(above)
            above = len(start) - 1
        final.append(above)
    level = np.zeros(len(start), dtype=np.int64)
    for node, up in enumerate(parent):
        level[node] = level[up] + 1 if up >= 0 else 0
    ends = np.asarray(end, dtype=np.int64)
    leaf = np.asarray(final, dtype=np.int64)[forest.leaf_node]
    path = np.full((len(prompts), int(level.max()) + 1), -1, dtype=np.int64)
    at = leaf.copy()
    while (at >= 0).any():
        alive = np.flatnonzero(at >= 0)
        path[alive, level[at[alive]]] = at[alive]
        at[alive] = np.asarray(parent, dtype=np.int64)[at[alive]]
    return PromptTree(
        token_ids=forest.token_ids.astype(np.int64),
        depth=forest.depth.astype(np.int64),
        start=np.asarray(start, dtype=np.int64),
        end=ends,
        parent=np.asarray(parent, dtype=np.int64),
        level=level,
        last=forest.subtree_end.astype(np.int64)[ends - 1],
        leaf=leaf,
        path=path,
    )
