"""Device code of triton.py: the product of the head with its statistics, their combination, the exact KL, dLoss/dlogits.

`head_statistics` is the one product in front of everything: for a tile of rows and a fixed split of the vocabulary it keeps, in fp32,
    m = max z,   s = sum exp(z - m),   e = sum exp(z - m) (z - m)
online over the tiles of the split (when m grows by d: e <- (e - d s) exp(-d), s <- s exp(-d)), picks the labels' logits out of the same
registers, and, if asked, stores the raw product h W^T in fp32. The splits depend on the vocabulary alone and are combined in a fixed
order by `combine`, without atomics: a row's numbers have the same bits in any batch, with or without a reference, with the product
stored or not. e is kept relative to m: entropy = log s - e / s loses nothing where logits are large. For the same reason log p is
(z - m) - log s.

What needs two distributions or a gradient works on stored products, a row at a time: `divergence` (exact KL) and `logits_gradient`,
which writes dLoss/d(h W^T + b) of the rows that have one, without gaps; the closed form is the one at the top of reference.py.
"""

# Kernels take pointers and constants that Python's types do not describe.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # finite: 0 times it is 0


@triton.jit
def _tanh(x):
    square = x * x
    series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))
    series = x + x * square * (-1.0 / 3.0 + square * series)
    decay = tl.exp(-2.0 * tl.abs(x))
    value = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.09, series, tl.where(x < 0, -value, value))


@triton.jit
def _scale(x, inverse, softcap):
    """z of h W^T + b; softcap None: none. Multiplied, not divided: a division is some eight instructions for each of a tile's elements."""
    if softcap is not None:
        x = softcap * _tanh(x * (1.0 / softcap))
    return x * inverse


@triton.jit
def _read_tile(
    x,  # [ROWS, COLUMNS] of h W^T
    column_start,
    bias,
    inverse,
    starts,
    labels,
    label_logits,
    most,  # labels that a row of the tile has
    peak,  # [ROWS] running statistics, as are the next two
    total,
    moment,
    rows,
    in_rows,
    vocabulary,
    softcap,
    COLUMNS: tl.constexpr,
):
    """The running statistics with these columns in them; picks the labels' logits on the way."""
    in_tile = tl.arange(0, COLUMNS)
    in_columns = in_tile < vocabulary - column_start
    if bias is not None:
        x += tl.load(bias + column_start + in_tile, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    scale = tl.load(inverse + rows, mask=in_rows, other=1.0)
    z = tl.where(in_columns[None, :], _scale(x, scale[:, None], softcap), float("-inf"))
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
    return higher, total, moment


@triton.jit
def place(program, row_tiles, splits, group):
    """Tile of rows and split of the vocabulary of a program: `group` tiles of rows go through all splits before the next tiles begin.

    Programs that run together share their weights, a group's rows stay in the L2 cache, and the weight streams once per group. Rows fastest over all
    tiles would stream the hidden states once per split, which for a long batch is many times the bytes.
    """
    begun = program // (group * splits) * group
    height = row_tiles - begun
    if height > group:
        height = group
    inside = program - begun * splits
    return begun + inside % height, inside // height


@triton.jit(do_not_specialize=["num_rows", "group"])
def head_statistics_kernel(
    hidden,  # [N, H]
    weight,  # [V, H]
    bias,  # [V] or None
    inverse,  # [N] fp32: 1 / temperature
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
    group,  # tiles of rows that stay in the L2 cache together
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,  # columns, a multiple of COLUMNS
    TMA: tl.constexpr,
    HALVES: tl.constexpr,  # of a tile, read one after the other; always with TMA
    UPCAST: tl.constexpr,
):
    row_tile, split = place(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.cdiv(vocabulary, SPLIT), group)
    row_start = row_tile * ROWS
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
        if products is not None and not TMA:
            tl.store(
                products + column_start + (rows - row_start)[:, None] * products_stride + in_tile[None, :],
                x,
                mask=in_rows[:, None] & in_columns[None, :],
            )
        if (
            HALVES
        ):  # each needs half the registers, and half the staging area beside the stages of the product
            left, right = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))
            if products is not None and TMA:
                product_tiles.store([row_start, column_start], left)
            peak, total, moment = _read_tile(
                left, column_start, bias, inverse, starts, labels, label_logits, most, peak, total, moment,
                rows, in_rows, vocabulary, softcap, COLUMNS // 2,
            )  # fmt: skip
            right_start = column_start + COLUMNS // 2
            if products is not None and TMA:
                product_tiles.store([row_start, right_start], right)
            peak, total, moment = _read_tile(
                right, right_start, bias, inverse, starts, labels, label_logits, most, peak, total, moment,
                rows, in_rows, vocabulary, softcap, COLUMNS // 2,
            )  # fmt: skip
        else:
            peak, total, moment = _read_tile(
                x, column_start, bias, inverse, starts, labels, label_logits, most, peak, total, moment,
                rows, in_rows, vocabulary, softcap, COLUMNS,
            )  # fmt: skip
    at = split.to(tl.int64) * num_rows + rows
    tl.store(peaks + at, peak, mask=in_rows)
    tl.store(totals + at, total, mask=in_rows)
    tl.store(moments + at, moment, mask=in_rows)


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
    SPLITS: tl.constexpr,  # taken at a time
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    m = tl.full([ROWS], LOWEST, tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    e = tl.zeros([ROWS], tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        place = split.to(tl.int64)[:, None] * num_rows + rows[None, :]
        mask = (split < splits)[:, None] & in_rows[None, :]
        part_m = tl.load(peaks + place, mask=mask, other=LOWEST)
        part_s = tl.load(totals + place, mask=mask, other=0.0)
        part_e = tl.load(moments + place, mask=mask, other=0.0)
        higher = tl.maximum(m, tl.max(part_m, 0))
        rise, part_rise = m - higher, part_m - higher[None, :]
        decay, part_decay = tl.exp(rise), tl.exp(part_rise)
        e = decay * (e + rise * s) + tl.sum(part_decay * (part_e + part_rise * part_s), 0)
        s = decay * s + tl.sum(part_decay * part_s, 0)
        m = higher
    s = tl.where(in_rows, s, 1.0)
    tl.store(peak + rows, m, mask=in_rows)
    tl.store(log_total + rows, tl.log(s), mask=in_rows)
    tl.store(entropy + rows, tl.log(s) - e / s, mask=in_rows)


@triton.jit
def _log_probability(products, bias, columns, mask, scale, peak, log_total, softcap):
    x = tl.load(products + columns, mask=mask, other=0.0)
    if bias is not None:
        x += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    return (_scale(x, scale, softcap) - peak) - log_total, x


@triton.jit
def divergence_kernel(
    products,  # [n, V] fp32
    ref_products,  # [n, V] fp32
    bias,
    ref_bias,
    inverse,  # [n] fp32: 1 / temperature; fp32 as are the next four
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
    scale = tl.load(inverse + row)
    m, log_s = tl.load(peak + row), tl.load(log_total + row)
    ref_m, ref_log_s = tl.load(ref_peak + row), tl.load(ref_log_total + row)
    sums = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = columns < vocabulary
        log_p, _ = _log_probability(
            products + row * products_stride, bias, columns, mask, scale, m, log_s, softcap
        )
        log_q, _ = _log_probability(
            ref_products + row * ref_stride, ref_bias, columns, mask, scale, ref_m, ref_log_s, softcap
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
    inverse,  # [n] fp32: 1 / temperature; fp32 as are the next four
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
    out,  # [a, V], the i-th for the i-th acting row; may be products where all act
    vocabulary,
    products_stride,  # elements from row to row, as are the next two
    ref_stride,
    out_stride,
    softcap,
    FORWARD: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    out += row * out_stride
    if acting is not None:
        row = tl.load(acting + row)
    scale = tl.load(inverse + row)
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
            products + row * products_stride, bias, columns, mask, scale, m, log_s, softcap
        )
        form = tl.zeros([COLUMNS], tl.float32) + base
        if b1 is not None:
            form += slope * log_p
        if d_kl is not None:
            log_q, _ = _log_probability(
                ref_products + row * ref_stride, ref_bias, columns, mask, scale, ref_m, ref_log_s, softcap
            )
            if FORWARD:
                gradient = tl.exp(log_p) * form - k * tl.exp(log_q)
            else:
                gradient = tl.exp(log_p) * (form - k * log_q)
        else:
            gradient = tl.exp(log_p) * form
        for j in range(first, last):
            gradient += tl.where(columns == tl.load(labels + j), tl.load(coefficients + j), 0.0)
        gradient = gradient * scale
        if softcap is not None:
            cap = _tanh(x * (1.0 / softcap))
            gradient = gradient * (1.0 - cap * cap)
        tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=mask)
