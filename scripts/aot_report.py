"""Compiles the Triton kernels for GPUs that need not be there and says what they take: registers, spills, shared memory, instructions, buffers.

    python scripts/aot_report.py [--arch 80 90 100 103 120] [--only head_statistics] [--json FILE]

Exit code 1 if a kernel does not compile, spills, needs more shared memory than a block can have, lacks the instructions that it was written for,
or has a loop with fewer buffers than its stages give (aot_inspect.py). A kernel's cases stand in a function of its own below and are listed in
CASES.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))
os.environ.pop("TRITON_INTERPRET", None)  # kernels defined under it cannot be compiled

import aot_inspect
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ALL = tuple(aot_inspect.MACHINES)


class Case(NamedTuple):
    name: str
    kernel: Any  # a triton.jit function
    signature: dict[str, str]  # argument -> type ("*bf16", "i32", ...) of those that are no constant
    constants: dict[str, Any]  # argument -> value, None for a tensor that is not given
    unaligned: tuple[str, ...] = ()  # integers that are not multiples of 16; all others and all pointers are
    archs: tuple[int, ...] = ALL
    warps: int = 4
    stages: int = 3
    tensor_cores: bool | str = False  # True: the architecture's own; else the instruction that is looked for
    tma: bool = False
    pendings: int = 0  # products that a wait of wgmma in the loop leaves running
    access_bytes: int = 0  # that a load or store of global memory moves for a thread at least, but for
    uniform: int = 0  # so many loads of single numbers
    occupancy: float = 0.0  # share of a multiprocessor's warps that run at a time, at least


def linear_logprob_cases() -> Iterator[Case]:
    from fst_kernels.linear_logprob import triton as op
    from fst_kernels.linear_logprob import triton_kernels as kernels

    rows = dict.fromkeys(("inverse", "peak", "log_total", "ref_peak", "ref_log_total"), "*fp32")
    partial = dict.fromkeys(("peaks", "totals", "moments"), "*fp32")
    for tiles, archs in (
        (op.AMPERE, ALL),
        (op.HOPPER, (90,)),
        (op.BLACKWELL, (100, 103)),
        (op.CONSUMER, (120,)),
    ):
        # Tensors that are not given are None.
        for what, optional, softcap in (
            ("", {"bias": None, "products": None}, {"softcap": None}),
            (" stored", {"bias": None, "products": "*fp32"}, {"softcap": None}),
            (" bias stored", {"bias": "*bf16", "products": "*fp32"}, {"softcap": None}),
            (" bias softcap stored", {"bias": "*bf16", "products": "*fp32"}, {"softcap": "fp32"}),
        ):
            arguments = (
                dict.fromkeys(("hidden", "weight"), "*bf16")
                | optional
                | {"inverse": "*fp32", "starts": "*i64", "labels": "*i64", "label_logits": "*fp32"}
                | partial
                | dict.fromkeys(("num_rows", "vocabulary", "size", "hidden_stride", "weight_stride"), "i32")
                | {"products_stride": "i32", "group": "i32"}
                | softcap
            )
            yield Case(
                f"head_statistics {tiles.rows}x{tiles.columns}x{tiles.depth}{' TMA' if tiles.tma else ''}{what}",
                kernels.head_statistics_kernel,
                {name: kind for name, kind in arguments.items() if kind is not None},
                {name: None for name, kind in arguments.items() if kind is None}
                | {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth, "SPLIT": tiles.split}
                | {"TMA": tiles.tma, "HALVES": tiles.halves, "UPCAST": False},
                unaligned=("num_rows", "group"),
                archs=archs,
                warps=tiles.warps,
                stages=tiles.stages,
                tensor_cores=True,
                tma=tiles.tma,
                pendings=1,
            )
    yield Case(
        "combine",
        kernels.combine_kernel,
        partial
        | dict.fromkeys(("peak", "log_total", "entropy"), "*fp32")
        | {"num_rows": "i32", "splits": "i32"},
        {"ROWS": op.COMBINED_ROWS, "SPLITS": op.COMBINED_SPLITS},
        unaligned=("num_rows", "splits"),
    )
    pair = dict.fromkeys(("products", "ref_products"), "*fp32") | dict.fromkeys(("bias", "ref_bias"), "*bf16")
    strides = dict.fromkeys(("vocabulary", "products_stride", "ref_stride"), "i32")
    for forward in (False, True):
        yield Case(
            f"divergence {'forward' if forward else 'reverse'} softcap",
            kernels.divergence_kernel,
            pair | rows | {"kl": "*fp32", "softcap": "fp32"} | strides,
            {"FORWARD": forward, "COLUMNS": op.BLOCK},
            access_bytes=16,
            uniform=6,  # a row's statistics, and its KL
            occupancy=0.5,
        )
    labels = {"starts": "*i64", "labels": "*i64", "coefficients": "*fp32"}
    out = {"out": "*bf16", "out_stride": "i32"} | strides
    unused = (
        "ref_products",
        "bias",
        "ref_bias",
        "ref_peak",
        "ref_log_total",
        "b1",
        "d_kl",
        "acting",
        "softcap",
    )
    yield Case(
        "logits_gradient",
        kernels.logits_gradient_kernel,
        {"products": "*fp32", "b0": "*fp32"}
        | labels
        | out
        | {k: v for k, v in rows.items() if k not in unused},
        dict.fromkeys(unused) | {"FORWARD": False, "COLUMNS": op.BLOCK},
        access_bytes=16,
        uniform=8,
        occupancy=0.5,
    )
    for forward in (False, True):
        yield Case(
            f"logits_gradient {'forward' if forward else 'reverse'} KL, all options",
            kernels.logits_gradient_kernel,
            pair
            | rows
            | dict.fromkeys(("b0", "b1", "d_kl"), "*fp32")
            | labels
            | out
            | {"acting": "*i64", "softcap": "fp32"},
            {"FORWARD": forward, "COLUMNS": op.BLOCK},
            access_bytes=16,
            uniform=13,
            occupancy=0.5,
        )


def layer_row_cases() -> Iterator[Case]:
    """The row operations of a layer, for the widths of Qwen2.5-0.5B, Qwen3-8B and 14B and a head size that is no power of two."""
    from fst_kernels import gpu
    from fst_kernels import gpu_kernels as kernels

    # bound by bytes: 16 an access, and many of these under way
    wide: dict[str, Any] = {"access_bytes": 16, "occupancy": 0.6}
    for width in (896, 4096, 5120):
        block = triton.next_power_of_2(width)
        yield Case(
            f"rms_norm H={width}",
            kernels.rms_norm_kernel,
            dict.fromkeys(("x", "weight", "out"), "*bf16") | {"stride": "i32", "eps": "fp32"},
            {"WIDTH": width, "BLOCK": block},
            warps=gpu.warps(block),
            **wide,
        )
    for dim in (64, 96, 128):
        turned = gpu.turned(dim)
        for norms in ("*bf16", None):
            yield Case(
                f"norm_and_turn D={dim}{'' if norms else ', without norms'}",
                kernels.norm_and_turn_kernel,
                dict.fromkeys(("x", "cos", "sin"), "*bf16")
                | ({"norms": norms} if norms else {})
                | dict.fromkeys(("heads", "stride", "stride_turn"), "i32")
                | {"eps": "fp32"},
                ({} if norms else {"norms": None})
                | {"HALF": dim // 2, "BLOCK": turned.block, "HEADS": turned.heads},
                unaligned=("heads",),
                warps=turned.warps,
                **wide,
            )
    for heads, dim in ((2, 64), (8, 96), (8, 128)):
        rows, block = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
        yield Case(
            f"scatter {heads} heads D={dim}",
            kernels.scatter_kernel,
            dict.fromkeys(("k", "v", "k_pool", "v_pool"), "*bf16")
            | {"slots": "*i64"}
            | {n: "i32" for n in kernels.scatter_kernel.arg_names if n.startswith("stride_")},
            {"ROWS": rows, "HEADS": heads, "D": dim, "BLOCK": block},
            warps=gpu.moving_warps(rows * block),
            access_bytes=8 if heads * dim < 256 else 16,
            uniform=1,  # the slot
            occupancy=0.5,
        )
    yield Case(
        "gate",
        kernels.gate_kernel,
        {"x": "*bf16", "out": "*bf16", "width": "i32", "blocks": "i32"},
        {"BLOCK": gpu.GATED_COLUMNS},
        unaligned=("blocks",),
        **wide,
    )


CASES: list[Callable[[], Iterator[Case]]] = [linear_logprob_cases, layer_row_cases]


def compile_case(case: Case, arch: int, spill: int = 0) -> aot_inspect.Report:
    """spill: bytes of local memory per thread that are accepted."""
    names = case.kernel.arg_names
    missing = [n for n in names if n not in case.signature and n not in case.constants]
    assert not missing, f"{case.name}: no type and no value for {', '.join(missing)}"
    signature = {n: case.signature.get(n, "constexpr") for n in names}
    aligned = [
        n
        for n, kind in case.signature.items()
        if kind[0] == "*" or (kind[0] == "i" and n not in case.unaligned)
    ]
    source = ASTSource(
        case.kernel,
        signature,
        {(names.index(n),): value for n, value in case.constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True},
    )
    return aot_inspect.judge(
        compiled, arch, warps=case.warps, stages=case.stages, tensor_cores=case.tensor_cores, tma=case.tma,
        pendings=case.pendings, spill=spill, access_bytes=case.access_bytes, uniform=case.uniform, occupancy=case.occupancy,
    )  # fmt: skip


def compile_and_print(case: Case, arch: int, spill: int = 0) -> aot_inspect.Report:
    one = compile_case(case, arch, spill)
    print(f"{one.line()}  sm_{arch} {case.name}", flush=True)
    for complaint in one.complaints:
        print(f"          !! {complaint}", flush=True)
    return one


def options(description: str | None) -> argparse.ArgumentParser:
    """With --arch, which all reports have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=ALL, choices=ALL)
    return parser


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    given = parser.parse_args()
    print(aot_inspect.HEADER, flush=True)
    found = []
    for case in (case for cases in CASES for case in cases() if given.only in case.name):
        for arch in sorted(set(case.archs) & set(given.arch)):
            one = compile_and_print(case, arch)
            found.append(
                {"case": case.name, "arch": arch, "complaints": one.complaints} | one.usage._asdict()
            )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    if not found:
        print(f"no kernel is called {given.only!r} on these architectures")
    return int(not found or any(one["complaints"] for one in found))


if __name__ == "__main__":
    sys.exit(main())
