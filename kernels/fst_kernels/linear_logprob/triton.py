"""The same head as reference.py in Triton: the matrix product reads its own rows' statistics while a tile of logits is in registers.

`head_statistics` is the one product in front of everything: for a tile of rows and a fixed split of the vocabulary it keeps, in fp32,
    m = max z,   s = sum exp(z - m),   e = sum exp(z - m) (z - m)
online over the tiles of the split (when m grows by d: e <- (e - d s) exp(-d), s <- s exp(-d)), picks the labels' logits out of the same
registers, and, if asked, stores the raw product h W^T in fp32. The splits depend on the vocabulary alone and are combined in ascending
order by a second kernel, without atomics: a row's numbers have the same bits in any batch, with or without a reference, with the
product stored (the training path, mode B) or not (log-probabilities only), so the ratio of a policy to itself is exactly 1.
e is kept relative to m: entropy = log s - e / s loses nothing where logits are large. For the same reason log p is (z - m) - log s.

What needs two distributions or a gradient works on stored products, a row at a time: `divergence` (exact KL) and `logits_gradient`,
which overwrites the products with dLoss/d(h W^T + b); the closed form is the one at the top of reference.py. In bfloat16 the gradient
takes the first half of its row's bytes; block i of a row writes before the place that block i reads, block 0 is guarded by a barrier.

The gradient's own products are torch's (cuBLAS). On compute capability 9.0 and later tiles come through TMA descriptors, before it
through pointers. With TRITON_INTERPRET=1 all of it runs on the CPU, in float32.
"""

# Kernels take pointers and constants that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fst_kernels.linear_logprob.reference import (
    IGNORED,
    Gradients,
    Temperature,
    accumulate_,
    label_table,
    make_heads,
    matmul,
    refuse_second_derivatives,
    row_chunks,
)

CHUNK_BYTES = 960 * 2**20
BLOCK = 1024  # columns of a row that the row kernels take at a time
LOWEST = tl.constexpr(-1e30)  # finite: 0 times it is 0


# ---------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _tanh(x):
    a = tl.abs(x)
    decay = tl.exp(-2.0 * a)
    square = x * x
    series = -17.0 / 315.0 + square * (62.0 / 2835.0)
    series = a + a * square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * series))
    value = tl.where(a < 0.3, series, (1.0 - decay) / (1.0 + decay))
    return tl.where(x < 0, -value, value)


@triton.jit
def _scale(x, temperature, softcap):
    """z of h W^T + b; softcap None: none."""
    if softcap is not None:
        x = softcap * _tanh(x / softcap)
    return x / temperature


@triton.jit(do_not_specialize=["num_rows"])
def head_statistics_kernel(
    hidden,  # [N, H]
    weight,  # [V, H]
    bias,  # [V] or None
    temperature,  # [N] fp32
    starts,  # [N + 1] where each row's labels begin
    labels,  # [L] by ascending row
    products,  # [N, V] fp32 or None
    label_logits,  # [L] fp32, z of each label
    peaks,  # [splits, N] fp32, as are the next two
    totals,
    moments,
    num_rows,
    vocabulary,
    size,
    hidden_stride,
    weight_stride,
    products_stride,
    softcap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,  # columns, a multiple of COLUMNS
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row_start = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    rows = row_start + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    # What a tile's end needs of its rows is loaded there: kept here it would take registers from the product.
    most = tl.max(
        tl.load(starts + rows + 1, mask=in_rows, other=0) - tl.load(starts + rows, mask=in_rows, other=0), 0
    ).to(tl.int32)
    # Offsets inside a tile fit 32 bits; a tile's own place needs 64.
    depth = tl.arange(0, DEPTH)
    in_tile = tl.arange(0, COLUMNS)
    if TMA:
        hidden_tiles = tl.make_tensor_descriptor(hidden, [num_rows, size], [hidden_stride, 1], [ROWS, DEPTH])
        weight_tiles = tl.make_tensor_descriptor(
            weight, [vocabulary, size], [weight_stride, 1], [COLUMNS, DEPTH]
        )
    else:
        hidden += row_start.to(tl.int64) * hidden_stride
    if products is not None:
        if TMA:
            product_tiles = tl.make_tensor_descriptor(
                products, [num_rows, vocabulary], [products_stride, 1], [ROWS, COLUMNS // 2]
            )
        else:
            products += row_start.to(tl.int64) * products_stride
    peak = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    moment = tl.zeros([ROWS], tl.float32)
    stop = tl.minimum((split + 1) * SPLIT, vocabulary)
    for column_start in range(split * SPLIT, stop, COLUMNS):
        in_columns = in_tile < vocabulary - column_start
        x = tl.zeros([ROWS, COLUMNS], tl.float32)
        weight_tile = weight + tl.cast(column_start, tl.int64) * weight_stride
        for k in range(0, size, DEPTH):
            if TMA:
                a = hidden_tiles.load([row_start, k])
                b = weight_tiles.load([column_start, k])
            else:
                in_depth = k + depth < size
                a = tl.load(
                    hidden + (rows - row_start)[:, None] * hidden_stride + (k + depth)[None, :],
                    mask=in_rows[:, None] & in_depth[None, :],
                    other=0.0,
                )
                b = tl.load(
                    weight_tile + in_tile[:, None] * weight_stride + (k + depth)[None, :],
                    mask=in_columns[:, None] & in_depth[None, :],
                    other=0.0,
                )
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            x = tl.dot(a, tl.trans(b), x, input_precision="ieee")
        if products is not None:
            if TMA:  # in halves, whose staging area fits beside the stages of the product
                left, right = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))
                product_tiles.store([row_start, column_start], left)
                product_tiles.store([row_start, column_start + COLUMNS // 2], right)
            else:
                tl.store(
                    products
                    + column_start
                    + (rows - row_start)[:, None] * products_stride
                    + in_tile[None, :],
                    x,
                    mask=in_rows[:, None] & in_columns[None, :],
                )
        if bias is not None:
            x += tl.load(bias + column_start + in_tile, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        t = tl.load(temperature + rows, mask=in_rows, other=1.0)
        z = tl.where(in_columns[None, :], _scale(x, t[:, None], softcap), float("-inf"))
        for j in range(most):
            first = tl.load(starts + rows, mask=in_rows, other=0)
            count = tl.load(starts + rows + 1, mask=in_rows, other=0) - first
            label = tl.load(labels + first + j, mask=j < count, other=-1).to(tl.int32) - column_start
            found = (label >= 0) & (label < COLUMNS)
            if tl.max(found.to(tl.int32), 0) > 0:
                at = in_tile[None, :] == label[:, None]
                tl.store(label_logits + first + j, tl.sum(tl.where(at, z, 0.0), 1), mask=found)
        higher = tl.maximum(peak, tl.max(z, 1))
        z = z - higher[:, None]
        p = tl.exp(z)
        rise = peak - higher
        decay = tl.exp(rise)
        moment = decay * (moment + rise * total) + tl.sum(p * tl.where(p > 0, z, 0.0), 1)
        total = decay * total + tl.sum(p, 1)
        peak = higher
    place = split.to(tl.int64) * num_rows + rows
    tl.store(peaks + place, peak, mask=in_rows)
    tl.store(totals + place, total, mask=in_rows)
    tl.store(moments + place, moment, mask=in_rows)


@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(
    peaks,  # [splits, N] fp32, as are the next two
    totals,
    moments,
    peak,  # [N] fp32, as are the next two
    log_total,
    entropy,
    num_rows,
    splits,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    m = tl.full([ROWS], LOWEST, tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    e = tl.zeros([ROWS], tl.float32)
    for split in range(splits):
        place = tl.cast(split, tl.int64) * num_rows + rows
        next_m = tl.load(peaks + place, mask=in_rows, other=0.0)
        next_s = tl.load(totals + place, mask=in_rows, other=1.0)
        next_e = tl.load(moments + place, mask=in_rows, other=0.0)
        higher = tl.maximum(m, next_m)
        rise, next_rise = m - higher, next_m - higher
        decay, next_decay = tl.exp(rise), tl.exp(next_rise)
        e = decay * (e + rise * s) + next_decay * (next_e + next_rise * next_s)
        s = decay * s + next_decay * next_s
        m = higher
    tl.store(peak + rows, m, mask=in_rows)
    tl.store(log_total + rows, tl.log(s), mask=in_rows)
    tl.store(entropy + rows, tl.log(s) - e / s, mask=in_rows)


@triton.jit
def _log_probability(products, bias, columns, mask, t, peak, log_total, softcap):
    x = tl.load(products + columns, mask=mask, other=0.0)
    if bias is not None:
        x += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    return (_scale(x, t, softcap) - peak) - log_total, x


@triton.jit
def divergence_kernel(
    products,  # [n, V] fp32
    ref_products,  # [n, V] fp32
    bias,
    ref_bias,
    temperature,  # [n] fp32, as are the next four
    peak,
    log_total,
    ref_peak,
    ref_log_total,
    kl,  # [n] fp32
    vocabulary,
    products_stride,  # elements from row to row, as is the next
    ref_stride,
    softcap,
    FORWARD: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(temperature + row)
    m, log_s = tl.load(peak + row), tl.load(log_total + row)
    ref_m, ref_log_s = tl.load(ref_peak + row), tl.load(ref_log_total + row)
    sums = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = columns < vocabulary
        log_p, _ = _log_probability(
            products + row * products_stride, bias, columns, mask, t, m, log_s, softcap
        )
        log_q, _ = _log_probability(
            ref_products + row * ref_stride, ref_bias, columns, mask, t, ref_m, ref_log_s, softcap
        )
        if FORWARD:
            term = tl.exp(log_q) * (log_q - log_p)
        else:
            term = tl.exp(log_p) * (log_p - log_q)
        sums += tl.where(mask, term, 0.0)
    tl.store(kl + row, tl.sum(sums, 0))


@triton.jit
def logits_gradient_kernel(
    products,  # [n, V] fp32
    ref_products,  # [n, V] fp32 or None
    bias,
    ref_bias,
    temperature,  # [n] fp32, as are the next four
    peak,
    log_total,
    ref_peak,
    ref_log_total,
    b0,  # [n] fp32
    b1,  # [n] fp32 or None
    d_kl,  # [n] fp32 or None
    starts,  # [n + 1] where each row's labels begin
    labels,  # [l]
    coefficients,  # [l] fp32
    acting,  # rows to be worked on, or None: all
    out,  # the bytes of products, with out_stride elements a row
    vocabulary,
    products_stride,  # elements from row to row, as are the next two
    ref_stride,
    out_stride,
    softcap,
    FORWARD: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if acting is not None:
        row = tl.load(acting + row)
    t = tl.load(temperature + row)
    m, log_s = tl.load(peak + row), tl.load(log_total + row)
    base = tl.load(b0 + row)
    slope = tl.load(b1 + row) if b1 is not None else 0.0
    if d_kl is not None:
        ref_m, ref_log_s = tl.load(ref_peak + row), tl.load(ref_log_total + row)
        k = tl.load(d_kl + row)
    first, last = tl.load(starts + row), tl.load(starts + row + 1)
    for start in range(0, vocabulary, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = columns < vocabulary
        log_p, x = _log_probability(
            products + row * products_stride, bias, columns, mask, t, m, log_s, softcap
        )
        form = tl.zeros([COLUMNS], tl.float32) + base
        if b1 is not None:
            form += slope * log_p
        if d_kl is not None:
            log_q, _ = _log_probability(
                ref_products + row * ref_stride, ref_bias, columns, mask, t, ref_m, ref_log_s, softcap
            )
            if FORWARD:
                gradient = tl.exp(log_p) * form - k * tl.exp(log_q)
            else:
                gradient = tl.exp(log_p) * (form - k * log_q)
        else:
            gradient = tl.exp(log_p) * form
        for j in range(first, last):
            gradient += tl.where(columns == tl.load(labels + j), tl.load(coefficients + j), 0.0)
        gradient = gradient / t
        if softcap is not None:
            cap = _tanh(x / softcap)
            gradient = gradient * (1.0 - cap * cap)
        tl.debug_barrier()
        tl.store(out + row * out_stride + columns, gradient.to(out.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------- launches


class Tiles(NamedTuple):
    """A tile of the product. It must not depend on the number of rows: a row's bits do depend on it."""

    rows: int
    columns: int
    depth: int
    split: int  # columns of the vocabulary that one program walks through
    tma: bool
    warps: int
    stages: int


INTERPRETED = Tiles(16, 64, 32, 256, False, 4, 1)
FULL_PRECISION = Tiles(64, 64, 32, 4096, False, 4, 2)  # float32 operands
AMPERE = Tiles(128, 64, 64, 4096, False, 8, 3)
HOPPER = Tiles(128, 256, 64, 4096, True, 8, 3)
BLACKWELL = Tiles(128, 128, 64, 4096, True, 8, 4)


def choose_tiles(hidden: Tensor) -> Tiles:
    if not hidden.is_cuda:
        return INTERPRETED
    if hidden.dtype == torch.float32:
        return FULL_PRECISION
    major, _ = torch.cuda.get_device_capability(hidden.device)
    rows_are_aligned = hidden.shape[1] * hidden.element_size() % 16 == 0  # what a descriptor asks for
    if major < 9 or not rows_are_aligned:
        return AMPERE
    return HOPPER if major == 9 else BLACKWELL


def default_chunk_rows(vocabulary: int, products: int) -> int:
    """Rows whose fp32 products, so many per row, take under 1 GiB together."""
    return max(128, CHUNK_BYTES // (4 * max(vocabulary, 1) * products) // 128 * 128)


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

    def part(self, rows: slice) -> Statistics:
        return Statistics(self.peak[rows], self.log_total[rows], self.entropy[rows], self.label_logits)

    def logprob(self, rows: Tensor) -> Tensor:
        """[l] of the labels in these rows; means nothing for labels outside of the vocabulary (ignored ones)."""
        return (self.label_logits - self.peak[rows]) - self.log_total[rows]


def head_statistics_(
    out: Statistics,
    hidden: Tensor,  # [n, H]
    head: Weights,
    temperature: Tensor,  # [n] fp32
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
            head_statistics_kernel[(triton.cdiv(n, tiles.rows), splits)](
                hidden, weight, head.bias, temperature, labels.starts, labels.labels, products, out.label_logits,
                *partial, n, vocabulary, size, hidden.stride(0), weight.stride(0),
                0 if products is None else products.stride(0), softcap,
                ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, SPLIT=tiles.split, TMA=tiles.tma,
                UPCAST=not hidden.is_cuda, num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip
            combine_kernel[(triton.cdiv(n, 128),)](*partial, *out[:3], n, splits, ROWS=128, num_warps=4)
    return products


def divergence(
    products: Tensor,  # [n, V] fp32
    ref_products: Tensor,  # [n, V] fp32
    policy: Statistics,
    reference: Statistics,
    head: Weights,
    ref_head: Weights,
    temperature: Tensor,  # [n] fp32
    softcap: float | None,
    kl: str,
) -> Tensor:
    """Exact KL [n]."""
    n, vocabulary = products.shape
    out = torch.empty_like(policy.peak)
    if n:
        with _on(out):
            divergence_kernel[(n,)](
                products, ref_products, head.bias, ref_head.bias, temperature, policy.peak, policy.log_total,
                reference.peak, reference.log_total, out, vocabulary, products.stride(0),
                ref_products.stride(0), softcap, FORWARD=kl == "forward", COLUMNS=BLOCK, num_warps=4,
            )  # fmt: skip
    return out


class RowNumbers(NamedTuple):
    """What logits_gradient reads of the rows, all [n] fp32; the reference's only with an exact KL."""

    temperature: Tensor
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
    acting: Tensor | None = None,  # ascending rows; None: all
) -> Tensor:
    """dLoss/d(h W^T + b) of the acting rows, [n or number acting, V], in the type in which its products are taken."""
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
    half = head.weight.is_cuda and head.weight.dtype == torch.bfloat16
    out = products.view(torch.bfloat16)[:, :vocabulary] if half else products
    count = n if acting is None else acting.shape[0]
    if count and vocabulary:
        with _on(products):
            logits_gradient_kernel[(count,)](
                products, ref_products, head.bias, None if ref_head is None else ref_head.bias, rows.temperature,
                rows.peak, rows.log_total, rows.ref_peak, rows.ref_log_total, b0, b1, d_kl, labels.starts,
                labels.labels, coefficients.contiguous(), acting, out, vocabulary, products.stride(0),
                0 if ref_products is None else ref_products.stride(0), out.stride(0), softcap,
                FORWARD=kl == "forward", COLUMNS=BLOCK, num_warps=4,
            )  # fmt: skip
    return out if acting is None else out[acting]


def make_weights(
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> tuple[Weights, Weights | None]:
    """The policy's head and, if there are reference states, the reference's: the policy's own, bias included, without a ref_weight."""

    def head(weight: Tensor, bias: Tensor | None) -> Weights:
        return Weights(weight.contiguous(), None if bias is None else bias.contiguous())

    own = head(weight, bias)
    if ref_hidden is None:
        return own, None
    return own, own if ref_weight is None else head(ref_weight, ref_bias)


def row_temperatures(temperature: Temperature, like: Tensor) -> Tensor:
    """[N] fp32."""
    if isinstance(temperature, Tensor):
        return temperature.float().contiguous()
    return torch.full((like.shape[0],), temperature, dtype=torch.float32, device=like.device)


# ---------------------------------------------------------------------------------------------------------------- mode A


class LinearLogprobTriton(torch.autograd.Function):
    """Arguments, results and gradients of reference.LinearLogprob. The forward waits for nothing on the device."""

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
        num_rows, num_labels, device = hidden.shape[0], labels.shape[0], hidden.device
        t = row_temperatures(temperature, hidden)
        head, ref_head = make_weights(weight, bias, ref_hidden, ref_weight, ref_bias)
        if rows is None:
            row, order = torch.arange(num_rows, device=device), None
        else:
            row, order = torch.sort(rows.long(), stable=True)
        ranges = LabelRanges.of(num_rows, row, labels if order is None else labels[order])
        policy = Statistics.empty(num_rows, num_labels, device)
        reference = None if ref_hidden is None else Statistics.empty(num_rows, num_labels, device)
        divergences = None if kl is None else torch.empty(num_rows, dtype=torch.float32, device=device)
        step = max(1, num_rows) if kl is None else chunk_rows
        for start in range(0, num_rows, step):
            at = slice(start, min(start + step, num_rows))
            here = LabelRanges(ranges.starts[at.start : at.stop + 1], ranges.labels, ranges.rows)
            products = head_statistics_(
                policy.part(at), hidden[at], head, t[at], softcap, here, store=kl is not None
            )
            if reference is None or ref_head is None or ref_hidden is None:
                continue
            ref_products = head_statistics_(
                reference.part(at), ref_hidden[at], ref_head, t[at], softcap, here, store=kl is not None
            )
            if divergences is not None and products is not None and ref_products is not None:
                divergences[at] = divergence(
                    products, ref_products, policy.part(at), reference.part(at), head, ref_head, t[at], softcap,
                    str(kl),
                )  # fmt: skip

        def of_labels(statistics: Statistics) -> Tensor:  # in the caller's order
            found = statistics.logprob(row)
            found = found if order is None else torch.empty_like(found).index_copy_(0, order, found)
            return torch.where(labels == IGNORED, 0.0, found)

        logprob, lse = of_labels(policy), policy.peak + policy.log_total
        ref_logprob = ref_peak = ref_log_total = None
        if reference is not None:
            ref_logprob, ref_peak, ref_log_total = of_labels(reference), reference.peak, reference.log_total
        ctx.save_for_backward(
            hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, labels, t, policy.peak, policy.log_total,
            ref_peak, ref_log_total, policy.entropy, divergences,
        )  # fmt: skip
        ctx.softcap, ctx.kl, ctx.chunk_rows = softcap, kl, chunk_rows
        ctx.mark_non_differentiable(lse, *([] if ref_logprob is None else [ref_logprob]))
        ctx.set_materialize_grads(False)
        return logprob, policy.entropy, lse, ref_logprob, divergences

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("linear_logprob")
        d_logprob, d_entropy, _, _, d_kl = grads
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, labels, *of_rows = ctx.saved_tensors
        numbers = RowNumbers(*of_rows)
        if d_logprob is None:
            d_logprob = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
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
        raw, raw_ref = make_weights(weight, bias, ref_hidden if kl else None, ref_weight, ref_bias)
        out = Gradients(hidden, head, *ctx.needs_input_grad[:3])
        every = selected.shape[0] == hidden.shape[0]
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in row_chunks(None if every else selected, selected.shape[0], compact, ctx.chunk_rows):
                h = hidden[chunk.rows]
                d_z = logits_gradient_(
                    matmul(h, head.weight.t()),
                    None if ref_head is None else matmul(ref_hidden[chunk.rows], ref_head.weight.t()),
                    raw,
                    raw_ref,
                    RowNumbers(*(None if x is None else x[chunk.rows] for x in numbers)),  # type: ignore[arg-type]
                    ctx.softcap,
                    kl,
                    d_logprob[table.origin[chunk.labels]],
                    LabelRanges.of(chunk.size, chunk.label_rows, table.labels[chunk.labels]),
                    None if d_entropy is None else d_entropy[chunk.rows],
                    None if d_kl is None else d_kl[chunk.rows],
                )
                out.add(chunk.rows, d_z, h)
        d_weight = None if out.weight is None else out.weight.to(weight.dtype)
        d_bias = None if out.bias is None else out.bias.to(bias.dtype)
        return out.hidden, d_weight, d_bias, *([None] * 9)
