"""A Triton kernel is compiled anew for every kind of integer that it specialises on; none of these may change from batch to batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# The same in all steps of a run: of the model, or the number of rows of a mask.
OF_THE_RUN = {"heads", "kv_heads", "group", "batches", "rows", "window", "stride", "width", "blocks", "eps"}
SCRIPT = """
import json
from triton.runtime import JITFunction
from fst_kernels.cascade_decode import triton_kernels as cascade
from fst_kernels.tree_attention import list_kernels as lists, triton_kernels as tree
from fst_kernels import gpu_kernels
found = {}
for module in (tree, lists, cascade, gpu_kernels):
    for name, kernel in vars(module).items():
        if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
            found[name] = [p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)]
print(json.dumps(found))
"""
POINTERS = {
    "q", "k", "v", "out", "dout", "dq", "dk", "dv", "end", "depth", "lists", "counts", "order", "units", "splits", "block_max", "block_min",
    "key_low", "key_high", "query_low", "query_high", "tiles", "bounds", "entries", "ends", "owner", "lse2", "delta", "partials", "k_pool", "v_pool",
    "x", "weight", "norms", "cos", "sin", "slots", "node_slots", "suffix_slots", "suffix_lengths", "ranked", "items", "above", "past", "part_out", "part_lse2", "parts", "part_count", "lse",
}  # fmt: skip


def test_no_kernel_of_the_forest_is_specialised_on_a_size_that_changes() -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found) >= 10
    for name, parameters in found.items():
        sizes = {p for p in parameters if p not in POINTERS and not p.startswith(("stride_", "scale"))}
        assert sizes <= OF_THE_RUN, name
