"""The same head as reference.py in Triton: the matrix product reads its own rows' statistics while a tile of logits is in registers.

The kernels are in triton_kernels.py; here are their tiles, their launches and `TritonRows`, which is what the operations call. Scoring
(linear_logprob) and training (linear_policy_loss) run the very same product, so the ratio of a policy to itself is exactly 1. Without an
exact KL and without a gradient no logits are stored at all. The gradient's own products are torch's (cuBLAS). On compute capability 9.0
and later tiles come through TMA descriptors, before it through pointers. With TRITON_INTERPRET=1 all of it runs on the CPU, in float32.
"""

# Kernels are launched with an index, which Python's types do not describe.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fst_kernels.linear_logprob.rows import Heads, Rows, RowValues, accumulate_, matmul, operand
from fst_kernels.linear_logprob.triton_kernels import (
    combine_kernel,
    divergence_kernel,
    head_statistics_kernel,
    logits_gradient_kernel,
)

CHUNK_BYTES = 320 * 10**6
# hidden states that the product keeps in the L2 cache (40 MB on an A100, 50 MB on an H100) beside the weights
RESIDENT_BYTES = 16 * 10**6
BLOCK = 1024  # columns of a row that the row kernels take at a time


class Tiles(NamedTuple):
    """A tile of the product. It must not depend on the number of rows: a row's bits do depend on it."""

    rows: int
    columns: int
    depth: int
    split: int  # columns of the vocabulary that one program walks through
    tma: bool
    halves: bool  # of a tile are read one after the other
    warps: int
    stages: int


# A split is short, so that the last wave of programs is nearly full: 512 rows of a vocabulary of 151,936 are 4 x 297 programs of the
# Hopper tile, exactly 9 waves over 132 multiprocessors; 4 x 38 programs of 4096 columns would be 1.15 waves.
INTERPRETED = Tiles(16, 64, 32, 256, False, True, 4, 1)
FULL_PRECISION = Tiles(64, 64, 32, 512, False, False, 4, 2)  # float32 operands
AMPERE = Tiles(128, 64, 64, 512, False, False, 8, 3)
HOPPER = Tiles(128, 256, 64, 512, True, True, 8, 3)
BLACKWELL = Tiles(128, 128, 64, 512, True, True, 8, 4)
CONSUMER = Tiles(128, 128, 64, 512, True, True, 8, 3)  # 12.x: mma.sync, and 99 KiB of shared memory
COMBINED_ROWS, COMBINED_SPLITS = 16, 64  # of the partial statistics, at a time


def choose_tiles(hidden: Tensor) -> Tiles:
    if not hidden.is_cuda:
        return INTERPRETED
    if hidden.dtype == torch.float32:
        return FULL_PRECISION
    major, _ = torch.cuda.get_device_capability(hidden.device)
    rows_are_aligned = hidden.shape[1] * hidden.element_size() % 16 == 0  # what a descriptor asks for
    if major < 9 or not rows_are_aligned:
        return AMPERE
    return {9: HOPPER, 10: BLACKWELL, 11: BLACKWELL}.get(major, CONSUMER)


def default_chunk_rows(vocabulary: int, products: int) -> int:
    """Rows whose fp32 products, so many per row, take 320 MB together: what is gathered for the gradient's products is larger (Gradients)."""
    return max(128, CHUNK_BYTES // (4 * max(vocabulary, 1) * products) // 128 * 128)


def row_group(row_bytes: int, tile_rows: int) -> int:
    """Tiles of rows that go through the whole vocabulary together."""
    return max(1, RESIDENT_BYTES // (row_bytes * tile_rows))


def _operand(x: Tensor, tma: bool, tile_rows: int) -> Tensor:
    """Adjacent columns, offsets inside a tile that fit 32 bits, and for a descriptor aligned rows."""
    if (x.stride(1) != 1 and x.shape[1] > 1) or (tile_rows - 1) * x.stride(0) + x.shape[1] >= 2**31:
        return x.contiguous()
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(0) > 0
    return x.clone(memory_format=torch.contiguous_format) if tma and not aligned else x


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where Triton puts descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _on(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


class Weights(NamedTuple):
    """A head: [V, H], [V] or None."""

    weight: Tensor
    bias: Tensor | None


class LabelRanges(NamedTuple):
    """Labels by ascending row: row i has labels[starts[i] : starts[i + 1]]."""

    starts: Tensor  # [n + 1]
    labels: Tensor  # [l]
    rows: Tensor  # [l]

    @staticmethod
    def of(num_rows: int, rows: Tensor, labels: Tensor) -> LabelRanges:
        edges = torch.arange(num_rows + 1, device=rows.device, dtype=rows.dtype)
        return LabelRanges(torch.searchsorted(rows, edges), labels.contiguous(), rows)


class Statistics(NamedTuple):
    """fp32 numbers of some rows. log p = (z - peak) - log_total."""

    peak: Tensor  # [n]
    log_total: Tensor  # [n]
    entropy: Tensor  # [n]
    label_logits: Tensor  # [l] z of the labels

    @staticmethod
    def empty(num_rows: int, num_labels: int, device: torch.device) -> Statistics:
        peak, log_total, entropy = torch.empty((3, num_rows), dtype=torch.float32, device=device)
        return Statistics(
            peak, log_total, entropy, torch.zeros(num_labels, dtype=torch.float32, device=device)
        )

    def logprob(self, rows: Tensor) -> Tensor:
        """[l] of the labels in these rows."""
        return (self.label_logits - self.peak[rows]) - self.log_total[rows]


def head_statistics_(
    out: Statistics,
    hidden: Tensor,  # [n, H]
    head: Weights,
    inverse: Tensor,  # [n] fp32, 1 / temperature
    softcap: float | None,
    labels: LabelRanges,
    *,
    store: bool,
) -> Tensor | None:
    """Fills `out`; its label_logits in the places that the rows' label ranges name. Returns h W^T [n, V] in fp32 if it is to be stored."""
    (n, size), vocabulary = hidden.shape, head.weight.shape[0]
    tiles = choose_tiles(hidden)
    hidden, weight = _operand(hidden, tiles.tma, tiles.rows), _operand(head.weight, tiles.tma, tiles.columns)
    splits = triton.cdiv(vocabulary, tiles.split)
    partial = hidden.new_empty((3, splits, n), dtype=torch.float32)
    products = None
    if store:
        pitch = triton.cdiv(vocabulary, 8) * 8  # rows aligned, as descriptors ask for and cuBLAS likes
        products = hidden.new_empty((n, pitch), dtype=torch.float32)[:, :vocabulary]
    if n:
        if tiles.tma:
            triton.set_allocator(_scratch)
        with _on(hidden):
            head_statistics_kernel[(triton.cdiv(n, tiles.rows) * splits,)](
                hidden, weight, head.bias, inverse, labels.starts, labels.labels, products, out.label_logits,
                *partial, n, vocabulary, size, hidden.stride(0), weight.stride(0),
                0 if products is None else products.stride(0), softcap, row_group(size * hidden.element_size(), tiles.rows),
                ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, SPLIT=tiles.split, TMA=tiles.tma,
                HALVES=tiles.halves, UPCAST=not hidden.is_cuda, num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
            combine_kernel[(triton.cdiv(n, COMBINED_ROWS),)](
                *partial, *out[:3], n, splits, ROWS=COMBINED_ROWS, SPLITS=COMBINED_SPLITS, num_warps=4
            )
    return products


def divergence(
    products: Tensor,  # [n, V] fp32
    ref_products: Tensor,  # [n, V] fp32
    policy: Statistics,
    reference: Statistics,
    head: Weights,
    ref_head: Weights,
    inverse: Tensor,  # [n] fp32, 1 / temperature
    softcap: float | None,
    kl: str,
) -> Tensor:
    """Exact KL [n]."""
    n, vocabulary = products.shape
    out = torch.empty_like(policy.peak)
    if n:
        with _on(out):
            divergence_kernel[(n,)](
                products, ref_products, head.bias, ref_head.bias, inverse, policy.peak, policy.log_total,
                reference.peak, reference.log_total, out, vocabulary, products.stride(0),
                ref_products.stride(0), softcap, FORWARD=kl == "forward", COLUMNS=BLOCK, num_warps=4,
            )  # fmt: skip
    return out


class RowNumbers(NamedTuple):
    """What logits_gradient reads of the rows, all [n] fp32; the reference's only with an exact KL."""

    inverse: Tensor  # 1 / temperature
    peak: Tensor
    log_total: Tensor
    ref_peak: Tensor | None
    ref_log_total: Tensor | None
    entropy: Tensor
    kl: Tensor | None


def logits_gradient_(
    products: Tensor,  # [n, V] fp32, overwritten
    ref_products: Tensor | None,
    head: Weights,
    ref_head: Weights | None,
    rows: RowNumbers,
    softcap: float | None,
    kl: str | None,
    coefficients: Tensor,  # [l] dLoss/d(log-prob of the label)
    labels: LabelRanges,
    d_entropy: Tensor | None,  # [n] dLoss/dentropy; None = 0
    d_kl: Tensor | None,  # [n] dLoss/dKL; None = 0
    acting: Tensor | None = None,  # [a] ascending rows; None: all
    out: Tensor | None = None,  # [n or a, V] where to write it; None: over the products, if all rows act
) -> Tensor:
    """dLoss/d(h W^T + b) of the acting rows, [n or a, V]."""
    n, vocabulary = products.shape
    b0 = -accumulate_(torch.zeros_like(rows.peak), labels.rows, coefficients)
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
    # Autograd hands on one number for all rows as a tensor without strides.
    b1, d_kl = (None if x is None else x.contiguous() for x in (b1, d_kl))
    count = n if acting is None else acting.shape[0]
    if out is None:
        out = products if acting is None else torch.empty_like(products[:count])
    if count and vocabulary:
        with _on(products):
            logits_gradient_kernel[(count,)](
                products, ref_products, head.bias, None if ref_head is None else ref_head.bias, rows.inverse,
                rows.peak, rows.log_total, rows.ref_peak, rows.ref_log_total, b0, b1, d_kl, labels.starts,
                labels.labels, coefficients.contiguous(), acting, out, vocabulary, products.stride(0),
                0 if ref_products is None else ref_products.stride(0), out.stride(0), softcap,
                FORWARD=kl == "forward", COLUMNS=BLOCK, num_warps=4,
            )  # fmt: skip
    return out


class TritonRows:
    """HeadRows in Triton. `evaluate` waits for nothing on the device."""

    def __init__(self, heads: Heads) -> None:
        def weights(weight: Tensor, bias: Tensor | None) -> Weights:
            return Weights(weight.contiguous(), None if bias is None else bias.contiguous())

        self.head = weights(heads.weight, heads.bias)
        self.ref_head = self.head if heads.ref_weight is None else weights(heads.ref_weight, heads.ref_bias)
        self.softcap, self.kl = heads.softcap, heads.kl
        self.operands: tuple[Tensor, Tensor] | None = None

    def evaluate(self, rows: Rows, *, keep: bool) -> RowValues:
        n, count, device = rows.hidden.shape[0], rows.labels.shape[0], rows.hidden.device
        scale = inverse_temperatures(rows)
        ranges = LabelRanges.of(n, rows.label_rows, rows.labels)
        policy = Statistics.empty(n, count, device)
        store = self.kl is not None
        products = head_statistics_(
            policy, rows.hidden, self.head, scale, self.softcap, ranges, store=keep or store
        )
        reference = ref_products = exact = None
        if rows.ref_hidden is not None:
            reference = Statistics.empty(n, count, device)
            ref_products = head_statistics_(
                reference, rows.ref_hidden, self.ref_head, scale, self.softcap, ranges, store=store
            )
            if self.kl is not None and products is not None and ref_products is not None:
                exact = divergence(
                    products, ref_products, policy, reference, self.head, self.ref_head, scale, self.softcap, self.kl
                )  # fmt: skip
        of_reference = (policy if reference is None else reference)[:2]
        kept = torch.stack((policy.peak, policy.log_total, *of_reference))
        values = RowValues(
            policy.logprob(rows.label_rows),
            policy.entropy,
            policy.peak + policy.log_total,
            None if reference is None else reference.logprob(rows.label_rows),
            exact,
            kept,
        )
        if keep:
            assert products is not None
            self.last = products, ref_products, ranges, numbers_of(scale, kept, policy.entropy, exact)
        return values

    def recall(self, rows: Rows, entropy: Tensor, kl: Tensor | None, kept: Tensor) -> None:
        if self.operands is None:  # in fp16 a copy in fp32
            own = operand(self.head.weight)
            other = own if self.ref_head is self.head else operand(self.ref_head.weight)
            self.operands = own, other
        own, other = self.operands

        ref_products = None if rows.ref_hidden is None else matmul(rows.ref_hidden, other.t())
        ranges = LabelRanges.of(rows.hidden.shape[0], rows.label_rows, rows.labels)
        numbers = numbers_of(inverse_temperatures(rows), kept, entropy, kl)
        self.last = matmul(rows.hidden, own.t()), ref_products, ranges, numbers

    def gradient(
        self,
        coefficient: Tensor,
        d_entropy: Tensor | None,
        d_kl: Tensor | None,
        acting: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        products, ref_products, ranges, numbers = self.last
        del self.last
        return logits_gradient_(
            products, ref_products, self.head, self.ref_head, numbers, self.softcap, self.kl, coefficient, ranges,
            d_entropy, d_kl, acting, out,
        )  # fmt: skip


def inverse_temperatures(rows: Rows) -> Tensor:
    """[n] fp32."""
    t = rows.temperature
    if not isinstance(t, Tensor):
        t = rows.hidden.new_full((rows.hidden.shape[0],), t, dtype=torch.float32)
    return t.float().reciprocal()


def numbers_of(inverse: Tensor, kept: Tensor, entropy: Tensor, kl: Tensor | None) -> RowNumbers:
    peak, log_total, ref_peak, ref_log_total = kept.unbind()
    return RowNumbers(inverse, peak, log_total, ref_peak, ref_log_total, entropy, kl)
