"""Decoding over a pool of keys and values (kv_pool.py) by the kernels of fst_kernels: one `cascade_decode_attention` per layer of a step, over the
prompt nodes that sequences share and their own suffixes. The work list is built when sequences come and go.
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
    """A range of the pool with room for `limit` sampled tokens of each slot."""

    def __init__(self, pool: KVPool, slots: int, limit: int) -> None:
        self.limit, self.span = limit, pool.take(slots * limit)
        self.slots = slots

    @property
    def first(self) -> Ints:
        """[slots], the pool's slot of each one's first token."""
        return self.span.first + np.arange(self.slots) * self.limit

    def rows(self, offset: Ints) -> Ints:
        """Where the token with this offset [slots] in its response goes."""
        return self.first + offset

    def keep(self, slots: Tensor) -> None:
        """Keep only these slots, renumbered in this order."""
        at = slots[:, None] * self.limit + torch.arange(self.limit, device=slots.device)
        self.span.keep(at.flatten())
        self.slots = len(slots)


class DecodePlan:
    """Attention of one new token per slot over its path and its suffix, for as long as neither the paths nor the pool's ranges change.

    rows, lengths: [slots], of the step at hand, tensors that stay (graphs.py); work: the work list, another one where the suffixes outgrow it.
    Idle slots keep their last path. In layers with a sliding window (`window`) keys farther back are kept and not attended to.
    """

    windows = True

    def __init__(self, cache: TreeCache, paths: Ints, suffixes: Suffixes, *, device: torch.device) -> None:
        self.cache, self.paths, self.suffixes, self.pool = cache, paths, suffixes, cache.pool
        self.node_slots = cache.slots_of(np.unique(paths[paths >= 0]))
        self.suffix_slots = torch.as_tensor(suffixes.first, device=device)
        self.lengths = torch.zeros(suffixes.slots, dtype=torch.int32, device=device)
        self.rows = torch.zeros(suffixes.slots, dtype=torch.int64, device=device)
        self.work: CascadePlan | None = None  # set by step(), where it has to be another
        self.backend = ""  # likewise: asked for once, not for every layer

    def step(self, rows: Tensor, lengths: Ints, dtype: torch.dtype) -> None:
        """rows: [slots], where the new token goes (Suffixes.rows); lengths: [slots], suffix tokens each slot sees, the new one included. The
        work list has room for suffixes of a power of two and is built again when one outgrows it."""
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
