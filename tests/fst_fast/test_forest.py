"""The packer: what it stores, what each token attends to, and that splitting loses nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.errors import UserError
from fst_fast.forest import Forest, Leaf, Share, pack, split, unshared_tokens

SHARES: tuple[Share, ...] = ("prompts", "all")


def leaf(prompt: list[int], response: list[int]) -> Leaf:
    return Leaf(np.array(prompt, np.int64), np.array(response, np.int64))


def ids(leaf: Leaf) -> list[int]:
    return [*leaf.prompt_ids.tolist(), *leaf.response_ids.tolist()]


tokens = st.integers(0, 2)  # few ids, so that prefixes, whole prompts and whole leaves coincide often
some_leaves = st.lists(
    st.builds(leaf, st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, max_size=4)),
    min_size=1,
    max_size=14,
)
shares = st.sampled_from(SHARES)
few = settings(max_examples=40, deadline=None)


@few
@given(some_leaves, shares)
def test_every_path_gives_its_leaf_and_depth_is_the_position(leaves: list[Leaf], share: Share) -> None:
    forest = pack(leaves, share=share)
    for i, one in enumerate(leaves):
        path = forest.path(i)
        assert forest.token_ids[path].tolist() == ids(one)
        assert forest.depth[path].tolist() == list(range(len(one)))


@few
@given(some_leaves, shares)
def test_a_token_sees_exactly_the_path_that_leads_to_it(leaves: list[Leaf], share: Share) -> None:
    forest = pack(leaves, share=share)
    at = np.arange(len(forest.token_ids))
    reached = set()
    for i in range(len(leaves)):
        path = forest.path(i)
        for n, j in enumerate(path):
            visible = np.flatnonzero((at <= j) & (j < forest.subtree_end))
            assert visible.tolist() == path[: n + 1].tolist()
        reached.update(path.tolist())
    assert reached == set(at.tolist())


@few
@given(some_leaves, shares)
def test_every_response_token_has_one_label_at_the_token_before_it(leaves: list[Leaf], share: Share) -> None:
    forest = pack(leaves, share=share)
    expected = [
        (i, t, int(one.response_ids[t]), int(forest.path(i)[len(one.prompt_ids) - 1 + t]))
        for i, one in enumerate(leaves)
        for t in range(len(one.response_ids))
    ]
    got = zip(
        forest.leaf.tolist(),
        forest.offset.tolist(),
        forest.labels.tolist(),
        forest.rows.tolist(),
        strict=True,
    )
    assert list(got) == expected


@few
@given(some_leaves)
def test_nothing_is_stored_twice_and_responses_are_merged_only_when_asked(leaves: list[Leaf]) -> None:
    def prefixes(sequences: list[list[int]]) -> int:
        return len({tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)})

    responses = sum(len(one.response_ids) for one in leaves)
    assert (
        len(pack(leaves, share="prompts").token_ids)
        == prefixes([one.prompt_ids.tolist() for one in leaves]) + responses
    )
    assert len(pack(leaves, share="all").token_ids) == prefixes([ids(one) for one in leaves])
    assert unshared_tokens(leaves) == sum(map(len, leaves))


@few
@given(some_leaves, shares)
def test_nodes_tile_the_tokens_in_preorder_and_end_only_where_something_ends_or_diverges(
    leaves: list[Leaf], share: Share
) -> None:
    forest = pack(leaves, share=share)
    assert forest.node_start.tolist() == [0, *forest.node_end[:-1].tolist()]
    assert forest.node_end[-1] == len(forest.token_ids)
    children = np.bincount(forest.node_parent[forest.node_parent >= 0], minlength=len(forest.node_start))
    for s, parent in enumerate(forest.node_parent.tolist()):
        assert parent < s
        if parent >= 0:
            assert (
                forest.node_end[parent]
                <= forest.node_start[s]
                < forest.subtree_end[forest.node_start[parent]]
            )
        assert children[s] != 1 or s in forest.leaf_node


@few
@given(some_leaves, shares, st.integers(10, 40))
def test_split_covers_every_leaf_once_and_every_part_fits(
    leaves: list[Leaf], share: Share, budget: int
) -> None:
    parts = split(leaves, budget, share=share)
    assert sorted(i for part in parts for i in part) == list(range(len(leaves)))
    for part in parts:
        assert 0 < len(pack([leaves[i] for i in part], share=share).token_ids) <= budget


@few
@given(some_leaves, shares, st.integers(10, 40))
def test_split_minimises_the_largest_part_for_its_number_of_parts(
    leaves: list[Leaf], share: Share, budget: int
) -> None:
    parts = split(leaves, budget, share=share)
    largest = max(len(pack([leaves[i] for i in part], share=share).token_ids) for part in parts)
    if largest > max(map(len, leaves)):
        assert len(split(leaves, largest - 1, share=share)) > len(parts)


@few
@given(some_leaves, shares)
def test_parts_spell_the_same_leaves_and_labels_as_the_whole(leaves: list[Leaf], share: Share) -> None:
    def described(forest: Forest, names: list[int]) -> set[tuple[object, ...]]:
        out = set()
        for leaf_, offset, label, row in zip(
            forest.leaf, forest.offset, forest.labels, forest.rows, strict=True
        ):
            path = forest.path(int(leaf_))
            seen = path[: path.tolist().index(row) + 1]
            out.add(
                (
                    names[leaf_],
                    int(offset),
                    int(label),
                    tuple(forest.token_ids[seen]),
                    tuple(forest.depth[seen]),
                )
            )
        return out

    whole = described(pack(leaves, share=share), list(range(len(leaves))))
    parts = [
        described(pack([leaves[i] for i in part], share=share), part)
        for part in split(leaves, 10, share=share)
    ]
    assert set().union(*parts) == whole
    assert sum(map(len, parts)) == len(whole)


def test_equal_trees_are_cut_between_the_trees_and_nothing_is_computed_again() -> None:
    leaves = [
        leaf([context] * 5 + [problem], [sample])
        for context in range(4)
        for problem in (7, 8)
        for sample in range(3)
    ]
    whole = len(pack(leaves).token_ids)
    sizes = [len(pack([leaves[i] for i in part]).token_ids) for part in split(leaves, whole // 4 + 2)]
    assert sizes == [whole // 4] * 4


def test_a_budget_for_everything_gives_one_part() -> None:
    leaves = [leaf([1, 2, n], [n]) for n in range(5)]
    assert split(leaves, len(pack(leaves).token_ids)) == [[0, 1, 2, 3, 4]]
    assert split([], 1) == []


def test_a_leaf_longer_than_the_budget_is_refused_with_its_numbers() -> None:
    with pytest.raises(
        UserError, match=r"sequence 1 has 3 prompt \+ 4 response = 7 tokens.* 6 tokens.*at least 7"
    ):
        split([leaf([1], [2]), leaf([1, 2, 3], [4, 5, 6, 7])], 6)


def test_a_leaf_may_end_at_an_inner_node() -> None:
    forest = pack([leaf([1, 2], []), leaf([1, 2, 3], [4]), leaf([1, 2], [5])])
    assert forest.node_end[forest.leaf_node[0]] == 2
    assert forest.token_ids.tolist() == [1, 2, 5, 3, 4]
    assert forest.node_parent.tolist() == [-1, 0, 0]


def test_identical_responses_share_rows_only_under_share_all() -> None:
    leaves = [leaf([1, 2], [3, 4]), leaf([1, 2], [3, 4])]
    merged, apart = pack(leaves, share="all"), pack(leaves, share="prompts")
    assert merged.token_ids.tolist() == [1, 2, 3, 4]
    assert merged.rows.tolist() == [1, 2, 1, 2]
    assert merged.leaf_node.tolist() == [0, 0]
    assert apart.token_ids.tolist() == [1, 2, 3, 4, 3, 4]
    assert apart.rows.tolist() == [1, 2, 1, 4]


def test_a_response_is_never_shared_with_a_longer_prompt() -> None:
    forest = pack([leaf([1], [2, 3]), leaf([1, 2], [3])], share="prompts")
    assert len(forest.token_ids) == 5
    assert len(pack([leaf([1], [2, 3]), leaf([1, 2], [3])], share="all").token_ids) == 3


def test_a_chain_of_prefixes_as_deep_as_the_batch_is_packed() -> None:
    forest = pack([leaf([0] * n, [n]) for n in range(1, 200)])
    assert len(forest.token_ids) == 199 + 199
    assert forest.depth.max() == 199


def test_no_leaves_make_an_empty_forest() -> None:
    forest = pack([])
    assert len(forest.token_ids) == len(forest.rows) == len(forest.node_start) == len(forest.leaf_node) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (leaf([], [1]), "leaf 0 has an empty prompt"),
        (Leaf(np.array([1], np.int32), np.array([1])), "prompt_ids of leaf 0 is int32"),
        (Leaf(np.array([1]), np.array([[1]])), "response_ids of leaf 0 is int64 of shape"),
    ],
)
def test_malformed_leaves_are_refused_by_name(wrong: Leaf, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack([wrong])


def test_an_unknown_sharing_is_refused() -> None:
    with pytest.raises(ValueError, match="share='none' is not known; allowed are 'prompts' and 'all'"):
        pack([leaf([1], [2])], share="none")  # type: ignore[arg-type]
