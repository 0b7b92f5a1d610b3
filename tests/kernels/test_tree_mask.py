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


@pytest.mark.parametrize(
    ("parents", "order", "ends"),
    [
        (
            [-1, 0, 0, 1],
            [0, 1, 3, 2],
            [4, 3, 3, 4],
        ),  # insertion order: token 3 belongs to the branch begun by token 1
        ([2, 2, -1, -1, 1], [2, 0, 1, 4, 3], [4, 2, 4, 4, 5]),  # roots behind their children
        ([-1, -1, 0, 1, 0, 1], [0, 2, 4, 1, 3, 5], [3, 2, 3, 6, 5, 6]),  # two trees, mixed
        ([-1, 0, 1, 0, -1], [0, 1, 2, 3, 4], [4, 3, 3, 4, 5]),  # preorder already
        ([-1], [0], [1]),
        ([], [], []),
    ],
)
def test_parents_in_any_order_are_brought_into_preorder(
    parents: list[int], order: list[int], ends: list[int]
) -> None:
    for given_ in (
        parents,
        torch.tensor(parents, dtype=torch.int32),
        torch.tensor(parents, dtype=torch.int64),
    ):
        mask, found = TreeMask.from_parents(given_)
        assert found.dtype == torch.int64
        assert found.tolist() == order
        assert mask.subtree_end.tolist() == [ends]


def test_insertion_order_taken_as_preorder_is_another_tree_and_from_parents_is_not() -> None:
    """What each token sees, from its parents alone."""
    parents = [-1, 0, 0, 1, 2, 1]
    paths = [{i} for i in range(6)]
    for i, parent in enumerate(parents[1:], 1):
        paths[i] |= paths[parent]
    mask, order = TreeMask.from_parents(parents)
    for at, row in enumerate(visible_pairs(mask.subtree_end)[0]):
        assert set(order[row].tolist()) == paths[int(order[at])]
    taken = visible_pairs(from_parents(parents))
    assert any(set(row.nonzero()[:, 0].tolist()) != path for row, path in zip(taken, paths, strict=True))


@few
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_attention_over_shuffled_parents_is_that_of_the_tree(seed: int, n: int) -> None:
    """A random forest, its tokens shuffled: every token's output is attention over its own ancestors, in the caller's order."""
    g = torch.Generator().manual_seed(seed)
    grown = [int(torch.randint(-1, i, (), generator=g)) if i else -1 for i in range(n)]
    place = torch.randperm(n, generator=g).tolist()  # where the shuffle puts each grown token
    parents = [0] * n
    for i, parent in enumerate(grown):
        parents[place[i]] = -1 if parent < 0 else place[parent]
    mask, order = TreeMask.from_parents(torch.tensor(parents))
    q, k, v = (x.detach() for x in qkv(1, n, torch.float64, heads=1, kv_heads=1, dim=2))
    out = tree_attention(q[:, :, order], k[:, :, order], v[:, :, order], mask)[:, :, order.argsort()]
    for token in range(n):
        path = [token]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        weight = (k[0, 0, path] @ q[0, 0, token] / 2**0.5).softmax(0)
        torch.testing.assert_close(out[0, 0, token], weight @ v[0, 0, path])


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        (
            [-1, 2, 1],
            r"parents has a cycle: following them from token 1, whose parent is 2, never reaches a root \(-1\)",
        ),
        ([0], "parents has a cycle: following them from token 0, whose parent is 0,"),
        ([-1, 0, 4, 2, 3, 4], "parents has a cycle: following them from token 2, whose parent is 4,"),
        ([-1, 7], r"parents\[1\]=7; allowed: -1 \(a root\) to 1"),
        ([0, -2, -1], r"parents\[1\]=-2; allowed: -1 \(a root\) to 2"),
        ([-1.0, 0.0], r"parents has dtype torch.float32 and shape \[2\]; \[N\] of int32 or int64 is needed"),
        (torch.tensor([[-1, 0]]), r"parents has dtype torch.int64 and shape \[1, 2\]"),
    ],
)
def test_what_is_no_forest_is_refused_in_one_sentence(parents: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        TreeMask.from_parents(parents)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


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
