"""Compiles the Triton kernels of tree attention for GPUs that need not be there and says what they take.

    python scripts/aot_tree_attention.py [--arch 80 90 100 103 120] [--dim 64 80 96 128 256] [--dtype bf16 fp16 fp32] [--window no yes] [--spill 0]

One line per kernel: registers, bytes of local memory per thread, shared memory of a block, SASS instructions, blocks per multiprocessor, and of
each loop its buffers and pending products. Exit code 1 if a kernel does not compile, spills (more than --spill bytes), needs more shared memory
than a block has, lacks tensor cores (16-bit types) or TMA where asked for, or has a loop with fewer buffers than its stages give (aot_inspect.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import aot_inspect
import aot_report
import torch

from fst_kernels.tree_attention import list_kernels
from fst_kernels.tree_attention import triton as op
from fst_kernels.tree_attention import triton_kernels as kernels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TABLES = (
    "end depth lists counts order units splits block_max block_min key_low key_high query_low query_high "
    "tiles bounds entries owner"
)
TYPES = {"ends": "*i64"} | dict.fromkeys(TABLES.split(), "*i32")
TYPES |= dict.fromkeys(("lse2", "delta", "partials"), "*fp32")
TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
# read through descriptors where there is TMA
TILED = {"q": "queries", "dout": "queries", "k": "keys", "v": "keys"}


def passes(tiles: op.Tiling, window: bool) -> Iterator[tuple[str, Any, op.Tile, bool, dict[str, Any]]]:
    """Name, kernel, tile, TMA, constants of its own. With `window` the variants that a sliding window takes, and no others."""
    plain = op.Tile(op.DELTA_ROWS, tiles.dkdv.keys, 4, 3)
    queries = op.Tile(tiles.forward.queries, tiles.forward.keys, 4, 3)
    suffix, own = (" window", {"WINDOW": True}) if window else ("", {"WINDOW": False})
    yield "list" + suffix, list_kernels.list_kernel, queries, False, {"SCAN": op.SCAN, **own}
    yield "forward" + suffix, kernels.forward_kernel, tiles.forward, tiles.tma, own
    yield "dq" + suffix, kernels.dq_kernel, tiles.dq, tiles.tma, own
    for dk, dv in ((True, False), (False, True)) if tiles.apart else ((True, True),):
        name = "dk" * dk + "dv" * dv + suffix
        yield name, kernels.dkdv_kernel, tiles.dkdv, tiles.tma, {"DK": dk, "DV": dv, **own}
    if window:
        near = op.Tile(tiles.dkdv.queries, tiles.dkdv.keys, 4, 3)
        yield "tile list", list_kernels.tile_list_kernel, near, False, {"SCAN": op.SCAN}
        yield "thin, of keys", list_kernels.thin_kernel, near, False, {"OF_KEYS": True}
        yield "thin, of queries", list_kernels.thin_kernel, queries, False, {"OF_KEYS": False}
    else:
        yield "delta", kernels.delta_kernel, plain, False, {}
        yield "reduce", kernels.reduce_kernel, op.Tile(64, tiles.dkdv.keys, 8, 3), False, {}


def case_of(
    name: str, kernel: Any, tile: op.Tile, tma: bool, own: dict[str, Any], dim: int, dtype: str
) -> aot_report.Case:
    wide = op.padded(dim)
    constants = {
        "D": dim,
        "DIM": wide,
        "BM": tile.queries,
        "BN": tile.keys,
        "TMA": tma,
        "PRECISION": "ieee",
    } | own
    types = TYPES | dict.fromkeys(TENSORS, "*" + dtype)
    if tma:
        types |= {n: f"tensordesc<{dtype}[1,1,{getattr(tile, of)},{wide}]>" for n, of in TILED.items()}
    signature = {
        n: types.get(n, "fp32" if n.startswith("scale") else "i32")
        for n in kernel.arg_names
        if n not in constants
    }
    return aot_report.Case(
        f"{dtype} D={dim} {name} {tile.queries}x{tile.keys} {tile.warps} warps {tile.stages} stages",
        kernel,
        signature,
        {n: value for n, value in constants.items() if n in kernel.arg_names},
        unaligned=tuple(n for n in signature if not n.startswith("stride")),
        warps=tile.warps,
        stages=tile.stages,
        tensor_cores=dtype != "fp32" and "PRECISION" in kernel.arg_names,
        tma=tma,
    )


def main() -> int:
    parser = aot_report.options(__doc__)
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 80, 96, 128, 256])
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--window", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    parser.add_argument(
        "--spill", type=int, default=0, help="bytes of local memory per thread that are accepted"
    )
    given = parser.parse_args()
    print(aot_inspect.HEADER, flush=True)
    failed = 0
    for arch, dtype, dim in ((a, t, d) for a in given.arch for t in given.dtype for d in given.dim):
        variants = [
            part
            for window in (w == "yes" for w in given.window)
            for part in passes(op.tiling(dim, DTYPES[dtype], (arch // 10, arch % 10), window), window)
        ]
        for variant in variants:
            case = case_of(*variant, dim, dtype)
            failed += bool(aot_report.compile_and_print(case, arch, spill=given.spill).complaints)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
