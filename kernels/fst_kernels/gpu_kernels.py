"""The device code of gpu.py: a program holds a row, some heads of a token, or a stretch of a row, and reads and writes it once."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

# Names of arguments that belong together share a line.
# fmt: off


@triton.jit
def rms_norm_kernel(x, weight, out, stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + row * WIDTH + column, value.to(out.dtype.element_ty) * scale, mask=inside)


@triton.jit
def norm_and_turn_kernel(
    x, norms, cos, sin, heads, stride, stride_turn, eps, HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr
):
    blocks = tl.cdiv(heads, HEADS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    head, column = tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (head < heads)[:, None] & (column < HALF)[None, :]
    first = (head * (2 * HALF))[:, None] + column[None, :]
    at = x + row * stride + first
    left = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if norms is not None:
        inverse = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / (2 * HALF) + eps)[:, None]
        scale_left = tl.load(norms + first, mask=inside, other=0.0)
        scale_right = tl.load(norms + first + HALF, mask=inside, other=0.0)
        left = ((left * inverse).to(x.dtype.element_ty) * scale_left).to(tl.float32)
        right = ((right * inverse).to(x.dtype.element_ty) * scale_right).to(tl.float32)
    turn = row * stride_turn + column[None, :] + 0 * head[:, None]  # of each head: so a thread loads what it needs in one access
    c = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (left * c - right * s).to(x.dtype.element_ty), mask=inside)
    tl.store(at + HALF, (right * c + left * s).to(x.dtype.element_ty), mask=inside)


@triton.jit
def gate_kernel(x, out, width, blocks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x + row * 2 * width + width + column, mask=inside, other=0.0)
    value = value / (1.0 + tl.exp(-value))
    tl.store(out + row * width + column, value.to(out.dtype.element_ty) * other, mask=inside)


@triton.jit
def scatter_kernel(
    k, v, k_pool, v_pool, slots,
    stride_kn, stride_kh, stride_vn, stride_vh,
    stride_ks, stride_kph, stride_vs, stride_vph,
    ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    head, column = tl.arange(0, ROWS).to(tl.int64)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS) & (column < D)
    key = tl.load(k + row * stride_kn + head * stride_kh + column, mask=inside)
    value = tl.load(v + row * stride_vn + head * stride_vh + column, mask=inside)
    tl.store(k_pool + slot * stride_ks + head * stride_kph + column, key, mask=inside)
    tl.store(v_pool + slot * stride_vs + head * stride_vph + column, value, mask=inside)
