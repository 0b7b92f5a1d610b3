"""The head of a language model fused with what a policy-gradient loss reads from it, in plain PyTorch: a chunk of rows at a time.

A row is a hidden state h. With z = softcap(h W^T + b) / temperature and r the same of the reference model,
    log p = z - logsumexp z,   entropy = -sum p log p,   reverse KL = sum p (log p - log q),   forward KL = sum q (log q - log p),
where q = softmax r. For dLoss/d(log p of its labels) c_m, dLoss/dentropy g and dLoss/dKL k of a row, with c = sum of its c_m,
    dLoss/dz_v = p_v (b1 log p_v - b2 log q_v + b0) + c_m [v = label m]
    b1 = k - g,  b2 = k,  b0 = -c - k KL - g entropy        (reverse KL;  without KL: k = 0)
    b1 = -g,     b2 = 0,  b0 = -c - g entropy + k,  minus k q_v   (forward KL).
Every row of it sums to zero. It is written in log p, not z, so that large logits cancel before they are multiplied.

A chunk's matrix product is padded with zero rows to a multiple of ROW_BLOCK: BLAS takes other code paths, with other roundings, for few
rows, and a row's numbers must not depend on how many neighbours it has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fst_kernels.linear_logprob.rows import (
    Heads,
    Rows,
    RowValues,
    Temperature,
    accumulate_,
    accumulator,
    matmul,
    operand,
)

ROW_BLOCK = 64
CHUNK_BYTES = 64 * 2**20


def default_chunk_rows(vocabulary: int) -> int:
    """Rows whose fp32 logits take about 64 MiB. It depends on the vocabulary alone."""
    return max(ROW_BLOCK, CHUNK_BYTES // (4 * max(vocabulary, 1)) // ROW_BLOCK * ROW_BLOCK)


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


def make_heads(heads: Heads) -> tuple[Head, Head]:
    """The policy's head and the reference's: the policy's own, bias included, without a ref_weight."""
    head = Head(operand(heads.weight), heads.bias, heads.softcap)
    if heads.ref_weight is None:
        return head, head
    return head, Head(operand(heads.ref_weight), heads.ref_bias, heads.softcap)


def pad_rows(x: Tensor) -> Tensor:
    """[n, ...] -> [ceil(n / ROW_BLOCK) * ROW_BLOCK, ...], zeros at the end."""
    missing = -x.shape[0] % ROW_BLOCK
    return torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x


def padded_temperature(temperature: Temperature, dtype: torch.dtype) -> Temperature:
    """The float, or [n] -> [n padded, 1] with ones in the padding."""
    if not isinstance(temperature, Tensor):
        return temperature
    column = temperature.to(dtype).unsqueeze(1)
    return torch.cat((column, column.new_ones(-column.shape[0] % ROW_BLOCK, 1)))


class RowStatistics(NamedTuple):
    """Row quantities [n padded] and the log-probabilities they come from [n padded, V]."""

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
    d_entropy: Tensor | None,  # [n padded] dLoss/dentropy; None = 0
    d_kl: Tensor | None,  # [n padded] dLoss/dKL; None = 0
) -> Tensor:
    """dLoss/dz [n padded, V]: the closed form above."""
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


class ReferenceRows:
    """HeadRows in plain PyTorch, on any device."""

    def __init__(self, heads: Heads) -> None:
        self.head, self.ref_head = make_heads(heads)
        self.kl = heads.kl

    def evaluate(self, rows: Rows, *, keep: bool) -> RowValues:
        t = padded_temperature(rows.temperature, accumulator(rows.hidden.dtype))
        z = self.head.logits(pad_rows(rows.hidden), t)
        r = None if rows.ref_hidden is None else self.ref_head.logits(pad_rows(rows.ref_hidden), t)
        scaled = z.clone() if keep and self.head.softcap is not None else None
        statistics = row_statistics(z, r, self.kl)
        n, at = rows.hidden.shape[0], (rows.label_rows, rows.labels)
        if keep:
            self.last = rows, t, scaled, statistics
        return RowValues(
            statistics.log_p[at],
            statistics.entropy[:n],
            statistics.lse[:n],
            None if statistics.log_q is None else statistics.log_q[at],
            None if statistics.kl is None else statistics.kl[:n],
        )

    def recall(self, rows: Rows, entropy: Tensor, kl: Tensor | None, kept: Tensor) -> None:
        self.evaluate(rows, keep=True)

    def gradient(
        self, coefficient: Tensor, d_entropy: Tensor | None, d_kl: Tensor | None, acting: Tensor | None
    ) -> Tensor:
        rows, t, scaled, statistics = self.last
        del self.last
        d_z = logits_gradient(
            statistics,
            self.kl,
            coefficient,
            rows.label_rows,
            rows.labels,
            None if d_entropy is None else pad_rows(d_entropy),
            None if d_kl is None else pad_rows(d_kl),
        )
        d_logits = self.head.gradient(d_z, scaled, t)[: rows.hidden.shape[0]]
        return d_logits if acting is None else d_logits[acting]
