"""Cascade decoding against dense attention over each sequence's own past in float64; the Triton kernels in Triton's interpreter.

As in test_tree_attention_triton.py this file runs itself once more with TRITON_INTERPRET=1, which Triton reads when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_kernels import CascadePlan, backends, cascade_decode_attention
from tests.compiler import needs_a_compiler

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["reference", "cpu"]
HEADS = (2, 1) if INTERPRETED else (4, 2)  # of queries, of keys


def outer(test: Any) -> Any:
    return None if INTERPRETED else test


class Case:
    """Random pools and queries over a tree given by paths and node lengths; nodes one after the other, in any order, or in pages."""

    def __init__(
        self, paths, node_lengths, suffix_lengths, *, heads=HEADS[0], kv_heads=HEADS[1], dim=8, capacity=None, page=None, shuffle=False,
        chunk=16, seed=0, dtype=torch.float32, window=None,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        self.paths, self.lengths = [list(p) for p in paths], list(node_lengths)
        self.suffixes, self.window = torch.tensor(suffix_lengths, dtype=torch.int32), window
        capacity = capacity or max(1, int(self.suffixes.max()))
        sizes = self.lengths + [capacity] * len(self.paths)
        order = torch.randperm(len(sizes), generator=g).tolist() if shuffle else range(len(sizes))
        if page is None:
            starts, used = [0] * len(sizes), 0
            for i in order:
                starts[i], used = used, used + sizes[i]
            self.slots = [torch.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)]
            table = torch.tensor(starts)
        else:
            pages = [-(-n // page) for n in sizes]
            free, used = torch.randperm(sum(pages), generator=g) * page, sum(pages) * page
            table = torch.full((len(sizes), max(pages)), -1)
            for i, n in enumerate(pages):
                table[i, :n], free = free[:n], free[n:]
            self.slots = [
                (table[i, : pages[i], None] + torch.arange(page)).flatten()[:n] for i, n in enumerate(sizes)
            ]
        nodes = len(self.lengths)
        self.q = torch.randn(len(self.paths), heads, dim, generator=g).to(dtype)
        self.k, self.v = (torch.randn(used, kv_heads, dim, generator=g).to(dtype) for _ in range(2))
        self.plan = CascadePlan.build(
            self.paths, node_slots=table[:nodes], node_lengths=self.lengths, suffix_slots=table[nodes:].contiguous(),
            suffix_lengths=self.suffixes, suffix_capacity=capacity, page_size=page, chunk=chunk,
        )  # fmt: skip

    backend: str  # of the fixture below

    def run(self, **change):
        q, k, v = (change.get(name, getattr(self, name)) for name in ("q", "k", "v"))
        return cascade_decode_attention(
            q, k, v, self.plan, scale=0.4, window=self.window, return_lse=True, backend=self.backend
        )

    def keys_of(self, s):
        seen = [self.slots[n] for n in self.paths[s] if n >= 0]
        past = torch.cat([*seen, self.slots[len(self.lengths) + s][: int(self.suffixes[s])]]).long()
        return past if self.window is None else past[-self.window :]

    def truth(self):
        group = self.q.shape[1] // self.k.shape[1]
        out, lse = (
            torch.zeros(self.q.shape, dtype=torch.float64),
            torch.zeros(self.q.shape[:2], dtype=torch.float64),
        )
        for s in range(len(self.q)):
            k, v = (x[self.keys_of(s)].double().repeat_interleave(group, 1) for x in (self.k, self.v))
            scores = torch.einsum("hd,khd->hk", self.q[s].double(), k) * 0.4
            lse[s] = scores.logsumexp(1)
            if len(k):
                out[s] = torch.einsum("hk,khd->hd", scores.softmax(1), v)
        return out, lse

    def check(self, tolerance=1e-5):
        assert self.q.abs().min() > 0
        for got, want in zip(self.run(), self.truth(), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    needs_a_compiler(request.param)
    monkeypatch.setattr(Case, "backend", request.param, raising=False)
    return request.param


def nested(contexts, problems, samples, sizes=(40, 21), seed=0):
    """paths and node lengths of contexts x problems x samples."""
    roots = range(contexts)
    paths = [[c, contexts + c * problems + p] for c in roots for p in range(problems) for _ in range(samples)]
    return paths, [sizes[0]] * contexts + [sizes[1]] * (contexts * problems)


def random_tree(seed, sequences):
    rng = np.random.default_rng(seed)
    nodes = int(rng.integers(1, 12))
    parents = [-1] + [int(rng.integers(-1, i)) for i in range(1, nodes)]
    paths = []
    for _ in range(sequences):
        node, path = int(rng.integers(-1, nodes)), []
        while node >= 0:
            path.insert(0, node)
            node = parents[node]
        paths.append(path)
    deepest = max(1, *(len(p) for p in paths))
    lengths = rng.choice([1, 2, 15, 16, 17, 33, 50], nodes).tolist()
    return [p + [-1] * (deepest - len(p)) for p in paths], lengths, rng.integers(0, 40, sequences).tolist()


@outer
def test_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.emulated
@outer
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_it_compiles_for_hopper_with_tensor_cores_and_without_spills():
    """One head size and architecture; scripts/aot_cascade_decode.py without arguments does all of them, in minutes."""
    pytest.importorskip("triton")
    script = Path(__file__).parents[2] / "scripts" / "aot_cascade_decode.py"
    done = subprocess.run(
        [sys.executable, str(script), "--arch", "90", "--only", "bf16 D=128 64 rows"], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sm_90 part bf16 D=128") == 4


# Suffix lengths around chunk and tile, one node with many chunks, a lonely sequence, one at an inner node, one without a prompt.
UNEVEN = [[0, 2], [1, -1], [0, 3], [0, 2], [1, 4], [0, 3], [-1, -1], [0, -1]], [100, 33, 1, 16, 17]
UNEVEN_SUFFIXES = [3, 1, 0, 17, 16, 15, 2, 0] if INTERPRETED else [3, 1, 0, 33, 17, 16, 2, 32]


@pytest.mark.parametrize(
    "layout",
    [{}, {"page": 3}] if INTERPRETED else [{}, {"shuffle": True}, {"page": 16}, {"page": 3}],
    ids=str,
)
def test_every_sequence_sees_its_path_and_its_suffix(layout):
    Case(*UNEVEN, UNEVEN_SUFFIXES, capacity=50 if layout else None, **layout).check()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(1, 1, 80), (8, 1, 64), (6, 2, 96), (2, 2, 128), (4, 1, 256), (40, 1, 16)]
)
def test_head_groups_and_head_sizes(heads, kv_heads, dim):
    """40 query heads on one KV head are more than one small tile has rows, even for a suffix."""
    Case(*nested(1, 2, 2, (20, 5)), [4, 9, 0, 17], heads=heads, kv_heads=kv_heads, dim=dim).check()


@pytest.mark.parametrize("samples", [9, 33] if INTERPRETED else [1, 7, 8, 9, 33])
def test_tiles_of_queries_that_are_not_full(samples):
    Case(*nested(1, 1, samples, (18, 3)), [2] * samples, heads=2, kv_heads=1).check()


@pytest.mark.parametrize("window", [1, 17, 200] if INTERPRETED else [1, 2, 15, 16, 17, 33, 40, 130, 1000])
def test_through_a_window_a_sequence_sees_the_last_keys_of_its_past(window):
    """Whole parts lie behind it, for some or for all of the queries of a tile; with 1000 nothing does."""
    case = Case(*UNEVEN, UNEVEN_SUFFIXES, capacity=50, window=window)
    case.check()
    case.suffixes += 15
    case.check()


@pytest.mark.parametrize("page", [16] if INTERPRETED else [3, 16, 64])
@pytest.mark.parametrize("window", [None, 37])
def test_suffixes_in_pages_give_the_bits_of_suffixes_in_ranges(page, window):
    """Nodes in ranges, as the engine has them; with pages that a tile of keys fits into, and others."""
    lengths = [1 + i * 23 % 70 for i in range(len(UNEVEN_SUFFIXES))]
    case = Case(*UNEVEN, lengths, capacity=80, shuffle=True, window=window)
    nodes, suffixes = case.plan.node_slots[:, 0], case.plan.suffix_slots[:, 0]
    plain = case.run()
    pages = -(-80 // page)
    used = len(case.k)
    table = used + torch.randperm(pages * len(suffixes), generator=torch.Generator().manual_seed(1)) * page
    table = table.view(-1, pages)
    for name in ("k", "v"):
        pool = torch.cat([getattr(case, name), torch.zeros(table.numel() * page, *case.k.shape[1:])])
        for s, first in enumerate(suffixes.tolist()):
            rows = (table[s, :, None] + torch.arange(page)).flatten()[:80]
            pool[rows] = pool[first : first + 80].clone()
            pool[first : first + 80] = 1e3  # must not be read
        setattr(case, name, pool)
    case.plan = CascadePlan.build(
        case.paths, node_slots=nodes, node_lengths=case.lengths, suffix_slots=table, suffix_lengths=case.suffixes,
        suffix_capacity=80, page_size=page, chunk=16,
    )  # fmt: skip
    for one, other in zip(case.run(), plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("page", [None, 4])
def test_a_window_over_pages_and_many_queries_of_different_depth(page):
    paths, lengths = nested(1, 2, 17 if INTERPRETED else 40, (70, 9))
    Case(paths, lengths, [1 + i % 30 for i in range(len(paths))], page=page, shuffle=True, window=45).check()


@settings(max_examples=2 if INTERPRETED else 25, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([None, 4, 16]), st.booleans(), st.sampled_from([None, 3, 30])
)  # fmt: skip
def test_random_trees(seed, sequences, page, shuffle, window):
    Case(*random_tree(seed, sequences), page=page, shuffle=shuffle, seed=seed, window=window).check()


def test_a_sequence_that_sees_no_key_gets_zeros():
    case = Case([[-1], [0]], [5], [0, 0])
    out, lse = case.run()
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    assert out[1].any()


def test_large_scores():
    case = Case(*UNEVEN, UNEVEN_SUFFIXES)
    case.q *= 1e4
    case.check(tolerance=1e-4)


def test_what_another_branch_holds_does_not_change_a_bit():
    case = Case(*UNEVEN, UNEVEN_SUFFIXES, kv_heads=1, heads=2)
    before, lse = case.run()
    foreign = torch.cat(
        [case.slots[1], case.slots[4], case.slots[5 + 1]]
    ).long()  # nodes 1 and 4, the suffix of sequence 1
    k, v = case.k.clone(), case.v.clone()
    k[foreign], v[foreign] = 7.0, -7.0
    after, lse_after = case.run(k=k, v=v)
    mine = [0, 2, 3, 5, 6, 7]
    assert torch.equal(before[mine], after[mine])
    assert torch.equal(lse[mine], lse_after[mine])
    assert not torch.equal(before[[1, 4]], after[[1, 4]])


@outer
def test_the_order_of_the_sequences_changes_nothing(backend):
    case = Case(*UNEVEN, UNEVEN_SUFFIXES)
    out, _ = case.run()
    order = torch.tensor([5, 0, 7, 3, 6, 1, 4, 2])
    tables = {
        "node_slots": case.plan.node_slots[:, 0], "suffix_slots": case.plan.suffix_slots[order, 0].contiguous(),
        "suffix_lengths": case.suffixes[order].contiguous(),
    }  # fmt: skip
    plan = CascadePlan.build(
        torch.tensor(case.paths)[order], node_lengths=case.lengths, suffix_capacity=case.plan.suffix_capacity, chunk=16, **tables
    )  # fmt: skip
    again = cascade_decode_attention(case.q[order], case.k, case.v, plan, scale=0.4, backend=backend)
    torch.testing.assert_close(again, out[order], rtol=1e-6, atol=1e-6)
    assert backend != "cpu" or torch.equal(again, out[order])


@outer
def test_on_the_cpu_neither_neighbours_nor_threads_change_a_bit(backend):
    """With a window rows meet a chunk's keys alone or in pairs, depending on their neighbours."""
    if backend != "cpu":
        pytest.skip("said of the C++ kernel")
    paths, lengths = nested(2, 3, 7, (70, 21))
    for heads, window in ((2, None), (4, 45), (3, 13)):
        suffixes = [1 + i % 30 for i in range(len(paths))]
        case = Case(paths, lengths, suffixes, capacity=40, heads=heads, kv_heads=1, window=window, dim=20)
        whole, lse = case.run()
        for some in ([5], list(range(3, 40, 4))):
            at = torch.tensor(some)
            plan = CascadePlan.build(
                torch.tensor(case.paths)[at], node_slots=case.plan.node_slots[:, 0], node_lengths=case.lengths,
                suffix_slots=case.plan.suffix_slots[at, 0].int(), suffix_lengths=case.suffixes[at].contiguous(), suffix_capacity=40, chunk=16,
            )  # fmt: skip
            few = cascade_decode_attention(case.q[at], case.k, case.v, plan, scale=0.4, window=window, return_lse=True, backend="cpu")  # fmt: skip
            assert torch.equal(few[0], whole[at])
            assert torch.equal(few[1], lse[at])
        threads = torch.get_num_threads()
        torch.set_num_threads(3 if threads == 1 else 1)
        try:
            assert torch.equal(case.run()[0], whole)
        finally:
            torch.set_num_threads(threads)


@outer
def test_nan_comes_out_where_it_is_seen_and_nowhere_else(backend):
    case = Case(*UNEVEN, UNEVEN_SUFFIXES)
    case.k[case.slots[1]] = torch.nan
    out, lse = case.run()
    sees = torch.tensor([1 in path for path in case.paths])
    assert out[sees].isnan().all()
    assert lse[sees].isnan().all()
    assert not out[~sees].isnan().any()


def test_lengths_written_in_place_are_seen_by_the_same_plan():
    case = Case(*UNEVEN, UNEVEN_SUFFIXES, capacity=50)
    case.check()
    case.suffixes += 15  # a chunk more
    case.suffixes[3] = 0
    case.check()


def test_pools_by_head_strided_queries_and_double(backend):
    case = Case(*UNEVEN, UNEVEN_SUFFIXES)
    out, _ = case.run()
    by_head = {n: getattr(case, n).transpose(0, 1).contiguous().transpose(0, 1) for n in ("k", "v")}
    wide = case.q[:, :, None].expand(-1, -1, 3, -1).contiguous()
    again, _ = case.run(q=wide[:, :, 1], **by_head)
    torch.testing.assert_close(again, out, rtol=1e-6, atol=1e-6)
    if backend == "reference":
        double = Case(*UNEVEN, UNEVEN_SUFFIXES, dtype=torch.float64)
        double.check(tolerance=1e-12)
        low = Case(*UNEVEN, UNEVEN_SUFFIXES, dtype=torch.bfloat16)
        low.check(tolerance=2e-2)
        assert low.run()[0].dtype == torch.bfloat16


def test_an_empty_batch():
    plan = CascadePlan.build(
        torch.zeros(0, 2), node_slots=[], node_lengths=[], suffix_slots=torch.zeros(0, dtype=torch.int64),
        suffix_lengths=torch.zeros(0, dtype=torch.int32), suffix_capacity=4,
    )  # fmt: skip
    pool = torch.zeros(3, 1, 8)
    assert cascade_decode_attention(torch.zeros(0, 2, 8), pool, pool, plan, backend=Case.backend).shape == (
        0,
        2,
        8,
    )


# ------------------------------------------------------------------------------------------------------------- the plan


@outer
def test_the_work_list_reads_every_key_once_per_tile_of_queries():
    """Brute force: from the items, who reads which key; every (query row, key) pair of the tree exactly once."""
    for group, case in (
        (2, Case(*UNEVEN, UNEVEN_SUFFIXES, page=4)),
        (20, Case(*nested(2, 2, 3), [5] * 12, shuffle=True)),
    ):
        plan, seen = case.plan, set()
        for work in plan.work(group):
            for entry, begin, end, sequence, query, first_row, rows, _ in work.items.tolist():
                table, page = (
                    (plan.suffix_slots, plan.suffix_page)
                    if sequence >= 0
                    else (plan.node_slots, plan.node_page)
                )
                end = end if sequence < 0 else min(end, int(case.suffixes[sequence]))
                for row in range(first_row, min(first_row + work.rows, rows)):
                    who = int(plan.order[query + row // group])
                    for key in range(begin, end):
                        at = (
                            table.flatten()[entry + key // page] + key % page
                            if page
                            else table.flatten()[entry] + key
                        )
                        pair = who, row % group, int(at)
                        assert pair not in seen
                        seen.add(pair)
        want = {(s, g, int(x)) for s in range(len(case.paths)) for g in range(group) for x in case.keys_of(s)}
        assert seen == want


@outer
def test_parts_are_cut_by_the_length_of_their_segment_alone():
    def cuts(samples):
        plan = Case(*nested(2, 2, samples, (77, 40)), [30] * (4 * samples)).plan
        return [
            {tuple(i[:3]) for work in plan.work(1) for i in work.items.tolist() if i[3] < 0},
            plan.parts()[0].shape[1],
        ]

    assert cuts(1) == cuts(3) == cuts(40)


@outer
def test_bytes_read_and_bytes_that_are_unique():
    paths, lengths = nested(4, 16, 8, (1536, 300))
    case = Case(paths, lengths, [256] * 512, heads=1, kv_heads=1, dim=1, chunk=512)
    size = {"head_dim": 128, "itemsize": 2}
    token = 2 * 8 * 128 * 2
    keys, suffixes = 4 * 1536 + 64 * 300, 512 * 256
    few = case.plan.kv_bytes(query_heads=8, kv_heads=8, **size)
    assert few.unique == (keys + suffixes) * token
    assert few.unshared == 512 * (1536 + 300 + 256) * token
    assert few.read == (2 * 4 * 1536 + 64 * 300 + suffixes) * token  # 128 queries are two tiles of 64
    many = case.plan.kv_bytes(query_heads=32, kv_heads=8, **size)
    assert many.unique == few.unique
    assert many.read == (8 * 4 * 1536 + 64 * 300 + suffixes) * token  # 512 rows are eight tiles


@outer
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": [[0, 3]]}, r"paths\[0, 1\]=3; allowed: -1 <= node < 2"),
        ({"paths": [[-1, 1]]}, r"paths\[0\]=\[-1, 1\] has a hole"),
        ({"paths": [[0, 1], [1, 0]], "rows": 2}, "node 0 stands at two places"),
        ({"paths": [0, 1]}, r"paths has shape \[2\]; allowed: \[S, L\]"),
        ({"node_lengths": [0, 4]}, r"node_lengths\[0\]=0; allowed: 1 to"),
        ({"node_lengths": [4]}, r"node_lengths has shape \[1\], node_slots \[2\]"),
        ({"node_slots": [[0], [4]]}, "node_slots has shape .* with page_size=None"),
        ({"node_slots": [[0], [4]], "page_size": 2}, r"node_lengths\[0\]=4; allowed: 1 to 2"),
        ({"suffix_capacity": 0}, "suffix_capacity=0"),
        ({"suffix_lengths": torch.zeros(1)}, "suffix_lengths is torch.float32"),
        ({"suffix_slots": torch.zeros(2, dtype=torch.int64)}, "suffix_slots is .* 1 rows"),
        ({"suffix_slots": torch.zeros(1, 2, dtype=torch.int64), "page_size": 2, "node_lengths": [1, 1]}, "needs more than 2 pages of 2"),
    ],
)  # fmt: skip
def test_a_plan_that_makes_no_sense_is_refused(change, message):
    change = dict(change)
    rows = change.pop("rows", 1)
    arguments = {
        "paths": [[0, 1]], "node_slots": [0, 4], "node_lengths": [4, 4], "suffix_slots": torch.full((rows,), 8),
        "suffix_lengths": torch.ones(rows, dtype=torch.int32), "suffix_capacity": 5,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        CascadePlan.build(arguments.pop("paths"), **arguments)


@outer
def test_tensors_that_do_not_fit_the_plan_are_refused():
    case = Case([[0]], [4], [2], capacity=2)
    q, k, v = case.q, case.k, case.v
    for arguments, message in (
        ((q[:0], k, v), r"q has shape \[0, 4, 8\]; allowed: \[1, Hq, D\]"),
        ((q, k.double(), v), "k_pool has dtype float64"),
        ((q, k[:3], v[:3]), "k_pool has 3 slots; the plan's nodes read slot 3"),
        ((q[:, :3], k, v), "Hq a multiple of Hkv"),
        ((q, k, v[:5]), "equal pools"),
        ((q, torch.zeros(6, 2, 16)[:, :, ::2], v), "must lie side by side"),
    ):
        with pytest.raises(ValueError, match=message):
            cascade_decode_attention(*arguments, case.plan)
    with pytest.raises(ValueError, match="window=0; allowed: at least 1, or None"):
        cascade_decode_attention(q, k, v, case.plan, window=0)
    case.suffixes += 1
    with pytest.raises(
        ValueError, match="suffix_lengths run from 3 to 3; allowed: 0 to the plan's suffix_capacity=2"
    ):
        cascade_decode_attention(q, k, v, case.plan)
    case.suffixes -= 1
    case.plan.suffix_slots.add_(1)
    with pytest.raises(ValueError, match="the suffix of sequence 0 reads the slots 5 to 6; the pool has 6"):
        cascade_decode_attention(q, k, v, case.plan)
    case.plan.suffix_slots.sub_(1)
    with pytest.raises(RuntimeError, match="backend=triton cannot run"):
        cascade_decode_attention(q, k, v, case.plan, backend="triton")
    assert backends()["cascade_decode_attention"]["taken"] in ("reference", "cpu", "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("dim", "window"), [(64, None), (80, None), (96, None), (128, None), (256, None), (128, 650), (256, 650)]
)
def test_on_a_gpu_the_error_is_that_of_dense_attention_and_a_graph_replays(dim, window, dtype):
    case = Case(
        *nested(2, 3, 9, (700, 130)),
        [37] * 54,
        heads=8,
        kv_heads=2,
        dim=dim,
        capacity=600,
        chunk=512,
        dtype=dtype,
        window=window,
    )
    want = case.truth()[0]
    device = {n: getattr(case, n).cuda() for n in ("q", "k", "v")}
    lengths = case.suffixes.cuda()
    plan = CascadePlan.build(
        case.paths, node_slots=case.plan.node_slots[:, 0], node_lengths=case.lengths, suffix_slots=case.plan.suffix_slots[:, 0].cuda(),
        suffix_lengths=lengths, suffix_capacity=600,
    )  # fmt: skip

    def run():
        return cascade_decode_attention(*device.values(), plan, scale=0.4, window=window, backend="triton")

    out = run()
    bound = 1e-5 if dtype == torch.float32 else 2 * float((want - want.to(dtype).double()).abs().max()) + 1e-5
    assert float((out.cpu().double() - want).abs().max()) <= max(bound, 4e-3 * (dtype != torch.float32))
    assert torch.equal(out, run())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    lengths.fill_(530)  # a second chunk of every suffix
    graph.replay()
    assert torch.equal(captured, run())
    assert not torch.equal(captured, out)
