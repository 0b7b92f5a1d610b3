"""A batch of token sequences as a forest: every shared prefix is stored, and computed, once.

A *leaf* is one sequence: a prompt and its response. Leaves that begin with the same token ids share those tokens; where
they diverge, the trie has a *node* boundary. Nodes are laid out in depth-first preorder, so a node's descendants are
the contiguous range after it, and one int32 per token encodes the whole attention mask:

    key i is visible to query j   iff   i <= j < subtree_end[i]

`depth` is a token's position in its own sequence, used for rotary embeddings. Sharing depends on token ids alone, not
on contexts, problems or samples. With share="prompts", responses are kept separate even if two samples agree: every
label has a row of its own response, except the first, which all samples of a prompt predict from the prompt's last
token. With share="all", responses are merged too, and one row can carry the labels of many leaves.

numpy only: arrays are compared as a whole, never token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fst_fast.errors import UserError

Share = Literal["prompts", "all"]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Leaf:
    """One sequence. The response may be empty (a prompt to prefill); the prompt may not.

    sampled: bool [response], which of its tokens are labels; None: all. The others are what an environment said between two turns."""

    prompt_ids: Ids
    response_ids: Ids
    sampled: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Forest:
    """N tokens in S nodes, M labels of L leaves. Nodes are in depth-first preorder; the tokens of node s start at node_start[s]."""

    token_ids: Ids  # [N]
    depth: NDArray[np.int32]  # [N]
    subtree_end: NDArray[np.int32]  # [N], exclusive
    node_start: NDArray[np.int32]  # [S]
    node_end: NDArray[np.int32]  # [S]
    node_parent: NDArray[np.int32]  # [S], -1 for a root
    leaf_node: NDArray[np.int32]  # [L], the node at whose end the leaf ends
    rows: Ids  # [M], the token whose hidden state predicts the label
    labels: Ids  # [M]
    leaf: Ids  # [M], which leaf the label belongs to
    offset: Ids  # [M], which token of the leaf's response it is

    def path(self, leaf: int) -> Ids:
        """Indices in the forest of the leaf's tokens (prompt, then response), in order."""
        nodes = []
        node = int(self.leaf_node[leaf])
        while node >= 0:
            nodes.append(np.arange(self.node_start[node], self.node_end[node], dtype=np.int64))
            node = int(self.node_parent[node])
        return np.concatenate(nodes[::-1])


class _Trie:
    """Nodes as parallel lists. Node 0 is the parent of all roots and has no tokens. Splitting a node keeps its id for the lower part."""

    def __init__(self) -> None:
        self.tokens: list[Ids] = [np.empty(0, np.int64)]
        self.branches: list[dict[int, int]] = [{}]  # first token -> child
        self.tails: list[list[int]] = [[]]  # children that are never merged: responses under share="prompts"

    def add(self, tokens: Ids) -> int:
        self.tokens.append(tokens)
        self.branches.append({})
        self.tails.append([])
        return len(self.tokens) - 1

    def insert(self, ids: Ids) -> int:
        """Walk down along `ids`, splitting and adding nodes where they diverge; return the node at which they end."""
        node, at = 0, 0
        while at < len(ids):
            first = int(ids[at])
            child = self.branches[node].get(first)
            if child is None:
                child = self.branches[node][first] = self.add(ids[at:])
                return child
            segment = self.tokens[child]
            n = min(len(segment), len(ids) - at)
            differs = segment[:n] != ids[at : at + n]
            common = int(differs.argmax()) if differs.any() else n
            if common < len(segment):
                upper = self.add(segment[:common])
                self.tokens[child] = segment[common:]
                self.branches[upper][int(segment[common])] = child
                self.branches[node][first] = upper
                child = upper
            node, at = child, at + common
        return node

    def insert_unmerged(self, node: int, ids: Ids) -> int:
        tail = self.add(ids)
        self.tails[node].append(tail)
        return tail


def _build(leaves: Sequence[Leaf], share: Share) -> tuple[_Trie, list[int]]:
    trie = _Trie()
    known: dict[bytes, int] = {}  # most prompts occur group_size times: look them up instead of walking

    def insert(ids: Ids) -> int:
        key = ids.tobytes()
        if key not in known:
            known[key] = trie.insert(ids)
        return known[key]

    if share == "all":
        return trie, [insert(np.concatenate([leaf.prompt_ids, leaf.response_ids])) for leaf in leaves]
    prompt_ends = [insert(leaf.prompt_ids) for leaf in leaves]
    ends = []
    for leaf, node in zip(leaves, prompt_ends, strict=True):
        ends.append(trie.insert_unmerged(node, leaf.response_ids) if len(leaf.response_ids) else node)
    return trie, ends


def _preorder(trie: _Trie, ends: Sequence[int]) -> tuple[list[list[int]], list[int], dict[int, int]]:
    """Nodes in preorder as runs of trie nodes. A node with a single child, at which no leaf ends, is joined with that child.

    Returns the runs, the parent of each run, and the run that each trie node ends, if it ends one."""
    leaf_ends = set(ends)
    runs: list[list[int]] = []
    parents: list[int] = []
    index: dict[int, int] = {}
    stack = [(node, -1) for node in reversed(trie.branches[0].values())]
    while stack:
        node, parent = stack.pop()
        run = [node]
        children = [*trie.tails[node], *trie.branches[node].values()]
        while len(children) == 1 and node not in leaf_ends:
            node = children[0]
            run.append(node)
            children = [*trie.tails[node], *trie.branches[node].values()]
        index[node] = len(runs)
        runs.append(run)
        parents.append(parent)
        stack.extend((child, index[node]) for child in reversed(children))
    return runs, parents, index


def pack(leaves: Sequence[Leaf], *, share: Share = "prompts") -> Forest:
    """Lay the leaves out as a forest. Trees and branches are ordered by first appearance; a prompt's responses come before longer prompts.

    Raises ValueError for a leaf without a prompt, and for ids that are not one-dimensional int64."""
    _check(leaves, share)
    trie, ends = _build(leaves, share)
    runs, parents, index = _preorder(trie, ends)

    pieces = [trie.tokens[node] for run in runs for node in run]
    token_ids = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    lengths = np.array([sum(len(trie.tokens[node]) for node in run) for run in runs], dtype=np.int64)
    node_end = np.cumsum(lengths)
    node_start = node_end - lengths

    depth_before = np.zeros(len(runs), np.int64)
    for s, parent in enumerate(parents):
        if parent >= 0:
            depth_before[s] = depth_before[parent] + lengths[parent]
    subtree_end = node_end.copy()
    for s in range(len(runs) - 1, -1, -1):
        if parents[s] >= 0:
            subtree_end[parents[s]] = max(subtree_end[parents[s]], subtree_end[s])

    leaf_node = np.array([index[node] for node in ends], dtype=np.int32)
    rows = _rows(leaves, leaf_node, node_start, node_end, parents)
    labels, leaf, offset = label_arrays(leaves)
    forest = Forest(
        token_ids=token_ids,
        depth=(np.arange(len(token_ids)) + np.repeat(depth_before - node_start, lengths)).astype(np.int32),
        subtree_end=np.repeat(subtree_end, lengths).astype(np.int32),
        node_start=node_start.astype(np.int32),
        node_end=node_end.astype(np.int32),
        node_parent=np.array(parents, dtype=np.int32),
        leaf_node=leaf_node,
        rows=rows if len(rows) == len(labels) else rows[sampled_tokens(leaves)],
        labels=labels,
        leaf=leaf,
        offset=offset,
    )
    assert len(forest.rows) == len(forest.labels)
    return forest


def sampled_tokens(leaves: Sequence[Leaf]) -> NDArray[np.bool_]:
    """[tokens of all responses] Which of them are labels."""
    return np.concatenate(
        [np.empty(0, bool)]
        + [np.ones(len(x.response_ids), bool) if x.sampled is None else x.sampled for x in leaves]
    )


def label_arrays(leaves: Sequence[Leaf]) -> tuple[Ids, Ids, Ids]:
    """(labels, leaf, offset), [M] each, as in Forest."""
    empty, lengths = np.empty(0, np.int64), [len(leaf.response_ids) for leaf in leaves]
    arrays = (
        np.concatenate([empty, *(leaf.response_ids for leaf in leaves)]),
        np.repeat(np.arange(len(leaves)), lengths),
        np.concatenate([empty, *(np.arange(n) for n in lengths)]),
    )
    if all(leaf.sampled is None for leaf in leaves):
        return arrays
    kept = sampled_tokens(leaves)
    return arrays[0][kept], arrays[1][kept], arrays[2][kept]


def _rows(
    leaves: Sequence[Leaf], leaf_node: NDArray[np.int32], start: Ids, end: Ids, parents: Sequence[int]
) -> Ids:
    """The row of each label, i.e. the token before it: walk up from the leaf's end until the response and one prompt token are covered."""
    rows = [np.empty(0, np.int64)]
    for leaf, node in zip(leaves, leaf_node.tolist(), strict=True):
        missing = len(leaf.response_ids)
        if not missing:
            continue
        missing += 1
        climbed = []
        while missing > 0:
            climbed.append(np.arange(max(start[node], end[node] - missing), end[node]))
            missing -= len(climbed[-1])
            node = parents[node]
        rows.append(np.concatenate(climbed[::-1])[:-1])
    return np.concatenate(rows)


def split(leaves: Sequence[Leaf], token_budget: int, *, share: Share = "prompts") -> list[list[int]]:
    """Cut the leaves into as few micro-batches as the budget allows, then make the largest one as small as possible.

    In forest order, a run of leaves needs the whole path of its first leaf, then only the tokens between its end and
    the end of the last. So each part is a run of leaves. Ancestors of a cut are recomputed in each part that needs
    them, which is exact. Raises UserError if a single leaf is longer than `token_budget`."""
    if not leaves:
        return []
    longest = max(len(leaf) for leaf in leaves)
    if longest > token_budget:
        which = next(i for i, leaf in enumerate(leaves) if len(leaf) == longest)
        raise UserError(
            f"sequence {which} has {len(leaves[which].prompt_ids)} prompt + {len(leaves[which].response_ids)} response = {longest} tokens, "
            f"more than the {token_budget} tokens of one micro-batch; slow.tokens_per_micro_batch must be at least {longest}"
        )
    forest = pack(leaves, share=share)
    order = np.argsort(forest.leaf_node, kind="stable")
    ends = forest.node_end[forest.leaf_node[order]].astype(np.int64)  # ascending
    lengths = np.array([len(leaves[i]) for i in order])
    return [sorted(part.tolist()) for part in np.split(order, cuts(ends, lengths, token_budget)[1:])]


def cuts(ends: Ids, lengths: Ids, token_budget: int) -> list[int]:
    """The first leaf of every part that `split` makes. Leaves are in forest order: leaf i ends at token ends[i] [L] and is lengths[i] tokens long
    from its root on, at most `token_budget`."""

    def cut(largest: int) -> list[int]:
        """Parts filled greedily up to `largest` tokens."""
        starts = [0]
        while True:
            first = starts[-1]
            after = int(np.searchsorted(ends, ends[first] + largest - lengths[first], side="right"))
            if after >= len(ends):
                return starts
            starts.append(after)

    parts = len(cut(token_budget))
    low, high = int(lengths.max()), token_budget
    while low < high:  # the smallest size that still gives this number of parts
        middle = (low + high) // 2
        if len(cut(middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    return cut(low)


def unshared_tokens(leaves: Sequence[Leaf]) -> int:
    """Total tokens of the leaves, without sharing or padding."""
    return sum(len(leaf) for leaf in leaves)


def _check(leaves: Sequence[Leaf], share: str) -> None:
    if share not in ("prompts", "all"):
        raise ValueError(f"share={share!r} is not known; allowed are 'prompts' and 'all'")
    for i, leaf in enumerate(leaves):
        for name, ids in (("prompt_ids", leaf.prompt_ids), ("response_ids", leaf.response_ids)):
            if ids.ndim != 1 or ids.dtype != np.int64:
                raise ValueError(
                    f"{name} of leaf {i} is {ids.dtype} of shape {ids.shape}; one-dimensional int64 is needed"
                )
        if leaf.sampled is not None and (
            leaf.sampled.dtype != bool or leaf.sampled.shape != leaf.response_ids.shape
        ):
            raise ValueError(
                f"sampled of leaf {i} is {leaf.sampled.dtype} of shape {leaf.sampled.shape}; bool of shape {leaf.response_ids.shape} is needed"
            )
        if not len(leaf.prompt_ids):
            raise ValueError(
                f"leaf {i} has an empty prompt; at least one token is needed, to predict the first response token from"
            )
