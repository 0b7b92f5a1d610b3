"""TreeMask: what it is built from, what is refused, and what is computed once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fst_kernels.tree_attention import TreeMask, tree_attention
from fst_kernels.tree_attention import mask as mask_module
from tests.kernels.test_tree_attention import (
    END,
    F32,
    few,
    from_parents,
    qkv,
    random_forest,
    visible_pairs,
)


def test_a_causal_mask_is_ordinary_causal_attention() -> None:
    q, k, v = (x.detach() for x in qkv(1, 20, F32))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(tree_attention(q, k, v, TreeMask.causal(20)), expected, rtol=0, atol=1e-5)


def test_packed_documents_do_not_see_each_other() -> None:
    lengths = [3, 1, 9]
    q, k, v = (x.detach() for x in qkv(1, 13, F32))
    out = tree_attention(q, k, v, TreeMask.documents(lengths))
    each = [
        torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)
        for a, b, c in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(each, 2), rtol=0, atol=1e-5)


def test_a_shared_prefix_is_seen_by_each_suffix_and_suffixes_do_not_see_each_other() -> None:
    mask = TreeMask.shared_prefixes([(4, [2, 3]), (2, []), (0, [1])])
    parents = [-1, 0, 1, 2, 3, 4, 3, 6, 7, -1, 9, -1]
    assert torch.equal(mask.subtree_end[0], from_parents(parents))
    assert mask.depth[0].tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 0, 1, 0]
    with pytest.raises(ValueError, match=r"lengths 4 and \[-1\]; none may be negative"):
        TreeMask.shared_prefixes([(4, [-1])])


@few
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([0.2, 0.9]))
def test_depth_follows_from_subtree_end_and_one_that_differs_is_refused(
    seed: int, n: int, run: float
) -> None:
    trees = torch.stack([random_forest(seed, n, run), random_forest(seed + 1, n, run)])
    depth = visible_pairs(trees).sum(-1) - 1
    mask = TreeMask.from_subtree_end(trees, depth=depth)
    assert torch.equal(mask.depth, depth.int())
    assert torch.equal(mask_module._depth_on_device(trees), depth.int())
    wrong = depth.clone()
    wrong[1, n - 1] += 1
    with pytest.raises(ValueError, match=rf"depth\[{n - 1}\] of row 1 is {int(wrong[1, -1])}, but"):
        TreeMask.from_subtree_end(trees, depth=wrong)
    q, k, v = (x.detach() for x in qkv(2, n, F32, dim=2))
    for given_ in (trees, mask):
        tree_attention(q, k, v, given_, depth=depth)
        with pytest.raises(ValueError, match="of row 1 is"):
            tree_attention(q, k, v, given_, depth=wrong)


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (torch.zeros(3), "depth is torch.float32"),
        ([0, 1, 2], "depth is list"),
        (torch.arange(2), r"depth has shape \[2\] and subtree_end \[1, 3\]"),
    ],
)
def test_a_malformed_depth_is_refused_by_name(depth: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeMask.from_subtree_end(END, depth=depth)  # type: ignore[arg-type]


def test_a_mask_is_a_copy_and_a_write_to_it_is_noticed() -> None:
    tree = from_parents([-1, 0, 0])
    mask = TreeMask.from_subtree_end(tree)
    q, k, v = (x.detach() for x in qkv(1, 3, F32))
    before = tree_attention(q, k, v, mask)
    tree[1] = 3
    assert torch.equal(tree_attention(q, k, v, mask), before)
    mask.subtree_end[0, 1] = 3
    assert torch.equal(tree_attention(q, k, v, mask), tree_attention(q, k, v, tree))


def test_layers_that_share_a_mask_share_its_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, calls = random_forest(1, 50, 0.8), []
    analyse = mask_module._segments
    monkeypatch.setattr(mask_module, "_segments", lambda x: calls.append(1) or analyse(x))
    mask = TreeMask.from_subtree_end(tree)
    for _ in range(3):
        tree_attention(*qkv(1, 50, F32), mask).sum().backward()
    assert len(calls) == 1
    tree_attention(*qkv(1, 50, F32), tree).sum().backward()
    assert len(calls) == 2


def test_a_device_tensor_is_looked_at_only_when_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU tensor stands for the device's: look_at_values says which are looked at."""
    tree = random_forest(1, 50, 0.8)
    q, k, v = (x.detach() for x in qkv(1, 50, F32))
    with monkeypatch.context() as blind:
        blind.setattr(mask_module, "look_at_values", lambda device: False)
        unseen = TreeMask.from_subtree_end(tree, depth=torch.zeros(50, dtype=torch.int32))  # wrong, not read
        assert unseen.known is None
        assert unseen.binding(1000) == 1000
        got = [tree_attention(q, k, v, unseen, window=w) for w in (None, 3, 1000)]
    seen = TreeMask.from_subtree_end(tree)
    assert seen.binding(1000) is None
    assert all(
        torch.equal(x, tree_attention(q, k, v, seen, window=w))
        for x, w in zip(got, (None, 3, 1000), strict=True)
    )
    assert torch.equal(unseen.depth, seen.depth)
