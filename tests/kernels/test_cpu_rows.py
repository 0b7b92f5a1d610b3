"""The C++ row operations of a transformer layer against the same in float64, and what is said where they cannot be compiled."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fst_kernels import backends, cpu, library
from tests.compiler import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"backend=cpu: {why_not()}")
SIZES = [(1, 8), (3, 128), (2, 13), (700, 96)]  # the last one is shared by threads


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "width"), SIZES)
def test_rms_norm(n, width):
    x = 3 * rows(n, width)
    want = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(cpu.rms_norm(x, 1e-6).double(), want, rtol=1e-6, atol=1e-6)
    zeros = torch.zeros(2, width)
    assert torch.equal(cpu.rms_norm(zeros, 1e-6), zeros)


@pytest.mark.parametrize(("n", "width"), SIZES)
def test_gate(n, width):
    x = 10 * rows(n, 2 * width)
    x[0, :4] = torch.tensor([-200.0, 200.0, -88.0, 0.0])
    gate, up = x.double().chunk(2, 1)
    torch.testing.assert_close(cpu.gate(x).double(), F.silu(gate) * up, rtol=2e-6, atol=1e-6)
    x[0, 1] = torch.nan
    assert cpu.gate(x).isnan().nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize(("n", "heads", "dim"), [(1, 1, 2), (3, 4, 32), (5, 2, 20), (300, 6, 64)])
@pytest.mark.parametrize("normed", [True, False])
def test_norm_and_turn_in_place_among_other_heads(n, heads, dim, normed):
    wide = rows(n, (heads + 2) * dim).view(n, heads + 2, dim)
    before = wide.double()
    norms = rows(heads, dim, seed=1) if normed else None
    angle = rows(n, dim // 2, seed=2).double()
    turn = torch.polar(torch.full_like(angle, 1.5), angle)
    cpu.norm_and_turn(wide[:, :heads], norms, torch.view_as_real(turn.to(torch.complex64)), 1e-6)
    want = before[:, :heads]
    if norms is not None:
        want = want / (want.square().mean(2, keepdim=True) + 1e-6).sqrt() * norms.double()
    pairs = torch.view_as_complex(want.reshape(n, heads, -1, 2)) * turn[:, None]
    torch.testing.assert_close(
        wide[:, :heads].double(), torch.view_as_real(pairs).flatten(2), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(wide[:, heads:].double(), before[:, heads:])


@pytest.mark.parametrize("n", [0, 1, 5, 300])
def test_scatter_into_a_pool_that_lies_by_head(n):
    x = rows(n, 6 * 40).view(n, 6, 40)[:, 1:5]
    at = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:n].contiguous()
    pool, want = (torch.zeros(4, 400, 40).transpose(0, 1) for _ in range(2))
    want[at] = x
    cpu.scatter(x, pool, at)
    assert torch.equal(pool, want)


def test_they_are_taken_on_this_machine():
    assert cpu.why_not() is None
    if not torch.cuda.is_available():
        for op in ("cascade_decode_attention", "tree_attention", "sample_tokens"):
            assert backends()[op]["taken"] == "cpu"


def test_without_a_compiler_or_with_one_that_fails_the_reference_is_taken_and_the_reason_said():
    code = "import fst_kernels; print(fst_kernels.backends()['tree_attention'])"
    for compiler, reason, warned in (
        ("no-such-compiler", "it needs g++, or another compiler named by CXX", False),
        ("g++ --no-such-option", "unrecognized command-line option", True),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "CXX": compiler, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "'taken': 'reference'" in done.stdout
        assert reason in done.stdout
        assert ("UserWarning: fst_kernels: backend=cpu could not be compiled" in done.stderr) == warned


def test_a_library_of_the_same_sources_is_compiled_once():
    path = library._build("cpu")
    made = path.stat().st_mtime_ns
    assert library._build("cpu") == path
    assert path.stat().st_mtime_ns == made


def gradients(outcome, inputs, seed=9):
    """The gradients of a weighted sum of `outcome`."""
    by = torch.randn(outcome.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad((outcome * by.to(outcome.dtype)).sum(), inputs)


def doubles(*tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def compare(ours, theirs, tolerance=2e-6):
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            a.double(), e, rtol=tolerance, atol=1e-30 + tolerance * float(e.detach().abs().max())
        )


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 3, 13), (1, 700, 96), (3, 5, 4, 16), (1, 2500, 24)])
@pytest.mark.parametrize("trained", [True, False])
def test_norm_and_its_gradients(shape, trained):
    x, weight = 3 * rows(*shape).requires_grad_(), rows(shape[-1], seed=1).requires_grad_(trained)
    x64, w64 = doubles(x, weight)
    out = cpu.norm(x, weight, 1e-6)
    want = x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w64
    wrt = slice(2 if trained else 1)
    compare([out, *gradients(out, (x, weight)[wrt])], [want, *gradients(want, (x64, w64)[wrt])])
    assert not cpu.norm(x.detach(), weight.detach(), 1e-6).requires_grad


def test_the_gradient_of_a_norms_weight_does_not_depend_on_threads():
    x, weight = rows(700, 96).requires_grad_(), rows(96, seed=1).requires_grad_()
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append(gradients(cpu.norm(x, weight, 1e-6), (x, weight)))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(1, 1), (2, 13), (3, 7, 96), (1, 2500, 24)])
def test_swiglu_and_its_gradients(shape):
    gate, up = 10 * rows(*shape).requires_grad_(), rows(*shape, seed=1).requires_grad_()
    with torch.no_grad():
        gate.view(-1)[:4] = torch.tensor([-200.0, 200.0, -88.0, 0.0])[: gate.numel()]
    g64, u64 = doubles(gate, up)
    out, want = cpu.swiglu(gate, up), F.silu(g64) * u64
    compare([out, *gradients(out, (gate, up))], [want, *gradients(want, (g64, u64))])
    with torch.no_grad():
        gate.view(-1)[-1] = torch.nan
    out = cpu.swiglu(gate, up)
    assert [t.isnan().sum() for t in (out, *gradients(out, (gate, up)))] == [1, 1, 1]


@pytest.mark.parametrize(("n", "heads", "dim"), [(1, 1, 2), (3, 4, 32), (5, 2, 20), (700, 6, 64)])
def test_rotate_and_its_gradient_in_any_layout(n, heads, dim):
    wide = rows(n, (heads + 1) * dim).view(n, heads + 1, dim)
    cos, sin = (
        rows(n, dim, seed=1),
        rows(n, dim, seed=2),
    )  # the halves differ: the gradient is the exact transpose
    for x in (
        wide[:, :heads],
        wide[:, :heads].transpose(0, 1).contiguous().transpose(0, 1),
        wide[..., : dim // 2].repeat(1, 1, 2)[:, 1:],
    ):
        x = x.detach().requires_grad_()
        x64 = x.detach().double().requires_grad_()
        low, high = x64.chunk(2, -1)
        want = x64 * cos.double()[:, None] + torch.cat([-high, low], -1) * sin.double()[:, None]
        out = cpu.rotate(x, cos, sin)
        compare([out, *gradients(out, (x,))], [want, *gradients(want, (x64,))])
