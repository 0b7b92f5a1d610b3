"""Prefill and decoding over a pool (kv_pool.py) by the kernels of fst_kernels: what a GPU takes.

A decode step is one `cascade_decode_attention` per layer over prompt nodes and suffixes, whose work list is built when sequences come and go. Prefill is
one `tree_attention` per layer over the window and what stands above it: the keys of the ancestors come from the pool, and queries are computed for
them too, for nobody. That costs the attention of those tokens once more, nothing else of the model, and never holds scores.

The other way, batched attention calls over blocks (cascade.py, prefill.py), is what a CPU takes, no slower there.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fst_fast.rollout.kv_pool import KVPool
from fst_fast.rollout.kv_tree import TreeCache
from fst_fast.rollout.prefill import PrefillPlan
from fst_fast.rollout.prompt_tree import Ints
from fst_kernels import CascadePlan, cascade_decode_attention
from fst_kernels.backends import choose_backend
from fst_kernels.tree_attention import tree_attention


class PooledSuffixes:
    """A range of the pool with room for `limit` sampled tokens of each slot."""

    def __init__(self, pool: KVPool, slots: int, limit: int) -> None:
        self.limit, self.span = limit, pool.take(slots * limit)
        self.slots = slots

    @property
    def first(self) -> Ints:
        """[slots], the pool's slot of each one's first token."""
        return self.span.first + np.arange(self.slots) * self.limit

    def rows(self, offset: Ints) -> Ints:
        return self.first + offset

    def grow(self, tokens: int) -> bool:
        """There is room for all tokens from the beginning."""
        assert tokens <= self.limit
        return False

    def keep(self, slots: Tensor) -> None:
        at = slots[:, None] * self.limit + torch.arange(self.limit, device=slots.device)
        self.span.keep(at.flatten())
        self.slots = len(slots)


class PooledDecodePlan:
    """Attention of one new token per slot over its path and its suffix, for as long as neither the paths nor the pool's ranges change.

    rows, lengths: [slots], of the step at hand, tensors that stay (graphs.py); work: the work list, another one where the suffixes outgrow it.
    In layers with a sliding window (`window`) keys farther back are kept and not attended to.
    """

    windows = True

    def __init__(
        self, cache: TreeCache, paths: Ints, suffixes: PooledSuffixes, *, device: torch.device
    ) -> None:
        assert cache.pool is not None
        self.cache, self.paths, self.suffixes, self.pool = cache, paths, suffixes, cache.pool
        nodes = np.unique(paths[paths >= 0])
        self.node_slots = np.zeros(len(cache.block_of), dtype=np.int64)
        self.node_slots[nodes] = [
            cache.block(b).slot(r)
            for b, r in zip(cache.block_of[nodes].tolist(), cache.row_of[nodes].tolist(), strict=True)
        ]
        self.suffix_slots = torch.as_tensor(suffixes.first, device=device)
        self.lengths = torch.zeros(suffixes.slots, dtype=torch.int32, device=device)
        self.rows = torch.zeros(suffixes.slots, dtype=torch.int64, device=device)
        self.work: CascadePlan | None = None  # set by step(), where it has to be another
        self.backend = ""  # likewise: asked for once, not for every layer


    def step(self, rows: Tensor, lengths: Ints, dtype: torch.dtype, positions: Ints | None = None) -> None:
        """As DecodePlan.step. The work list has room for suffixes of a power of two and is built again when one outgrows it."""
        self.rows.copy_(rows)
        self.lengths.copy_(torch.as_tensor(lengths))
        longest = int(lengths.max())
        if self.work is None or longest > self.work.suffix_capacity:
            tree = self.cache.tree
            self.backend = choose_backend("cascade_decode_attention", None, self.rows.device, dtype)
            self.work = CascadePlan.build(
                self.paths,
                node_slots=self.node_slots,
                node_lengths=tree.end - tree.start,
                suffix_slots=self.suffix_slots,
                suffix_lengths=self.lengths,
                suffix_capacity=min(1 << max(longest, 64).bit_length(), self.suffixes.limit),
            )

    def tokens(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """q [S, Hq, D], k and v [S, Hkv, D] -> [S, Hq, D]."""
        assert self.work is not None, "step comes first"
        self.pool.write(layer, self.rows, k, v)
        keys, values = self.pool.k[layer], self.pool.v[layer]
        return cascade_decode_attention(
            q, keys, values, self.work, scale=scale, window=window, backend=self.backend
        )

    def last(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor) -> Tensor:
        """Every slot has one token, and every token is read."""
        raise AssertionError("a decode step asks for all rows")

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """For the transformers forward: q [S, Hq, 1, D], k and v [S, Hkv, 1, D] -> [S, 1, Hq, D]."""
        return self.tokens(layer, q.squeeze(2), k.squeeze(2), v.squeeze(2), scale, window)[:, None]


class PooledPrefillPlan(PrefillPlan):
    """The same window, its blocks in a pool."""

    def __init__(
        self, cache: TreeCache, nodes: Ints, read: Ints, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(cache, nodes, read, device=device, dtype=dtype)
        assert cache.pool is not None
        self.pool, tree = cache.pool, cache.tree
        seen = self.attended
        lengths = tree.end[seen] - tree.start[seen]
        first = [cache.block(int(cache.block_of[node])).slot(int(cache.row_of[node])) for node in seen]
        slots = np.repeat(np.array(first) - (np.cumsum(lengths) - lengths), lengths) + np.arange(
            lengths.sum()
        )
        mine = np.flatnonzero(np.repeat(np.isin(seen, nodes), lengths))
        self.slots = torch.as_tensor(slots, device=device)  # [U], of every token that is seen
        self.mine = torch.as_tensor(mine, device=device)  # [N], those of the window among them
        self.window_slots = self.slots.index_select(0, self.mine)
        self.work = self.read_work = None
        self.backend = choose_backend("cascade_decode_attention", None, device, dtype)
        if self.backend == "cpu":
            node_slots = np.zeros(len(tree.start), dtype=np.int64)
            node_slots[seen] = first
            of = np.repeat(np.arange(len(nodes)), tree.end[nodes] - tree.start[nodes])
            paths = tree.path_of(nodes)
            above = np.where(paths == nodes[:, None], -1, paths)[of]
            how = {"node_slots": node_slots, "node_lengths": tree.end - tree.start}
            offset = self.tokens_of - tree.start[nodes][of]
            self.work = CascadePlan.build(
                above,
                suffix_slots=torch.as_tensor(node_slots[nodes][of]),
                suffix_lengths=torch.as_tensor(offset + 1).int(),
                suffix_capacity=int(offset.max()) + 1,
                **how,
            )
            nothing = torch.zeros(len(read), dtype=torch.int32)
            self.read_work = CascadePlan.build(
                tree.path_of(read), suffix_slots=nothing, suffix_lengths=nothing, suffix_capacity=1, **how
            )

    def _attended(self, nodes: Ints) -> Ints:
        """The window and what stands above it."""
        above = np.array([node for node, _ in self.ancestors], dtype=np.int64)
        return np.sort(np.concatenate([nodes, above]))

    def tokens(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """q [N, Hq, D], k and v [N, Hkv, D] -> [N, Hq, D]; stores k and v."""
        self._store(layer, k, v)
        if self.work is not None:
            return cascade_decode_attention(
                q, self.pool.k[layer], self.pool.v[layer], self.work, scale=scale, window=window, backend=self.backend
            )  # fmt: skip
        keys, values = (x[layer].index_select(0, self.slots) for x in (self.pool.k, self.pool.v))
        queries = q.new_zeros(len(keys), *q.shape[1:]).index_copy_(0, self.mine, q)
        q, k, v = (x.transpose(0, 1)[None] for x in (queries, keys, values))
        out = tree_attention(q, k, v, self.mask, scale=scale, window=window)[0].transpose(0, 1)
        return out.index_select(0, self.mine)

    def last(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor) -> Tensor:
        if self.read_work is None:
            return super().last(layer, q, k, v, scale, rows)
        self._store(layer, k, v)
        q = q.index_select(0, rows)
        return cascade_decode_attention(
            q, self.pool.k[layer], self.pool.v[layer], self.read_work, scale=scale, backend=self.backend
        )

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.pool.write(layer, self.window_slots, k, v)
