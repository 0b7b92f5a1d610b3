"""Prefill attention for a window of prompt nodes: all their tokens in one forward, keys and values written to the pool.

A window is a run of nodes in depth-first order, without those already cached. On the CPU each token is a query of
`cascade_decode_attention` whose suffix is its own node up to itself. Elsewhere there is one `tree_attention` per layer
over the window and its ancestors. Ancestor keys come from the pool; their queries are zeros whose output is not read, so
the kernel skips every block of queries without a token of the window.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fst_fast.rollout.kv_tree import TreeCache, allocate_blocks
from fst_fast.rollout.prompt_tree import Ints
from fst_kernels import CascadePlan, cascade_decode_attention
from fst_kernels.backends import choose_backend
from fst_kernels.tree_attention import TreeMask, tree_attention


class PrefillPlan:
    """nodes: ascending, not yet cached; their ancestors are cached or in `nodes`. read: the nodes in `nodes` at whose
    ends logits are needed."""

    windows = True

    def __init__(
        self, cache: TreeCache, nodes: Ints, read: Ints, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        tree = cache.tree
        self.cache, self.pool, self.nodes, self.read, self.device = cache, cache.pool, nodes, read, device
        self.backend = choose_backend("cascade_decode_attention", None, device, dtype)
        lengths = tree.end[nodes] - tree.start[nodes]
        offset = np.concatenate([[0], np.cumsum(lengths)])  # [nodes + 1], of each node in the window
        self.node_of_token = np.repeat(np.arange(len(nodes)), lengths)  # [N], the node of each token
        self.within = np.arange(offset[-1]) - offset[self.node_of_token]  # [N], its offset in the node
        self.tokens_of = tree.start[nodes][self.node_of_token] + self.within
        self.read_rows = offset[1:][np.searchsorted(nodes, read)] - 1  # [R], in the window
        for own, block in allocate_blocks(tree.level[nodes], lengths, pool=cache.pool):
            cache.add(block, nodes[own], np.arange(len(own)))
        paths = tree.path_of(nodes)
        self.visible = np.unique(paths[paths >= 0])  # the window and its ancestors
        self.node_slots = cache.slots_of(self.visible)
        # [N]
        self.slots = torch.as_tensor(self.node_slots[nodes][self.node_of_token] + self.within, device=device)

    @cached_property
    def work(self) -> CascadePlan:
        """Work list: every token of the window attends to its ancestor nodes and to its own node up to itself."""
        tree = self.cache.tree
        paths = tree.path_of(self.nodes)
        return CascadePlan.build(
            np.where(paths == self.nodes[:, None], -1, paths)[self.node_of_token],
            node_slots=self.node_slots,
            node_lengths=tree.end - tree.start,
            suffix_slots=torch.as_tensor(self.node_slots[self.nodes][self.node_of_token], device=self.device),
            suffix_lengths=torch.as_tensor(self.within + 1, device=self.device).int(),
            suffix_capacity=int(self.within.max()) + 1,
        )

    @cached_property
    def read_work(self) -> CascadePlan:
        """Work list: the last tokens of the `read` nodes attend to their whole paths."""
        tree = self.cache.tree
        nothing = torch.zeros(len(self.read), dtype=torch.int32, device=self.device)
        return CascadePlan.build(
            tree.path_of(self.read),
            node_slots=self.node_slots,
            node_lengths=tree.end - tree.start,
            suffix_slots=nothing,
            suffix_lengths=nothing,
            suffix_capacity=1,
        )

    @cached_property
    def tree(self) -> tuple[TreeMask, Tensor, Tensor]:
        """For all visible nodes in depth-first order: the mask, the pool indices of their tokens [U], and which of
        these are the window [N]."""
        tree, seen = self.cache.tree, self.visible
        lengths = tree.end[seen] - tree.start[seen]
        offset = np.concatenate([[0], np.cumsum(lengths)])
        behind = np.searchsorted(tree.start, tree.last)  # exclusive end of each node's subtree, as a node
        subtree_end = np.repeat(offset[np.searchsorted(seen, behind[seen])], lengths)
        slots = np.repeat(self.node_slots[seen] - offset[:-1], lengths) + np.arange(offset[-1])
        window = np.flatnonzero(np.repeat(np.isin(seen, self.nodes), lengths))
        read = torch.zeros(int(offset[-1]), dtype=torch.bool)
        read[window] = True
        mask = TreeMask.from_subtree_end(
            torch.from_numpy(subtree_end.astype(np.int32)), device=self.device, read=read
        )
        return mask, torch.as_tensor(slots, device=self.device), torch.as_tensor(window, device=self.device)

    def tokens(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """Write k and v to the pool and attend: q [N, Hq, D], k and v [N, Hkv, D] -> [N, Hq, D]."""
        self.pool.write(layer, self.slots, k, v)
        k, v = self.pool.k[layer], self.pool.v[layer]
        if self.backend == "cpu":
            return cascade_decode_attention(q, k, v, self.work, scale=scale, window=window, backend="cpu")
        mask, slots, mine = self.tree
        keys, values = k.index_select(0, slots), v.index_select(0, slots)
        queries = q.new_zeros(len(keys), *q.shape[1:]).index_copy_(0, mine, q)
        q, k, v = (x.transpose(0, 1)[None] for x in (queries, keys, values))
        out = tree_attention(q, k, v, mask, scale=scale, window=window)[0].transpose(0, 1)
        return out.index_select(0, mine)

    def last(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor) -> Tensor:
        """Like `tokens`, but returns only the outputs of rows (which must be read_rows): [R, Hq, D]."""
        self.pool.write(layer, self.slots, k, v)
        k, v, q = self.pool.k[layer], self.pool.v[layer], q.index_select(0, rows)
        return cascade_decode_attention(q, k, v, self.read_work, scale=scale, backend=self.backend)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """For the transformers forward: q [1, Hq, N, D], k and v [1, Hkv, N, D] -> [1, N, Hq, D]."""
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return self.tokens(layer, q, k, v, scale, window)[None]
