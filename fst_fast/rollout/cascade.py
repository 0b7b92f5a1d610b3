"""Decode attention over a KV pool (kv_pool.py): one `cascade_decode_attention` per layer and step, over the shared
prompt nodes and each sequence's own suffix. The work list is rebuilt only when sequences start or finish.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fst_fast.rollout.kv_pool import KVPool
from fst_fast.rollout.kv_tree import TreeCache
from fst_fast.rollout.prompt_tree import Ints
from fst_kernels import CascadePlan, cascade_decode_attention
from fst_kernels.backends import choose_backend


class Suffixes:
    """A range of the pool with room for `limit` sampled tokens per slot."""

    def __init__(self, pool: KVPool, slots: int, limit: int) -> None:
        self.limit, self.span = limit, pool.take(slots * limit)
        self.slots = slots

    @property
    def first(self) -> Ints:
        """[slots] pool index of each slot's first suffix token."""
        return self.span.first + np.arange(self.slots) * self.limit

    def rows(self, offset: Ints) -> Ints:
        """[slots] pool index of the suffix token at `offset` [slots]."""
        return self.first + offset

    def keep(self, slots: Tensor) -> None:
        """Keep only these slots, renumbered in this order."""
        at = slots[:, None] * self.limit + torch.arange(self.limit, device=slots.device)
        self.span.keep(at.flatten())
        self.slots = len(slots)


class DecodePlan:
    """Attention of one new token per slot over its prompt path and its suffix, valid until the paths or the pool's ranges change.

    rows, lengths: [slots], of the current step; fixed buffers, as CUDA graphs need (graphs.py). work: the work list,
    rebuilt when suffixes outgrow it. Idle slots keep their last path. Layers with a sliding window (`window`) keep
    older keys but do not attend to them."""

    windows = True

    def __init__(self, cache: TreeCache, paths: Ints, suffixes: Suffixes, *, device: torch.device) -> None:
        self.cache, self.paths, self.suffixes, self.pool = cache, paths, suffixes, cache.pool
        self.node_slots = cache.slots_of(np.unique(paths[paths >= 0]))
        self.suffix_slots = torch.as_tensor(suffixes.first, device=device)
        self.lengths = torch.zeros(suffixes.slots, dtype=torch.int32, device=device)
        self.rows = torch.zeros(suffixes.slots, dtype=torch.int64, device=device)
        self.work: CascadePlan | None = None  # built by step() when needed
        self.backend = ""  # likewise; chosen once per work list, not per layer

    def step(self, rows: Tensor, lengths: Tensor, longest: int, dtype: torch.dtype) -> None:
        """Prepare a decode step. rows: [slots], pool index of each new token (Suffixes.rows). lengths: [slots], suffix
        tokens visible to each slot, the new one included; longest: the largest of them. The work list has room for
        suffixes up to a power of two and is rebuilt when one outgrows it."""
        self.rows.copy_(rows)
        self.lengths.copy_(lengths)
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
        """Not used: every slot has one token, and the logits of all tokens are read."""
        raise AssertionError("a decode step reads all rows")

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """For the transformers forward: q [S, Hq, 1, D], k and v [S, Hkv, 1, D] -> [S, 1, Hq, D]."""
        return self.tokens(layer, q.squeeze(2), k.squeeze(2), v.squeeze(2), scale, window)[:, None]
