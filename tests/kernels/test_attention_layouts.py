"""Tree attention and cascade decoding, on every backend that runs here, compute from tensors of any layout what the reference computes from
contiguous copies of them: values and gradients, whichever of the tensors require a gradient.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fst_kernels import CascadePlan, TreeMask, cascade_decode_attention, tree_attention
from tests.kernels.layouts import (
    DIM,
    DTYPES,
    INTERPRETED,
    MORE,
    TOLERANCE,
    assert_layouts_do_not_matter,
    draws,
    floats,
    lay,
    on_each_backend,
    outer,
    results_and_gradients,
    skip_where_it_cannot_run,
)
from tests.kernels.test_tree_attention import random_forest


@on_each_backend("tree_attention")
@draws
@given(st.data())
def test_tree_attention(backend: str, data: st.DataObject) -> None:
    skip_where_it_cannot_run(backend)
    dtype = data.draw(st.sampled_from(DTYPES[backend]))
    batch, n, dim = (
        data.draw(st.sampled_from([0, 1, 2])),
        data.draw(st.sampled_from([0, 1, 2, 7, *([7] if INTERPRETED else [33, 33])])),
        data.draw(MORE),
    )
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 2)]))
    seed, run_ = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([0.5, 1.0, 1.0]))
    shapes = {"q": heads, "k": kv_heads, "v": kv_heads, "d_out": heads}
    tensors = {
        name: floats(batch, h, n, dim, dtype=dtype, seed=seed + h + i)
        for i, (name, h) in enumerate(shapes.items())
    }
    rows = data.draw(st.sampled_from([None, 1, batch])) if batch else None
    trees = [
        random_forest(seed + row, n, run_) if n else torch.empty(0, dtype=torch.int32)
        for row in range(rows or 1)
    ]
    tensors["subtree_end"] = trees[0] if rows is None else torch.stack(trees)
    tensors["depth"] = (
        TreeMask.from_subtree_end(tensors["subtree_end"]).depth.view(tensors["subtree_end"].shape).long()
    )
    window = data.draw(st.sampled_from([None, None, 1, 4]))

    def run(x: dict[str, Tensor], on: str) -> dict[str, Tensor | None]:
        out, lse = tree_attention(
            x["q"],
            x["k"],
            x["v"],
            x["subtree_end"],
            depth=x["depth"],
            window=window,
            return_lse=True,
            backend=on,
        )
        return {"out": out, "lse": lse}

    # A layout that repeats numbers along the tokens is another forest: the mask's own layouts are another test.
    assert_layouts_do_not_matter(data, backend, tensors, run, kept=("subtree_end", "depth"))


@on_each_backend("tree_attention")
@pytest.mark.parametrize("name", ["q", "k", "v", "d_out"])
def test_the_numbers_of_a_head_need_not_lie_side_by_side(backend: str, name: str) -> None:
    """One sequence and a tree of two long branches: their segments are read through views, not gathered first."""
    skip_where_it_cannot_run(backend)
    chain, branches = TreeMask.causal(20), TreeMask.shared_prefixes([(340, (310, 5))])
    for mask in (chain,) if INTERPRETED else (chain, branches):
        n = mask.subtree_end.shape[1]
        shapes = {"q": 4, "k": 2, "v": 2, "d_out": 4}
        tensors = {key: floats(1, h, n, 8, seed=i) for i, (key, h) in enumerate(shapes.items())}
        for layout, dim in (("stepped", 3), ("transposed", 2), ("expanded", 3), ("expanded", 2)):
            laid = tensors | {name: lay(tensors[name], layout, dim)}
            plain = {key: x.clone(memory_format=torch.contiguous_format) for key, x in laid.items()}

            def run(x: dict[str, Tensor], on: str, mask: TreeMask = mask) -> dict[str, Tensor | None]:
                return {"out": tree_attention(x["q"], x["k"], x["v"], mask, backend=on)}

            got, want = (
                results_and_gradients(x, {"q", "k", "v"}, run, on)
                for x, on in ((laid, backend), (plain, "reference"))
            )
            for part, expected in zip(got, want, strict=True):
                for key, x in expected.items():
                    torch.testing.assert_close(
                        part[key], x, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
                    )


@on_each_backend("tree_attention")
@pytest.mark.parametrize("layout", ["stepped", "transposed", "offset"])
@pytest.mark.parametrize("dim", [0, 1])
def test_masks_of_every_layout(backend: str, layout: str, dim: int) -> None:
    skip_where_it_cannot_run(backend)
    n = 5 if INTERPRETED else 21
    # As many rows as tokens: strides alone tell them apart.
    ends = torch.stack([random_forest(seed, n, 0.5) for seed in range(n)])
    depth = TreeMask.from_subtree_end(ends).depth
    q, k, v = (floats(n, 2, n, 4, seed=i) for i in range(3))
    want = tree_attention(q, k, v, ends, backend="reference")
    for given_ in (lay(ends, layout, dim), TreeMask.from_subtree_end(lay(ends, layout, dim))):
        got = tree_attention(q, k, v, given_, depth=lay(depth, layout, dim), backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@on_each_backend("cascade_decode_attention")
@draws
@given(st.data())
def test_cascade_decode_attention(backend: str, data: st.DataObject) -> None:
    skip_where_it_cannot_run(backend)
    dtype = data.draw(st.sampled_from(DTYPES[backend]))
    dim, page = data.draw(MORE), data.draw(st.sampled_from([None, 4]))
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 2)]))
    paths, lengths, suffixes = [[0, 1], [0, 1], [0, 2], [0, -1]], [19, 7, 5], [3, 0, 8, 1]
    if data.draw(st.booleans()):
        paths, suffixes = paths[:1], suffixes[:1]
    sequences, slots = len(paths), 19 + 7 + 5 + 8 * 4 + 12
    if page is None:
        starts = torch.tensor([0, 19, 26, *range(31, 31 + 8 * sequences, 8)])
    else:
        starts = (
            torch.randperm(slots // page, generator=torch.Generator().manual_seed(1))[
                : 5 + 2 + 2 + 2 * sequences
            ]
            * page
        )
        table = torch.full((3 + sequences, 5), -1)
        for row, (first, count) in enumerate(
            [(0, 5), (5, 2), (7, 2), *((9 + 2 * i, 2) for i in range(sequences))]
        ):
            table[row, :count] = starts[first : first + count]
        starts = table
    tensors = {
        "q": floats(sequences, heads, dim, dtype=dtype, seed=1), "k": floats(slots, kv_heads, dim, dtype=dtype, seed=2),
        "v": floats(slots, kv_heads, dim, dtype=dtype, seed=3), "paths": torch.tensor(paths), "node_slots": starts[:3].clone(),
        "node_lengths": torch.tensor(lengths),
    }  # fmt: skip
    laid = {
        name: lay(
            x,
            data.draw(st.sampled_from(["contiguous", "stepped", "transposed", "offset"])),
            data.draw(DIM),
        )
        for name, x in tensors.items()
    }
    for name in "kv":
        if laid[name].stride(2) != 1:  # refused: see below
            laid[name] = laid[name].contiguous()
    if data.draw(st.booleans()):
        laid["q"] = lay(laid["q"], "expanded", data.draw(st.integers(0, 2)))
    window = data.draw(st.sampled_from([None, 1, 10]))
    results = []
    for given_, on in ((laid, backend), ({n: x.contiguous() for n, x in laid.items()}, "reference")):
        plan = CascadePlan.build(
            given_["paths"], node_slots=given_["node_slots"], node_lengths=given_["node_lengths"],
            suffix_slots=starts[3:].contiguous(), suffix_lengths=torch.tensor(suffixes, dtype=torch.int32), suffix_capacity=8,
            page_size=page, chunk=16,
        )  # fmt: skip
        q, k, v = (given_[name].requires_grad_(data.draw(st.booleans())) for name in ("q", "k", "v"))
        results.append(cascade_decode_attention(q, k, v, plan, window=window, return_lse=True, backend=on))
    assert not any(x.requires_grad for x in results[0])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=TOLERANCE[want.dtype], atol=TOLERANCE[want.dtype])


@outer
def test_a_pool_whose_keys_are_torn_apart_is_refused_and_so_are_suffixes_that_cannot_be_kept() -> None:
    q, pool, lengths = floats(1, 2, 4, seed=1), floats(9, 1, 4, seed=2), torch.ones(1, dtype=torch.int32)
    arguments = {"node_slots": [0], "node_lengths": [5], "suffix_capacity": 2}
    plan = CascadePlan.build([[0]], suffix_slots=torch.tensor([7]), suffix_lengths=lengths, **arguments)
    for pools in ((lay(pool, "stepped", 2), pool), (pool, lay(pool, "transposed", 0))):
        with pytest.raises(
            ValueError, match=r"_pool has strides \[.*\]; the D numbers of a key must lie side by side"
        ):
            cascade_decode_attention(q, *pools, plan)
    two = {"node_slots": [0], "node_lengths": [5], "suffix_capacity": 2, "suffix_lengths": lengths.repeat(2)}
    with pytest.raises(ValueError, match=r"suffix_slots is .*; allowed: contiguous"):
        CascadePlan.build([[0], [0]], **two | {"suffix_slots": lay(torch.tensor([5, 7]), "stepped", 0)})
    with pytest.raises(ValueError, match=r"suffix_lengths is .*; allowed: contiguous"):
        CascadePlan.build(
            [[0], [0]], **two | {"suffix_slots": torch.tensor([5, 7]), "suffix_lengths": lengths.expand(2)}
        )
