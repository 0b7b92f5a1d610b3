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

from fst_kernels.checks import look_at_values


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
    prepared: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _LIVE[_key(self.subtree_end)] = self

    @classmethod
    def from_subtree_end(
        cls, subtree_end: Tensor, *, depth: Tensor | None = None, device: torch.device | str | None = None
    ) -> TreeMask:
        """Check and analyse subtree_end, int32 [N] or [R, N], for attention on `device` (None: where it lies).

        A host tensor is checked and analysed on the host, and sent to the device without waiting for it. A device tensor is looked at
        with FST_CHECK=1 only, because that waits for the device. `depth` (integer, of the same shape) is not needed; one that is given must agree.

        Raises ValueError where subtree_end is not int32 of one or two dimensions, not ascending (i < subtree_end[i] <= N), or not
        laminar (ranges that overlap without one holding the other), and where depth differs from the number of a token's ancestors.
        """
        if not isinstance(subtree_end, Tensor):
            raise ValueError(
                f"subtree_end is a {type(subtree_end).__name__}; an int32 tensor or a TreeMask is needed"
            )
        check_subtree_end(subtree_end)
        rows = subtree_end.detach()
        rows = rows[None] if rows.ndim == 1 else rows
        target = rows.device if device is None else torch.device(device)
        if not look_at_values(rows.device):
            mask = cls(rows.to(target, copy=True), _depth_on_device(rows).to(target), None)
        else:
            host = rows.cpu()
            segments = _segments(host)
            own_depth = _depth_of(segments, host.shape)
            mask = cls(_send(host, target), _send(own_depth, target), segments)
        if depth is not None:
            mask.check_depth(depth)
        return mask

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
        if batch not in self.prepared:
            self.prepared[batch] = TreeMask.from_subtree_end(self.subtree_end.expand(batch, -1))
        repeated: TreeMask = self.prepared[batch]
        return repeated


_LIVE: WeakValueDictionary[Any, TreeMask] = WeakValueDictionary()  # by the place and version of subtree_end


def _key(subtree_end: Tensor) -> tuple[Any, ...]:
    version = 0 if subtree_end.is_inference() else subtree_end._version
    return subtree_end.device, subtree_end.data_ptr(), tuple(subtree_end.shape), version


def mask_of(subtree_end: Tensor) -> TreeMask:
    """The living mask whose own subtree_end this is, or a new one.

    A torch operator takes tensors and no masks; this finds the analysis again. It never finds a wrong one: a mask's tensor is a copy
    that nobody else writes to, and while the mask lives no other tensor can lie in its place.
    """
    found = _LIVE.get(_key(subtree_end)) if subtree_end.numel() else None
    return TreeMask.from_subtree_end(subtree_end) if found is None else found


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
