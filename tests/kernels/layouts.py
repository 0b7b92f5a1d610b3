"""Tensors in drawn layouts, and the claim that an operation computes from them what it computes from contiguous copies: for test_layouts.py and
test_attention_layouts.py.

Between the numbers of a laid-out tensor lies NaN (in integers a number out of range), so that what is read from a wrong place shows.
Triton reads TRITON_INTERPRET when it is imported: in a process with it only claims about backend="triton" are collected, without it the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fst_kernels.backends import IMPLEMENTED
from fst_kernels.library import missing
from tests.compiler import needs_a_compiler

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LAYOUTS = ("contiguous", "stepped", "transposed", "expanded", "offset")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TOLERANCE = {F64: 1e-10, F32: 1e-5, BF16: 2e-2, F16: 2e-3}  # of results in this type, rounding included
DTYPES = {  # of the operands; the reference takes all
    "triton": [F32], "cpu": [F32], "host": [F32, BF16, F16], "reference": [F32, BF16, F16, F64],
}  # fmt: skip
DIM = st.sampled_from([-1, -1, 0, 1, 2])  # the last one matters most: kernels read it without a stride
SIZE = st.sampled_from([0, 1, 1, 2, 3, 5, 9])
MORE = st.sampled_from([1, 2, 3, 5, 8, 17])
draws = settings(max_examples=15 if INTERPRETED else 60, deadline=None)

Run = Callable[[dict[str, Tensor], str], dict[str, Tensor | None]]


def backends_of(op: str) -> list[str]:
    names = [name for name in IMPLEMENTED[op] if name not in ("cuda", "flex", "flash")]
    return [name for name in names if (name == "triton") == INTERPRETED]


def on_each_backend(op: str) -> Any:
    return pytest.mark.parametrize("backend", backends_of(op))


def outer(test: Any) -> Any:
    """A claim that is not about Triton."""
    return None if INTERPRETED else test


def lay(x: Tensor, layout: str, dim: int) -> Tensor:
    """The numbers of x in another layout along dim; "expanded": the first ones along dim, repeated without memory of their own."""
    if not x.ndim:
        return x
    dim %= x.ndim
    foreign = float("nan") if x.is_floating_point() else 2**30
    if layout == "stepped":
        wide = x.new_full((*x.shape[:dim], 2 * x.shape[dim], *x.shape[dim + 1 :]), foreign)
        return wide[(slice(None),) * dim + (slice(1, None, 2),)].copy_(x)
    if layout == "transposed":
        other = -1 if dim < x.ndim - 1 else 0
        return x.transpose(dim, other).contiguous().transpose(dim, other)
    if layout == "expanded" and x.shape[dim]:
        return x.narrow(dim, 0, 1).clone().expand(x.shape)
    if layout == "offset":
        return x.new_full((x.numel() + 3,), foreign)[3:].view(x.shape).copy_(x)
    return x.clone()


def floats(*shape: int, dtype: torch.dtype = F32, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def skip_where_it_cannot_run(backend: str) -> None:
    needs_a_compiler(backend)
    if backend == "host" and (reason := missing("host")) is not None:
        pytest.skip(reason)


def assert_layouts_do_not_matter(
    data: st.DataObject, backend: str, tensors: dict[str, Tensor], run: Run, *, kept: tuple[str, ...] = ()
) -> None:
    """run(tensors, backend) -> results. Gradients with respect to those that require one come with the upstream gradient `d_<result>`, where
    one is among the tensors. kept: names of tensors whose layout is not drawn."""
    laid = {
        name: x if name in kept else lay(x, data.draw(st.sampled_from(LAYOUTS)), data.draw(DIM))
        for name, x in tensors.items()
    }
    able = sorted(n for n, x in laid.items() if x.is_floating_point() and not n.startswith("d_"))
    asked = data.draw(st.sets(st.sampled_from(able)))
    # Copies in the layout of the numbers' order.
    plain = {name: x.clone(memory_format=torch.contiguous_format) for name, x in laid.items()}
    for name, x in (*laid.items(), *plain.items()):
        assert not x.is_floating_point() or not x.isnan().any(), name
    (got, got_grads), (want, want_grads) = (
        results_and_gradients(given_, asked, run, on)
        for given_, on in ((laid, backend), (plain, "reference"))
    )
    for name, expected in {**want, **want_grads}.items():
        found = {**got, **got_grads}[name]
        assert (found is None) == (expected is None), name
        if expected is None or found is None:
            continue
        assert found.dtype == expected.dtype, name
        assert found.shape == expected.shape, name
        tolerance = TOLERANCE.get(expected.dtype, 0)
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def results_and_gradients(
    tensors: dict[str, Tensor], asked: set[str], run: Run, backend: str
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    leaves = {n: x.detach().requires_grad_() if n in asked else x for n, x in tensors.items()}
    results = run(leaves, backend)
    ends = [(x, leaves[f"d_{n}"]) for n, x in results.items() if x is not None and x.requires_grad]
    inputs = [leaves[n] for n in sorted(asked)]
    gradients: tuple[Tensor | None, ...] = (None,) * len(inputs)
    if ends and inputs:
        outputs, upstream = zip(*ends, strict=True)
        gradients = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
    found = {f"gradient of {n}": g for n, g in zip(sorted(asked), gradients, strict=True)}
    return {n: None if x is None else x.detach() for n, x in results.items()}, found
