"""`cascade_decode_attention`: arguments checked, backend chosen."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from fst_kernels.backends import choose_backend
from fst_kernels.cascade_decode import cpu, reference
from fst_kernels.cascade_decode.plan import CascadePlan
from fst_kernels.checks import FLOATS, check_tensor, look_at_values


@overload
def cascade_decode_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    plan: CascadePlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def cascade_decode_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    plan: CascadePlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def cascade_decode_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    plan: CascadePlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one new token per sequence over the nodes of its path and its own suffix (the new token's key included, if the caller
    has written it and counts it in the plan's suffix_lengths). For sampling: no gradient.

    q [S,Hq,D]; k_pool, v_pool [slots,Hkv,D] of the same float type, Hq a multiple of Hkv (query head h reads key head h // (Hq / Hkv)), rows
    of D contiguous, as the pool lies; plan: CascadePlan.build, made once for as long as no sequence changes its path. scale: default
    D ** -0.5. window: each sequence sees only the last so many keys of its past (nodes, then suffix), the new token's own among them:
    sliding-window attention; None: all. Pools must hold finite numbers everywhere (make them with zeros). Returns out [S,Hq,D], with
    `return_lse` also lse [S,Hq] float32 (natural log of the sum of exponentials of the scaled scores). A sequence that sees no key gets
    zeros and -inf. No atomics; segments are cut by their own length alone and parts merge in one order.

    backend="triton" can be captured in a CUDA graph after one call that warms up, and replays with whatever q, the pools, plan.suffix_lengths and
    plan.suffix_slots then hold. Raises ValueError for shapes, types and devices that do not fit, for a window below 1, for a pool smaller than the plan's slots
    and, on the CPU or with FST_CHECK=1, for a suffix that is longer than the plan's capacity or reads outside the pool; RuntimeError for a backend that cannot run here.
    """
    check_tensor("q", q, (plan.sequences, "Hq", "D"), FLOATS, plan.suffix_lengths.device)
    sequences, heads, dim = q.shape
    if not dim:
        raise ValueError(f"q has shape {list(q.shape)}; heads of at least 1 number are needed")
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        check_tensor(name, pool, ("slots", "Hkv", dim), (q.dtype,), q.device)
        if pool.shape[:2] != k_pool.shape[:2] or pool.shape[1] < 1 or heads % pool.shape[1]:
            raise ValueError(
                f"{name} has shape {list(pool.shape)}, k_pool {list(k_pool.shape)}, q {list(q.shape)}; allowed: equal pools, Hq a multiple of Hkv"
            )
        if len(pool) <= plan.last_slot:
            raise ValueError(f"{name} has {len(pool)} slots; the plan's nodes read slot {plan.last_slot}")
        if pool.stride(2) != 1 and dim > 1:
            raise ValueError(
                f"{name} has strides {list(pool.stride())}; the D numbers of a key must lie side by side"
            )
    taken = choose_backend("cascade_decode_attention", backend, q.device, q.dtype)
    if sequences and taken != "cpu" and look_at_values(q.device):  # the kernel for the CPU looks itself
        plan.of_step(f"checked, {len(k_pool)}", lambda: plan.check_suffixes(len(k_pool)))
    if window is not None and window < 1:
        raise ValueError(f"window={window}; allowed: at least 1, or None")
    scale = 1 / math.sqrt(dim) if scale is None else scale
    if not q.numel():
        out, lse = torch.zeros_like(q), q.new_zeros(q.shape[:2], dtype=torch.float32)
    elif taken == "triton":
        from fst_kernels.cascade_decode import triton  # only here: it is not installed everywhere

        out, lse = triton.cascade_decode(q, k_pool, v_pool, plan, scale, window)
    elif taken == "cpu":
        out, lse = cpu.cascade_decode(q, k_pool, v_pool, plan, scale, window)
    else:
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "cascade_decode_attention: backend=reference cannot be captured in a CUDA graph, a replay would see the lengths of the capture; triton can"
            )
        with torch.autocast(q.device.type, enabled=False):
            out, partial_lse = reference.cascade_decode(q, k_pool, v_pool, plan, scale, window)
        lse = torch.logsumexp(partial_lse, 0) if return_lse else partial_lse
    return (out, lse) if return_lse else out
