"""The C++ kernels for the CPU (csrc/cpu), float32, reached through their C interface with ctypes: compiled at their first use.

`attend` is what cascade_decode_attention and tree_attention are there. Beside it are the row operations of a transformer layer, one pass
over memory each: for a forward without gradients, and as `norm`, `swiglu` and `rotate` with their gradients. Tensors are what the caller says they are, nothing is checked. `why_not` tells whether
there are such kernels.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fst_kernels.library import load, why_not_compiled

ROWS_A_PART, MOST_PARTS = 32, 64
"""Into how many parts the rows are cut whose sum is a gradient of `norm`."""
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class TreeAttention(ctypes.Structure):
    """FstTreeAttention of csrc/cpu/tree_attention.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("queries", "kv_heads", "group", "dim", "threads")),
        ("scale", ctypes.c_float),
        ("q", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head")),
        *((name, ctypes.c_void_p) for name in ("k", "v")),
        *((name, ctypes.c_int64) for name in ("slots", "k_slot", "k_head", "v_slot", "v_head")),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("out_row", "out_head")),
        ("lse", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("lse_row", "lse_head")),
        ("order", ctypes.c_void_p),
        ("levels", ctypes.c_int64),
        ("level_begin", ctypes.c_void_p),
        *((f"run_{name}", ctypes.c_void_p) for name in ("first", "count", "length", "above", "entry")),
        ("node_slots", ctypes.c_void_p),
        ("node_page", ctypes.c_int64),
        ("suffix_slots", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("suffix_slots_are_wide", "suffix_pages", "suffix_page")),
        ("suffix_lengths", ctypes.c_void_p),
        ("suffix_capacity", ctypes.c_int64),
        ("past", ctypes.c_void_p),
        ("window", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, **values: Tensor | int) -> TreeAttention:
        """Tensors go by their addresses; the arguments keep them alive."""
        out = cls(**{name: x.data_ptr() if isinstance(x, Tensor) else x for name, x in values.items()})
        out.held = values
        return out


def attend(
    arguments: TreeAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
) -> int:
    """Fills out [N, Hq, D] and lse [N, Hq], for the tree of the arguments; q [N, Hq, D], k and v [slots, Hkv, D], the last dimension side
    by side. -1, or the first query whose suffix is out of range: then nothing was computed."""
    _, heads, dim = q.shape
    a: Any = arguments
    a.kv_heads, a.group, a.dim, a.slots = k.shape[1], heads // k.shape[1], dim, len(k)
    a.threads, a.scale, a.window = torch.get_num_threads(), scale, window or 0
    a.q, a.k, a.v, a.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
    (a.q_row, a.q_head, _), (a.out_row, a.out_head, _) = q.stride(), out.stride()
    (a.k_slot, a.k_head, _), (a.v_slot, a.v_head, _) = k.stride(), v.stride()
    a.lse, (a.lse_row, a.lse_head) = lse.data_ptr(), lse.stride()
    wrong: int = library().fst_tree_attention(ctypes.byref(arguments))
    return wrong


def why_not() -> str | None:
    """Why there are no such kernels on this machine; None if there are. Compiles them at the first call."""
    return why_not_compiled("cpu")


@functools.cache
def library() -> ctypes.CDLL:
    """RuntimeError: it cannot be compiled here."""
    lib, _ = load("cpu")
    lib.fst_rms_norm.argtypes = [_POINTER, _POINTER, _INT, _INT, _FLOAT, _INT]
    lib.fst_norm_and_turn.argtypes = [_POINTER, _INT, _POINTER, _POINTER, _INT, _INT, _INT, _FLOAT, _INT]
    lib.fst_gate.argtypes = [_POINTER, _POINTER, _INT, _INT, _INT]
    lib.fst_scatter.argtypes = [_POINTER, _INT, _INT, _POINTER, _INT, _INT, _POINTER, *[_INT] * 4]
    lib.fst_norm.argtypes = [*[_POINTER] * 4, _INT, _INT, _FLOAT, _INT]
    lib.fst_norm_backward.argtypes = [*[_POINTER] * 7, *[_INT] * 4]
    lib.fst_swiglu.argtypes = [*[_POINTER] * 3, _INT, _INT]
    lib.fst_swiglu_backward.argtypes = [*[_POINTER] * 5, _INT, _INT]
    lib.fst_rotate.argtypes = [
        _POINTER,
        _INT,
        _INT,
        _POINTER,
        _POINTER,
        _POINTER,
        *[_INT] * 5,
        ctypes.c_bool,
        _INT,
    ]
    lib.fst_tree_attention.argtypes = [ctypes.POINTER(TreeAttention)]
    lib.fst_tree_attention.restype = lib.fst_tree_attention_size.restype = ctypes.c_int64
    assert lib.fst_tree_attention_size() == ctypes.sizeof(TreeAttention)
    without_result = (
        "rms_norm",
        "norm_and_turn",
        "gate",
        "scatter",
        "norm",
        "norm_backward",
        "swiglu",
        "swiglu_backward",
        "rotate",
    )
    for name in without_result:
        getattr(lib, f"fst_{name}").restype = None
    return lib


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / rms(x), x [N, H] contiguous."""
    out = torch.empty_like(x)
    rows, width = x.shape
    library().fst_rms_norm(x.data_ptr(), out.data_ptr(), rows, width, eps, torch.get_num_threads())
    return out


def norm_and_turn(x: Tensor, norms: Tensor | None, turn: Tensor, eps: float) -> None:
    """In place, of x [N, heads, D], whose heads lie side by side: x / rms(x) * norms [heads, D], unless that is None; then pairs of
    neighbours are turned as complex numbers by turn [N, D]."""
    rows, heads, dim = x.shape
    library().fst_norm_and_turn(
        x.data_ptr(), x.stride(0), None if norms is None else norms.data_ptr(), turn.data_ptr(), rows, heads, dim, eps,
        torch.get_num_threads(),
    )  # fmt: skip


def gate(x: Tensor) -> Tensor:
    """silu(x[:, :I]) * x[:, I:], x [N, 2 I] contiguous."""
    rows, width = len(x), x.shape[1] // 2
    out = x.new_empty(rows, width)
    library().fst_gate(x.data_ptr(), out.data_ptr(), rows, width, torch.get_num_threads())
    return out


def scatter(x: Tensor, to: Tensor, at: Tensor) -> None:
    """to[at] = x, x [N, heads, D] and to [slots, heads, D] with the last dimension side by side, at [N] int64 contiguous."""
    rows, heads, dim = x.shape
    library().fst_scatter(
        x.data_ptr(), x.stride(0), x.stride(1), to.data_ptr(), to.stride(0), to.stride(1), at.data_ptr(), rows, heads, dim,
        torch.get_num_threads(),
    )  # fmt: skip


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        rows, out, scale = x.numel() // len(weight), torch.empty_like(x), x.new_empty(x.shape[:-1])
        library().fst_norm(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), scale.data_ptr(), rows, len(weight), eps, torch.get_num_threads()
        )  # fmt: skip
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        grad, rows, width = grad.contiguous(), scale.numel(), len(weight)
        parts = max(1, min(rows // ROWS_A_PART, MOST_PARTS))
        grad_x, sums = torch.empty_like(x), x.new_empty(parts, width)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        library().fst_norm_backward(
            x.data_ptr(), weight.data_ptr(), scale.data_ptr(), grad.data_ptr(), grad_x.data_ptr(),
            None if grad_weight is None else grad_weight.data_ptr(), sums.data_ptr(), parts, rows, width, torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        library().fst_swiglu(
            gate.data_ptr(), up.data_ptr(), out.data_ptr(), out.numel(), torch.get_num_threads()
        )
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad, grad_gate, grad_up = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        library().fst_swiglu_backward(
            gate.data_ptr(), up.data_ptr(), grad.data_ptr(), grad_gate.data_ptr(), grad_up.data_ptr(), grad.numel(),
            torch.get_num_threads(),
        )  # fmt: skip
        return grad_gate, grad_up


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, backward=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, backward=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    rows, heads, dim = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    out = x.new_empty(rows, heads, dim)
    library().fst_rotate(
        x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), out.stride(0), out.stride(1), rows, heads, dim,
        backward, torch.get_num_threads(),
    )  # fmt: skip
    return out


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, x [..., H], weight [H] contiguous. Differentiable by both."""
    out: Tensor = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape. Differentiable by both."""
    out: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin, the rotary embedding: x [N, heads, D], cos and sin [N, D] contiguous. Differentiable by x."""
    out: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out
