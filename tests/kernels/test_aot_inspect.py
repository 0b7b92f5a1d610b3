"""What scripts/aot_inspect.py reads from a compiled kernel: a planted fault of each kind is found. Compiles for sm_90; needs no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import aot_inspect
import aot_report
import triton
import triton.language as tl


@triton.jit
def walk(x, y, table, out, count, size, CARRIED: tl.constexpr):
    """Multiplies x with the tiles of y that the table names."""
    place = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    mine = tl.load(x + place)
    total = tl.zeros([64, 64], tl.float32)
    upcoming = tl.load(table)
    for t in range(0, count):
        if CARRIED:
            tile, upcoming = upcoming, tl.load(table + tl.minimum(t + 1, count - 1))
        else:
            tile = tl.load(table + t)
        total = tl.dot(mine, tl.load(y + tile * size + place), total)
    tl.store(out + place, total)


def case(**changes):
    fields = {
        "name": "walk",
        "kernel": walk,
        "signature": {
            "x": "*bf16",
            "y": "*bf16",
            "table": "*i32",
            "out": "*fp32",
            "count": "i32",
            "size": "i32",
        },
        "constants": {"CARRIED": True},
        "unaligned": ("count",),
        "tensor_cores": True,
        "pendings": 1,
    }
    return aot_report.Case(**fields | changes)


def test_a_loop_whose_index_is_carried_has_all_its_buffers():
    report = aot_report.compile_case(case(), 90)
    assert report.complaints == []
    assert [(loop.products, loop.buffers, loop.indices) for loop in report.loops] == [(1, 3, 0)]
    assert report.usage.instructions > 50


def test_an_index_that_is_loaded_inside_the_loop_costs_a_buffer_and_is_complained_of():
    report = aot_report.compile_case(case(constants={"CARRIED": False}), 90)
    assert [loop.buffers for loop in report.loops] == [2]
    assert any("2 buffers per operand; 3 stages give 3" in c for c in report.complaints)
    assert any("index" in c for c in report.complaints)


def test_a_wait_for_all_products_and_missing_instructions_are_complained_of():
    report = aot_report.compile_case(case(pendings=2, tma=True), 90)
    assert any("none of them 2" in c for c in report.complaints)
    assert any("cp.async.bulk.tensor" in c for c in report.complaints)


def row_case(name, **changes):
    return next(c for c in aot_report.layer_row_cases() if c.name == name)._replace(**changes)


def test_row_operations_move_sixteen_bytes_at_a_time_and_a_stride_that_does_not_allow_it_is_complained_of():
    assert aot_report.compile_case(row_case("norm_and_turn D=64"), 90).complaints == []
    report = aot_report.compile_case(row_case("gate", unaligned=("width", "blocks")), 90)
    assert any("24 of 2 bytes; 16 are wanted, but for 0 single numbers" in c for c in report.complaints)
    slots = aot_report.compile_case(row_case("scatter 8 heads D=128", uniform=0), 90)
    assert any("1 of 8 bytes" in c for c in slots.complaints)


def test_a_multiprocessor_that_runs_too_few_warps_is_complained_of():
    report = aot_report.compile_case(row_case("scatter 8 heads D=128", warps=1, occupancy=0.6), 90)
    assert report.complaints == ["50% of the warps of a multiprocessor run at a time; 60% are wanted"]


@pytest.mark.parametrize(
    ("ptx", "found"),
    [
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", {16: 1}),
        ("st.global.L1::evict_last.b16 [ %rd1 ], { %rs1 };\nld.global.b64 { %rd2 }, [ %rd1 ];", {2: 1, 8: 1}),
        ("ld.shared.b32 %r1, [%r2];\nst.global.v2.f32 [ %rd1 ], { %f1, %f2 };", {8: 1}),
    ],
)
def test_accesses(ptx, found):
    assert aot_inspect.accesses(ptx) == found


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "columns", "blocks"),
    [
        (90, 255, 8, 147_480, 0, 1),  # 8 warps x 8,192 registers: one block, whatever the shared memory
        (90, 128, 8, 65_808, 0, 2),
        (90, 130, 8, 65_808, 0, 1),  # 136 registers are given out
        (100, 64, 8, 30_000, 256, 2),  # two blocks share the 512 columns of tensor memory
        (120, 64, 4, 101_376, 0, 1),
        (120, 64, 4, 131_096, 0, 0),  # the head's tile of sm_100
    ],
)
def test_occupancy(arch, registers, warps, shared, columns, blocks):
    assert aot_inspect.occupancy(arch, registers, warps, shared, columns) == blocks


@pytest.mark.parametrize(
    ("stages", "instruction", "buffers"), [(1, "mma.sync", 0), (3, "mma.sync", 2), (3, "wgmma", 3)]
)
def test_expected_buffers(stages, instruction, buffers):
    assert aot_inspect.expected_buffers(stages, instruction) == buffers
