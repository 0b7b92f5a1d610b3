"""The claims of test_linear_logprob_triton.py, a process of its own: TRITON_INTERPRET=1 must be there before the kernels are defined.

Not collected by itself: pytest runs it by name, from there.
"""

import importlib
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fst_kernels import PolicyObjective, backends, linear_logprob, linear_policy_loss
from fst_kernels.linear_logprob import op as logprob_op
from fst_kernels.linear_logprob import triton as op
from fst_kernels.linear_policy_loss import op as loss_op

loss_api = importlib.import_module("fst_kernels.linear_policy_loss.api")

assert os.environ.get("TRITON_INTERPRET") == "1"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def make(n=19, h=40, v=300, m=None, *, seed=0, scale=0.3):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, h, generator=g), torch.randn(v, h, generator=g) * scale
    labels = torch.randint(0, v, (n if m is None else m,), generator=g)
    if labels.numel() > 1:
        labels[0], labels[-1] = 0, v - 1
    rows = None if m is None else torch.randint(0, n, (m,), generator=g)
    return hidden, weight, labels, rows


def dyadic(*shape, seed=0):
    """Eighths: their products and sums are exact in fp32, so the interpreter's BLAS gives a row the same bits anywhere in a tile."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=g) / 8


def both(hidden, weight, labels, *, bias=None, **arguments):
    """Outputs and gradients of a loss that reaches every differentiable output: reference, Triton."""
    found = []
    for backend in ("reference", "triton"):
        inputs = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
        given = inputs[2] if bias is not None else None
        out = linear_logprob(*inputs[:2], labels, bias=given, backend=backend, **arguments)
        terms = [x for x in (out.logprob, out.entropy, out.kl) if x is not None]
        loss = sum((x * torch.linspace(-1, 2, len(x))).sum() for x in terms)
        found.append((out, torch.autograd.grad(loss, inputs)))
    return found


def assert_same(found):
    (want, want_grads), (got, got_grads) = found
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **CLOSE)
    for a, b in zip(got_grads, want_grads, strict=True):
        assert b.norm() > 0 or want.entropy.numel() == 0
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("kl", [None, "reverse", "forward"])
@pytest.mark.parametrize("m", [None, 30], ids=["one label a row", "several labels a row"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_values_and_gradients_are_the_references(kl, m, softcap):
    hidden, weight, labels, rows = make(m=m)
    labels[2] = -100
    g = torch.Generator().manual_seed(1)
    own_head = kl == "reverse"
    assert_same(
        both(
            hidden,
            weight,
            labels,
            rows=rows,
            bias=torch.randn(300, generator=g) if m else None,
            temperature=torch.rand(19, generator=g) + 0.5 if m else 0.7,
            softcap=softcap,
            kl=kl,
            ref_hidden=torch.randn(19, 24 if own_head else 40, generator=g) if kl or m else None,
            ref_weight=torch.randn(300, 24, generator=g) * 0.3 if own_head else None,
            chunk_rows=8,
        )
    )


@pytest.mark.parametrize(("n", "v"), [(0, 123), (1, 123), (17, 513), (3, 1), (0, 1)])
def test_sizes_that_fit_no_tile(n, v):
    hidden, weight, labels, _ = make(n, 37, v)
    if v > 1:
        assert_same(both(hidden, weight, labels))
    else:
        assert torch.equal(linear_logprob(hidden, weight, labels, backend="triton").logprob, torch.zeros(n))


def test_more_rows_than_a_tile_and_a_large_vocabulary():
    hidden, weight, labels, _ = make(129, 8, 40)
    assert_same(both(hidden, weight, labels))
    hidden, weight, labels, _ = make(2, 4, 5021)
    assert_same(both(hidden, weight, labels))


@pytest.mark.parametrize("level", [-200.0, 0.0, 200.0])
def test_logits_all_at_one_level_are_uniform(level):
    hidden = torch.full((3, 4), level / 4)
    labels = torch.tensor([0, 160, 322])
    out = linear_logprob(
        hidden, torch.ones(323, 4), labels, ref_hidden=torch.zeros(3, 4), kl="reverse", backend="triton"
    )
    log_v = torch.full((3,), 323.0).log()
    torch.testing.assert_close(out.logprob, -log_v, atol=1e-6, rtol=0)
    torch.testing.assert_close(out.entropy, log_v, atol=1e-6, rtol=0)
    torch.testing.assert_close(out.kl, torch.zeros(3), atol=2e-6, rtol=0)


@pytest.mark.parametrize("temperature", [0.01, 10.0])
def test_one_hot_rows_and_extreme_temperatures(temperature):
    hidden = torch.eye(3, 300) * 50
    labels = torch.tensor([0, 1, 299])
    assert_same(both(hidden, torch.eye(300), labels, temperature=temperature))


def test_a_row_has_the_same_bits_in_any_batch_any_chunk_and_with_any_option():
    hidden, weight, ref = dyadic(37, 16), dyadic(700, 16, seed=1), dyadic(37, 16, seed=2)
    labels = torch.arange(37) * 18
    whole = linear_logprob(hidden, weight, labels, backend="triton")
    with_kl = linear_logprob(
        hidden, weight, labels, ref_hidden=ref, kl="forward", backend="triton", chunk_rows=5
    )
    for at in (slice(0, 1), slice(3, 20), slice(36, 37)):
        part = linear_logprob(
            hidden[at], weight, labels[at], ref_hidden=ref[at], kl="forward", backend="triton"
        )
        for name in ("logprob", "entropy", "lse"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[at]), name
            assert torch.equal(getattr(part, name), getattr(with_kl, name)[at]), name
        assert torch.equal(part.kl, with_kl.kl[at])
        assert torch.equal(part.ref_logprob, with_kl.ref_logprob[at])


def test_reruns_have_the_same_bits_also_in_the_gradient():
    hidden, weight, labels, rows = make(m=30)
    runs = [both(hidden, weight, labels, rows=rows)[1] for _ in range(2)]
    for a, b in zip(runs[0][0] + runs[0][1], runs[1][0] + runs[1][1], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_ignored_labels_give_exactly_zero_and_move_nothing():
    hidden, weight, labels, rows = make(m=30)
    labels[rows == rows[5]] = -100
    hidden.requires_grad_()
    out = linear_logprob(hidden, weight, labels, rows=rows, backend="triton")
    assert torch.equal(out.logprob[labels == -100], torch.zeros(int((labels == -100).sum())))
    (d_hidden,) = torch.autograd.grad(out.logprob.sum(), hidden)
    assert torch.equal(d_hidden[rows[5]], torch.zeros(40))
    assert d_hidden.norm() > 0


def test_strides_do_not_matter():
    hidden, weight, labels, _ = make()
    want = linear_logprob(hidden, weight, labels, backend="triton")
    wide = torch.zeros(19, 50)
    wide[:, 3:43] = hidden
    got = linear_logprob(wide[:, 3:43], weight.t().contiguous().t(), labels, backend="triton")
    for a, b in zip(got[:3], want[:3], strict=True):
        assert torch.equal(a, b)


def test_offsets_beyond_two_to_the_31():
    """Pages that are never touched cost nothing: a few rows at the ends of a tensor of 2^31 elements and more."""
    small, weight, labels, _ = make(20, 16, 40)
    stride = 2**31 // 15 - 16  # inside a tile of 16 rows offsets fit 31 bits, the second tile begins beyond
    far = torch.empty(19 * stride + 16, dtype=torch.bfloat16).as_strided((20, 16), (stride, 1))
    far.copy_(small)
    near = linear_logprob(far.contiguous(), weight.bfloat16(), labels, backend="triton")
    got = linear_logprob(far, weight.bfloat16(), labels, backend="triton")
    assert torch.equal(got.logprob, near.logprob)
    assert 15 * stride + 16 < 2**31 < 16 * stride


def test_the_gradient_reaches_rows_beyond_two_to_the_31():
    v, n = 2**20, 2**11 + 1  # the last row begins at element 2^31
    products = torch.empty(n, v)
    products[-1] = 0
    rows = op.RowNumbers(
        torch.ones(n), torch.zeros(n), torch.full((n,), float(v)).log(), None, None, torch.zeros(n), None
    )
    labels = op.LabelRanges.of(n, torch.tensor([n - 1]), torch.tensor([v - 1]))
    head = op.Weights(torch.empty(0, 0), None)
    block, op.BLOCK = op.BLOCK, 2**20  # one step of the interpreter
    try:
        gradient = op.logits_gradient_(
            products, None, head, None, rows, None, None, torch.ones(1), labels, None, None, torch.tensor([n - 1])
        )  # fmt: skip
    finally:
        op.BLOCK = block
    assert gradient.shape == (1, v)
    assert float(gradient[0, -1]) == pytest.approx(1.0)
    assert float(gradient[0, 0]) == pytest.approx(-1 / v)


@pytest.mark.parametrize("of", ["entropy", "kl"])
def test_a_gradient_that_is_one_number_for_all_rows_reaches_each_of_them(of):
    hidden, weight, labels, _ = make()
    found = []
    for backend in ("reference", "triton"):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
        out = linear_logprob(
            *inputs, labels, ref_hidden=hidden.flip(0), kl="reverse", backend=backend, chunk_rows=8
        )
        found.append(
            torch.autograd.grad(getattr(out, of).sum(), inputs)
        )  # the gradient of a sum has stride 0
    for a, b in zip(*found, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_tile_read_whole_gives_what_one_read_in_halves_gives(monkeypatch):
    hidden, weight, labels, rows = make(m=30)
    bias = torch.randn(300, generator=torch.Generator().manual_seed(4))
    halves = linear_logprob(hidden, weight, labels, rows=rows, bias=bias, softcap=3.0, backend="triton")
    monkeypatch.setattr(op, "INTERPRETED", op.INTERPRETED._replace(halves=False))
    whole = linear_logprob(hidden, weight, labels, rows=rows, bias=bias, softcap=3.0, backend="triton")
    for a, b in zip(halves[:3], whole[:3], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("kl", [None, "reverse"])
def test_gradients_gathered_from_several_chunks_are_those_of_each(monkeypatch, kl):
    """What tensor cores take: compact rows, several chunks to a product."""
    hidden, weight, labels, rows = make(m=30)
    advantages = torch.randn(30, generator=torch.Generator().manual_seed(6))
    advantages[::4] = 0
    found = []
    for gathered in (0, 8, 100):
        for module in (logprob_op, loss_op):
            monkeypatch.setattr(module, "gathered_rows", lambda *_, rows=gathered: rows)
        loss_inputs, logprob_inputs = (
            [x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2)
        )
        loss, _ = linear_policy_loss(
            *loss_inputs, labels, advantages, objective=PolicyObjective(kl=kl, kl_coef=0.3), token_weight=torch.ones(30),
            rows=rows, ref_hidden=hidden.flip(0) if kl else None, backend="triton", chunk_rows=3,
        )  # fmt: skip
        out = linear_logprob(
            *logprob_inputs, labels, rows=rows, kl=kl, ref_hidden=hidden.flip(0) if kl else None, backend="triton", chunk_rows=3
        )  # fmt: skip
        composed = (out.logprob * advantages).sum() + (0 if kl is None else out.kl.sum())
        found.append(
            [*torch.autograd.grad(loss, loss_inputs), *torch.autograd.grad(composed, logprob_inputs)]
        )
    for got in found[1:]:
        for a, b in zip(got, found[0], strict=True):
            assert b.norm() > 0
            assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize(
    ("kind", "kl", "entropy_coef"),
    [("cispo", None, 0.0), ("grpo", "k3", 0.1), ("dapo", "reverse", 0.1), ("reinforce", "forward", 0.0)],
)
def test_the_loss_and_its_gradients_are_the_references(kind, kl, entropy_coef):
    hidden, weight, labels, rows = make(m=30)
    labels[3] = -100
    g = torch.Generator().manual_seed(5)
    bias, ref, old = (torch.randn(x, generator=g) for x in ((300,), (19, 40), (30,)))
    advantages, token_weight = torch.randn(30, generator=g), torch.rand(30, generator=g)
    advantages[5:14], token_weight[20:24] = 0, 0
    objective = PolicyObjective(kind, kl=kl, kl_coef=0.3 if kl else 0.0, entropy_coef=entropy_coef)
    found = []
    for backend in ("reference", "triton"):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        loss, stats = linear_policy_loss(
            *inputs[:2], labels, advantages, objective=objective, token_weight=token_weight, rows=rows,
            old_logprob=old - 6, rollout_weight=token_weight + 0.5, bias=inputs[2], softcap=5.0,
            temperature=torch.linspace(0.5, 2, 19), ref_hidden=ref if kl else None, backend=backend, chunk_rows=8,
        )  # fmt: skip
        found.append((stats.sums, torch.autograd.grad(2 * loss, inputs)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-4)
    for a, b in zip(found[1][1], found[0][1], strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("chunk_rows", [7, 100])
def test_on_policy_the_ratio_is_exactly_one(chunk_rows):
    hidden, weight, ref = dyadic(21, 16), dyadic(300, 16, seed=1), dyadic(21, 16, seed=2)
    labels, rows = (torch.arange(30) * 9) % 300, (torch.arange(30) * 5) % 21
    old = linear_logprob(hidden, weight, labels, rows=rows, temperature=0.7, backend="triton").logprob
    token_weight = torch.ones(30)
    token_weight[::3] = 0  # rows drop out: the others move to other places of other tiles
    for kl in (None, "reverse"):
        _, stats = linear_policy_loss(
            hidden.requires_grad_(), weight, labels, torch.ones(30), token_weight=token_weight, rows=rows, ref_hidden=ref,
            objective=PolicyObjective("ppo", kl=kl, kl_coef=0.1, clip_low=0.0, clip_high=0.0), temperature=0.7,
            old_logprob=old, backend="triton", chunk_rows=chunk_rows,
        )  # fmt: skip
        assert float(stats.mismatch_kl) == 0
        assert float(stats.clipped_fraction) == 0


def test_frozen_inputs_get_no_gradient_and_no_gradient_is_no_error():
    hidden, weight, labels, _ = make()
    arguments = {"objective": PolicyObjective(), "token_weight": torch.ones(19), "backend": "triton"}
    loss, _ = linear_policy_loss(hidden, weight, labels, torch.ones(19), **arguments)
    assert not loss.requires_grad
    loss, _ = linear_policy_loss(hidden.requires_grad_(), weight, labels, torch.ones(19), **arguments)
    loss.backward()
    assert hidden.grad.norm() > 0
    assert weight.grad is None


def test_the_interpreter_is_taken_only_by_name():
    assert backends()["linear_logprob"]["taken"] == "reference"
    assert "interpreter" in backends()["linear_logprob"]["others"]["triton"]


class Waits(TorchDispatchMode):
    """Counts the operations that make a host wait for a device: sizes and numbers that depend on values."""

    NAMES = ("nonzero", "_local_scalar_dense", "unique_consecutive", "masked_select")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        indexed_by_bool = "index" in name and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool
            for x in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        self.count += any(n in name for n in self.NAMES) or indexed_by_bool
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kl", [None, "k3"])
def test_the_loop_over_chunks_waits_for_nothing(monkeypatch, kl):
    """The waits of a call are those in front of the loop, as many for 3 chunks as for 10."""
    monkeypatch.delenv("FST_CHECK", raising=False)
    results = []

    def plain(*arguments, **named):  # an operator's own operations are hidden from the mode
        with torch.no_grad():
            results.append(loss_op.linear_policy_loss_op._init_fn(*arguments, **named))
        return results[-1]

    monkeypatch.setattr(loss_api, "linear_policy_loss_op", plain)
    hidden, weight, labels, _ = make()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    advantages = torch.where(torch.arange(19) % 3 == 0, 0.0, 1.0)
    counts = []
    for chunk_rows in (8, 2):
        with Waits() as waits:
            linear_policy_loss(
                hidden, weight, labels, advantages, objective=PolicyObjective("ppo", kl=kl, kl_coef=0.1 if kl else 0.0),
                token_weight=torch.ones(19), old_logprob=torch.full((19,), -5.7),
                ref_logprob=torch.full((19,), -5.5) if kl else None, backend="triton", chunk_rows=chunk_rows,
            )  # fmt: skip
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0
    (loss, _, d_hidden, d_weight, _), other = results
    for a, b in zip((loss, d_hidden, d_weight), (other[0], *other[2:4]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert d_hidden[1].any()
    assert d_hidden[::3].any() == (kl is not None)
