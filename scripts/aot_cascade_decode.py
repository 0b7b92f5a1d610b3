"""Compiles the Triton kernels of cascade decoding for GPUs that need not be there: registers, spills, shared memory, tensor cores.

    python scripts/aot_cascade_decode.py [--arch 80 90 100 103 120] [--only "D=128 64 rows"] [--json FILE]

The report and its exit code are those of aot_report.py; here stand the cases.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import aot_report
import torch

from fst_kernels.cascade_decode import triton as op
from fst_kernels.cascade_decode import triton_kernels as kernels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PAGES = {"ranges": (0, 0), "suffixes in pages": (0, 64), "pages": (64, 64)}  # of nodes, of suffixes
TABLES = ("node_slots", "suffix_lengths", "ranked", "items", "above", "past", "parts", "part_count")
PARTS = {"part_out": "*fp32", "part_lse2": "*fp32"}


def strides(kernel: object) -> dict[str, str]:
    return {n: "i32" for n in kernel.arg_names if n.startswith("stride_")}  # type: ignore[attr-defined]


def cascade_decode_cases() -> Iterator[aot_report.Case]:
    for dtype, dim in [("bf16", d) for d in (64, 80, 96, 128, 256)] + [
        ("fp16", 128),
        ("fp32", 128),
        ("fp32", 256),
    ]:
        wide = op.padded(dim)
        for rows in op.row_tiles(DTYPES[dtype]):
            tiles = {
                arch: op.tile(dim, rows, DTYPES[dtype], (arch // 10, arch % 10)) for arch in aot_report.ALL
            }
            for tile, kind, page, window in [
                (t, k, p, w) for t in set(tiles.values()) for k, p in PAGES.items() for w in (False, True)
            ]:
                if kind == "pages" and (window or (dtype, dim) not in (("bf16", 128), ("bf16", 256))):
                    continue  # the loads differ, what surrounds them does not
                if kind == "suffixes in pages" and (window or dtype != "bf16"):
                    continue
                yield aot_report.Case(
                    f"part {dtype} D={dim} {rows} rows x {tile.keys} keys, {tile.warps} warps, {tile.stages} stages, {kind}{', window' * window}",
                    kernels.part_kernel,
                    dict.fromkeys(("q", "k_pool", "v_pool"), "*" + dtype)
                    | dict.fromkeys((n for n in TABLES if n in kernels.part_kernel.arg_names), "*i32")
                    | {"suffix_slots": "*i64"}
                    | PARTS
                    | {"scale2": "fp32", "heads": "i32", "kv_heads": "i32", "window": "i32", "group": "i32"}
                    | strides(kernels.part_kernel),
                    {"D": dim, "DIM": wide, "ROWS": rows, "KEYS": tile.keys, "PRECISION": "ieee"}
                    | {
                        "NODE_PAGE": page[0],
                        "SUFFIX_PAGE": page[1],
                        "WHOLE": page == (0, 64) and rows == op.TILES[0],
                        "WINDOW": window,
                    },
                    unaligned=("heads", "kv_heads", "window", "group"),
                    archs=tuple(arch for arch, own in tiles.items() if own == tile),
                    warps=tile.warps,
                    stages=tile.stages,
                    # Below 64 rows there is neither wgmma nor tcgen05.
                    tensor_cores=dtype != "fp32" and ("mma.sync" if rows < 64 else True),
                )
        for window in (False, True):
            yield aot_report.Case(
                f"merge {dtype} D={dim}{', window' * window}",
                kernels.merge_kernel,
                PARTS
                | dict.fromkeys((n for n in TABLES if n in kernels.merge_kernel.arg_names), "*i32")
                | {"out": "*" + dtype, "lse": "*fp32"}
                | dict.fromkeys(("heads", "width", "suffix_part", "suffix_chunks"), "i32")
                | strides(kernels.merge_kernel),
                {"D": dim, "DIM": wide, "HEADS": op.MERGED_HEADS, "CHUNK": 512, "WINDOW": window},
                unaligned=("heads", "width", "suffix_part", "suffix_chunks"),
            )


if __name__ == "__main__":
    aot_report.CASES[:] = [cascade_decode_cases]
    sys.exit(aot_report.main())
