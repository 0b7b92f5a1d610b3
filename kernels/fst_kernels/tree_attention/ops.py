"""`tree_attention` as the torch operators fst_kernels::tree_attention and fst_kernels::tree_attention_backward, for autograd and torch.compile.

An operator takes tensors and numbers, so it is handed subtree_end and finds the analysed TreeMask again (see mask.py). Besides out and lse
the forward returns what its own backward needs of the softmax, in the backend's units: no precision is lost in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fst_kernels.backends import choose_backend
from fst_kernels.tree_attention import cpu, reference
from fst_kernels.tree_attention.mask import mask_of

_LIBRARY = torch.library.Library("fst_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "tree_attention(Tensor q, Tensor k, Tensor v, Tensor subtree_end, int? window, float scale, str? backend)"
    " -> (Tensor out, Tensor lse, Tensor total)"
)
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "tree_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor total, Tensor subtree_end, int? window,"
    " float scale, str? backend) -> (Tensor dq, Tensor dk, Tensor dv)"
)
forward = torch.ops.fst_kernels.tree_attention
backward = torch.ops.fst_kernels.tree_attention_backward


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    window: int | None,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = mask_of(subtree_end)
    taken = choose_backend("tree_attention", backend, q.device, q.dtype)
    if taken in ("flex", "flash"):
        raise RuntimeError(
            f"tree_attention: backend={taken} compiles itself and cannot run within torch.compile"
        )
    if taken == "triton":
        from fst_kernels.tree_attention import triton  # only here: it is not installed everywhere

        out, total = triton.forward(q, k, v, mask, scale, window)
        return out, triton.natural(total), total
    if taken == "cpu":
        out, total = cpu.forward(q, k, v, mask.expand(len(q)), scale, window)
        return out, total.clone(), total
    with torch.autocast(q.device.type, enabled=False):
        out, total = reference.forward(q, k, v, mask.expand(len(q)), scale, window)
    return out, total.to(torch.float32, copy=True), total


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    total: Tensor,
    subtree_end: Tensor,
    window: int | None,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = mask_of(subtree_end)
    if mask.read is not None:
        raise ValueError("a TreeMask with `read` has no gradient: the other queries' outputs are undefined")
    if choose_backend("tree_attention", backend, q.device, q.dtype) == "triton":
        from fst_kernels.tree_attention import triton

        return triton.backward(dout, q, k, v, out, total, mask, scale, window)
    with torch.autocast(q.device.type, enabled=False):
        return reference.backward(dout, q, k, v, out, total, mask.expand(len(q)), scale, window)


def _like(x: Tensor) -> Tensor:
    """What every backend returns for x [B,H,N,D]: the same shape, token-major underneath."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    window: int | None,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    out, kind = _like(q), torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty(q.shape[:3], dtype=torch.float32), q.new_empty(q.shape[:3], dtype=kind)


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, subtree_end, *ctx.rest = inputs
    out, lse, total = output
    ctx.mark_non_differentiable(lse, total)
    ctx.save_for_backward(q, k, v, out, total, subtree_end)
    if type(subtree_end) is Tensor:  # not while torch.compile traces
        ctx.mask = mask_of(subtree_end)  # so that it lives until the backward


def _autograd(ctx: Any, dout: Tensor, _dlse: Tensor, _dtotal: Tensor) -> tuple[Tensor | None, ...]:
    return (*backward(dout, *ctx.saved_tensors, *ctx.rest), None, None, None, None)


def _once(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "tree_attention is differentiable once: its backward has no gradient of its own (create_graph=True asks for it)"
    )


for _name, _run, _fake in (
    ("tree_attention", _forward, _fake_forward),
    ("tree_attention_backward", _backward, _fake_backward),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fst_kernels::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("fst_kernels::tree_attention", _autograd, setup_context=_setup, lib=_LIBRARY)
torch.library.register_autograd("fst_kernels::tree_attention_backward", _once, lib=_LIBRARY)
