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


def rows(n, width, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


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
    norms = rows(heads, dim, 1) if normed else None
    angle = rows(n, dim // 2, 2).double()
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
