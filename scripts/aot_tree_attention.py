"""Compiles the Triton kernels of tree attention for GPUs that need not be there and says what they take.

    python scripts/aot_tree_attention.py [--arch 80 90 100 103 120] [--dim 64 80 96 128 256] [--dtype bf16 fp16 fp32] [--window no yes] [--spill 0]

One line per kernel: registers, bytes of local memory per thread, shared memory of a block, SASS instructions, blocks per multiprocessor, and of
each loop its buffers and pending products. Exit code 1 if a kernel does not compile, spills (more than --spill bytes), needs more shared memory
than a block has, lacks tensor cores (16-bit types) or TMA where asked for, or has a loop with fewer buffers than its stages give (aot_inspect.py).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))
os.environ.pop("TRITON_INTERPRET", None)  # kernels defined under it cannot be compiled

import aot_inspect
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fst_kernels.tree_attention import list_kernels
from fst_kernels.tree_attention import triton as op
from fst_kernels.tree_attention import triton_kernels as kernels

ALL = tuple(aot_inspect.MACHINES)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INT_POINTERS = (
    *(
        "end",
        "depth",
        "lists",
        "counts",
        "order",
        "units",
        "splits",
        "block_max",
        "block_min",
        "key_low",
        "key_high",
    ),
    *("query_low", "query_high", "tiles", "bounds", "entries", "owner"),
)
LONG_POINTERS = ("ends",)
FLOAT_POINTERS = ("lse2", "delta", "partials")
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


def compile_one(
    kernel: Any, tile: op.Tile, tma: bool, own: dict[str, Any], dim: int, dtype: str, arch: int
) -> Any:
    wide = op.padded(dim)
    constants = {
        "D": dim,
        "DIM": wide,
        "BM": tile.queries,
        "BN": tile.keys,
        "TMA": tma,
        "PRECISION": "ieee",
    } | own
    signature, aligned = {}, []
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif tma and name in TILED:
            signature[name] = f"tensordesc<{dtype}[1,1,{getattr(tile, TILED[name])},{wide}]>"
        else:
            pointer = (
                "i32"
                if name in INT_POINTERS
                else "i64"
                if name in LONG_POINTERS
                else "fp32"
                if name in FLOAT_POINTERS
                else dtype
                if name in TENSORS
                else ""
            )
            signature[name] = "*" + pointer if pointer else "fp32" if name.startswith("scale") else "i32"
            if pointer or name.startswith("stride"):
                aligned.append(position)
    values = {(kernel.arg_names.index(n),): value for n, value in constants.items() if n in kernel.arg_names}
    source = ASTSource(kernel, signature, values, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=tile.launch)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=ALL, choices=ALL)
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
        for name, kernel, tile, tma, own in variants:
            compiled = compile_one(kernel, tile, tma, own, dim, dtype, arch)
            multiplies = dtype != "fp32" and "PRECISION" in kernel.arg_names
            one = aot_inspect.judge(
                compiled, arch, warps=tile.warps, stages=tile.stages, tensor_cores=multiplies, tma=tma, spill=given.spill
            )  # fmt: skip
            failed += bool(one.complaints)
            shape = f"{tile.queries}x{tile.keys} {tile.warps} warps {tile.stages} stages"
            print(f"{one.line()}  sm_{arch} {dtype} D={dim} {name} {shape}", flush=True)
            for complaint in one.complaints:
                print(f"          !! {complaint}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
