"""linear_logprob and linear_policy_loss in Triton: claims under the interpreter (in a process of their own), and on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fst_kernels import PolicyObjective, linear_logprob, linear_policy_loss

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


@needs_triton
def test_every_claim_holds_under_the_interpreter():
    claims = Path(__file__).with_name("linear_triton_claims.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(claims),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_triton
def test_asked_for_by_name_on_the_cpu_it_says_why_it_cannot_run():
    hidden, weight, labels = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 4])
    with pytest.raises(RuntimeError, match="backend=triton cannot run: it needs a CUDA device"):
        linear_logprob(hidden, weight, labels, backend="triton")
    with pytest.raises(RuntimeError, match="sum in float32, the tensors are float64"):
        linear_logprob(hidden.double(), weight.double(), labels, backend="triton")


def gpu_case(n=1000, h=256, v=50257):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=g).bfloat16().cuda()
    weight = (torch.randn(v, h, generator=g) * 0.1).bfloat16().cuda()
    return hidden, weight, torch.randint(0, v, (n,), generator=g).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("kl", [None, "reverse", "forward"])
@pytest.mark.parametrize("h", [256, 250, 100])
def test_on_a_gpu_bf16_keeps_fp32_statistics(kl, h):
    hidden, weight, labels = gpu_case(h=h)
    ref = hidden.flip(0).contiguous()
    found = []
    for dtype, backend in ((torch.float32, "reference"), (torch.bfloat16, "triton")):
        inputs = [x.to(dtype).detach().requires_grad_() for x in (hidden, weight)]
        out = linear_logprob(
            *inputs, labels, ref_hidden=ref.to(dtype), kl=kl, backend=backend, temperature=0.8
        )
        loss = out.logprob.sum() + out.entropy.square().sum() + (0 if kl is None else out.kl.sum())
        found.append((out, torch.autograd.grad(loss, inputs)))
    (want, want_grads), (got, got_grads) = found
    assert (got.logprob - want.logprob).abs().max() < 1e-3
    assert (got.ref_logprob - want.ref_logprob).abs().max() < 1e-3
    assert (got.entropy - want.entropy).abs().max() < 2e-3
    if kl is not None:
        assert (got.kl - want.kl).abs().max() < 2e-3
    for a, b in zip(got_grads, want_grads, strict=True):
        assert (a.float() - b).norm() <= 4e-3 * b.norm()


@pytest.mark.gpu
def test_on_a_gpu_a_row_has_the_same_bits_in_any_batch_and_the_ratio_is_exactly_one():
    hidden, weight, labels = gpu_case()
    whole = linear_logprob(hidden, weight, labels, backend="triton")
    for at in (slice(0, 1), slice(77, 500), slice(999, 1000)):
        part = linear_logprob(hidden[at], weight, labels[at], backend="triton")
        for a, b in zip(part[:3], whole[:3], strict=True):
            assert torch.equal(a, b[at])
    token_weight = torch.ones(1000, device="cuda")
    token_weight[::3] = 0
    gradients = []
    for chunk_rows in (128, 384, 384):
        inputs = [x.detach().requires_grad_() for x in (hidden, weight)]
        loss, stats = linear_policy_loss(
            *inputs, labels, torch.randn(1000, generator=torch.Generator().manual_seed(1)).cuda(), backend="triton",
            objective=PolicyObjective(), token_weight=token_weight, old_logprob=whole.logprob, chunk_rows=chunk_rows,
        )  # fmt: skip
        assert float(stats.mismatch_kl) == 0
        gradients.append(torch.autograd.grad(loss, inputs))
    for a, b in zip(*gradients[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("kl", [None, "reverse", "forward"])
def test_on_a_gpu_the_losss_gradients_are_those_of_fp32(kl):
    hidden, weight, labels = gpu_case(300)
    objective = PolicyObjective("dapo", kl=kl, kl_coef=0.1 if kl else 0.0, entropy_coef=0.01 if kl else 0.0)
    g = torch.Generator().manual_seed(2)
    advantages, bias = torch.randn(300, generator=g).cuda(), torch.randn(50257, generator=g).bfloat16().cuda()
    found = []
    for dtype, backend in ((torch.float32, "reference"), (torch.bfloat16, "triton")):
        inputs = [x.to(dtype).detach().requires_grad_() for x in (hidden, weight, bias)]
        loss, _ = linear_policy_loss(
            *inputs[:2], labels, advantages, objective=objective, token_weight=torch.ones(300, device="cuda"),
            bias=inputs[2], ref_hidden=hidden.flip(0).to(dtype).contiguous() if kl else None, softcap=20.0,
            backend=backend,
        )  # fmt: skip
        found.append(torch.autograd.grad(loss, inputs))
    for a, b in zip(found[1], found[0], strict=True):
        assert b.norm() > 0
        assert (a.float() - b).norm() <= 4e-3 * b.norm()
