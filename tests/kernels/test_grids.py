"""Grids of the Triton kernels: the second and third axis of a CUDA grid end at 65,535, the first at 2^31 - 1. No kernel runs here."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from fst_kernels.tree_attention import TreeMask, list_kernels, triton_kernels
from fst_kernels.tree_attention import triton as tree_attention

LAST_OF_Y_AND_Z = 65_535
KERNELS = {
    list_kernels: ("list_kernel", "tile_list_kernel", "thin_kernel"),
    triton_kernels: ("forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel", "reduce_kernel"),
}


@pytest.fixture
def grids(monkeypatch):
    """Name of each kernel launched -> its grids."""
    seen: dict[str, list[tuple[int, ...]]] = {}

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            def launch(*arguments, **_):
                seen.setdefault(self.name, []).append(grid)
                for x in arguments:  # what a kernel would have written is read by the host's own code
                    if isinstance(x, torch.Tensor) and x.dtype == torch.int32:
                        x.nan_to_num_(0)

            return launch

    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Recorder(name))
    return seen


@pytest.mark.parametrize(("batch", "heads", "rows"), [(1, 70_000, 1), (35_000, 2, 1), (70_000, 1, 70_000)])
@pytest.mark.parametrize("window", [None, 2])
def test_batch_times_heads_of_70_000_fits_into_every_grid_of_tree_attention(
    grids, batch, heads, rows, window
):
    n, dim = 3, 16
    ends = torch.tensor([3, 2, 3], dtype=torch.int32).repeat(rows, 1)
    ends[:, 1] = 3  # a chain, deeper than the window
    mask = TreeMask.from_subtree_end(ends)
    q = torch.zeros(batch, heads, n, dim)
    out, lse2 = tree_attention.forward(q, q, q, mask, 1.0, window)
    tree_attention.backward(q, q, q, q, out, lse2, mask, 1.0, window)
    assert {
        "list_kernel",
        "forward_kernel",
        "delta_kernel",
        "dq_kernel",
        "dkdv_kernel",
        "reduce_kernel",
    } <= set(grids)
    assert ("thin_kernel" in grids) == (window is not None)
    for name, launched in grids.items():
        for grid in launched:
            assert all(axis <= LAST_OF_Y_AND_Z for axis in grid[1:]), (name, grid)
            assert grid[0] < 2**31, (name, grid)
    for name in ("forward_kernel", "delta_kernel", "dq_kernel"):
        assert [math.prod(g) for g in grids[name]] == [batch * heads]
