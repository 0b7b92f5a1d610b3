"""Attention for a window of prompt nodes, all their tokens in one forward; their keys and values become new blocks of the cache.

The window is any run of nodes in depth-first order, nodes that are already there left out. Within it the attention is tree attention. What
a token's past holds beyond the window are nodes of the cache, and the queries below one of them are contiguous in the window.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fst_fast.rollout.cascade import PathAttention
from fst_fast.rollout.kv_tree import Block, TreeCache, blocks_of
from fst_fast.rollout.prompt_tree import Ints
from fst_kernels.cascade_decode.partial import Sight, partial_attention, seen_attention
from fst_kernels.tree_attention import TreeMask, tree_attention


class PrefillPlan:
    """nodes: ascending, not yet in the cache, their ancestors in it or among them. read: those of them at whose ends logits are wanted."""

    windows = True

    def __init__(
        self, cache: TreeCache, nodes: Ints, read: Ints, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        tree = cache.tree
        self.cache, self.read, self.device = cache, read, device
        lengths = tree.end[nodes] - tree.start[nodes]
        offset = np.concatenate([[0], np.cumsum(lengths)])  # [nodes + 1], of each node in the window
        self.tokens_of = np.repeat(tree.start[nodes] - offset[:-1], lengths) + np.arange(offset[-1])
        self.read_rows = offset[1:][np.searchsorted(nodes, read)] - 1  # [R], in the window
        behind = np.searchsorted(tree.start, tree.last)  # exclusive end of each node's subtree, as a node
        above = set(tree.path_of(nodes).reshape(-1).tolist()) - {-1} - set(nodes.tolist())
        self.ancestors = [  # (node, its queries in the window), from the deepest level up
            (node, slice(*offset[np.searchsorted(nodes, [node, behind[node]])].tolist()))
            for node in sorted(above, key=lambda node: -tree.level[node])
        ]
        self.attended = self._attended(nodes)  # ascending
        lengths_of = tree.end[self.attended] - tree.start[self.attended]
        place = np.concatenate([[0], np.cumsum(lengths_of)])
        subtree_end = np.repeat(place[np.searchsorted(self.attended, behind[self.attended])], lengths_of)
        self.mask = TreeMask.from_subtree_end(torch.from_numpy(subtree_end.astype(np.int32)), device=device)
        self._sights: dict[int, list[Sight]] = {}  # by window, of each ancestor
        self.blocks: list[tuple[Block, Tensor]] = []  # and [rows * L], the tokens of the window that go there
        for own, block, offsets in blocks_of(
            tree.level[nodes], lengths, device=device, dtype=dtype, pool=cache.pool
        ):
            index = np.where(offsets >= 0, offset[own][:, None] + offsets, 0)
            self.blocks.append((block, torch.as_tensor(index.reshape(-1), device=device)))
            cache.add(block, nodes[own], np.arange(len(own)))

    def _attended(self, nodes: Ints) -> Ints:
        """The nodes that the tree attention is over."""
        return nodes

    def _sight(self, window: int, group: int, dtype: torch.dtype) -> list[Sight]:
        """What the queries below each ancestor see of it through a sliding window."""
        if window not in self._sights:
            tree = self.cache.tree
            self._sights[window] = found = []
            for node, below in self.ancestors:
                key = tree.depth[tree.start[node] : tree.end[node]]
                seen = key > tree.depth[self.tokens_of[below]][:, None] - window  # [queries, keys]
                each = torch.as_tensor(np.tile(seen, (group, 1))[None], device=self.device)
                found.append(Sight.of(each, dtype))
        return self._sights[window]

    def tokens(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """q [N, Hq, D], k and v [N, Hkv, D] -> [N, Hq, D]; stores k and v."""
        self._store(layer, k, v)
        out, lse = tree_attention(
            q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], self.mask,
            scale=scale, window=window, return_lse=True,
        )  # fmt: skip
        out = out.float()
        heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
        sights = None if window is None else self._sight(window, heads // kv_heads, q.dtype)
        for number, (node, below) in enumerate(self.ancestors):
            seen = below.stop - below.start
            key, value = self.cache.block(self.cache.block_of[node]).row(layer, int(self.cache.row_of[node]))
            queries = q[below].transpose(0, 1).reshape(1, kv_heads, heads // kv_heads * seen, dim)
            if sights is None:
                part, part_lse = partial_attention(queries, key, value, scale, None)
            else:
                part, part_lse = seen_attention(queries, key, value, scale, sights[number])
            part_lse = part_lse.reshape(1, heads, seen)
            total = torch.logaddexp(lse[:, :, below], part_lse)
            out[:, :, below] *= (lse[:, :, below] - total).exp().unsqueeze(-1)
            out[:, :, below] += part.reshape(1, heads, seen, -1) * (part_lse - total).exp().unsqueeze(-1)
            lse[:, :, below] = total
        return out[0].transpose(0, 1).to(q.dtype)

    def last(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor) -> Tensor:
        """q [N, Hq, D], k and v [N, Hkv, D], rows: read_rows -> [R, Hq, D]; stores k and v."""
        self._store(layer, k, v)
        q = q.index_select(0, rows)
        if not len(q):
            return q
        paths = PathAttention(self.cache, self.cache.tree.path_of(self.read), self.device)
        return paths.attend(layer, q, k.shape[1], scale, None)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """For the transformers forward: q [1, Hq, N, D], k and v [1, Hkv, N, D] -> [1, N, Hq, D]."""
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return self.tokens(layer, q, k, v, scale, window)[None]

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        for block, index in self.blocks:
            kept = []
            for new in (k, v):
                rows = new.transpose(0, 1).index_select(1, index)  # [Hkv, rows * L, D]
                kept.append(rows.view(len(rows), len(block.lengths), -1, new.shape[2]).transpose(0, 1))
            block.put(layer, *kept)
