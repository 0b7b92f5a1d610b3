"""The mask of tree attention: one int32 per token, and the segments that follow from it.

Tokens lie in depth-first preorder; key i is visible to query j iff i <= j < subtree_end[i]. A *segment* is a run of tokens with equal
subtree_end: token i+1 continues token i's segment exactly where both end together, so segments need not be given. Segments form a tree:
a segment's descendants are the contiguous range behind it, and all of them see all of its keys.

A TreeMask is checked and analysed once per forest and then shared by every layer, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TreeMask:
    """A checked mask. Segment arrays are on the host and count tokens through the whole batch: row b starts at b * N."""

    subtree_end: Tensor  # [B, N] int32, on the device of q, k and v
    start: NDArray[np.int64]  # [S]
    end: NDArray[np.int64]  # [S]
    last: NDArray[np.int64]  # [S], exclusive end of the segment's descendants
    level: NDArray[np.int64]  # [S], 0 for a root
    prepared: dict[Any, Any] = field(
        default_factory=dict, repr=False
    )  # what a backend derives from the mask, by the backend's key

    @classmethod
    def from_subtree_end(cls, subtree_end: Tensor) -> TreeMask:
        """Check and analyse subtree_end: int32 [N] or [B, N], on the device where attention will run.

        Raises ValueError where it is not int32 of one or two dimensions, not ascending (i < subtree_end[i] <= N), or not laminar
        (ranges that overlap without one holding the other).
        """
        if not isinstance(subtree_end, Tensor):
            raise ValueError(
                f"subtree_end is a {type(subtree_end).__name__}; an int32 tensor or a TreeMask is needed"
            )
        if subtree_end.dtype != torch.int32:
            raise ValueError(f"subtree_end has dtype {subtree_end.dtype}; torch.int32 is needed")
        if subtree_end.ndim not in (1, 2):
            raise ValueError(f"subtree_end has shape {list(subtree_end.shape)}; [N] or [B, N] is needed")
        rows = subtree_end.detach()
        rows = rows[None] if rows.ndim == 1 else rows
        segments = [_segments(row, b) for b, row in enumerate(rows.cpu().numpy().astype(np.int64))]
        shifts = np.repeat(np.arange(len(segments)) * rows.shape[1], [len(s[0]) for s in segments])
        start, end, last, level = (
            np.concatenate([s[c] for s in segments] or [np.empty(0, np.int64)]) for c in range(4)
        )
        return cls(rows, start + shifts, end + shifts, last + shifts, level)

    def expand(self, batch: int) -> TreeMask:
        """A mask of `batch` rows: this one, or its only row repeated."""
        if len(self.subtree_end) == batch:
            return self
        assert len(self.subtree_end) == 1
        if batch not in self.prepared:
            self.prepared[batch] = TreeMask.from_subtree_end(self.subtree_end.expand(batch, -1).contiguous())
        repeated: TreeMask = self.prepared[batch]
        return repeated


def _segments(subtree_end: NDArray[np.int64], row: int) -> tuple[NDArray[np.int64], ...]:
    """start, end, last, level of one row's segments; raises ValueError where the row is no forest."""
    n = len(subtree_end)
    wrong = np.flatnonzero((subtree_end <= np.arange(n)) | (subtree_end > n))
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"subtree_end[{i}] of row {row} is {subtree_end[i]}; it must lie in {i + 1}..{n} (i < subtree_end[i] <= N)"
        )
    start = np.flatnonzero(np.diff(subtree_end, prepend=-1))
    end = np.append(start[1:], n) if n else start
    last = subtree_end[start]
    level = np.zeros(len(start), np.int64)
    open_ends: list[int] = []
    for s, (first, until) in enumerate(zip(start.tolist(), last.tolist(), strict=True)):
        while open_ends and open_ends[-1] <= first:
            open_ends.pop()
        if open_ends and until > open_ends[-1]:
            raise ValueError(
                f"subtree_end is not laminar: in row {row} subtree_end[{first}]={until} reaches past the subtree around it, which "
                f"ends at {open_ends[-1]}; at most {open_ends[-1]} is allowed"
            )
        level[s] = len(open_ends)
        open_ends.append(until)
    return start, end, last, level
