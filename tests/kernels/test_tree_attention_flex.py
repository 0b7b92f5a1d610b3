"""Tree attention through FlexAttention: the mask and its blocks on the CPU, which is as far as they go without a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fst_kernels.backends import choose_backend
from fst_kernels.tree_attention import TreeMask, flex, tree_attention
from tests.kernels.test_tree_attention import SHAPES, nested, qkv, random_forest, side_by_side, visible_pairs

WINDOWS = (None, 1, 40)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
LONG = {
    "contexts, problems, samples": nested([2, 3, 4], [150, 40, 20]),
    "whole blocks": nested([2, 2], [128, 128]),
    "two trees": side_by_side(nested([1, 2], [300, 130]), nested([1, 3], [90, 100])),
    **SHAPES,
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", LONG)
def test_the_output_is_that_of_the_reference(name: str, window: int | None) -> None:
    ends = LONG[name]
    q, k, v = (x.detach() for x in qkv(2, len(ends), torch.float32))
    expected = tree_attention(q, k, v, ends, window=window, return_lse=True, backend="reference")
    found = tree_attention(q, k, v, ends, window=window, return_lse=True, backend="flex")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_each_row_of_a_batch_may_have_a_forest_of_its_own() -> None:
    ends = torch.stack([random_forest(seed, 200, 0.9) for seed in range(3)])
    q, k, v = (x.detach() for x in qkv(3, 200, torch.float32))
    for window in WINDOWS:
        expected = tree_attention(q, k, v, ends, window=window, backend="reference")
        torch.testing.assert_close(
            tree_attention(q, k, v, ends, window=window, backend="flex"), expected, atol=1e-5, rtol=1e-5
        )


def seen_in_blocks(ends: Tensor, queries: int, window: int | None) -> tuple[Tensor, Tensor]:
    """Of each block of queries and of keys: whether any pair is visible, whether all are. By the definition."""
    n = len(ends)
    visible = visible_pairs(ends, window)
    q_blocks, k_blocks = -(-n // queries), -(-n // flex.KEYS)
    padded = torch.zeros(q_blocks * queries, k_blocks * flex.KEYS, dtype=torch.int64)
    padded[:n, :n] = visible
    seen = padded.view(q_blocks, queries, k_blocks, flex.KEYS).sum((1, 3))
    sizes = torch.full((q_blocks, 1), queries)
    sizes[-1] = n - (q_blocks - 1) * queries
    return seen > 0, seen == sizes * flex.KEYS


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 900),
    st.sampled_from([0.9, 0.99, 0.999]),
    st.sampled_from([128, 256]),
)
def test_the_blocks_are_those_of_the_definition(seed: int, n: int, run: float, queries: int) -> None:
    ends = random_forest(seed, n, run)
    mask = TreeMask.from_subtree_end(ends)
    for window in WINDOWS:
        found = flex.block_mask(mask, queries, window)
        some, all_ = seen_in_blocks(ends, queries, window)
        full = listed(found.full_kv_num_blocks, found.full_kv_indices)
        partial = listed(found.kv_num_blocks, found.kv_indices)
        assert not (full & partial).any()
        if window is None:
            assert torch.equal(full, all_)
            assert torch.equal(full | partial, some)
        else:  # by the bounds of depths in a block: a block too many costs time, one too few is wrong
            assert not (full & ~all_).any()
            assert not (some & ~(full | partial)).any()


def listed(count: Tensor | None, names: Tensor | None) -> Tensor:
    """[QB, KB]: the blocks in a list."""
    assert count is not None
    assert names is not None
    blocks = names.shape[-1]
    out = torch.zeros(names.shape[-2], blocks, dtype=torch.bool)
    for row in range(len(out)):
        out[row, names[0, 0, row, : int(count[0, 0, row])].long()] = True
    return out


def test_a_mask_is_divided_into_blocks_once() -> None:
    mask = TreeMask.from_subtree_end(LONG["whole blocks"])
    assert flex.block_mask(mask, 128, None) is flex.block_mask(mask, 128, None)
    assert flex.block_mask(mask, 128, 9) is not flex.block_mask(mask, 128, None)


@pytest.mark.parametrize("backend", ["flex", "flash"])
def test_what_cannot_run_says_why(backend: str) -> None:
    ends = SHAPES["chain"]
    q, k, v = qkv(1, len(ends), torch.float64)
    with pytest.raises(RuntimeError, match="the tensors are"):
        tree_attention(q, k, v, ends, backend=backend)


def test_gradients_on_a_cpu_are_refused_before_anything_is_computed() -> None:
    ends = SHAPES["chain"]
    q, k, v = qkv(1, len(ends), torch.float32)
    with pytest.raises(RuntimeError, match="no gradient on a CPU"):
        tree_attention(q, k, v, ends, backend="flex")
    with torch.no_grad():
        tree_attention(q, k, v, ends, backend="flex")


def test_it_does_not_run_within_the_compilation_of_a_caller() -> None:
    mask = TreeMask.from_subtree_end(SHAPES["chain"])
    q, k, v = (x.detach() for x in qkv(1, len(SHAPES["chain"]), torch.float32))
    run = torch.compile(lambda q, k, v: tree_attention(q, k, v, mask, backend="flex"), backend="eager")
    with pytest.raises(RuntimeError, match=r"cannot run within torch\.compile"):
        run(q, k, v)


def test_no_token_is_no_error() -> None:
    q = torch.empty(1, 2, 0, 8)
    assert tree_attention(q, q, q, torch.empty(0, dtype=torch.int32), backend="flex").shape == q.shape


def test_the_environment_may_name_a_backend_for_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = choose_backend
    monkeypatch.setenv("FST_KERNELS", "tree_attention=flex, sample_tokens=reference")
    assert choose("tree_attention", None) == "flex"
    assert choose("sample_tokens", None) == "reference"
    monkeypatch.delenv("FST_KERNELS")
    expected = choose("linear_logprob", None)
    monkeypatch.setenv("FST_KERNELS", "tree_attention=flex")
    assert choose("linear_logprob", None) == expected
    monkeypatch.setenv("FST_KERNELS", "attention=flex")
    with pytest.raises(ValueError, match="names the operation 'attention'"):
        choose("tree_attention", None)
    monkeypatch.setenv("FST_KERNELS", "tree_attention=flexible")
    with pytest.raises(ValueError, match="'flexible' is not a backend"):
        choose("tree_attention", None)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flex", "flash"])
@pytest.mark.parametrize("window", WINDOWS)
def test_on_a_gpu_output_and_gradients_are_those_of_the_reference(backend: str, window: int | None) -> None:
    if backend == "flash":
        pytest.importorskip("flash_attn.cute", reason="the package flash-attn-4 is not installed")
    ends = LONG["contexts, problems, samples"].cuda()
    q, k, v = (
        x.detach().cuda().bfloat16().requires_grad_() for x in qkv(1, len(ends), torch.float32, dim=64)
    )
    out = tree_attention(q, k, v, ends, window=window, backend=backend)
    weight = torch.randn_like(out)
    found = (out, *torch.autograd.grad((out * weight).sum(), (q, k, v)))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = tree_attention(*wide, ends, window=window, backend="reference")
    grads = torch.autograd.grad((expected * weight.double()).sum(), wide)
    for mine, right in zip(found, (expected, *grads), strict=True):
        torch.testing.assert_close(mine.double(), right, atol=2e-2, rtol=2e-2)
