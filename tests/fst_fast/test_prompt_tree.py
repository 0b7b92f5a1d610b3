"""The trie of a call's prompts: however nodes are merged, joined or cut, a prompt's path gives the prompt."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.rollout.prompt_tree import forest_of, prompt_tree
from tests.fst_fast.test_rollout import assert_same, forest, make_model, requests_of, sample

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(PROMPTS, st.integers(0, 12), st.integers(1, 5))
def test_paths_spell_the_prompts_and_know_their_positions(prompts, join, longest):
    arrays = [np.array(p, dtype=np.int64) for p in prompts]
    tree = prompt_tree(forest_of(arrays, join_tokens=join), max_node_tokens=longest)
    for prompt, path in zip(prompts, tree.path, strict=True):
        nodes = path[path >= 0]
        tokens = np.concatenate([np.arange(tree.start[n], tree.end[n]) for n in nodes])
        assert tree.token_ids[tokens].tolist() == prompt
        assert tree.depth[tokens].tolist() == list(range(len(prompt)))
        assert (tree.last[nodes] >= tree.end[nodes[-1]]).all()
    assert (tree.parent < np.arange(len(tree.parent))).all()
    assert (tree.end - tree.start <= longest).all()
    inside = tree.last[:, None] > np.arange(tree.end[-1])
    for node, up in enumerate(tree.parent):  # a subtree lies within its parent's
        assert up < 0 or (
            tree.start[up] < tree.start[node]
            and tree.last[node] <= tree.last[up]
            and inside[up, tree.start[node]]
        )


@settings(max_examples=100, deadline=None)
@given(PROMPTS)
def test_without_joining_every_distinct_prefix_is_one_token(prompts):
    arrays = [np.array(p, dtype=np.int64) for p in prompts]
    distinct = {tuple(p[: n + 1]) for p in prompts for n in range(len(p))}
    assert len(forest_of(arrays, join_tokens=0).token_ids) == len(distinct)
    assert len(forest_of(arrays, join_tokens=10**6).token_ids) >= len(distinct)


def test_a_short_shared_prefix_is_copied_and_a_long_one_shared():
    def sizes(shared: int, leaves: int, join: int) -> list[int]:
        prompts = [np.array([1] * shared + [2 + i] * 3, dtype=np.int64) for i in range(leaves)]
        found = forest_of(prompts, join_tokens=join)
        return (found.node_end - found.node_start).tolist()

    assert sizes(4, 3, 8) == [7, 7, 7]  # 8 tokens more
    assert sizes(4, 3, 7) == [4, 3, 3, 3]
    ends_there = [np.array([1, 1]), np.array([1, 1, 2]), np.array([1, 1, 3])]
    assert len(forest_of(ends_there, join_tokens=99).node_start) == 3


def test_joining_changes_no_token():
    model, requests = make_model(), requests_of(contexts=(4, 7, 18))
    shared, joined = forest(model, join_tokens=0), forest(model, join_tokens=32)
    assert_same(sample(shared, requests), sample(joined, requests))
    assert joined.tokens_computed > shared.tokens_computed
    assert_same(sample(shared, requests), sample(joined, requests))
    assert joined.tokens_reused > shared.tokens_reused
