"""The Triton kernels of tree attention in Triton's interpreter, float32, tiny tiles, against dense attention in float64; and compiled ahead
of time for sm_80, sm_90 and sm_100.

The interpreter is chosen when Triton is imported, for the whole process: without TRITON_INTERPRET=1 this file runs itself once more with
it. What the interpreter cannot show (bfloat16, races, speed) is left to the tests marked gpu.
"""

from __future__ import annotations

import importlib
import importlib.util
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
from torch import Tensor

pytest.importorskip("triton")

from fst_kernels.tree_attention import TreeMask, blocks, tree_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
F64, F32 = torch.float64, torch.float32
BLOCK = 16


def interpreted(test: Any) -> Any:
    """A claim of the inner process; not collected in the outer one."""
    return test if INTERPRETED else None


def compiled(test: Any) -> Any:
    return None if INTERPRETED else test


def neighbour(name: str) -> Any:
    """A test module of this folder, for its oracle and its forests."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(name + ".py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


trees = neighbour("test_tree_attention")
triton_backend = importlib.import_module("fst_kernels.tree_attention.triton")
Tile, Tiling = triton_backend.Tile, triton_backend.Tiling


def tiling(
    forward: tuple[int, int] = (16, 16),
    dq: tuple[int, int] = (16, 16),
    dkdv: tuple[int, int] = (16, 16),
    tma: bool = False,
    apart: bool = False,
) -> Tiling:
    return Tiling(*(Tile(*pair, 4, 1) for pair in (forward, dq, dkdv)), tma, apart)


def run(
    subtree_end: Tensor,
    inputs: list[Tensor],
    dout: Tensor | None = None,
    *,
    scale: float = 0.5,
    tiles: Tiling | None = None,
    target: int = 3,
    window: int | None = None,
) -> list[Tensor]:
    """out, lse, and with dout also dq, dk, dv."""
    mask, tiles = TreeMask.from_subtree_end(subtree_end), tiles or tiling()
    out, total = triton_backend.forward(*inputs, mask, scale, window, tiles)
    lse = triton_backend.natural(total)
    if dout is None:
        return [out, lse]
    grads = triton_backend.backward(dout, *inputs, out, total, mask, scale, window, tiles, target)
    return [out, lse, *grads]


def assert_like_dense(
    subtree_end: Tensor,
    *,
    scale: float = 0.5,
    batch: int = 1,
    tiles: Tiling | None = None,
    target: int = 3,
    window: int | None = None,
    **sizes: int,
) -> None:
    rows = subtree_end if subtree_end.ndim == 2 else subtree_end.expand(batch, -1)
    sizes = {"heads": 2, "kv_heads": 1, "dim": 8, **sizes}
    inputs = [x.detach() for x in trees.qkv(len(rows), rows.shape[1], F32, **sizes)]
    exact = [x.to(F64).requires_grad_() for x in inputs]
    dout = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    got = run(subtree_end, inputs, dout.float(), scale=scale, tiles=tiles, target=target, window=window)
    expected, expected_lse = trees.dense_attention(*exact, rows, scale, window)
    expected.backward(dout)
    want = [expected.detach(), expected_lse.detach(), *(x.grad for x in exact)]
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert name == "lse" or a.any()
        torch.testing.assert_close(a.to(F64), b, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@compiled
def test_in_the_interpreter() -> None:
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


@compiled
def test_it_compiles_for_hopper_with_tensor_cores_and_tma_and_without_spills() -> None:
    """One head size and architecture; scripts/aot_tree_attention.py without arguments does all of them, in minutes."""
    script = Path(__file__).parents[2] / "scripts" / "aot_tree_attention.py"
    import triton

    old = triton.__version__.startswith(
        "3.6."
    )  # it needs a few registers more for dK and dV (docs/LOG.md, 2026-11-27)
    spill = 16 if old else 0  # bytes
    command = [sys.executable, str(script), "--arch", "90", "--dim", "64", "--spill", str(spill)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sm_90 bf16 D=64") == 6 + 7  # without a window, with one


# ------------------------------------------------------------------------------------------- attention, interpreted

SMALL = {
    "star": trees.from_parents([-1] + [0] * 50),
    "caterpillar of depth 25": trees.from_parents([-1] + [x for i in range(25) for x in (2 * i, 2 * i)]),
    "hot prefix": trees.nested([1, 16], [20, 2]),
    "padding tail": trees.side_by_side(trees.nested([1, 3], [16, 6]), trees.from_parents([-1] * 9)),
    **{name: trees.SHAPES[name] for name in ("one token", "only roots of one token", "two trees")},
    "contexts, problems, samples": trees.nested([2, 2, 3], [10, 3, 4]),
    "a chain of one block": trees.from_parents(list(range(-1, 15))),
    "a chain of one block less one": trees.from_parents(list(range(-1, 14))),
    "a chain of two blocks and one": trees.from_parents(list(range(-1, 32))),
}


@interpreted
@pytest.mark.parametrize("name", SMALL)
def test_every_shape_of_tree_matches_the_dense_mask(name: str) -> None:
    assert_like_dense(SMALL[name])


@interpreted
@pytest.mark.parametrize("offset", range(BLOCK))
def test_a_branch_and_a_root_at_every_residue_of_the_block(offset: int) -> None:
    """A path of `offset` + 1 tokens that forks twice; behind it a second tree. Includes the last few of a block."""
    fork = offset
    first = trees.from_parents([*range(-1, fork), fork, fork + 1, fork + 2, fork])
    assert_like_dense(trees.side_by_side(first, trees.from_parents([-1, 0, 0, *[2] * (16 - offset)])))


@interpreted
@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.integers(1, 60),
    st.sampled_from([0.2, 0.7, 0.95]),
    st.sampled_from([1, 4, 50]),
    trees.WINDOWS,
)
def test_random_forests_match_the_dense_mask(
    seed: int, n: int, run_on: float, target: int, window: int | None
) -> None:
    assert_like_dense(trees.random_forest(seed, n, run_on), target=target, window=window)


@interpreted
@pytest.mark.parametrize("window", [1, 5, 17, 33])
def test_a_sliding_window_by_depth_matches_the_dense_mask(window: int) -> None:
    """A chain of several blocks, a prefix out of reach of the deep leaves, a shallow sibling behind a deep one."""
    tree = trees.side_by_side(trees.nested([1, 3], [40, 20]), trees.from_parents([*range(-1, 30), 2, 31]))
    assert_like_dense(tree, window=window, target=5)
    assert_like_dense(tree, window=window, tiles=tiling((32, 16), (16, 32), (16, 32), tma=True, apart=True))


@interpreted
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors, dk and dv apart"])
@pytest.mark.parametrize(
    "sizes",
    [((32, 16), (16, 32), (16, 32)), ((16, 32), (32, 16), (32, 16))],
    ids=["wide queries", "wide keys"],
)
def test_tiles_of_unequal_sides(sizes: tuple[tuple[int, int], ...], tma: bool) -> None:
    assert_like_dense(trees.random_forest(3, 70, 0.9), tiles=tiling(*sizes, tma, apart=tma))


@interpreted
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(1, 1, 80), (4, 2, 96), (3, 1, 64), (2, 2, 128), (1, 1, 256)]
)
def test_head_groups_and_head_sizes(heads: int, kv_heads: int, dim: int) -> None:
    assert_like_dense(
        trees.random_forest(4, 40, 0.8), scale=dim**-0.5, heads=heads, kv_heads=kv_heads, dim=dim
    )


@interpreted
def test_rows_of_a_batch_may_hold_one_forest_or_several() -> None:
    assert_like_dense(trees.random_forest(1, 40, 0.8), batch=2)
    assert_like_dense(
        torch.stack([trees.random_forest(1, 40, 0.8), trees.from_parents(list(range(-1, 39)))]), target=4
    )


@interpreted
def test_inputs_that_are_views_of_other_layouts_are_read_right() -> None:
    tree = trees.random_forest(6, 30, 0.8)
    inputs = [x.detach() for x in trees.qkv(1, 30, F32, heads=2, kv_heads=2, dim=8)]
    dout = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2))
    plain = run(tree, inputs, dout)
    views = [
        inputs[0].transpose(1, 2).contiguous().transpose(1, 2),  # as projections leave it
        inputs[1].mT.contiguous().mT,  # the head size is not the last stride
        torch.cat([inputs[2], inputs[2]], -1)[..., :8],
    ]
    for a, b in zip(plain, run(tree, views, dout.mT.contiguous().mT), strict=True):
        assert torch.equal(a, b)


@interpreted
def test_identical_responses_get_identical_outputs() -> None:
    tree = trees.nested([1, 2], [16, 16])
    inputs = [x.detach().clone() for x in trees.qkv(1, 48, F32, heads=2, kv_heads=1)]
    for x in inputs:
        x[:, :, 32:] = x[:, :, 16:32]
    out = run(tree, inputs)[0]
    torch.testing.assert_close(out[:, :, 32:], out[:, :, 16:32], rtol=0, atol=1e-6)


@interpreted
@pytest.mark.parametrize("window", [None, 20])
def test_only_blocks_with_a_query_that_is_read_are_computed(window: int | None) -> None:
    """A prompt of 96 tokens whose last 20 are new, and one of 40 of which all are: as a second window of a prefill."""
    ends = torch.cat([torch.full((96,), 96), torch.full((40,), 136)]).int()
    read = torch.arange(136) >= 76
    whole, some = (TreeMask.from_subtree_end(ends, read=r) for r in (None, read))
    q, k, v = (x.detach() for x in trees.qkv(1, 136, F32))
    tiles = tiling()
    all_out, _ = triton_backend.forward(q, k, v, whole, 0.5, window, tiles)
    out, _ = triton_backend.forward(q, k, v, some, 0.5, window, tiles)
    assert torch.equal(out[:, :, read], all_out[:, :, read])
    assert not out[:, :, :64].any(), "the blocks 0 to 3 have no query that is read"
    counts = [triton_backend.lists(mask, tiles.forward, window).counts.sum((0, 1)) for mask in (whole, some)]
    assert torch.equal(counts[1], torch.where(torch.arange(9) >= 4, counts[0], 0))
    assert counts[0][:4].all()


@interpreted
def test_a_mask_with_queries_that_are_not_read_has_no_gradient() -> None:
    mask = TreeMask.from_subtree_end(torch.full((20,), 20).int(), read=torch.arange(20) > 3)
    q, k, v = trees.qkv(1, 20, F32)
    out = tree_attention(q, k, v, mask)
    with pytest.raises(ValueError, match="has no gradient"):
        out.sum().backward()


@interpreted
def test_a_query_head_reads_the_key_head_of_its_group() -> None:
    tree = trees.random_forest(3, 20, 0.8)
    q, k, v = (x.detach() for x in trees.qkv(1, 20, F32, heads=4, kv_heads=2))
    out, turned = run(tree, [q, k, v])[0], run(tree, [q, k.roll(1, 1), v.roll(1, 1)])[0]
    for head in range(4):
        alone = run(tree, [q[:, [head]], k[:, [head // 2]], v[:, [head // 2]]])[0]
        torch.testing.assert_close(out[:, [head]], alone)
        assert (turned[:, head] - out[:, head]).abs().max() > 0.1


@interpreted
def test_lists_of_a_star_of_512_leaves_are_exact() -> None:
    tree = trees.from_parents([-1] + [0] * 512)
    assert_lists_are_exact(tree, 64, 64)
    assert_units_are_exact(tree, 64, 64, 4)


@interpreted
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_scores_of_ten_thousand_stay_finite_and_right(size: float) -> None:
    tree = trees.nested([2, 3], [11, 5])
    q, k, v = (x.detach() for x in trees.qkv(1, len(tree), F32, heads=2, kv_heads=1))
    got = run(tree, [q * size, k, v], torch.ones_like(q), scale=1.0)
    expected, expected_lse = trees.dense_attention(*(x.to(F64) for x in (q * size, k, v)), tree[None], 1.0)
    torch.testing.assert_close(got[0].to(F64), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got[1].to(F64), expected_lse, rtol=1e-6, atol=1e-2)
    assert all(bool(torch.isfinite(x).all()) for x in got)


@interpreted
@pytest.mark.parametrize("window", [None, 8])
def test_editing_one_branch_changes_no_other_branch_by_a_bit(window: int | None) -> None:
    tree = trees.nested([2, 3], [9, 6])  # branch b of tree 0 is 9 + 6 b .. 15 + 6 b
    edited = slice(15, 21)
    elsewhere = torch.ones(len(tree), dtype=torch.bool)
    elsewhere[edited] = False
    out_of_path = elsewhere.clone()
    out_of_path[:9] = False  # the root's own keys do see gradients from the edited branch
    inputs = [x.detach() for x in trees.qkv(1, len(tree), F32, heads=2, kv_heads=1)]
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, :, edited] += 1.5
    dout = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    before, after = (run(tree, x, dout, window=window) for x in (inputs, changed))
    for n, (x, y) in enumerate(zip(before, after, strict=True)):
        rows = elsewhere if n < 3 else out_of_path  # out, lse, dq | dk, dv
        assert torch.equal(x[:, :, rows], y[:, :, rows])
        assert not torch.equal(x[:, :, edited], y[:, :, edited])


@interpreted
def test_twice_the_same_is_bitwise_the_same_and_cutting_ranges_changes_sums_only_by_rounding() -> None:
    tree = trees.nested([1, 20], [20, 2])
    inputs = [x.detach() for x in trees.qkv(1, len(tree), F32, heads=2, kv_heads=1)]
    dout = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    first, again, whole = (run(tree, inputs, dout, target=t) for t in (8, 8, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], whole[:3], strict=True))
    assert not torch.equal(first[3], whole[3])
    torch.testing.assert_close(first[3:], whole[3:])


@interpreted
@pytest.mark.parametrize("error", [-1, 1])
def test_subtree_end_off_by_one_changes_one_query_and_its_gradient(error: int) -> None:
    tree = trees.from_parents([-1, *range(9), 9, 10, 11, 11, 11, 9, 9])
    wrong = tree.clone()
    wrong[10:12] += error
    inputs = [x.detach() for x in trees.qkv(1, len(tree), F32, heads=2, kv_heads=1)]
    right, bad = (run(t, inputs, torch.ones_like(inputs[0])) for t in (tree, wrong))
    for n in (0, 2):
        difference = (right[n] - bad[n]).abs().amax(dim=(0, 1, 3))
        assert (difference > 1e-4).nonzero().flatten().tolist() == [14 if error < 0 else 15]


@interpreted
def test_the_public_function_takes_the_backend_when_named() -> None:
    tree = trees.random_forest(7, 20, 0.8)
    for window in (None, 4):
        results = []
        for backend in ("triton", "reference"):
            q, k, v = trees.qkv(2, 20, F32, heads=2, kv_heads=1)
            out, lse = tree_attention(q, k, v, tree, backend=backend, return_lse=True, window=window)
            out.square().sum().backward()
            results.append((out.detach(), lse, q.grad, k.grad, v.grad))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="head size 257"):
        tree_attention(
            *(torch.zeros(1, 1, 2, 257) for _ in range(3)), tree[:2].clamp(max=2), backend="triton"
        )


@interpreted
def test_no_token_and_no_head_give_empty_results() -> None:
    empty = torch.zeros(1, 2, 0, 16)
    out, lse = tree_attention(
        empty, empty, empty, torch.zeros(0, dtype=torch.int32), backend="triton", return_lse=True
    )
    assert (out.shape, lse.shape) == ((1, 2, 0, 16), (1, 2, 0))


# ---------------------------------------------------------------- what the kernels know of a forest: any tile size, plain arrays


def assert_lists_are_exact(tree: Tensor, queries: int, keys: int, window: int | None = None) -> None:
    seen, mask = trees.visible_pairs(tree, window).numpy(), TreeMask.from_subtree_end(tree)
    known = triton_backend.lists(mask, Tile(queries, keys, 4, 1), window)
    counts = known.counts[:, 0].numpy()
    assert counts.sum(0)[known.order[0].numpy()].tolist() == sorted(counts.sum(0).tolist(), reverse=True)
    for b, row in enumerate(known.lists[0].numpy()):
        pairs = seen[b * queries : (b + 1) * queries]
        some, every = (
            {c for c in range(-(-len(tree) // keys)) if test(pairs[:, c * keys : (c + 1) * keys])}
            for test in (np.any, np.all)
        )
        every -= {len(tree) // keys} if len(tree) % keys else set()  # a block that N ends in is masked
        free, masked = counts[:, b]
        assert sorted(row[:free].tolist()) == sorted(every)
        assert sorted(row[len(row) - masked :].tolist()) == sorted(some - every)


def assert_units_are_exact(tree: Tensor, keys: int, queries: int, target: int) -> None:
    """Every (query, block of keys) with a visible pair in exactly one unit; bounds on units, cuts and slots kept; longest first."""
    seen, mask = trees.visible_pairs(tree).numpy(), TreeMask.from_subtree_end(tree)
    work = blocks.units(mask, keys, queries, target)
    done = np.zeros((len(tree), -(-len(tree) // keys)), int)
    slots: dict[int, list[int]] = {}
    lengths = []
    for block, low, high, slot in work.units[0].tolist():
        if block >= 0:
            done[low:high, block] += 1
            lengths.append(high - low)
            assert (low - block * keys) % queries == 0
            if slot >= 0:
                slots.setdefault(block, []).append(slot)
    wanted = [seen[:, b * keys : (b + 1) * keys].any(1) for b in range(done.shape[1])]
    assert (done == np.stack(wanted, 1)).all()
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) <= done.shape[1] + target
    split = {
        block: list(range(first, first + parts))
        for block, first, parts in work.splits[0].tolist()
        if block >= 0
    }
    assert split == {block: sorted(own) for block, own in slots.items()}
    used = [s for own in slots.values() for s in own]
    assert len(set(used)) == len(used)
    assert all(s < work.slots for s in used)
    assert max(lengths) <= -(-int(done.sum()) // target) + queries


def assert_tile_lists_are_exact(tree: Tensor, keys: int, queries: int, target: int, window: int) -> None:
    """Every tile with a visible pair in exactly one list, once, mask-free exactly where all pairs are visible; longest list first."""
    seen, mask = trees.visible_pairs(tree, window).numpy(), TreeMask.from_subtree_end(tree)
    near = triton_backend.tile_lists(mask, Tile(queries, keys, 4, 1), target, window)
    found: dict[int, list[tuple[int, bool]]] = {b: [] for b in range(-(-len(tree) // keys))}
    lengths = []
    for unit, (left, right), (free, masked) in zip(
        near.units[0].tolist(), near.bounds[:, 0].T.tolist(), near.counts[:, 0].T.tolist(), strict=True
    ):
        own = near.tiles[0].tolist()
        tiles = [(t, True) for t in own[left : left + free]] + [
            (t, False) for t in own[right - masked : right]
        ]
        assert all(unit[1] <= t * queries < unit[2] for t, _ in tiles)
        lengths.append(len(tiles))
        if unit[0] >= 0:
            found[unit[0]] += tiles
    assert lengths == sorted(lengths, reverse=True)
    for b, tiles in found.items():
        keys_seen = seen[:, b * keys : (b + 1) * keys]
        for t in range(-(-len(tree) // queries)):
            pairs = keys_seen[t * queries : (t + 1) * queries]
            whole = pairs.shape == (queries, keys) and bool(pairs.all())
            assert tiles.count((t, True)) == whole
            assert tiles.count((t, False)) == (bool(pairs.any()) and not whole)


@interpreted
@pytest.mark.parametrize("offset", range(128))
def test_lists_and_units_for_a_branch_at_every_residue_of_128(offset: int) -> None:
    """A path forks at the given offset in its second block, then again; a second tree begins right behind it."""
    fork = 128 + offset
    first = trees.from_parents(
        [*range(-1, fork), *range(fork, fork + 70), fork, *range(fork + 71, fork + 100)]
    )
    tree = trees.side_by_side(first, trees.from_parents([-1, 0, 0, 0, 3]))
    assert_lists_are_exact(tree, 128, 64)
    assert_units_are_exact(tree, 128, 64, 4)


@interpreted
@pytest.mark.parametrize("tile", [(128, 64), (64, 128), (64, 64)])
def test_lists_and_units_of_a_branch_at_offsets_57_to_63_of_64(tile: tuple[int, int]) -> None:
    for offset in range(57, 64):
        tree = trees.from_parents(
            [*range(-1, offset), *range(offset, offset + 90), offset, *range(offset + 91, offset + 150)]
        )
        assert_lists_are_exact(tree, *tile)
        assert_units_are_exact(tree, *tile, 5)


@interpreted
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.integers(1, 400),
    st.sampled_from([0.1, 0.7, 0.97]),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([16, 32, 64]),
    st.integers(1, 40),
)
def test_lists_and_units_of_random_forests(
    seed: int, n: int, run_on: float, a: int, b: int, target: int
) -> None:
    tree = trees.random_forest(seed, n, run_on)
    assert_lists_are_exact(tree, a, b)
    assert_units_are_exact(tree, a, b, target)


@interpreted
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.integers(1, 150),
    st.sampled_from([0.7, 0.97]),
    st.sampled_from([16, 32]),
    st.sampled_from([16, 32]),
    st.integers(1, 20),
    st.sampled_from([1, 10, 40]),
)
def test_lists_of_random_forests_under_a_window(
    seed: int, n: int, run_on: float, a: int, b: int, target: int, window: int
) -> None:
    tree = trees.random_forest(seed, n, run_on)
    assert_lists_are_exact(tree, a, b, window)
    assert_tile_lists_are_exact(tree, max(a, b), min(a, b), target, window)


@interpreted
def test_lists_are_found_in_more_than_one_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "SCAN", 4)
    tree = trees.random_forest(5, 300, 0.95)
    assert_lists_are_exact(tree, 16, 16)
    assert_lists_are_exact(tree, 16, 16, 30)
    assert_tile_lists_are_exact(tree, 16, 16, 3, 30)


def test_rows_of_lists_are_as_wide_as_the_longest_path_not_as_the_forest() -> None:
    tree = trees.nested([40, 4], [30, 30])  # 6000 tokens, 60 deep
    mask = TreeMask.from_subtree_end(tree)
    assert blocks.list_width(mask, 16, 16) <= 9
    two = TreeMask.from_subtree_end(torch.stack([tree, tree]))
    assert blocks.list_width(two, 16, 16) == blocks.list_width(mask, 16, 16)


def test_a_mask_is_analysed_once() -> None:
    mask = TreeMask.from_subtree_end(trees.random_forest(5, 100, 0.9))
    assert blocks.units(mask, 16, 16, 4) is blocks.units(mask, 16, 16, 4)
    assert blocks.key_blocks(mask, 16) is blocks.key_blocks(mask, 16)
    assert blocks.units(mask, 16, 16, 4) is not blocks.units(mask, 16, 16, 5)


# ------------------------------------------------------------------------------------------- on a GPU: what is interpreted nowhere


def gpu_forest() -> Tensor:
    """About 1900 tokens: branches at any offset, a hot prefix, a padding tail."""
    parts = [
        trees.random_forest(11, 700, 0.97),
        trees.nested([1, 12], [300, 70]),
        trees.from_parents([-1] * 30),
    ]
    return trees.side_by_side(trees.side_by_side(*parts[:2]), parts[2]).cuda()


def on_gpu(
    inputs: list[Tensor], tree: Tensor, dout: Tensor, backend: str, window: int | None = None
) -> list[Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs)
    out, lse = tree_attention(q, k, v, tree, return_lse=True, backend=backend, window=window)
    out.backward(dout)
    return [out.detach(), lse, q.grad, k.grad, v.grad]  # type: ignore[list-item]


@compiled
@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32])
def test_on_a_gpu_it_is_as_close_as_dense_attention_of_the_same_type(
    dim: int, dtype: torch.dtype, window: int | None
) -> None:
    tree = gpu_forest()
    inputs = [x.detach().cuda() for x in trees.qkv(1, len(tree), dtype, heads=4, kv_heads=2, dim=dim)]
    dout = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    got = on_gpu(inputs, tree, dout, "triton", window)
    exact = on_gpu([x.to(F64) for x in inputs], tree, dout.to(F64), "reference", window)
    seen = trees.visible_pairs(tree.cpu(), window).cuda()
    plain = [x.clone().requires_grad_() for x in inputs]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        rough = torch.nn.functional.scaled_dot_product_attention(*plain, attn_mask=seen, enable_gqa=True)
    rough.backward(dout)
    torch.testing.assert_close(got[1], exact[1], rtol=1e-3, atol=1e-3)
    yardstick = [rough.detach(), *(x.grad for x in plain)]
    for name, x, y, z in zip(
        ("out", "dq", "dk", "dv"), (got[0], *got[2:]), yardstick, (exact[0], *exact[2:]), strict=True
    ):
        assert x.any()
        assert (x - z).norm() <= 2 * (y - z).norm() + 1e-5 * z.norm(), name


@compiled
@pytest.mark.gpu
def test_on_a_gpu_it_is_bitwise_the_same_twice_and_branches_do_not_touch() -> None:
    tree = gpu_forest()
    inputs = [
        x.detach().cuda() for x in trees.qkv(1, len(tree), torch.bfloat16, heads=8, kv_heads=2, dim=128)
    ]
    dout = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()
    changed = [x.clone() for x in inputs]
    edited = slice(1000 + 2 * 70, 1000 + 3 * 70)  # one leaf below the hot prefix 700..999
    for x in changed:
        x[:, :, edited] += 1
    first, again, after = (on_gpu(x, tree, dout, "triton") for x in (inputs, inputs, changed))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    elsewhere = torch.ones(len(tree), dtype=torch.bool)
    elsewhere[edited] = False
    off_path = elsewhere.clone()
    off_path[700:1000] = False
    for n, (a, b) in enumerate(zip(first, after, strict=True)):
        rows = (elsewhere if n < 3 else off_path).cuda()
        assert torch.equal(a[:, :, rows], b[:, :, rows])


@compiled
@pytest.mark.gpu
def test_on_a_gpu_a_step_waits_for_nothing() -> None:
    """From a forest on the host to the gradients without a single synchronisation: mask, lists, units and launches."""
    tree = gpu_forest()
    inputs = [x.detach().cuda() for x in trees.qkv(1, len(tree), torch.bfloat16, heads=4, kv_heads=2, dim=64)]
    q, k, v = (x.requires_grad_() for x in inputs)
    host = tree.cpu()

    def step() -> None:
        mask = TreeMask.from_subtree_end(host, device="cuda")
        for window in (None, 100):
            tree_attention(q, k, v, mask, backend="triton", window=window).sum().backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
