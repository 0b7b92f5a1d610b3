"""The head of a language model fused with what a policy-gradient loss reads from it, in plain PyTorch by chunks of rows.

A row is a hidden state h. With z = softcap(h W^T + b) / temperature and r the same of the reference model,
    log p = z - logsumexp z,   entropy = -sum p log p,   reverse KL = sum p (log p - log q),   forward KL = sum q (log q - log p),
where q = softmax r. For dLoss/d(log p of its labels) c_m, dLoss/dentropy g and dLoss/dKL k of a row, with c = sum of its c_m,
    dLoss/dz_v = p_v (b1 log p_v - b2 log q_v + b0) + c_m [v = label m]
    b1 = k - g,  b2 = k,  b0 = -c - k KL - g entropy        (reverse KL;  without KL: k = 0)
    b1 = -g,     b2 = 0,  b0 = -c - g entropy + k,  minus k q_v   (forward KL).
Every row of it sums to zero. It is written in log p, not z, so that large logits cancel before they are multiplied.

Only lse and the row quantities are kept for the backward; logits are recomputed there, chunk by chunk. A chunk's matrix product is
padded with zero rows to a multiple of ROW_BLOCK: BLAS takes other code paths, with other roundings, for few rows, and a row's numbers
must not depend on how many neighbours it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROW_BLOCK = 64
CHUNK_BYTES = 64 * 2**20
IGNORED = -100

Temperature = float | Tensor  # > 0; [N]
RowIndex = slice | Tensor


# ---------------------------------------------------------------------------------------------------------------- rows and labels


class LabelTable(NamedTuple):
    """The labels that count, by ascending row."""

    rows: Tensor  # [L] row of each
    labels: Tensor  # [L]
    origin: Tensor  # [L] its place in the caller's arrays


def label_table(labels: Tensor, rows: Tensor | None, live: Tensor) -> LabelTable:
    """labels, live (bool), rows: [M]; rows None means label m belongs to row m."""
    origin = live.nonzero().squeeze(1)
    if rows is None:
        return LabelTable(origin, labels[origin], origin)
    row = rows[origin].long()
    order = torch.argsort(row, stable=True)
    origin = origin[order]
    return LabelTable(row[order], labels[origin], origin)


class Chunk(NamedTuple):
    rows: RowIndex  # rows of the caller's [N, ...] tensors
    size: int
    labels: slice  # of the label table
    label_rows: Tensor  # [l] row inside the chunk


def row_chunks(
    selected: Tensor | None, num_rows: int, label_rows: Tensor, chunk_rows: int
) -> Iterator[Chunk]:
    """Chunks over all rows (selected None) or the selected ones [R], ascending; label_rows [L] count in selected rows, ascending."""
    starts = range(0, num_rows, chunk_rows)
    edges = torch.tensor([*starts, num_rows], device=label_rows.device)
    bounds = torch.searchsorted(label_rows, edges).tolist()
    for i, start in enumerate(starts):
        stop = min(start + chunk_rows, num_rows)
        rows = slice(start, stop) if selected is None else selected[start:stop]
        labels = slice(bounds[i], bounds[i + 1])
        yield Chunk(rows, stop - start, labels, label_rows[labels] - start)


def default_chunk_rows(vocabulary: int) -> int:
    """Rows whose fp32 logits take about 64 MiB. It depends on the vocabulary alone."""
    return max(ROW_BLOCK, CHUNK_BYTES // (4 * max(vocabulary, 1)) // ROW_BLOCK * ROW_BLOCK)


def accumulate_(target: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """target[index] += values, flat, repeated indices added in order: the same bits on every run (on CUDA index_add_ has atomics)."""
    if target.is_cuda:
        return target.index_put_((index,), values, accumulate=True)
    return target.index_add_(0, index, values)


# ---------------------------------------------------------------------------------------------------------------- matrix products


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tensor_cores(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16


def operand(x: Tensor) -> Tensor:
    """x as the matrix products take it: bf16 as it is where the device multiplies it with fp32 sums, else in the accumulator's dtype."""
    return x if _tensor_cores(x) else x.to(accumulator(x.dtype))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with sums and result in fp32 (fp64 for fp64); b is an operand()."""
    if _tensor_cores(b):
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return torch.mm(a.to(b.dtype), b)


class Head(NamedTuple):
    """What turns hidden states into z: one of these for the policy, one for the reference."""

    weight: Tensor  # [V, H], an operand()
    bias: Tensor | None  # [V]
    softcap: float | None

    def logits(self, hidden: Tensor, temperature: Temperature) -> Tensor:  # [n, H] -> [n, V]
        z = matmul(hidden, self.weight.t())
        if self.bias is not None:
            z += self.bias
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z.div_(temperature)

    def gradient(self, d_z: Tensor, z: Tensor | None, temperature: Temperature) -> Tensor:
        """dLoss/d(h W^T + b) from dLoss/dz, in place; z [n, V] is needed with a soft-cap."""
        d_z.div_(temperature)
        if self.softcap is not None:
            assert z is not None
            d_z.mul_(1 - (z * temperature / self.softcap).square_())
        return d_z


def pad_rows(hidden: Tensor) -> Tensor:
    """[n, H] -> [ceil(n / ROW_BLOCK) * ROW_BLOCK, H], zero rows at the end."""
    missing = -hidden.shape[0] % ROW_BLOCK
    return torch.cat((hidden, hidden.new_zeros(missing, hidden.shape[1]))) if missing else hidden


def chunk_temperature(temperature: Temperature, chunk: Chunk, dtype: torch.dtype) -> Temperature:
    """The float, or [n padded, 1] with ones in the padding."""
    if not isinstance(temperature, Tensor):
        return temperature
    column = temperature[chunk.rows].to(dtype).unsqueeze(1)
    return torch.cat((column, column.new_ones(-chunk.size % ROW_BLOCK, 1)))


# ---------------------------------------------------------------------------------------------------------------- row quantities


class RowStatistics(NamedTuple):
    """Row quantities of a chunk [n] and the log-probabilities they come from [n, V]."""

    lse: Tensor
    log_p: Tensor
    entropy: Tensor
    log_q: Tensor | None
    kl: Tensor | None


def row_statistics(z: Tensor, r: Tensor | None, kl: str | None) -> RowStatistics:
    """Takes z and r [n, V] over."""
    lse = torch.logsumexp(z, -1)
    log_p = z.sub_(lse.unsqueeze(1))
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    log_q = divergence = None
    if r is not None:
        log_q = r.sub_(torch.logsumexp(r, -1, keepdim=True))
        if kl == "reverse":
            divergence = (log_p - log_q).mul_(p).sum(-1)
        elif kl == "forward":
            divergence = (log_q - log_p).mul_(log_q.exp()).sum(-1)
    return RowStatistics(lse, log_p, entropy, log_q, divergence)


def logits_gradient(
    rows: RowStatistics,
    kl: str | None,
    c_label: Tensor,  # [l] dLoss/d(log-prob of the label)
    label_rows: Tensor,  # [l] its row in the chunk
    labels: Tensor,  # [l]
    d_entropy: Tensor | None,  # [n] dLoss/dentropy; None = 0
    d_kl: Tensor | None,  # [n] dLoss/dKL; None = 0
) -> Tensor:
    """dLoss/dz [n, V]: the closed form above. Takes d_* padded to the rows of the chunk."""
    vocabulary = rows.log_p.shape[1]
    p = rows.log_p.exp()
    b0 = -accumulate_(torch.zeros_like(rows.lse), label_rows, c_label)
    b1: Tensor | None = None
    if d_entropy is not None:
        b0 = b0 - d_entropy * rows.entropy
        b1 = -d_entropy
    if d_kl is not None and kl == "reverse":
        assert rows.kl is not None
        b0 = b0 - d_kl * rows.kl
        b1 = d_kl if b1 is None else b1 + d_kl
    if d_kl is not None and kl == "forward":
        b0 = b0 + d_kl
    if b1 is None:
        d_z = p.mul_(b0.unsqueeze(1))
    else:
        form = rows.log_p * b1.unsqueeze(1)
        if d_kl is not None and kl == "reverse":
            assert rows.log_q is not None
            form.addcmul_(rows.log_q, d_kl.unsqueeze(1), value=-1)
        d_z = form.add_(b0.unsqueeze(1)).mul_(p)
    if d_kl is not None and kl == "forward":
        assert rows.log_q is not None
        d_z.addcmul_(rows.log_q.exp(), d_kl.unsqueeze(1), value=-1)
    accumulate_(d_z.view(-1), label_rows * vocabulary + labels, c_label)
    return d_z


class Gradients:
    """Sums of dLoss over chunks: d_hidden [N, H] in the type of hidden, d_weight [V, H] and d_bias [V] in fp32; None where not wanted."""

    def __init__(
        self, hidden: Tensor, head: Head, need_hidden: bool, need_weight: bool, need_bias: bool
    ) -> None:
        dtype = accumulator(hidden.dtype)
        self.head = head
        self.hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
        self.weight = (
            torch.zeros(head.weight.shape, dtype=dtype, device=hidden.device) if need_weight else None
        )
        self.bias = (
            torch.zeros(head.weight.shape[0], dtype=dtype, device=hidden.device) if need_bias else None
        )

    def add(self, rows: RowIndex, d_logits: Tensor, hidden: Tensor) -> None:
        """d_logits [n, V] and hidden [n, H] of the same rows, without padding."""
        if self.hidden is not None:
            self.hidden[rows] = matmul(d_logits, self.head.weight).to(self.hidden.dtype)
        if self.weight is not None:
            h = operand(hidden)
            if _tensor_cores(h):
                a = d_logits.to(h.dtype).t()
                torch.addmm(self.weight, a, h, out_dtype=torch.float32, out=self.weight)
            else:
                self.weight.addmm_(d_logits.t(), h)
        if self.bias is not None:
            self.bias += d_logits.sum(0, dtype=self.bias.dtype)


def pad_vector(x: Tensor, n: int) -> Tensor:
    """[m] -> [n], zeros at the end."""
    return x if x.shape[0] == n else torch.cat((x, x.new_zeros(n - x.shape[0])))


# ---------------------------------------------------------------------------------------------------------------- mode A


def refuse_second_derivatives(op: str) -> None:
    """Autograd enables gradients inside a backward if and only if it was asked for create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has first derivatives only; create_graph=True is not supported")


class LinearLogprob(torch.autograd.Function):
    """hidden, weight, bias -> logprob [M], entropy [N], lse [N], ref_logprob [M], kl [N]; the closed-form backward above."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        labels: Tensor,
        rows: Tensor | None,
        temperature: Temperature,
        softcap: float | None,
        kl: str | None,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        table = label_table(labels, rows, labels != IGNORED)
        dtype, num_rows, device = accumulator(hidden.dtype), hidden.shape[0], hidden.device
        logprob = torch.zeros(labels.shape[0], dtype=dtype, device=device)
        lse = torch.empty(num_rows, dtype=dtype, device=device)
        entropy = torch.empty_like(lse)
        ref_logprob = None if ref_hidden is None else torch.zeros_like(logprob)
        divergence = None if kl is None else torch.empty_like(lse)
        head, ref_head = make_heads(weight, bias, ref_hidden, ref_weight, ref_bias, softcap)
        with torch.autocast(device.type, enabled=False):
            for chunk in row_chunks(None, num_rows, table.rows, chunk_rows):
                t = chunk_temperature(temperature, chunk, dtype)
                z = head.logits(pad_rows(hidden[chunk.rows]), t)
                r = None if ref_head is None else ref_head.logits(pad_rows(ref_hidden[chunk.rows]), t)  # type: ignore[index]
                stats = row_statistics(z, r, kl)
                n, at = chunk.size, (chunk.label_rows, table.labels[chunk.labels])
                lse[chunk.rows] = stats.lse[:n]
                entropy[chunk.rows] = stats.entropy[:n]
                logprob[table.origin[chunk.labels]] = stats.log_p[at]
                if ref_logprob is not None and stats.log_q is not None:
                    ref_logprob[table.origin[chunk.labels]] = stats.log_q[at]
                if divergence is not None and stats.kl is not None:
                    divergence[chunk.rows] = stats.kl[:n]
        ctx.save_for_backward(
            hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, labels,
            temperature if isinstance(temperature, Tensor) else None,
        )  # fmt: skip
        ctx.temperature, ctx.softcap, ctx.kl, ctx.chunk_rows = (
            temperature if isinstance(temperature, float) else None,
            softcap,
            kl,
            chunk_rows,
        )
        ctx.mark_non_differentiable(lse, *([] if ref_logprob is None else [ref_logprob]))
        ctx.set_materialize_grads(False)
        return logprob, entropy, lse, ref_logprob, divergence

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("linear_logprob")
        d_logprob, d_entropy, _, _, d_kl = grads
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, labels, temperature = ctx.saved_tensors
        temperature = ctx.temperature if temperature is None else temperature
        dtype = accumulator(hidden.dtype)
        if d_logprob is None:
            d_logprob = torch.zeros(labels.shape, dtype=dtype, device=hidden.device)
        # Labels and rows without a coefficient take no part from here on.
        table = label_table(labels, rows, (labels != IGNORED) & (d_logprob != 0))
        wanted = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        wanted[table.rows] = True
        for d_row in (d_entropy, d_kl):
            if d_row is not None:
                wanted |= d_row != 0
        selected = wanted.nonzero().squeeze(1)  # [R]
        compact = torch.searchsorted(selected, table.rows)  # [L]
        kl = None if d_kl is None else ctx.kl
        head, ref_head = make_heads(
            weight, bias, ref_hidden if kl else None, ref_weight, ref_bias, ctx.softcap
        )
        out = Gradients(hidden, head, *ctx.needs_input_grad[:3])
        every = selected.shape[0] == hidden.shape[0]
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in row_chunks(None if every else selected, selected.shape[0], compact, ctx.chunk_rows):
                t = chunk_temperature(temperature, chunk, dtype)
                h = hidden[chunk.rows]
                z = head.logits(pad_rows(h), t)
                r = None if ref_head is None else ref_head.logits(pad_rows(ref_hidden[chunk.rows]), t)
                kept = z.clone() if ctx.softcap is not None else None
                stats = row_statistics(z, r, kl)
                padded = z.shape[0]
                d_z = logits_gradient(
                    stats,
                    kl,
                    d_logprob[table.origin[chunk.labels]],
                    chunk.label_rows,
                    table.labels[chunk.labels],
                    None if d_entropy is None else pad_vector(d_entropy[chunk.rows], padded),
                    None if d_kl is None else pad_vector(d_kl[chunk.rows], padded),
                )
                out.add(chunk.rows, head.gradient(d_z, kept, t)[: chunk.size], h)
        d_weight = None if out.weight is None else out.weight.to(weight.dtype)
        d_bias = None if out.bias is None else out.bias.to(bias.dtype)
        return out.hidden, d_weight, d_bias, *([None] * 9)


def make_heads(
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    softcap: float | None,
) -> tuple[Head, Head | None]:
    """The policy's head and, if there are reference states, the reference's: the policy's own, bias included, without a ref_weight."""
    head = Head(operand(weight), bias, softcap)
    if ref_hidden is None:
        return head, None
    return head, head if ref_weight is None else Head(operand(ref_weight), ref_bias, softcap)
