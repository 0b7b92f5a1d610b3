"""linear_logprob against log_softmax on whole logits, and what it promises bit by bit."""

import ast
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fst_kernels
from fst_kernels import backends, linear_logprob
from fst_kernels.linear_logprob import reference


def oracle(hidden, weight, labels, rows=None, bias=None, temperature=1.0, softcap=None, ref=None, kl=None):
    """The definition on whole logits: logprob, entropy, lse, ref_logprob, kl. ref: hidden, weight, bias."""

    def log_softmax(hidden, weight, bias):
        x = hidden @ weight.t() + (0 if bias is None else bias)
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        z = x / (temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature)
        return z, z.log_softmax(-1)

    rows = torch.arange(len(labels)) if rows is None else rows
    z, log_p = log_softmax(hidden, weight, bias)
    live = labels != -100

    def of_labels(log):
        return torch.where(live, log[rows, labels.clamp(min=0)], 0.0)

    entropy = -(log_p.exp() * log_p).sum(-1)
    ref_logprob = divergence = None
    if ref is not None:
        log_q = log_softmax(*ref)[1].detach()
        ref_logprob = of_labels(log_q)
        if kl == "reverse":
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        elif kl == "forward":
            divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    return of_labels(log_p), entropy, z.logsumexp(-1), ref_logprob, divergence


def make(n=9, h=5, v=11, m=None, *, seed=0, dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, h, generator=g), torch.randn(v, h, generator=g) * scale
    labels = torch.randint(0, v, (n if m is None else m,), generator=g)
    rows = None if m is None else torch.randint(0, n, (m,), generator=g)
    return hidden.to(dtype), weight.to(dtype), labels, rows


def equal(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def loss_of(out):
    """Something that reaches every differentiable output, with a different weight everywhere."""
    total = 0.0
    for x in (out[0], out[1], out[4]):
        if x is not None:
            total = total + (x * torch.linspace(-1, 2, len(x), dtype=x.dtype)).sum()
    return total


@pytest.mark.parametrize("kl", [None, "reverse", "forward"])
@pytest.mark.parametrize("several", [False, True], ids=["one label a row", "several labels a row"])
def test_values_and_gradients_equal_autograd_of_whole_logits(kl, several):
    grid = itertools.product(
        (None, 3.0), (1.0, 0.01, 10.0, "per row"), (False, True), ("none", "own", "shared")
    )
    for i, (softcap, temperature, biased, reference_head) in enumerate(grid):
        if kl is not None and reference_head == "none":
            continue
        hidden, weight, labels, rows = make(m=16 if several else None, seed=i)
        labels[2], labels[0], labels[-1] = -100, 0, 10
        g = torch.Generator().manual_seed(i)
        bias = torch.randn(11, generator=g).double() if biased else None
        t = torch.rand(9, generator=g).double() + 0.3 if temperature == "per row" else temperature
        ref_hidden = torch.randn(9, 5, generator=g).double()
        if reference_head == "own":
            ref = (torch.randn(9, 3, generator=g).double(), torch.randn(11, 3, generator=g).double(), bias)
            given = dict(zip(("ref_hidden", "ref_weight", "ref_bias"), ref, strict=True))
        elif reference_head == "shared":
            ref, given = (ref_hidden, weight, bias), {"ref_hidden": ref_hidden}
        else:
            ref, given = None, {}
        inputs = [x.clone().requires_grad_() for x in (hidden, weight, *([bias] if biased else []))]
        arguments = {
            "rows": rows,
            "bias": inputs[2] if biased else None,
            "temperature": t,
            "softcap": softcap,
        }
        want = oracle(*inputs[:2], labels, ref=ref, kl=kl, **arguments)
        got = linear_logprob(*inputs[:2], labels, kl=kl, chunk_rows=4, **arguments, **given)
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        want_grads = torch.autograd.grad(loss_of(want), inputs)
        got_grads = torch.autograd.grad(loss_of(got), inputs)
        for a, b in zip(got_grads, want_grads, strict=True):
            assert b.abs().max() > 0
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * float(b.abs().max()))


@pytest.mark.parametrize("kl", [None, "reverse", "forward"])
def test_gradcheck(kl):
    hidden, weight, labels, rows = make(4, 3, 5, m=7)
    labels[1] = -100
    bias, ref_hidden = torch.randn(5).double(), torch.randn(4, 3).double()
    temperature = torch.rand(4).double() + 0.5

    def outputs(hidden, weight, bias):
        out = linear_logprob(
            hidden, weight, labels, rows=rows, bias=bias, temperature=temperature, softcap=2.0, ref_hidden=ref_hidden,
            ref_weight=torch.ones(5, 3).double(), kl=kl, chunk_rows=3,
        )  # fmt: skip
        return [x for x in (out.logprob, out.entropy, out.kl) if x is not None]

    torch.autograd.gradcheck(outputs, [x.requires_grad_() for x in (hidden, weight, bias)])


@pytest.mark.parametrize("n", [0, 1, 127, 129])
@pytest.mark.parametrize("v", [123, 50257])
def test_sizes_that_fit_no_tile(n, v):
    hidden, weight, labels, _ = make(n, 37, v, dtype=torch.float32, scale=0.3)
    if n:
        labels[0], labels[-1] = 0, v - 1
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    truth = [x.detach().double().requires_grad_() for x in inputs]
    got, want = linear_logprob(*inputs, labels, chunk_rows=100), oracle(*truth, labels)
    for a, b in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=4e-6)
    grads, truths = torch.autograd.grad(loss_of(got), inputs), torch.autograd.grad(loss_of(want), truth)
    for a, b in zip(grads, truths, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("level", [-200.0, 0.0, 200.0])
def test_logits_all_at_one_level_are_uniform(level):
    hidden = torch.full((3, 4), level / 4, requires_grad=True)
    out = linear_logprob(
        hidden, torch.ones(123, 4), torch.tensor([0, 60, 122]), ref_hidden=torch.zeros(3, 4), kl="reverse"
    )
    log_v = torch.full((3,), 123.0).log()
    torch.testing.assert_close(out.logprob, -log_v, atol=2e-5, rtol=0)
    torch.testing.assert_close(out.entropy, log_v, atol=2e-5, rtol=0)
    torch.testing.assert_close(out.kl, torch.zeros(3), atol=2e-5, rtol=0)
    (grad,) = torch.autograd.grad(loss_of(out), hidden)
    torch.testing.assert_close(grad, torch.zeros(3, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_one_hot_rows_stay_finite(kl):
    hidden = torch.tensor([[400.0, 0.0], [-400.0, 0.0], [0.0, 400.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    out = linear_logprob(hidden, weight, torch.tensor([0, 0, 2]), ref_hidden=torch.zeros(3, 2), kl=kl)
    assert out.logprob.tolist() == [0.0, -800.0, 0.0]
    assert out.entropy.tolist() == [0.0, 0.0, 0.0]
    grads = torch.autograd.grad(loss_of(out), (hidden, weight))
    assert all(torch.isfinite(x).all() for x in (out.kl, *grads))
    assert grads[0][1].tolist() != [0.0, 0.0]


def test_each_row_of_the_logits_gradient_sums_to_zero():
    hidden, weight, labels, rows = make(9, 5, 200, m=20)
    z, r = hidden @ weight.t(), hidden.flip(0) @ weight.t()
    order = torch.argsort(rows, stable=True)
    scratch = reference.Scratch(weight)
    for kl in ("reverse", "forward"):
        stats = reference.row_statistics(z.clone(), r.clone(), kl, scratch)
        d_z = reference.logits_gradient(
            stats,
            kl,
            torch.randn(20).double(),
            rows[order],
            labels[order],
            torch.randn(9).double(),
            torch.randn(9).double(),
            scratch,
        )
        assert d_z.abs().max() > 1e-2
        assert d_z.sum(-1).abs().max() < 1e-12


def test_ignored_labels_give_exactly_zero():
    hidden, weight, labels, rows = make(9, 5, 11, m=16)
    labels[::2] = -100
    hidden.requires_grad_()
    out = linear_logprob(hidden, weight, labels, rows=rows, ref_hidden=hidden.detach() + 1)
    assert (out.logprob[::2] == 0).all()
    assert (out.ref_logprob[::2] == 0).all()
    assert (out.logprob[1::2] < 0).all()
    (grad,) = torch.autograd.grad(out.logprob[::2].sum(), hidden)
    assert (grad == 0).all()


def test_rows_without_a_coefficient_are_left_out_of_the_backward(monkeypatch):
    monkeypatch.delenv("FST_CHECK")  # which would refuse the NaN
    hidden, weight, labels, _ = make(9, 5, 11)
    hidden[4] = torch.nan
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    out = linear_logprob(*inputs, labels)
    assert out.logprob[4].isnan()
    keep = torch.ones(9, dtype=torch.float64)
    keep[4] = 0
    got = torch.autograd.grad(out.logprob, inputs, keep)
    without = [x.detach().requires_grad_() for x in (hidden[keep > 0], weight)]
    want = torch.autograd.grad(linear_logprob(*without, labels[keep > 0]).logprob.sum(), without)
    assert (got[0][4] == 0).all()
    torch.testing.assert_close(got[0][keep > 0], want[0])
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize(
    ("v", "dtype"), [(123, torch.float32), (123, torch.bfloat16), (50257, torch.float32)]
)
def test_a_row_has_the_same_bits_in_any_batch_and_any_chunk(v, dtype):
    hidden, weight, labels, _ = make(200, 48, v, dtype=dtype, scale=0.3)

    def run(pick, chunk_rows=None):
        return linear_logprob(
            hidden[pick],
            weight,
            labels[pick],
            ref_hidden=hidden.flip(0)[pick],
            kl="reverse",
            chunk_rows=chunk_rows,
        )

    whole = run(slice(None))
    assert equal(whole, run(slice(None)))
    for pick in (slice(0, 1), slice(199, 200), slice(3, 8), slice(50, 113), slice(71, 200)):
        for chunk_rows in (None, 50):
            assert equal([x[pick] for x in whole], run(pick, chunk_rows))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert equal([x[order] for x in whole], run(order))


def test_gradients_have_the_same_bits_on_every_run():
    hidden, weight, labels, rows = make(64, 32, 123, m=500, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    runs = [
        torch.autograd.grad(loss_of(linear_logprob(*inputs, labels, rows=rows)), inputs) for _ in range(3)
    ]
    assert equal(runs[0], runs[1])
    assert equal(runs[0], runs[2])


def test_strides_do_not_matter():
    hidden, weight, labels, rows = make(9, 5, 11, m=16)
    t = torch.rand(18).double()[::2] + 0.5
    want = linear_logprob(hidden, weight, labels, rows=rows, temperature=t.clone())
    spread = [torch.stack((x, x), -1)[..., 0] for x in (hidden, weight, labels, rows)]
    assert not any(x.is_contiguous() for x in spread)
    turned = [x.requires_grad_() for x in (spread[0].t().contiguous().t(), spread[1].t().contiguous().t())]
    got = linear_logprob(*turned, spread[2], rows=spread[3].int(), temperature=t)
    for a, b in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(a, b)
    straight = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    same = linear_logprob(*straight, labels, rows=rows, temperature=t)
    for a, b in zip(
        torch.autograd.grad(loss_of(got), turned), torch.autograd.grad(loss_of(same), straight), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_bf16_inputs_keep_fp32_statistics():
    hidden, weight, labels, _ = make(60, 64, 500, dtype=torch.bfloat16, scale=0.2)
    ref = hidden.flip(0)
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    truth = [x.detach().double().requires_grad_() for x in inputs]
    got = linear_logprob(*inputs, labels, ref_hidden=ref, kl="reverse")
    want = oracle(*truth, labels, ref=(ref.double(), truth[1], None), kl="reverse")
    for a, b, cap in zip(got, want, (1e-5, 1e-5, 1e-5, 1e-5, 1e-5), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < cap
    for a, b in zip(
        torch.autograd.grad(loss_of(got), inputs), torch.autograd.grad(loss_of(want), truth), strict=True
    ):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 4e-3 * b.norm()


def test_autocast_does_not_reach_inside():
    hidden, weight, labels, _ = make(20, 16, 30, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    want = linear_logprob(*inputs, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_logprob(*inputs, labels)
        grads = torch.autograd.grad(loss_of(got), inputs)
    assert equal(got[:3], want[:3])
    assert equal(grads, torch.autograd.grad(loss_of(want), inputs))


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, labels, _ = make()
    ref_hidden, ref_weight = (
        torch.randn(9, 5).double().requires_grad_(),
        torch.randn(11, 5).double().requires_grad_(),
    )
    both = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    want = torch.autograd.grad(loss_of(linear_logprob(*both, labels)), both)
    loss_of(linear_logprob(both[0], weight, labels, ref_hidden=ref_hidden, ref_weight=ref_weight)).backward()
    assert torch.equal(both[0].grad, want[0])
    assert both[1].grad is ref_hidden.grad is ref_weight.grad is None
    loss_of(linear_logprob(hidden, both[1], labels)).backward()
    assert torch.equal(both[1].grad, want[1])
    out = linear_logprob(both[0], weight, labels, ref_hidden=ref_hidden, ref_weight=ref_weight)
    assert not out.lse.requires_grad
    assert not out.ref_logprob.requires_grad


def test_a_tied_weight_sums_both_gradients():
    _, weight, labels, _ = make()
    tokens = torch.arange(9) % 11
    tied = weight.clone().requires_grad_()
    apart = [weight.clone().requires_grad_() for _ in range(2)]
    loss_of(linear_logprob(tied[tokens], tied, labels)).backward()
    loss_of(linear_logprob(apart[0][tokens], apart[1], labels)).backward()
    torch.testing.assert_close(tied.grad, apart[0].grad + apart[1].grad)


def test_second_derivatives_are_refused():
    hidden, weight, labels, _ = make()
    hidden.requires_grad_()
    out = linear_logprob(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="linear_logprob has first derivatives only"):
        torch.autograd.grad(out.logprob.sum(), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(9)}, r"hidden has shape \[9\]; allowed: \[N, H\]"),
        (
            {"hidden": torch.zeros(9, 5, dtype=torch.int64)},
            "hidden has dtype int64; allowed: float32, bfloat16",
        ),
        ({"weight": torch.zeros(11, 6).double()}, r"weight has shape \[11, 6\]; allowed: \[V, 5\]"),
        ({"weight": torch.zeros(11, 5)}, "weight has dtype float32; allowed: float64"),
        ({"weight": torch.zeros(11, 5, device="meta").double()}, "weight is on meta; it must be on cpu"),
        ({"labels": torch.zeros(8, dtype=torch.int64)}, r"labels has shape \[8\]; allowed: \[9\]"),
        ({"labels": torch.zeros(9, dtype=torch.int32)}, "labels has dtype int32; allowed: int64"),
        ({"labels": torch.tensor([0] * 8 + [11])}, r"labels\[8\]=11; allowed: 0 <= labels < 11, or -100"),
        ({"labels": torch.tensor([0, -1] + [0] * 7)}, r"labels\[1\]=-1; allowed"),
        ({"rows": torch.tensor([0] * 8 + [9])}, r"rows\[8\]=9; allowed: 0 <= rows < 9"),
        ({"rows": torch.zeros(8, dtype=torch.int64)}, r"rows has shape \[8\]; allowed: \[9\]"),
        ({"bias": torch.zeros(5)}, r"bias has shape \[5\]; allowed: \[11\]"),
        ({"temperature": 0.0}, r"temperature=0\.0; allowed: a finite number > 0"),
        ({"temperature": torch.tensor([1.0] * 8 + [0.0])}, r"temperature\[8\]=0\.0; allowed"),
        ({"temperature": torch.ones(3)}, r"temperature has shape \[3\]; allowed: \[9\]"),
        ({"softcap": -1.0}, r"softcap=-1\.0; allowed"),
        ({"kl": "reverse"}, "kl='reverse' needs ref_hidden"),
        (
            {"kl": "k3", "ref_hidden": torch.zeros(9, 5).double()},
            "kl='k3'; allowed: None, 'reverse', 'forward'",
        ),
        ({"ref_hidden": torch.zeros(9, 4).double()}, r"ref_hidden has shape \[9, 4\]; allowed: \[9, 5\]"),
        ({"ref_hidden": torch.zeros(9, 4), "ref_weight": torch.zeros(11, 3)}, r"allowed: \[11, 4\]"),
        ({"ref_weight": torch.zeros(11, 5)}, "ref_weight is given without ref_hidden"),
        ({"weight": torch.zeros(0, 5).double()}, r"weight has shape \[0, H\]; a vocabulary of at least 1"),
        ({"bias": torch.tensor([0.0] * 10 + [-torch.inf])}, r"bias\[10\]=-inf; it must be finite"),
        (
            {"ref_hidden": torch.zeros(9, 4), "ref_weight": torch.zeros(11, 4)},
            "ref_hidden has dtype torch.float32 and hidden torch.float64",
        ),
        ({"chunk_rows": 0}, "chunk_rows=0; allowed"),
        ({"backend": "tpu"}, "backend='tpu' is not a backend; allowed: reference, triton, cpu, cuda, host"),
    ],
    ids=lambda x: None if isinstance(x, str) else "+".join(x),
)
def test_bad_arguments_are_named(change, message):
    hidden, weight, labels, _ = make()
    arguments = {"hidden": hidden, "weight": weight, "labels": labels} | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_hidden_states_that_are_not_finite_are_named_where_a_label_reads_them(value):
    hidden, weight, labels, _ = make()
    hidden[3, 2] = value
    with pytest.raises(
        ValueError, match=r"hidden\[3\] holds NaN or Inf under a live label; it must be finite"
    ):
        linear_logprob(hidden, weight, labels)
    with pytest.raises(ValueError, match=r"ref_hidden\[3\] holds NaN or Inf"):
        linear_logprob(torch.zeros_like(hidden), weight, labels, ref_hidden=hidden)
    labels[3] = -100
    assert torch.isfinite(linear_logprob(hidden, weight, labels).logprob).all()


def test_a_backend_asked_for_by_name_runs_or_raises(monkeypatch):
    hidden, weight, labels, _ = make()
    for name in ("cuda", "host"):
        with pytest.raises(
            RuntimeError, match=f"backend={name} cannot run: there is no {name} implementation"
        ):
            linear_logprob(hidden, weight, labels, backend=name)
    report = backends()
    assert report["linear_logprob"]["taken"] == "reference"
    assert {report["sample_tokens"]["taken"], *report["sample_tokens"]["others"]} == {
        "reference", "cpu", "cuda", "host",
    }  # fmt: skip
    monkeypatch.setenv("FST_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="FST_KERNELS=triton cannot run"):
        linear_logprob(hidden, weight, labels)
    named = linear_logprob(hidden, weight, labels, backend="reference")
    torch.testing.assert_close(named.logprob, oracle(hidden, weight, labels)[0])
    monkeypatch.setenv("FST_KERNELS", "tritn")
    with pytest.raises(ValueError, match="FST_KERNELS='tritn' is not a backend"):
        linear_logprob(hidden, weight, labels)


def test_the_package_imports_torch_and_numpy_only_and_triton_in_its_own_modules():
    allowed = {"fst_kernels", "torch", "numpy", *sys.stdlib_module_names}
    sources = list(Path(fst_kernels.__file__).parent.rglob("*.py"))
    assert len(sources) > 10
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            here = allowed | {"triton"} if path.stem in ("triton", "triton_kernels") else allowed
        assert {name.partition(".")[0] for name in names} <= here, path
