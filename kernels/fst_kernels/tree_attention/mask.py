"""The mask of tree attention: one int32 per token, and the segments that follow from it.

Tokens lie in depth-first preorder; key i is visible to query j iff i <= j < subtree_end[i], and, under a sliding window, depth[j] -
depth[i] < window. A token's depth is the number of its ancestors: those are the tokens before it whose subtree has not ended, so
subtree_end determines it. A *segment* is a run of tokens with equal subtree_end: token i+1 continues token i's segment exactly where
both end together, so segments need not be given. Segments form a tree: a segment's descendants are the contiguous range behind it, and
all of them see all of its keys.

A TreeMask is checked and analysed once per forest and then shared by every layer, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fst_kernels.checks import INTS, look_at_values, once


@dataclass(frozen=True)
class Segments:
    """S segments of all rows, int64 on the host. They count tokens through the whole batch: row b starts at b * N."""

    start: Tensor  # [S]
    end: Tensor  # [S]
    last: Tensor  # [S], exclusive end of the segment's descendants
    level: Tensor  # [S], 0 for a root

    def path_sum(self, amount: Tensor) -> Tensor:
        """For every segment, the sum of amount [S] over itself and its ancestors."""
        change = torch.zeros(len(amount) + 1, dtype=amount.dtype)
        change[:-1] = amount
        change.index_add_(0, torch.searchsorted(self.start, self.last), -amount)
        return change.cumsum(0)[:-1]

    @cached_property
    def depth(self) -> Tensor:
        """[S], of the segment's first token."""
        lengths = self.end - self.start
        return self.path_sum(lengths) - lengths


@dataclass(frozen=True, eq=False)
class TreeMask:
    """A forest of N tokens, or R = B of them, one per row of the batch. Build it with one of the constructors below.

    `prepared` holds what a backend derives from the mask, by the backend's key. subtree_end is a copy of the mask's own: do not write to it.
    """

    subtree_end: Tensor  # [R, N] int32, on the device of q, k and v
    depth: Tensor  # [R, N] int32, likewise
    known: Segments | None  # None: made from a device tensor that nobody has looked at
    read: Tensor | None = None  # [R, N] bool, likewise: queries whose output is read; None: all
    prepared: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _LIVE[_key(self.subtree_end)] = self

    @classmethod
    def from_subtree_end(
        cls,
        subtree_end: Tensor,
        *,
        depth: Tensor | None = None,
        device: torch.device | str | None = None,
        read: Tensor | None = None,
    ) -> TreeMask:
        """Check and analyse subtree_end, int32 [N] or [R, N], for attention on `device` (None: where it lies).

        Tokens lie in depth-first preorder: a node, then the whole subtree of its first child, then that of the next. subtree_end[i] is one
        behind the last token of token i's subtree. Where the tree is known as a parent of each token, in whatever order, take from_parents:
        ranges made from parents in another order than preorder can be those of another forest, and then nothing shows it.

        A host tensor is checked and analysed on the host, and sent to the device without waiting for it. A device tensor is looked at
        with FST_CHECK=1 only, because that waits for the device. `depth` (integer, of the same shape) is not needed; one that is given must agree.
        read (bool, of the same shape, on the host): the queries whose output is wanted. What the others get is undefined, which spares a kernel the blocks of
        queries without one, and there is no gradient.

        Raises ValueError where subtree_end is not int32 of one or two dimensions, not ascending (i < subtree_end[i] <= N), or not
        laminar (ranges that overlap without one holding the other), and where depth differs from the number of a token's ancestors.
        """
        if not isinstance(subtree_end, Tensor):
            raise ValueError(
                f"subtree_end is a {type(subtree_end).__name__}; an int32 tensor or a TreeMask is needed"
            )
        check_subtree_end(subtree_end)
        rows = subtree_end.detach()
        rows = (rows[None] if rows.ndim == 1 else rows).contiguous()  # as the kernels read it
        target = rows.device if device is None else torch.device(device)
        wanted = None if read is None else _send(read.view_as(rows), target)
        if not look_at_values(rows.device):
            mask = cls(rows.to(target, copy=True), _depth_on_device(rows).to(target), None, wanted)
        else:
            host = rows.cpu()
            segments = _segments(host)
            own_depth = _depth_of(segments, host.shape)
            mask = cls(_send(host, target), _send(own_depth, target), segments, wanted)
        if depth is not None:
            mask.check_depth(depth)
        return mask

    @classmethod
    def from_parents(
        cls, parents: Tensor | Sequence[int], *, device: torch.device | str | None = None
    ) -> tuple[TreeMask, Tensor]:
        """The mask of the forest in which token i hangs on token parents[i] (-1: a root), and the order in which its tokens must lie.

        parents: [N] integers, a tensor or a list, in any order: as the tokens were added, parents behind their children, trees mixed. Returns
        (mask, order), order int64 [N] on `device` (None: where parents lie, the CPU for a list): token order[j] of the caller's comes
        at place j, so q[:, :, order] is what the mask is for, and out[:, :, order.argsort()] is back in the caller's. Children of one
        node, and roots, keep the order in which the caller has them; parents in preorder give order = 0 .. N-1.

        Waits for the device. ValueError: no integers of one dimension, a parent outside -1 .. N-1, a token that is its own ancestor.
        """
        given = (
            torch.as_tensor(parents)
            if isinstance(parents, Tensor) or len(parents)
            else torch.empty(0, dtype=torch.int64)
        )
        if given.dtype not in INTS or given.ndim != 1:
            raise ValueError(
                f"parents has dtype {given.dtype} and shape {list(given.shape)}; [N] of int32 or int64 is needed"
            )
        target = given.device if device is None else torch.device(device)
        order, ends = _preorder(given.tolist())
        mask = cls.from_subtree_end(torch.tensor(ends, dtype=torch.int32), device=target)
        return mask, torch.tensor(order, dtype=torch.int64).to(target)

    @classmethod
    def causal(cls, n: int, *, device: torch.device | str = "cpu") -> TreeMask:
        """One sequence of n tokens: ordinary causal attention."""
        return cls.documents([n], device=device)

    @classmethod
    def documents(cls, lengths: Sequence[int], *, device: torch.device | str = "cpu") -> TreeMask:
        """Sequences of these lengths, one behind the other in a row, that do not see each other."""
        return cls.shared_prefixes([(length, ()) for length in lengths], device=device)

    @classmethod
    def shared_prefixes(
        cls, groups: Sequence[tuple[int, Sequence[int]]], *, device: torch.device | str = "cpu"
    ) -> TreeMask:
        """One level of sharing: groups of (prefix length, lengths of the suffixes that each continue the prefix), laid out in this order."""
        ends: list[Tensor] = [torch.empty(0, dtype=torch.int32)]
        at = 0
        for prefix, suffixes in groups:
            if prefix < 0 or any(s < 0 for s in suffixes):
                raise ValueError(f"lengths {prefix} and {list(suffixes)}; none may be negative")
            ends.append(torch.full((prefix,), at + prefix + sum(suffixes), dtype=torch.int32))
            at += prefix
            for suffix in suffixes:
                at += suffix
                ends.append(torch.full((suffix,), at, dtype=torch.int32))
        return cls.from_subtree_end(torch.cat(ends), device=device)

    @cached_property
    def segments(self) -> Segments:
        """The segments. Waits for the device, and checks the mask, where it was made from a device tensor."""
        return _segments(self.subtree_end.cpu()) if self.known is None else self.known

    @cached_property
    def deepest(self) -> int:
        """The largest depth; -1 without a token. On the host, like the segments."""
        s = self.segments
        return int((s.depth + s.end - s.start).max()) - 1 if len(s.start) else -1

    def binding(self, window: int | None) -> int | None:
        """The window, or None where one of this size hides nothing here, as far as the host knows without asking the device."""
        return None if window is None or (self.known and window > self.deepest) else window

    def check_depth(self, depth: Tensor) -> None:
        """ValueError where depth is not the number of each token's ancestors. Looks at a device tensor with FST_CHECK=1 only."""
        if not isinstance(depth, Tensor) or depth.dtype not in (torch.int32, torch.int64):
            kind = depth.dtype if isinstance(depth, Tensor) else type(depth).__name__
            raise ValueError(f"depth is {kind}; a tensor of int32 or int64 is needed")
        if depth.shape not in (self.depth.shape, self.depth.shape[1:]):
            raise ValueError(
                f"depth has shape {list(depth.shape)} and subtree_end {list(self.depth.shape)}; they must be equal"
            )
        if not (look_at_values(depth.device) and look_at_values(self.depth.device)):
            return
        given = depth.reshape(self.depth.shape).to(self.depth.device)
        wrong = (given != self.depth).nonzero()
        if len(wrong):
            row, i = wrong[0].tolist()
            raise ValueError(
                f"depth[{i}] of row {row} is {int(given[row, i])}, but subtree_end gives that token {int(self.depth[row, i])} ancestors"
            )

    def expand(self, batch: int) -> TreeMask:
        """A mask of `batch` rows: this one, or its only row repeated."""
        if len(self.subtree_end) == batch:
            return self
        assert len(self.subtree_end) == 1
        rows = self.subtree_end.expand(batch, -1)
        return once(self.prepared, batch, lambda: TreeMask.from_subtree_end(rows))


_LIVE: WeakValueDictionary[Any, TreeMask] = WeakValueDictionary()  # by the place and version of subtree_end


def _key(subtree_end: Tensor) -> tuple[Any, ...]:
    version = 0 if subtree_end.is_inference() else subtree_end._version
    shape, strides = tuple(subtree_end.shape), subtree_end.stride()
    return subtree_end.device, subtree_end.data_ptr(), shape, strides, version


def mask_of(subtree_end: Tensor) -> TreeMask:
    """The living mask whose own subtree_end this is, or a new one.

    A torch operator takes tensors and no masks; this finds the analysis again. It never finds a wrong one: a mask's tensor is a copy
    that nobody else writes to, and while the mask lives no other tensor can lie in its place.
    """
    found = _LIVE.get(_key(subtree_end)) if subtree_end.numel() else None
    return TreeMask.from_subtree_end(subtree_end) if found is None else found


def _preorder(parents: list[int]) -> tuple[list[int], list[int]]:
    """The tokens in depth-first preorder, siblings as they come, and the end of the subtree of each of these places."""
    n = len(parents)
    # the children of each token; at -1, the last, the roots
    below: list[list[int]] = [[] for _ in range(n + 1)]
    for token, parent in enumerate(parents):
        if not -1 <= parent < n:
            raise ValueError(f"parents[{token}]={parent}; allowed: -1 (a root) to {n - 1}")
        below[parent].append(token)
    order: list[int] = []
    ends = [0] * n
    # places whose subtree goes on, and how many tokens waited when it began
    open_: list[tuple[int, int]] = []
    waiting = below[-1][::-1]
    while waiting:
        token = waiting.pop()
        while open_ and open_[-1][1] > len(waiting):
            ends[open_.pop()[0]] = len(order)
        open_.append((len(order), len(waiting)))
        order.append(token)
        waiting += below[token][::-1]
    for place, _ in open_:
        ends[place] = len(order)
    if len(order) < n:
        seen = set(order)
        token = next(token for token in range(n) if token not in seen)
        raise ValueError(
            f"parents has a cycle: following them from token {token}, whose parent is {parents[token]}, never reaches a root (-1)"
        )
    return order, ends


def check_subtree_end(subtree_end: Tensor) -> None:
    if subtree_end.dtype != torch.int32:
        raise ValueError(f"subtree_end has dtype {subtree_end.dtype}; torch.int32 is needed")
    if subtree_end.ndim not in (1, 2):
        raise ValueError(f"subtree_end has shape {list(subtree_end.shape)}; [N] or [B, N] is needed")


def _send(host: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` that the host does not wait for."""
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device, copy=True)


def _depth_on_device(subtree_end: Tensor) -> Tensor:
    """Ancestors of token j = the j tokens before it, less those whose subtree ends at j or before. [R, N] int32"""
    rows, n = subtree_end.shape
    ends = torch.zeros((rows, n + 1), dtype=torch.int32, device=subtree_end.device)
    ends.scatter_add_(1, subtree_end.clamp(0, n).long(), torch.ones_like(subtree_end))
    at = torch.arange(n, dtype=torch.int32, device=subtree_end.device)
    return at - ends[:, :n].cumsum(1, dtype=torch.int32)


def _depth_of(segments: Segments, shape: torch.Size) -> Tensor:
    lengths = segments.end - segments.start
    shift = torch.repeat_interleave(segments.depth - segments.start, lengths)
    return (torch.arange(shape.numel()) + shift).to(torch.int32).view(shape)


def _segments(subtree_end: Tensor) -> Segments:
    """The segments of all rows [R, N]; raises ValueError where a row is no forest."""
    rows, n = subtree_end.shape
    ends = subtree_end.long()
    at = torch.arange(n)
    wrong = ((ends <= at) | (ends > n)).nonzero()
    if len(wrong):
        row, i = wrong[0].tolist()
        raise ValueError(
            f"subtree_end[{i}] of row {row} is {int(ends[row, i])}; it must lie in {i + 1}..{n} (i < subtree_end[i] <= N)"
        )
    first = torch.ones_like(ends, dtype=torch.bool)
    first[:, 1:] = ends[:, 1:] != ends[:, :-1]
    start = first.flatten().nonzero()[:, 0]
    end = torch.cat([start[1:], start.new_tensor([rows * n])]) if len(start) else start
    last = (ends + torch.arange(rows)[:, None] * n).flatten()[start]
    levels = []
    open_ends: list[int] = []
    for from_, until in zip(start.tolist(), last.tolist(), strict=True):
        while open_ends and open_ends[-1] <= from_:
            open_ends.pop()
        if open_ends and until > open_ends[-1]:
            row, around = from_ // n, open_ends[-1] - from_ // n * n
            raise ValueError(
                f"subtree_end is not laminar: in row {row} subtree_end[{from_ - row * n}]={until - row * n} reaches past the subtree "
                f"around it, which ends at {around}; at most {around} is allowed"
            )
        levels.append(len(open_ends))
        open_ends.append(until)
    return Segments(start, end, last, torch.tensor(levels, dtype=torch.int64))
