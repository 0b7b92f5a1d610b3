"""Cascade decoding in plain PyTorch, on any device; on the CPU the fast path.

Nodes of one level and similar length become one batched attention call, the sequences below a node and the heads of a KV group folded into
the query length. Where their slots lie at equal steps the call reads the pool through a strided view, otherwise it copies the keys
together; long nodes are never copied: every stretch of them that lies at equal steps is a call of its own. The suffixes are one call more.
Outputs merge by their log-sum-exp in float32, root first, suffix last. Chunks are for the kernels only: here a segment is one part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fst_kernels.cascade_decode.partial import Sight, partial_attention, seen_attention
from fst_kernels.cascade_decode.plan import CascadePlan
from fst_kernels.checks import once

LONG = 256  # keys; from here on a node is not copied


@dataclass
class Keys:
    """Where [rows, L] keys lie in a pool: at first + row * step, or, if these are irregular, at `slots`."""

    rows: int
    length: int
    first: int = 0
    step: int = 0
    slots: Tensor | None = None  # [rows * L]

    def of(self, pool: Tensor, length: int | None = None) -> Tensor:
        """[rows, Hkv, L, D]."""
        length = self.length if length is None else length
        if self.slots is not None:
            slots = self.slots.view(self.rows, self.length)[:, :length].reshape(-1)
            return pool.index_select(0, slots).view(self.rows, length, *pool.shape[1:]).transpose(1, 2)
        slot, head, element = pool.stride()
        shape = (self.rows, pool.shape[1], length, pool.shape[2])
        return pool.as_strided(
            shape, (self.step * slot, head, slot, element), pool.storage_offset() + self.first * slot
        )


@dataclass
class Call:
    """One batched attention call: `width` sequences under each of keys.rows nodes."""

    keys: Keys
    ends: Tensor  # [rows] keys of each node
    width: int
    begin: int  # of its place in the list of partial results
    above: Tensor  # [rows] keys above each node
    masks: dict[torch.dtype, Tensor | None]

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        if dtype not in self.masks:
            self.masks[dtype] = _mask(self.ends, self.keys.length, dtype)
        return self.masks[dtype]

    def seen(self, lowest: Tensor) -> Tensor:
        """Through a window, [rows, width, L]. lowest: [rows * width], how many keys of its past each lane does not see."""
        key = torch.arange(self.keys.length, device=lowest.device)
        first = lowest.view(-1, self.width) - self.above[:, None]  # [rows, width]
        return (key < self.ends[:, None])[:, None] & (key >= first[..., None])


@dataclass
class Schedule:
    calls: list[Call]
    queries: Tensor  # sequence of every lane of every call
    where: Tensor  # [parts * S] partial result of each part of each sequence
    parts: int
    used: int  # partial results: S suffixes, one that weighs nothing, then the calls' lanes


@dataclass
class Suffixes:
    """Their keys and who sees how many: for one step, shared by its layers."""

    keys: Keys
    length: int
    masks: dict[torch.dtype, Tensor | None]
    lengths: Tensor
    some_empty: bool  # on a device: perhaps

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        if dtype not in self.masks:
            self.masks[dtype] = _mask(self.lengths, self.length, dtype)
        return self.masks[dtype]


def _mask(lengths: Tensor, longest: int, dtype: torch.dtype) -> Tensor | None:
    """Additive [rows, 1, 1, longest]; None where nothing is hidden (looked at on the CPU only). A row without keys sees one, for nobody."""
    if lengths.device.type == "cpu" and (not len(lengths) or int(lengths.min()) >= longest):
        return None
    hidden = torch.arange(longest, device=lengths.device) >= lengths.clamp(min=1)[:, None]
    mask = torch.zeros(hidden.shape, device=lengths.device, dtype=dtype)
    return mask.masked_fill_(hidden, float("-inf"))[:, None, None]


def _regular(first: Tensor) -> int | None:
    """The step between slots, if it is the same everywhere and not negative."""
    if len(first) == 1:
        return 0
    step = first.diff()
    return int(step[0]) if int(step[0]) >= 0 and bool((step == step[0]).all()) else None


def _progressions(first: list[int]) -> list[int]:
    """Cuts ascending numbers into stretches of equal steps: their lengths."""
    cuts = [0]
    for i in range(2, len(first)):
        if i - cuts[-1] > 1 and first[i] - first[i - 1] != first[i - 1] - first[i - 2]:
            cuts.append(i)
    return [b - a for a, b in zip(cuts, [*cuts[1:], len(first)], strict=True)]


def _slots(table: Tensor, page: int, length: int) -> Tensor:  # [rows, P] -> [rows, length]
    key = torch.arange(length, device=table.device)
    return table + key if not page else table[:, key // page] + key % page


def _schedule(plan: CascadePlan) -> Schedule:
    sequences, device = plan.sequences, plan.suffix_lengths.device
    table = plan.node_slots.cpu().long()
    pool_end = plan.last_slot + 1
    levels = int(plan.level.max()) + 1 if len(plan.level) else 0
    nowhere, used = sequences, sequences + 1
    where = torch.full((levels + 1, sequences), nowhere)
    where[-1] = torch.arange(sequences)
    calls: list[Call] = []
    queries: list[Tensor] = []
    for runs in _groups(plan, table[:, 0], levels):
        count, first = plan.count[runs], plan.first[runs]
        width, length = int(count.max()), int(plan.length[runs].max())
        node = plan.node[runs]
        step = None if plan.node_page and length > plan.node_page else _regular(table[node, 0])
        starts = table[node, 0]
        if step is not None and int(starts[-1]) + length <= pool_end:
            keys = Keys(len(runs), length, int(starts[0]), step)
        else:
            slots = _slots(table[node], plan.node_page, length)
            inside = torch.arange(length) < plan.length[runs][:, None]
            keys = Keys(
                len(runs), length, slots=torch.where(inside, slots, slots[:, :1]).flatten().to(device)
            )
        lane = torch.arange(width)
        live = lane < count[:, None]  # a lane without a sequence computes the first one's, for nobody
        take = plan.order[first[:, None] + torch.where(live, lane, 0)]  # [rows, width]
        level = int(plan.level[runs[0]])
        where[level, take[live]] = used + torch.arange(len(runs) * width).view(len(runs), width)[live]
        calls.append(
            Call(
                keys,
                plan.length[runs].to(device),
                width,
                used,
                plan.above[runs].to(device),
                {},
            )
        )
        queries.append(take.flatten())
        used += len(runs) * width
    spread = torch.cat(queries) if queries else torch.zeros(0, dtype=torch.int64)
    return Schedule(calls, spread.to(device), where.flatten().to(device), levels + 1, used)


def _groups(plan: CascadePlan, start: Tensor, levels: int) -> list[Tensor]:
    """Runs that share a call: of one level, of lengths within a factor of two (all up to 32 are one class), and nearly equally crowded.

    A call is as wide as its fullest node; where that would more than quadruple the work, nodes are parted by the order of magnitude
    (base 4) of the sequences below them.
    """
    kind = torch.ceil(torch.log2(plan.length.clamp(min=32).double())).long()
    groups: list[Tensor] = []
    for level in range(levels):
        for value in torch.unique(kind[plan.level == level]):
            runs = ((plan.level == level) & (kind == value)).nonzero().squeeze(1)
            runs = runs[start[plan.node[runs]].argsort(stable=True)]
            count = plan.count[runs]
            crowd = torch.zeros_like(count)
            if len(count) * int(count.max()) > 4 * int(count.sum()):
                crowd = (count.double().log2() / 2).long()
            for size in torch.unique(crowd):
                some = runs[crowd == size]
                even = _progressions(start[plan.node[some]].tolist())
                if 4 * len(even) <= len(some) or int(plan.length[some].max()) >= LONG:
                    groups += some.split(even)
                else:
                    groups.append(some)
    return groups


def _suffixes(plan: CascadePlan, slots_of_pool: int) -> Suffixes:
    """For the lengths and slots of now."""
    lengths, table, page = plan.suffix_lengths, plan.suffix_slots, plan.suffix_page
    on_host = lengths.device.type == "cpu"
    # The largest length is looked at where that does not wait for a device.
    longest = max(1, int(lengths.max())) if on_host else plan.suffix_capacity
    step = _regular(table[:, 0]) if on_host and (not page or longest <= page) else None
    if step is not None and int(table[:, 0].max()) + longest <= slots_of_pool:
        keys = Keys(len(lengths), longest, int(table[0, 0]), step)
    else:
        slots = _slots(table.long(), page, longest)
        seen = torch.arange(longest, device=lengths.device) < lengths.clamp(min=1)[:, None]
        keys = Keys(len(lengths), longest, slots=torch.where(seen, slots, slots[:, :1]).flatten())
    return Suffixes(keys, longest, {}, lengths, not on_host or int(lengths.min()) < 1)


def cascade_decode(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: CascadePlan, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """q [S, Hq, D], pools [slots, Hkv, D] -> out [S, Hq, D] and the parts' lse [parts, S, Hq], float32 at least."""
    sequences, heads, dim = q.shape
    kv_heads, value_dim = k_pool.shape[1], v_pool.shape[2]
    group = heads // kv_heads
    known = once(plan.prepared, "schedule", lambda: _schedule(plan))
    own: Suffixes = plan.of_step("suffixes", lambda: _suffixes(plan, len(k_pool)))
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.reshape(sequences, kv_heads, group, dim)
    out = q.new_empty((known.used, kv_heads, group, value_dim), dtype=wide)
    lse = q.new_empty((known.used, kv_heads, group), dtype=wide)
    # With a window, how many keys of its past each sequence does not see.
    lowest = None if window is None else plan.past + plan.suffix_lengths - window
    keys, values = own.keys.of(k_pool), own.keys.of(v_pool)
    if lowest is None:
        part, part_lse = partial_attention(q, keys, values, scale, own.mask(q.dtype))
    else:
        key = torch.arange(own.length, device=q.device)
        seen = (key < plan.suffix_lengths[:, None]) & (key >= (lowest - plan.past)[:, None])  # [S, L]
        part, part_lse = seen_attention(
            q, keys, values, scale, Sight.of(seen[:, None].expand(-1, group, -1), q.dtype)
        )
    out[:sequences], lse[:sequences] = part, part_lse
    out[sequences], lse[sequences] = 0, float("-inf")
    if own.some_empty:
        lse[:sequences].masked_fill_((plan.suffix_lengths < 1)[:, None, None], float("-inf"))
    spread = q.index_select(0, known.queries)
    taken = 0
    for call in known.calls:
        rows, size = call.keys.rows, call.keys.rows * call.width
        mine = spread[taken : taken + size].view(rows, call.width, kv_heads, group, dim).transpose(1, 2)
        mine = mine.reshape(rows, kv_heads, call.width * group, dim)
        keys, values = call.keys.of(k_pool), call.keys.of(v_pool)
        if lowest is None:
            part, part_lse = partial_attention(mine, keys, values, scale, call.mask(q.dtype))
        else:
            seen = call.seen(lowest[known.queries[taken : taken + size]]).repeat_interleave(group, 1)
            part, part_lse = seen_attention(mine, keys, values, scale, Sight.of(seen, q.dtype))
        at = slice(call.begin, call.begin + size)
        shape = rows, kv_heads, call.width, group
        out[at].view(rows, call.width, kv_heads, group, value_dim).copy_(
            part.view(*shape, value_dim).transpose(1, 2)
        )
        lse[at].view(rows, call.width, kv_heads, group).copy_(part_lse.reshape(shape).transpose(1, 2))
        taken += size
    lse = lse.index_select(0, known.where).view(known.parts, sequences, kv_heads, group)
    weights = torch.softmax(lse, 0)
    if own.some_empty:  # a sequence that sees nothing at all: zeros
        weights = weights.nan_to_num_(0.0)
    merged = out.index_select(0, known.where).view(known.parts, sequences, kv_heads, group, value_dim)
    merged = (merged * weights.unsqueeze(-1)).sum(0)
    return merged.to(q.dtype).view(sequences, heads, value_dim), lse.view(known.parts, sequences, heads)
