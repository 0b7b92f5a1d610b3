"""The trie of a batch's prompts, as arrays for prefill and decoding. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fst_fast.forest import Forest, Leaf, pack

Ints = NDArray[np.int64]
_NONE = np.zeros(0, dtype=np.int64)
JOIN_TOKENS = 32
"""The cost of one node, in tokens: in every layer of every step it needs its own attention call, which takes about as
long as computing and reading this many tokens."""


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

    def path_of(self, nodes: Ints) -> Ints:
        """[nodes, levels]: each node's path from the root, padded with -1."""
        return _paths(nodes, self.parent, self.level)


def common(a: Ints, b: Ints) -> int:
    """Tokens at the beginning that two sequences share."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


def forest_of(prompts: Sequence[Ints], *, join_tokens: int = JOIN_TOKENS) -> Forest:
    """Merge equal prefixes, except those too short to be worth a node: a node at which no prompt ends is copied into
    its children if that adds at most `join_tokens` tokens."""
    forest = pack([Leaf(np.asarray(prompt, dtype=np.int64), _NONE) for prompt in prompts])
    above = forest.node_parent.tolist()
    children = np.bincount(forest.node_parent.astype(np.int64) + 1, minlength=len(above) + 1)[1:].tolist()
    ends = set(forest.leaf_node.tolist())
    tokens: list[Ints] = []  # of the remaining nodes
    parent: list[int] = []
    number: list[int] = []  # new index of each old node; of a node copied into its children, its parent's
    given: list[Ints] = []  # tokens that each old node passes to its children
    for node, up in enumerate(above):
        own = forest.token_ids[forest.node_start[node] : forest.node_end[node]]
        ids = own if up < 0 else np.concatenate([given[up], own])
        upper = -1 if up < 0 else number[up]
        if children[node] and node not in ends and len(ids) * (children[node] - 1) <= join_tokens:
            number.append(upper)
            given.append(ids)
        else:
            number.append(len(tokens))
            given.append(_NONE)
            tokens.append(ids)
            parent.append(upper)
    if len(tokens) == len(above):
        return forest
    length = np.array([len(ids) for ids in tokens], dtype=np.int64)
    end = np.cumsum(length)
    depth, last = np.zeros(len(tokens), dtype=np.int64), end.copy()
    for node, up in enumerate(parent):
        depth[node] = depth[up] + length[up] if up >= 0 else 0
    for node in reversed(range(len(tokens))):
        if parent[node] >= 0:
            last[parent[node]] = max(last[parent[node]], last[node])
    return replace(
        forest,
        token_ids=np.concatenate(tokens),
        depth=(np.arange(end[-1]) + np.repeat(depth - end + length, length)).astype(np.int32),
        subtree_end=np.repeat(last, length).astype(np.int32),
        node_start=(end - length).astype(np.int32),
        node_end=end.astype(np.int32),
        node_parent=np.array(parent, dtype=np.int32),
        leaf_node=np.array([number[node] for node in forest.leaf_node.tolist()], dtype=np.int32),
    )


def prompt_tree(
    prompts: Sequence[Ints] | Forest, *, max_node_tokens: int, cuts: Ints | None = None
) -> PromptTree:
    """Build the tree. A segment longer than `max_node_tokens` becomes a chain of nodes, so that they can be prefilled
    one by one. cuts: per forest node, how many of its first tokens form a node of their own, of any length (0: none)."""
    forest = prompts if isinstance(prompts, Forest) else forest_of(prompts, join_tokens=0)
    start: list[int] = []
    end: list[int] = []
    parent: list[int] = []
    final: list[int] = []  # the last piece of each node of the forest
    cut_at = np.zeros(len(forest.node_start), np.int64) if cuts is None else cuts
    rows = zip(forest.node_start.tolist(), forest.node_end.tolist(), forest.node_parent.tolist(), cut_at.tolist(), strict=True)  # fmt: skip
    for lo, hi, up, cut in rows:
        above = final[up] if up >= 0 else -1
        begins = [lo] * (cut > 0) + list(range(lo + cut, hi, max_node_tokens))
        for begin, stop in zip(begins, [*begins[1:], hi], strict=True):
            start.append(begin)
            end.append(stop)
            parent.append(above)
            above = len(start) - 1
        final.append(above)
    level = np.zeros(len(start), dtype=np.int64)
    for node, up in enumerate(parent):
        level[node] = level[up] + 1 if up >= 0 else 0
    ends, parents = np.asarray(end, dtype=np.int64), np.asarray(parent, dtype=np.int64)
    leaf = np.asarray(final, dtype=np.int64)[forest.leaf_node]
    return PromptTree(
        token_ids=forest.token_ids.astype(np.int64),
        depth=forest.depth.astype(np.int64),
        start=np.asarray(start, dtype=np.int64),
        end=ends,
        parent=parents,
        level=level,
        last=forest.subtree_end.astype(np.int64)[ends - 1],
        leaf=leaf,
        path=_paths(leaf, parents, level),
    )


def _paths(nodes: Ints, parent: Ints, level: Ints) -> Ints:
    path = np.full((len(nodes), int(level.max(initial=0)) + 1), -1, dtype=np.int64)
    at = np.array(nodes, dtype=np.int64)
    while (at >= 0).any():
        alive = np.flatnonzero(at >= 0)
        path[alive, level[at[alive]]] = at[alive]
        at[alive] = parent[at[alive]]
    return path
