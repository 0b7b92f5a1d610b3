"""Row operations of a transformer layer on a GPU, one launch each, for a forward without gradients; cpu.py has the same for the CPU.

They round where transformers' layers round, so that a 16-bit model is sampled from as it is trained: a normalised row before it meets its weight,
silu before it meets the other half. Only the rotary embedding keeps its products in float32 until they are added. Tensors are what the caller says
they are, nothing is checked. Device code: gpu_kernels.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fst_kernels import gpu_kernels

TURNED_PAIRS = 512  # numbers of a half of the heads of one program
GATED_COLUMNS = 1024
VECTOR = 8  # numbers of a thread: 16 bytes of a 16-bit type, the widest access there is


class Turned(NamedTuple):
    """What a program of norm_and_turn takes."""

    heads: int
    block: int
    warps: int


def turned(dim: int) -> Turned:
    block = triton.next_power_of_2(dim // 2)
    heads = max(1, TURNED_PAIRS // block)
    return Turned(heads, block, moving_warps(heads * block))


def moving_warps(numbers: int) -> int:
    """For a program that moves so many numbers, in accesses as wide as there are."""
    return max(1, min(4, numbers // (32 * VECTOR)))


def warps(width: int) -> int:
    """For a program that holds a row of this many numbers."""
    return 4 if width <= 2048 else 8 if width <= 8192 else 16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight [H], x [N, H] with rows that may lie apart."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    if rows:
        gpu_kernels.rms_norm_kernel[(rows,)](
            x, weight, out, x.stride(0), eps, WIDTH=width, BLOCK=block, num_warps=warps(block)
        )
    return out


def norm_and_turn(x: Tensor, norms: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> None:
    """In place, of x [N, heads, D], whose heads lie side by side: x / rms(x) * norms [heads, D], unless that is None; then the two halves of every
    head are turned by cos and sin [N, D], of which the first halves are read."""
    rows, heads, dim = x.shape
    if rows:
        program = turned(dim)
        gpu_kernels.norm_and_turn_kernel[(rows * triton.cdiv(heads, program.heads),)](
            x, norms, cos, sin, heads, x.stride(0), cos.stride(0), eps,
            HALF=dim // 2, BLOCK=program.block, HEADS=program.heads, num_warps=program.warps,
        )  # fmt: skip


def gate(x: Tensor) -> Tensor:
    """silu(x[:, :I]) * x[:, I:], x [N, 2 I] contiguous."""
    rows, width = len(x), x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows:
        blocks = triton.cdiv(width, GATED_COLUMNS)
        gpu_kernels.gate_kernel[(rows * blocks,)](x, out, width, blocks, BLOCK=GATED_COLUMNS, num_warps=4)
    return out


def scatter(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, at: Tensor) -> None:
    """k_pool[at] = k and v_pool[at] = v: k, v [N, heads, D], pools [slots, heads, D], of each the last dimension side by side; at [N] int64."""
    rows, heads, dim = k.shape
    if rows:
        across, block = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
        gpu_kernels.scatter_kernel[(rows,)](
            k, v, k_pool, v_pool, at, *k.stride()[:2], *v.stride()[:2], *k_pool.stride()[:2], *v_pool.stride()[:2],
            ROWS=across, HEADS=heads, D=dim, BLOCK=block, num_warps=moving_warps(across * block),
        )  # fmt: skip
