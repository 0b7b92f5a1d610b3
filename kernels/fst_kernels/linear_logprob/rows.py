"""Rows, labels, chunks and the sums of gradients over chunks: what every backend of linear_logprob and linear_policy_loss shares.

A row is a hidden state; a label belongs to one row, a row can have several labels or none. Work goes chunk by chunk of rows, so that the
logits of a chunk exist and never those of all rows. What a backend does with a chunk is `HeadRows`; the two operations (op.py here and in
linear_policy_loss) are loops over chunks and know nothing of how.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fst_kernels.checks import check_range

IGNORED = -100

Temperature = float | Tensor  # > 0; [n]
RowIndex = slice | Tensor


# ---------------------------------------------------------------------------------------------------------------- rows and labels


class LabelTable(NamedTuple):
    """Labels by ascending row."""

    rows: Tensor  # [L] row of each
    labels: Tensor  # [L]
    origin: Tensor  # [L] its place in the caller's arrays


def label_table(labels: Tensor, rows: Tensor | None, live: Tensor) -> LabelTable:
    """The labels that count. labels, live (bool), rows: [M]; rows None: label m belongs to row m. Waits for the device."""
    origin = live.nonzero().squeeze(1)
    if rows is None:
        return LabelTable(origin, labels[origin], origin)
    row = rows[origin].long()
    order = torch.argsort(row, stable=True)
    origin = origin[order]
    return LabelTable(row[order], labels[origin], origin)


def every_label(labels: Tensor, rows: Tensor | None) -> LabelTable:
    """All labels, label 0 in the place of ignored ones. Waits for nothing."""
    if rows is None:
        origin = row = torch.arange(labels.shape[0], device=labels.device)
    else:
        row, origin = torch.sort(rows.long(), stable=True)
        labels = labels[origin]
    return LabelTable(row, torch.where(labels == IGNORED, 0, labels), origin)


class KnownRows(NamedTuple):
    """Rows of labels that the host knows: nothing that depends on them has to be asked of the device."""

    rows: Tensor  # [M] ascending
    order: Tensor  # [M] the place of each in the caller's arrays
    bounds: list[int]  # label at which each chunk of rows begins, and M

    @classmethod
    def of(cls, rows: Tensor, num_rows: int, chunk_rows: int, device: torch.device) -> KnownRows:
        """rows [M] int on the host, from 0 to num_rows - 1; the tensors are sent to the device, which is not waited for."""
        check_range("rows", rows, 0, max(num_rows, 1))
        ascending, order = torch.sort(rows.long(), stable=True)
        edges = torch.tensor([*range(0, num_rows, chunk_rows), num_rows])
        bounds = torch.searchsorted(ascending, edges).tolist()
        if device.type == "cuda":
            ascending, order = ascending.pin_memory(), order.pin_memory()
        return cls(ascending.to(device, non_blocking=True), order.to(device, non_blocking=True), bounds)


class Chunk(NamedTuple):
    rows: RowIndex  # rows of the caller's [N, ...] tensors
    size: int
    labels: slice  # of the label table
    label_rows: Tensor  # [l] row inside the chunk


def row_chunks(
    selected: Tensor | None,
    num_rows: int,
    label_rows: Tensor,
    chunk_rows: int,
    bounds: Sequence[int] = (),
) -> Iterator[Chunk]:
    """Chunks over all rows (selected None) or the selected ones [R], ascending; label_rows [L] count in selected rows, ascending.

    bounds: see KnownRows. Without them waits for the device where there is more than one chunk.
    """
    if num_rows <= chunk_rows:
        if num_rows:
            rows = slice(0, num_rows) if selected is None else selected
            yield Chunk(rows, num_rows, slice(0, label_rows.shape[0]), label_rows)
        return
    starts = range(0, num_rows, chunk_rows)
    if not bounds:
        edges = torch.tensor([*starts, num_rows], device=label_rows.device)
        bounds = torch.searchsorted(label_rows, edges).tolist()
    for i, start in enumerate(starts):
        stop = min(start + chunk_rows, num_rows)
        rows = slice(start, stop) if selected is None else selected[start:stop]
        labels = slice(bounds[i], bounds[i + 1])
        yield Chunk(rows, stop - start, labels, label_rows[labels] - start)


def acting_rows(chunk: Chunk, local: Tensor) -> RowIndex:
    """Rows `local` [a] of the chunk, ascending, in the caller's tensors."""
    return local + chunk.rows.start if isinstance(chunk.rows, slice) else chunk.rows[local]


def accumulate_(target: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """target[index] += values, flat, repeated indices added in order: the same bits on every run (on CUDA index_add_ has atomics)."""
    if target.is_cuda:
        return target.index_put_((index,), values, accumulate=True)
    return target.index_add_(0, index, values)


# ---------------------------------------------------------------------------------------------------------------- matrix products


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensor_cores(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16


def operand(x: Tensor) -> Tensor:
    """x as the matrix products take it: bf16 as it is where the device multiplies it with fp32 sums, else in the accumulator's dtype."""
    return x if tensor_cores(x) else x.to(accumulator(x.dtype))


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with sums and result in fp32 (fp64 for fp64), in `out` if given; b is an operand()."""
    if tensor_cores(b):
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return torch.mm(a.to(b.dtype), b, out=out)


GATHERED_BYTES = 2500 * 10**6  # 8,227 rows at V = 151,936
GATHERED_CHUNKS = 16


class Gradients:
    """Sums of dLoss over chunks: d_hidden [N, H] in the type of hidden, d_weight [V, H] and d_bias [V] in fp32; None where not wanted.

    On tensor cores the fp32 d_weight is read and written once per product, and a product over the few rows of one chunk is short: the
    gradients of several chunks are gathered (`room`), at most GATHERED_CHUNKS of them or GATHERED_BYTES, and multiplied together.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,  # [V, H], an operand()
        *,
        need_hidden: bool,
        need_weight: bool,
        need_bias: bool,
        gathered_rows: int,  # 0: each chunk is multiplied by itself
    ) -> None:
        dtype = accumulator(hidden.dtype)
        self.operand = weight
        self.hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
        self.weight = torch.zeros(weight.shape, dtype=dtype, device=hidden.device) if need_weight else None
        self.bias = torch.zeros(weight.shape[0], dtype=dtype, device=hidden.device) if need_bias else None
        self.gathered = weight.new_empty(gathered_rows, weight.shape[0]) if gathered_rows else None
        self.pending: list[tuple[RowIndex, Tensor]] = []  # rows and hidden states of what is gathered
        self.filled = 0

    def room(self, rows: int) -> Tensor | None:
        """[rows, V] for the dLoss/dlogits of the next add(); None: no place is kept for it."""
        if self.gathered is None:
            return None
        if self.filled + rows > self.gathered.shape[0]:
            self.flush()
        return self.gathered[self.filled : self.filled + rows]

    def add(self, rows: RowIndex, d_logits: Tensor, hidden: Tensor) -> None:
        """d_logits [n, V], in the room that was given if one was, and hidden [n, H] of the same rows."""
        if self.gathered is None:
            self._multiply(rows, d_logits, hidden)
        else:
            self.pending.append((rows, hidden))
            self.filled += hidden.shape[0]

    def flush(self) -> None:
        """What is gathered goes into the sums. Called at the end, too."""
        if self.gathered is None or not self.pending:
            return
        device = self.gathered.device
        index = torch.cat([
            torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
            for rows, _ in self.pending
        ])  # fmt: skip
        self._multiply(index, self.gathered[: self.filled], torch.cat([h for _, h in self.pending]))
        self.pending, self.filled = [], 0

    def _multiply(self, rows: RowIndex, d_logits: Tensor, hidden: Tensor) -> None:
        if self.hidden is not None:
            self.hidden[rows] = matmul(d_logits, self.operand).to(self.hidden.dtype)
        if self.weight is not None:
            h = operand(hidden)
            if tensor_cores(h):
                a = d_logits.to(h.dtype).t()
                torch.addmm(self.weight, a, h, out_dtype=torch.float32, out=self.weight)
            else:
                self.weight.addmm_(d_logits.t(), h)
        if self.bias is not None:
            self.bias += d_logits.sum(0, dtype=self.bias.dtype)


def gathered_rows(weight: Tensor, num_rows: int, chunk_rows: int) -> int:
    """How many rows' gradients are gathered for one product. weight: an operand() [V, H]."""
    if not tensor_cores(weight):
        return 0
    most = GATHERED_BYTES // (weight.element_size() * max(weight.shape[0], 1))
    return min(max(most, chunk_rows), GATHERED_CHUNKS * chunk_rows, num_rows)


# ---------------------------------------------------------------------------------------------------------------- what a backend does


class Heads(NamedTuple):
    """The policy's head and, where ref_hidden is given with the rows, the reference's: weight and bias, too, without a ref_weight."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    ref_weight: Tensor | None  # [V, H']
    ref_bias: Tensor | None  # [V]
    softcap: float | None
    kl: str | None  # "reverse" or "forward": that exact KL is wanted; None: none


class Rows(NamedTuple):
    """A chunk of rows and its labels."""

    hidden: Tensor  # [n, H]
    ref_hidden: Tensor | None  # [n, H']
    temperature: Temperature
    label_rows: Tensor  # [l] ascending
    labels: Tensor  # [l]


class RowValues(NamedTuple):
    """In the accumulator's dtype."""

    logprob: Tensor  # [l]
    entropy: Tensor  # [n]
    lse: Tensor  # [n]
    ref_logprob: Tensor | None  # [l]
    kl: Tensor | None  # [n]
    # [4, n] what recall() needs: peak and log of the sum relative to it, the policy's and the reference's
    kept: Tensor | None = None


class HeadRows(Protocol):
    """One backend over one pair of heads: what rows come to and, of the rows evaluated last, dLoss/dlogits."""

    def evaluate(self, rows: Rows, *, keep: bool) -> RowValues:
        """keep: gradient() follows."""

    def gradient(
        self,
        coefficient: Tensor,
        d_entropy: Tensor | None,
        d_kl: Tensor | None,
        acting: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        """dLoss/d(h W^T + b) [n or a, V] from dLoss/dlogprob [l], dLoss/dentropy [n] and dLoss/dKL [n] (None: 0).

        acting [a]: ascending rows that are wanted; None: all. out: where to put it; None: anywhere, until the next call.
        """


class RecallableRows(HeadRows, Protocol):
    """One that can also come back to rows evaluated earlier: what mode A's backward needs."""

    def recall(self, rows: Rows, entropy: Tensor, kl: Tensor | None, kept: Tensor) -> None:
        """As after evaluate(rows, keep=True), which gave this entropy [n], kl [n] and kept [4, n]: logits are computed again."""


def refuse_second_derivatives(op: str) -> None:
    """Autograd enables gradients inside a backward if and only if it was asked for create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has first derivatives only; create_graph=True is not supported")
