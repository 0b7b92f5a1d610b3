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

    # [n, H] -> [n, V]
    def logits(self, hidden: Tensor, temperature: Temperature, out: Tensor | None) -> Tensor:
        z = matmul(hidden, self.weight.t(), out)
        if self.bias is not None:
            z += self.bias
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z.div_(temperature)


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


class Scratch:
    """Matrices [n, V] that are used again for every chunk: on a CPU a fresh one costs more, in page faults, than what is computed in it.

    None on other devices, whose allocators keep their memory: torch makes a fresh one.
    """

    def __init__(self, weight: Tensor) -> None:
        """weight: an operand() [V, H]."""
        self.like = weight
        self.kept: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int) -> Tensor | None:
        if self.like.device.type != "cpu":
            return None
        if name not in self.kept or self.kept[name].shape[0] < rows:
            self.kept[name] = self.like.new_empty(rows, self.like.shape[0])
        return self.kept[name][:rows]


class RowStatistics(NamedTuple):
    """Row quantities [n] and the log-probabilities they come from [n, V]."""

    lse: Tensor
    log_p: Tensor
    entropy: Tensor
    log_q: Tensor | None
    kl: Tensor | None
    kept: Tensor  # [4, n] what log p and log q were made of: the policy's peak and log of the sum, then the reference's


def log_softmax_(z: Tensor, scratch: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """z [n, V] becomes log p; its peak and the log of its sum relative to that [n, 1], and log p's mean under p [n], minus the entropy."""
    peak = z.amax(-1, keepdim=True)
    z.sub_(peak)
    p = torch.exp(z, out=scratch)
    total = p.sum(-1, keepdim=True)
    log_total = total.log()
    mean = p.mul_(z).sum(-1, keepdim=True).div_(total).sub_(log_total)
    z.sub_(log_total)
    return torch.stack((peak.squeeze(1), log_total.squeeze(1))), mean.squeeze(1), z


def row_statistics(z: Tensor, r: Tensor | None, kl: str | None, scratch: Scratch) -> RowStatistics:
    """Takes z and r [n, V] over."""
    kept, mean, log_p = log_softmax_(z, scratch("p", len(z)))
    log_q = divergence = None
    ref_kept = torch.zeros_like(kept)
    if r is not None:
        ref_kept, _, log_q = log_softmax_(r, scratch("p", len(z)))
        if kl is not None:
            of, other = (log_p, log_q) if kl == "reverse" else (log_q, log_p)
            term = torch.sub(of, other, out=scratch("term", len(z)))
            divergence = term.mul_(torch.exp(of, out=scratch("p", len(z)))).sum(-1)
    return RowStatistics(kept.sum(0), log_p, -mean, log_q, divergence, torch.cat((kept, ref_kept)))


def logits_gradient(
    rows: RowStatistics,
    kl: str | None,
    c_label: Tensor,  # [l] dLoss/d(log-prob of the label)
    label_rows: Tensor,  # [l] its row in the chunk
    labels: Tensor,  # [l]
    d_entropy: Tensor | None,  # [n] dLoss/dentropy; None = 0
    d_kl: Tensor | None,  # [n] dLoss/dKL; None = 0
    scratch: Scratch,
) -> Tensor:
    """dLoss/dz [n, V]: the closed form above. Takes rows over."""
    log_p, log_q, vocabulary = rows.log_p, rows.log_q, rows.log_p.shape[1]
    d_z = torch.exp(log_p, out=scratch("p", len(log_p)))
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
        d_z.mul_(b0.unsqueeze(1))
    else:
        form = log_p.mul_(b1.unsqueeze(1))
        if d_kl is not None and kl == "reverse":
            assert log_q is not None
            form.addcmul_(log_q, d_kl.unsqueeze(1), value=-1)
        d_z.mul_(form.add_(b0.unsqueeze(1)))
    if d_kl is not None and kl == "forward":
        assert log_q is not None
        d_z.addcmul_(log_q.exp_(), d_kl.unsqueeze(1), value=-1)
    accumulate_(d_z.view(-1), label_rows * vocabulary + labels, c_label)
    return d_z


class ReferenceRows:
    """HeadRows in plain PyTorch, on any device."""

    def __init__(self, heads: Heads) -> None:
        self.head, self.ref_head = make_heads(heads)
        self.kl = heads.kl
        self.scratch = Scratch(self.head.weight)

    def _all_logits(
        self, rows: Rows, *, keep: bool
    ) -> tuple[Temperature, Tensor, Tensor | None, Tensor | None]:
        """Temperature, the policy's and the reference's logits, and what the gradient of the soft-cap needs."""
        t = padded_temperature(rows.temperature, accumulator(rows.hidden.dtype))
        z = self._logits("z", self.head, rows.hidden, t)
        r = None if rows.ref_hidden is None else self._logits("r", self.ref_head, rows.ref_hidden, t)
        scaled = None
        if keep and self.head.softcap is not None:  # the gradient of the soft-cap is 1 - scaled^2
            scaled = torch.mul(z, t, out=self.scratch("scaled", len(z))).div_(self.head.softcap)
        return t, z, r, scaled

    def evaluate(self, rows: Rows, *, keep: bool) -> RowValues:
        t, z, r, scaled = self._all_logits(rows, keep=keep)
        statistics = row_statistics(z, r, self.kl, self.scratch)
        n, at = rows.hidden.shape[0], (rows.label_rows, rows.labels)
        if keep:
            self.last = rows, t, scaled, statistics
        return RowValues(
            statistics.log_p[at],
            statistics.entropy[:n],
            statistics.lse[:n],
            None if statistics.log_q is None else statistics.log_q[at],
            None if statistics.kl is None else statistics.kl[:n],
            statistics.kept[:, :n],
        )

    def recall(self, rows: Rows, entropy: Tensor, kl: Tensor | None, kept: Tensor) -> None:
        t, z, r, scaled = self._all_logits(rows, keep=True)
        peak, log_total, ref_peak, ref_log_total = pad_rows(kept.t()).t().unsqueeze(2)
        log_p = z.sub_(peak).sub_(log_total)  # the bits of log_softmax_ without its sums
        log_q = None if r is None else r.sub_(ref_peak).sub_(ref_log_total)
        lse = (peak + log_total).squeeze(1)
        statistics = RowStatistics(
            lse, log_p, pad_rows(entropy), log_q, None if kl is None else pad_rows(kl), kept
        )
        self.last = rows, t, scaled, statistics

    def gradient(
        self,
        coefficient: Tensor,
        d_entropy: Tensor | None,
        d_kl: Tensor | None,
        acting: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        rows, t, scaled, statistics = self.last
        del self.last
        d_logits = logits_gradient(
            statistics,
            self.kl,
            coefficient,
            rows.label_rows,
            rows.labels,
            None if d_entropy is None else pad_rows(d_entropy),
            None if d_kl is None else pad_rows(d_kl),
            self.scratch,
        ).div_(t)
        if scaled is not None:
            d_logits.mul_(scaled.square_().neg_().add_(1))
        d_logits = d_logits[: rows.hidden.shape[0]]
        d_logits = d_logits if acting is None else d_logits[acting]
        return d_logits if out is None else out.copy_(d_logits)

    def _logits(self, name: str, head: Head, hidden: Tensor, temperature: Temperature) -> Tensor:
        padded = pad_rows(hidden)
        return head.logits(padded, temperature, self.scratch(name, len(padded)))
