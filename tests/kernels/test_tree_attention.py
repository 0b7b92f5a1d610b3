"""Tree attention against dense masked attention in float64: forward, log-sum-exp and gradients, over the shapes a forest can take."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fst_kernels.tree_attention import TreeMask, ops, reference, tree_attention

F64, F32 = torch.float64, torch.float32
few = settings(max_examples=25, deadline=None)
TOLERANCE = {F64: 1e-11, F32: 1e-5}


@pytest.fixture(params=["chosen", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 on the CPU is forward in C++ unless the reference is asked for."""
    if request.param == "reference":
        monkeypatch.setenv("FST_KERNELS", "reference")


def visible_pairs(subtree_end: Tensor, window: int | None = None) -> Tensor:
    """The definition, [..., query, key]. What a token sees without a window is its path, so the pairs count its depth."""
    at = torch.arange(subtree_end.shape[-1])
    visible = (at <= at[:, None]) & (at[:, None] < subtree_end[..., None, :])
    depth = visible.sum(-1) - 1
    return visible if window is None else visible & (depth[..., :, None] - depth[..., None, :] < window)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax over an N x N mask. q [B,Hq,N,D]; subtree_end [B,N]"""
    visible = visible_pairs(subtree_end, window)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    score = (q @ k.mT * scale).masked_fill(~visible[:, None], -torch.inf)
    return score.softmax(-1) @ v, score.logsumexp(-1)


def from_parents(parents: list[int]) -> Tensor:
    """subtree_end of tokens in preorder, from each token's parent (-1: a root)."""
    end = np.arange(1, len(parents) + 1)
    for i in range(len(parents) - 1, -1, -1):
        if parents[i] >= 0:
            end[parents[i]] = max(end[parents[i]], end[i])
    return torch.from_numpy(end.astype(np.int32))


def random_forest(seed: int, n: int, run: float) -> Tensor:
    """Preorder by climbing: each token continues the last one with probability `run`, else hangs on a random ancestor or is a root."""
    rng = np.random.default_rng(seed)
    parents = [-1]
    for i in range(1, n):
        parent = i - 1
        if rng.random() > run:
            while parent >= 0 and rng.random() < 0.6:
                parent = parents[parent]
        parents.append(parent)
    return from_parents(parents[:n])


def nested(sizes: list[int], length: list[int]) -> Tensor:
    """A regular forest: sizes[l] branches at level l, each of length[l] tokens."""
    parents: list[int] = []

    def grow(level: int, parent: int) -> None:
        if level == len(sizes):
            return
        for _ in range(sizes[level]):
            at = parent
            for _ in range(length[level]):
                parents.append(at)
                at = len(parents) - 1
            grow(level + 1, at)

    grow(0, -1)
    return from_parents(parents)


def side_by_side(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second + len(first)])


SHAPES = {
    "one token": from_parents([-1]),
    "chain": from_parents(list(range(-1, 69))),
    "star: one root, 512 leaves of one token": from_parents([-1] + [0] * 512),
    "only roots of one token": from_parents([-1] * 40),
    "caterpillar": from_parents([-1] + [x for i in range(100) for x in (2 * i, 2 * i)]),
    "two trees": side_by_side(nested([1, 3, 2], [5, 3, 2]), nested([1, 2, 4], [7, 1, 3])),
    "contexts, problems, samples": nested([2, 3, 4], [17, 5, 3]),
    "hot prefix": nested([1, 40], [60, 2]),
    "padding tail": side_by_side(nested([1, 3], [6, 4]), from_parents([-1] * 11)),
    "unequal leaves": from_parents(
        [
            -1,
            0,
            1,
            *(x for n in range(1, 12) for x in [2, *range(3 + n * (n - 1) // 2, 2 + n * (n + 1) // 2)]),
        ]
    ),
}


def qkv(
    batch: int, n: int, dtype: torch.dtype, *, heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(h: int) -> Tensor:
        return torch.randn(batch, h, n, dim, generator=generator, dtype=F64).to(dtype).requires_grad_()

    return [draw(heads), draw(kv_heads), draw(kv_heads)]


def assert_like_dense(
    subtree_end: Tensor,
    dtype: torch.dtype,
    kernel: reference.Kernel | None = None,
    window: int | None = None,
    **sizes: int,
) -> None:
    rows = subtree_end if subtree_end.ndim == 2 else subtree_end[None]
    given_ = qkv(len(rows), rows.shape[1], dtype, **sizes)
    exact = [x.detach().to(F64).requires_grad_() for x in given_]
    scale, mask = 0.7, TreeMask.from_subtree_end(rows)
    plain = [x.detach() for x in given_]
    out, lse = reference.forward(*plain, mask, scale, window, kernel)
    expected, expected_lse = dense_attention(*exact, rows, scale, window)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)
    expected.backward(dout.to(F64))
    grads = reference.backward(dout, *plain, out, lse, mask, scale, window, kernel)
    assert lse.dtype == dtype
    near = (
        1e-5 if dtype == F32 else 1e-6
    )  # scores of up to D = 80 products: what is left depends on the processor
    torch.testing.assert_close(lse.to(F64), expected_lse, rtol=near, atol=near)
    torch.testing.assert_close(out.to(F64), expected, rtol=0, atol=TOLERANCE[dtype])
    for name, got, want in zip("qkv", grads, exact, strict=True):
        assert want.grad is not None
        assert name != "v" or bool(got.any(-1).all())
        torch.testing.assert_close(
            got.to(F64),
            want.grad,
            rtol=TOLERANCE[dtype],
            atol=3 * TOLERANCE[dtype],
            msg=lambda m, n=name: f"d{n}: {m}",
        )


def test_this_torch_has_the_fast_cpu_path_and_it_is_taken() -> None:
    assert isinstance(reference.kernel_for(torch.zeros(1)), reference.Flash)
    assert isinstance(reference.kernel_for(torch.zeros(1, dtype=F64)), reference.Matmul)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [(F64, reference.Matmul()), (F32, reference.Flash())],
    ids=["matmul float64", "flash float32"],
)
def test_every_shape_of_tree_matches_the_dense_mask(
    name: str, dtype: torch.dtype, kernel: reference.Kernel
) -> None:
    assert_like_dense(SHAPES[name], dtype, kernel)


WINDOWS = st.sampled_from([None, 1, 2, 3, 8, 30])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 160),
    st.sampled_from([0.2, 0.7, 0.95]),
    st.sampled_from([F64, F32]),
    WINDOWS,
)
def test_random_forests_match_the_dense_mask(
    seed: int, n: int, run: float, dtype: torch.dtype, window: int | None
) -> None:
    assert_like_dense(random_forest(seed, n, run), dtype, window=window)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("window", [1, 2, 7, 20])
@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [(F64, reference.Matmul()), (F32, reference.Flash())],
    ids=["matmul float64", "flash float32"],
)
def test_a_sliding_window_by_depth_matches_the_dense_mask(
    name: str, window: int, dtype: torch.dtype, kernel: reference.Kernel
) -> None:
    assert_like_dense(SHAPES[name], dtype, kernel, window)


def test_a_window_of_one_is_a_token_alone_and_one_as_deep_as_the_forest_is_none() -> None:
    tree = SHAPES["contexts, problems, samples"]
    q, k, v = (x.detach() for x in qkv(1, len(tree), F32))
    alone = tree_attention(q, k, v, tree, window=1)
    torch.testing.assert_close(alone, v.repeat_interleave(2, dim=1))
    depth = int(TreeMask.from_subtree_end(tree).depth.max())
    whole = tree_attention(q, k, v, tree)
    assert torch.equal(tree_attention(q, k, v, tree, window=depth + 1), whole)
    changed = ((tree_attention(q, k, v, tree, window=depth) - whole).abs() > 1e-4).any(dim=3).all(dim=(0, 1))
    assert torch.equal(changed, TreeMask.from_subtree_end(tree).depth[0] == depth)


def test_a_window_computes_about_the_pairs_it_leaves() -> None:
    tree, window = nested([2, 8], [1200, 100]), 200
    blocks = reference.blocks(TreeMask.from_subtree_end(tree), window)
    computed = sum(b.queries.count * b.queries.length * b.keys.length / (2 if b.own else 1) for b in blocks)
    visible = int(visible_pairs(tree, window).sum())
    assert visible < computed < 1.5 * visible


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 1), (6, 2, 3), (8, 1, 32), (3, 3, 80)])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_any_head_grouping_and_head_size(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    assert_like_dense(random_forest(3, 60, 0.8), dtype, heads=heads, kv_heads=kv_heads, dim=dim)


def test_rows_of_a_batch_may_hold_different_forests() -> None:
    assert_like_dense(torch.stack([random_forest(1, 70, 0.8), SHAPES["chain"]]), F32)


def test_one_mask_serves_every_row_of_a_batch() -> None:
    tree = random_forest(1, 50, 0.8)
    q, k, v = qkv(3, 50, F32)
    once = tree_attention(q, k, v, TreeMask.from_subtree_end(tree))
    each = tree_attention(q, k, v, tree.expand(3, -1).contiguous())
    assert torch.equal(once, each)
    torch.testing.assert_close(once[1], tree_attention(q[1:2], k[1:2], v[1:2], tree)[0])


@pytest.mark.parametrize("window", [None, 12])
def test_queries_in_slices_give_the_same(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr(reference, "QUERY_SLICE", 7)
    for name in ("chain", "hot prefix"):
        assert_like_dense(SHAPES[name], F64, reference.Matmul(), window)


@pytest.mark.parametrize("window", [None, 2])
def test_gradcheck(window: int | None) -> None:
    mask = TreeMask.from_subtree_end(random_forest(5, 12, 0.6))
    q, k, v = qkv(1, 12, F64, heads=2, kv_heads=1, dim=3)
    assert torch.autograd.gradcheck(lambda *x: tree_attention(*x, mask, window=window), (q, k, v))


def test_bfloat16_is_as_close_as_dense_bfloat16() -> None:
    tree = random_forest(2, 120, 0.9)
    given_ = qkv(1, 120, torch.bfloat16, dim=32)
    exact = [x.detach().to(F64).requires_grad_() for x in given_]
    plain = [x.detach().requires_grad_() for x in given_]
    expected, _ = dense_attention(*exact, tree[None], 0.2)
    yardstick, _ = dense_attention(*plain, tree[None], 0.2)
    out = tree_attention(*given_, tree, scale=0.2)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    out.backward(dout), yardstick.backward(dout), expected.backward(dout.to(F64))
    for got, rough, want in zip(
        (out, *(x.grad for x in given_)),
        (yardstick, *(x.grad for x in plain)),
        (expected, *(x.grad for x in exact)),
        strict=True,
    ):
        assert (got - want).norm() <= 2 * (rough - want).norm() + 1e-5 * want.norm()


@pytest.mark.parametrize("offset", range(128))
def test_a_branch_and_a_root_at_every_residue_of_128(offset: int) -> None:
    """A path forks at the given offset in its second 128 tokens, then again; a second tree begins right behind it."""
    fork = 128 + offset
    first = from_parents([*range(-1, fork), *range(fork, fork + 40), fork, *range(fork + 41, fork + 60)])
    tree = side_by_side(first, from_parents([-1, 0, 0, 0, 3]))
    assert_like_dense(tree, F32, heads=2, kv_heads=1, dim=4)
    assert_like_dense(tree, F32, window=70, heads=2, kv_heads=1, dim=4)


def test_identical_responses_get_identical_outputs() -> None:
    tree = nested([1, 2], [16, 16])
    inputs = [x.detach().clone() for x in qkv(1, 48, F32)]
    for x in inputs:
        x[:, :, 32:] = x[:, :, 16:32]
    out = tree_attention(*inputs, tree)
    assert torch.equal(out[:, :, 32:], out[:, :, 16:32])


def test_a_query_head_reads_the_key_head_of_its_group() -> None:
    tree = random_forest(3, 40, 0.8)
    q, k, v = (x.detach() for x in qkv(1, 40, F32, heads=6, kv_heads=3))
    out, turned = tree_attention(q, k, v, tree), tree_attention(q, k.roll(1, 1), v.roll(1, 1), tree)
    for head in range(6):
        alone = tree_attention(*(x[:, [i]] for x, i in ((q, head), (k, head // 2), (v, head // 2))), tree)
        torch.testing.assert_close(out[:, [head]], alone)
        assert (turned[:, head] - out[:, head]).abs().max() > 0.1


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_scores_of_ten_thousand_stay_finite_and_right(size: float) -> None:
    tree = SHAPES["contexts, problems, samples"]
    q, k, v = (x.detach() for x in qkv(1, len(tree), F64))
    q = q * size
    out, lse = tree_attention(q, k, v, tree, scale=1.0, return_lse=True)
    expected, expected_lse = dense_attention(q, k, v, tree[None], 1.0)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse.float())
    single = [x.float().requires_grad_() for x in (q, k, v)]
    tree_attention(*single, tree, scale=1.0).sum().backward()
    assert all(bool(torch.isfinite(x.grad).all()) for x in single)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16])
def test_editing_one_branch_changes_no_other_branch_by_a_bit(dtype: torch.dtype, window: int | None) -> None:
    tree = nested([2, 3], [9, 6])  # branch b of tree 0 is 9 + 6 b .. 15 + 6 b
    edited = slice(15, 21)
    elsewhere = torch.ones(len(tree), dtype=torch.bool)
    elsewhere[edited] = False
    out_of_tree = elsewhere.clone()
    out_of_tree[:9] = False  # the root's own keys do see gradients from the edited branch

    def run(change: float) -> list[Tensor]:
        inputs = [x.detach().clone() for x in qkv(1, len(tree), dtype)]
        for x in inputs:
            x[:, :, edited] += change
            x.requires_grad_()
        out = tree_attention(*inputs, tree, window=window)
        (out * out).sum().backward()
        return [out.detach(), *(x.grad for x in inputs)]  # type: ignore[misc]

    before, after = run(0.0), run(1.5)
    for n, (x, y) in enumerate(zip(before, after, strict=True)):
        rows = elsewhere if n < 2 else out_of_tree  # out, dq | dk, dv
        assert torch.equal(x[:, :, rows], y[:, :, rows])
        assert not torch.equal(x[:, :, edited], y[:, :, edited])


def test_the_same_call_twice_is_bitwise_the_same() -> None:
    tree = random_forest(9, 150, 0.8)

    def run() -> list[Tensor]:
        inputs = qkv(1, 150, F32)
        tree_attention(*inputs, tree).square().sum().backward()
        return [x.grad for x in inputs]  # type: ignore[misc]

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


@pytest.mark.parametrize("error", [-1, 1])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_subtree_end_off_by_one_changes_the_result(error: int, dtype: torch.dtype) -> None:
    tree = from_parents(
        [-1, *range(9), 9, 10, 11, 11, 11, 9, 9]
    )  # root 0..9; a problem 10..11 with leaves 12, 13, 14; leaves 15, 16
    wrong = tree.clone()
    assert tree[10:12].tolist() == [15, 15]
    wrong[10:12] += error
    q, k, v = qkv(1, len(tree), dtype)
    difference = (
        (tree_attention(q, k, v, tree) - tree_attention(q, k, v, wrong)).detach().abs().amax(dim=(0, 1, 3))
    )
    changed = 14 if error < 0 else 15
    assert (difference > 1e-3).nonzero().flatten().tolist() == [changed]


def test_pairs_computed_are_near_the_pairs_visible() -> None:
    """Padding of the batched blocks is bounded: what it wastes is less than what it saves in launches."""
    rng = np.random.default_rng(0)
    parents: list[int] = []
    for context in rng.integers(100, 200, 3):
        parents += [-1, *range(len(parents), len(parents) + int(context) - 1)]
        last = len(parents) - 1
        for length in rng.integers(2, 60, 50):
            parents += [last, *range(len(parents), len(parents) + int(length) - 1)]
    tree = from_parents(parents)
    n, blocks = len(tree), reference.blocks(TreeMask.from_subtree_end(tree))
    computed = sum(b.queries.count * b.queries.length * b.keys.length / (2 if b.own else 1) for b in blocks)
    visible = sum(int(end) - i for i, end in enumerate(tree))
    assert visible < computed < 1.5 * visible < n * n / 2
    assert len(blocks) < 20


# ------------------------------------------------------------------------------------------------- as a torch operator


@pytest.mark.parametrize("given_as", ["tensor", "mask"])
@pytest.mark.parametrize("window", [None, 3])
def test_it_compiles_into_one_graph(given_as: str, window: int | None) -> None:
    tree = random_forest(3, 40, 0.8)
    mask = tree if given_as == "tensor" else TreeMask.from_subtree_end(tree)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | TreeMask) -> Tensor:
        return tree_attention(q * 2, k, v, mask, window=window).transpose(1, 2).flatten(2).square()

    plain, compiled = qkv(1, 40, F32), qkv(1, 40, F32)
    expected = run(*plain, mask)
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(*compiled, mask)
    expected.sum().backward(), out.sum().backward()
    torch.testing.assert_close(out, expected)
    assert out.any()
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_operator_keeps_torchs_rules() -> None:
    tree = random_forest(3, 30, 0.8)[None]
    q, k, v = qkv(1, 30, F64, dim=4)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.forward, (q, k, v, tree, 5, 0.5, "reference"), test_utils=checks)
    with torch.no_grad():
        out, _, total = ops.forward(q, k, v, tree, None, 0.5, "reference")
        given_ = (out, q, k, v, out, total, tree, None, 0.5, "reference")
        torch.library.opcheck(ops.backward, given_, test_utils=checks[:2])


def test_a_second_derivative_is_refused() -> None:
    q, k, v = qkv(1, 10, F64)
    [once] = torch.autograd.grad(
        tree_attention(q, k, v, TreeMask.causal(10)).square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="tree_attention is differentiable once"):
        once.sum().backward()


def test_it_needs_torch_alone() -> None:
    """numpy is installed here, so it is hidden from the import."""
    code = "import sys; sys.modules['numpy'] = None; from fst_kernels.tree_attention import *; import torch\n"
    code += "q = torch.ones(1, 1, 4, 2); print(tree_attention(q, q, q, TreeMask.causal(4), window=2).sum())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "tensor(8.)"


def test_lse_carries_no_gradient_but_out_does() -> None:
    q, k, v = qkv(1, 10, F32)
    out, lse = tree_attention(q, k, v, from_parents([-1, *range(9)]), return_lse=True)
    assert out.requires_grad
    assert not lse.requires_grad


Q = torch.zeros(1, 4, 3, 8)
KV = torch.zeros(1, 2, 3, 8)
END = torch.tensor([3, 3, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("q", "k", "v", "end", "message"),
    [
        (Q, KV, KV, END.long(), "subtree_end has dtype torch.int64; torch.int32"),
        (Q, KV, KV, END[None, None], r"subtree_end has shape \[1, 1, 3\]"),
        (Q, KV, KV, [3, 3, 3], "subtree_end is a list"),
        (
            Q,
            KV,
            KV,
            torch.tensor([3, 1, 3], dtype=torch.int32),
            r"subtree_end\[1\] of row 0 is 1; it must lie in 2..3",
        ),
        (
            Q,
            KV,
            KV,
            torch.tensor([3, 3, 4], dtype=torch.int32),
            r"subtree_end\[2\] of row 0 is 4; it must lie in 3..3",
        ),
        (
            Q,
            KV,
            KV,
            torch.tensor([2, 3, 3], dtype=torch.int32),
            r"not laminar: in row 0 subtree_end\[1\]=3 .* ends at 2",
        ),
        (Q, KV, KV, END[:2].clamp(max=2), "subtree_end has 2 tokens and q has 3"),
        (Q, KV, KV, END.expand(2, -1), "subtree_end has 2 rows and q has a batch of 1"),
        (Q[0], KV, KV, END, r"q has shape \[4, 3, 8\]"),
        (Q, KV.double(), KV, END, "k has dtype torch.float64, q torch.float32"),
        (Q.int(), KV, KV, END, "q has dtype torch.int32"),
        (Q, KV, KV[..., :4], END, "q, k, v have shapes"),
        (Q[:, :3], KV, KV, END, "q has 3 heads and k has 2"),
        (Q.to("meta"), KV, KV, END, "q is on meta, subtree_end on cpu"),
    ],
)
def test_wrong_arguments_are_refused_by_name(
    q: Tensor, k: Tensor, v: Tensor, end: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tree_attention(q, k, v, end)


@pytest.mark.parametrize("window", [0, -1, 2.0])
def test_a_window_below_one_is_refused(window: object) -> None:
    with pytest.raises(ValueError, match=f"window={window}; an integer of at least 1"):
        tree_attention(Q, KV, KV, END, window=window)  # type: ignore[call-overload]


def test_a_backend_asked_for_by_name_runs_or_raises() -> None:
    assert tree_attention(Q, KV, KV, END, backend="reference").shape == Q.shape
    for name in ("triton", "cuda"):
        with pytest.raises(RuntimeError, match=name):
            tree_attention(Q, KV, KV, END, backend=name)
    with pytest.raises(ValueError, match="tpu"):
        tree_attention(Q, KV, KV, END, backend="tpu")


def test_autocast_does_not_reach_inside(monkeypatch):
    monkeypatch.setattr(reference, "flash_shares_heads", lambda: False)  # the path that other devices take
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 12, 16, generator=g).requires_grad_() for h in (4, 2, 2))
    mask = TreeMask.shared_prefixes([(4, (5, 3))])
    want = tree_attention(q, k, v, mask)
    grads = torch.autograd.grad(want.square().sum(), (q, k, v))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = tree_attention(q, k, v, mask)
        same = torch.autograd.grad(got.square().sum(), (q, k, v))
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(same, grads, strict=True))
