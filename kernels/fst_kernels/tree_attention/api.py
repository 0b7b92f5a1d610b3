"""`tree_attention`: attention over a forest in depth-first preorder. Checks the arguments and chooses the backend."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from fst_kernels.backends import choose_backend
from fst_kernels.checks import FLOATS
from fst_kernels.tree_attention import ops
from fst_kernels.tree_attention.mask import TreeMask, check_subtree_end, mask_of


@overload
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor | TreeMask,
    *,
    scale: float | None = None,
    window: int | None = None,
    depth: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor | TreeMask,
    *,
    scale: float | None = None,
    window: int | None = None,
    depth: Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor | TreeMask,
    *,
    scale: float | None = None,
    window: int | None = None,
    depth: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which key i is visible to query j iff i <= j < subtree_end[i] and, with a window, depth[j] - depth[i] < window.

    q [B,Hq,N,D], k and v [B,Hkv,N,D] of one float type, in any layout, Hq a multiple of Hkv (query head h reads key head h // (Hq / Hkv));
    subtree_end int32 [N] (the same for every row) or [B,N], or the TreeMask of one, which saves the analysis where many layers share a
    forest; tokens lie in depth-first preorder (TreeMask.from_parents brings any order into it). scale: default D ** -0.5. window: a sliding window by depth, a token's own position included (window=1: itself only). depth:
    [N] or [B,N], a token's number of ancestors; it follows from subtree_end, and one that is given is checked. Returns out [B,Hq,N,D], with
    `return_lse` also lse [B,Hq,N] float32 (natural log of the sum of the exponentials of the scaled scores; not differentiable).
    Differentiable once in q, k and v. For one and the same forest shape the result of a token depends on the tokens it sees alone, bitwise.
    Works under torch.compile; there a mask that is not given as a TreeMask is analysed in every call.

    Raises ValueError for shapes, types or devices that do not fit, for a mask that is no forest and a depth that is not its (on a GPU with
    FST_CHECK=1 or a TreeMask made on the host: to look at a device tensor is to wait for it); RuntimeError for a backend that is asked for
    by name and cannot run here.
    """
    mask = None
    if isinstance(subtree_end, TreeMask):
        mask, ends = subtree_end, subtree_end.subtree_end
        if depth is not None:
            mask.check_depth(depth)
    elif torch.compiler.is_compiling() and isinstance(subtree_end, Tensor):
        if depth is not None:
            raise ValueError("depth cannot be checked under torch.compile; leave it out or give a TreeMask")
        check_subtree_end(subtree_end)
        ends = subtree_end[None] if subtree_end.ndim == 1 else subtree_end
    else:
        mask = TreeMask.from_subtree_end(subtree_end, depth=depth)
        ends = mask.subtree_end
    _check(q, k, v, ends)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window={window!r}; an integer of at least 1 is needed, or None for no window")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if not torch.compiler.is_compiling():
        backend = choose_backend("tree_attention", backend, q.device, q.dtype)
        if backend in ("flex", "flash"):
            # only here: it takes torch's compiler a second to import
            from fst_kernels.tree_attention import flex

            out, lse = flex.attention(q, k, v, mask_of(ends), scale, window, backend)
            return (out, lse) if return_lse else out
    out, lse, _ = ops.forward(q, k, v, ends, window, scale, backend)
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}; a tensor is needed")
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; [B, heads, N, D] is needed")
        if x.dtype not in FLOATS or x.dtype != q.dtype:
            raise ValueError(
                f"{name} has dtype {x.dtype}, q {q.dtype}; one of float32, bfloat16, float16, float64, the same for all"
            )
        if x.device != ends.device:
            raise ValueError(
                f"{name} is on {x.device}, subtree_end on {ends.device}; one device for all is needed"
            )
    batch, heads, n, dim = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[2], k.shape[3]) != (batch, n, dim):
        raise ValueError(
            f"q, k, v have shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; they may differ in heads of q only"
        )
    if not dim:
        raise ValueError("q, k, v have heads of size 0; at least 1 is needed")
    if not k.shape[1] or not heads or heads % k.shape[1]:
        raise ValueError(
            f"q has {heads} heads and k has {k.shape[1]}; the heads of q must be a positive multiple of those of k"
        )
    if ends.shape[1] != n:
        raise ValueError(f"subtree_end has {ends.shape[1]} tokens and q has {n}; they must be equal")
    if len(ends) not in (1, batch):
        raise ValueError(
            f"subtree_end has {len(ends)} rows and q has a batch of {batch}; 1 or {batch} rows are allowed"
        )
