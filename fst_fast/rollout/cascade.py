"""Decode attention over a KV pool (kv_pool.py): one `cascade_decode_attention` per layer and step, over the shared
prompt nodes and each sequence's own suffix. The work list is rebuilt only when sequences start or finish.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fst_fast.rollout.kv_pool import KVPool
from fst_fast.rollout.kv_tree import TreeCache
from fst_fast.rollout.prompt_tree import Ints
from fst_kernels import CascadePlan, cascade_decode_attention
from fst_kernels.backends import choose_backend


class Suffixes:
    """The sampled tokens of each slot, in pages that lie in one range of the pool, are taken as a response grows, and given back as it ends.

    page: tokens of a page. most: pages of the longest response; with most = 1 a page has room for a whole response. pages: how many there are.
    table: [slots, most], the numbers of each slot's pages in their order, then -1; held: [slots], how many these are; free: the others."""

    def __init__(self, pool: KVPool, slots: int, *, page: int, most: int, pages: int) -> None:
        self.page, self.most, self.span = page, most, pool.take(pages * page)
        self.table = np.full((slots, most), -1, dtype=np.int64)
        self.held = np.zeros(slots, dtype=np.int64)
        self.free = list(range(pages - 1, -1, -1))

    def first(self, page: Ints) -> Ints:
        """Pool index of the first token of pages by number; any of the range where there is none."""
        return self.span.first + np.maximum(page, 0) * self.page

    def rows(self, slots: Ints, offset: Ints) -> Ints:
        """Pool index of the token at `offset` of each slot."""
        return self.first(self.table[slots, offset // self.page]) + offset % self.page

    def grow(self, slots: Ints, tokens: Ints) -> bool:
        """Let each of these slots have the pages that so many tokens take; False, and none of them gets any, if too few are free."""
        wanted = -(-tokens // self.page)
        lacking = np.maximum(wanted - self.held[slots], 0)
        if lacking.sum() > len(self.free):
            return False
        for i in np.flatnonzero(lacking):
            slot = slots[i]
            for at in range(self.held[slot], wanted[i]):
                self.table[slot, at] = self.free.pop()
            self.held[slot] = wanted[i]
        return True

    def drop(self, slots: Ints) -> None:
        """Take the pages of these slots back."""
        mine = self.table[slots]
        self.free += mine[mine >= 0][::-1].tolist()
        self.table[slots], self.held[slots] = -1, 0

    def keep(self, slots: Ints, limit: int, device: torch.device) -> None:
        """Keep only these slots, renumbered in this order, with empty ones behind them up to `limit`, and no more pages than so many can need."""
        self.drop(np.setdiff1d(np.arange(len(self.held)), slots))
        table, held = self.table[slots], self.held[slots]
        self.table = np.full((limit, self.most), -1, dtype=np.int64)
        self.held = np.zeros(limit, dtype=np.int64)
        self.table[: len(slots)], self.held[: len(slots)] = table, held
        pages = min(self.span.tokens // self.page, limit * self.most)
        if pages * self.page == self.span.tokens:
            return
        mine = self.table[self.table >= 0]
        kept = torch.as_tensor(
            np.concatenate([mine, np.sort(self.free)])[:pages].astype(np.int64), device=device
        )
        self.span.keep((kept[:, None] * self.page + torch.arange(self.page, device=device)).flatten())
        self.table[self.table >= 0] = np.arange(len(mine))
        self.free = list(range(pages - 1, len(mine) - 1, -1))


class DecodePlan:
    """Attention of one new token per slot over its prompt path and its suffix, valid until the paths or the pool's ranges change.

    rows, lengths: [slots], of the current step; suffix_slots: [slots, P], where each page of a suffix begins, or [slots] where a suffix is one.
    These are fixed buffers, as CUDA graphs need (graphs.py), and written in place from step to step. work: the work list,
    rebuilt when suffixes outgrow it. Idle slots keep their last path. Layers with a sliding window (`window`) keep
    older keys but do not attend to them."""

    windows = True

    def __init__(self, cache: TreeCache, paths: Ints, suffixes: Suffixes, *, device: torch.device) -> None:
        self.cache, self.paths, self.suffixes, self.pool = cache, paths, suffixes, cache.pool
        self.node_slots = cache.slots_of(np.unique(paths[paths >= 0]))
        slots = len(paths)
        self.paged = suffixes.most > 1
        first = suffixes.first(suffixes.table[:slots])
        self.suffix_slots = torch.as_tensor(first if self.paged else first[:, 0], device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        self.rows = torch.zeros(slots, dtype=torch.int64, device=device)
        self.work: CascadePlan | None = None  # built by step() when needed
        self.backend = ""  # likewise; chosen once per work list, not per layer

    def step(
        self, rows: Tensor, lengths: Tensor, pages: Sequence[Tensor], longest: int, dtype: torch.dtype
    ) -> None:
        """Prepare a decode step. rows: [slots], pool index of each new token (Suffixes.rows). lengths: [slots], suffix
        tokens visible to each slot, the new one included; longest: the largest of them. pages: of the new tokens' pages, [slots] which of its slot's
        pages each is, and [slots] the pool index where it begins. The work list has room for suffixes up to a power of two and is rebuilt when one
        outgrows it."""
        self.rows.copy_(rows)
        self.lengths.copy_(lengths)
        if self.paged:
            number, first = pages
            self.suffix_slots.scatter_(1, number[:, None], first[:, None])
        if self.work is None or longest > self.work.suffix_capacity:
            tree = self.cache.tree
            self.backend = choose_backend("cascade_decode_attention", None, self.rows.device, dtype)
            self.work = CascadePlan.build(
                self.paths,
                node_slots=self.node_slots,
                node_lengths=tree.end - tree.start,
                suffix_slots=self.suffix_slots,
                suffix_lengths=self.lengths,
                suffix_capacity=min(
                    1 << max(longest, 64).bit_length(), self.suffixes.most * self.suffixes.page
                ),
                page_size=self.suffixes.page,
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
