"""GpuForward: its numbers against transformers in Triton's interpreter, whose memory its weights are, and when it is not used."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")  # scripts/gpu_check.sh loads this file on machines that may lack it
pytest.importorskip("triton")

from fst_fast.policy import gpu_forward
from fst_fast.policy.gpu_forward import GpuForward, joined, unsupported_reason
from fst_fast.policy.packing import model_inputs
from fst_fast.rollout import cascade, kv_pool, prefill
from fst_kernels import cascade_decode_attention
from fst_kernels.tree_attention import tree_attention
from tests.fst_fast.test_cpu_forward import batch
from tests.fst_fast.test_rollout import assert_same, forest, make_model, padded, requests_of, sample

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KINDS = ("llama", "qwen2", "qwen3")
inside = pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1")


def trained(kind: str) -> Any:
    """A model whose norms are not ones and whose biases are not zeros."""
    model = make_model(kind)
    for name, module in model.named_modules():
        if "norm" in name:
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if name.endswith("proj") and module.bias is not None:
            nn.init.normal_(module.bias)
    return model


@pytest.mark.emulated
@pytest.mark.skipif(INTERPRETED, reason="the outer process runs this file")
def test_in_the_interpreter_it_is_the_transformers_forward():
    """Triton reads TRITON_INTERPRET at import, so this file runs again in its own process."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "inside", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "6 passed" in done.stdout


@inside
@pytest.mark.parametrize("kind", KINDS)
def test_inside_logits_are_those_of_transformers(kind):
    model, b = trained(kind), batch()
    read = torch.tensor([3, 11, 20])
    with torch.inference_mode():
        expected = model(**model_inputs(b)).logits[0]
        forward = GpuForward(model)
        whole = forward(b.input_ids[0], b.position_ids[0], b.plan)
        some = forward(b.input_ids[0], b.position_ids[0], b.plan, read)
        again = model(**model_inputs(b)).logits[0]
    torch.testing.assert_close(whole, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(some, expected[read], atol=2e-5, rtol=1e-5)
    assert torch.equal(again, expected), "the model computes the same after its weights have moved"


@inside
@pytest.mark.parametrize("kind", KINDS)
def test_inside_rollouts_are_those_of_the_padded_path(kind, monkeypatch):
    for module in (cascade, prefill, kv_pool):
        monkeypatch.setattr(module, "choose_backend", lambda *_: "triton")  # as on a GPU
    for module in (cascade, prefill):
        monkeypatch.setattr(module, "cascade_decode_attention", partial(cascade_decode_attention))
    monkeypatch.setattr("fst_fast.rollout.engine.unsupported_reason", lambda _: "as on a GPU")
    monkeypatch.setattr(gpu_forward, "unsupported_reason", lambda _: None)
    monkeypatch.setattr(prefill, "tree_attention", partial(tree_attention, backend="triton"))
    model = trained(kind)
    plain = make_model(kind, "sdpa")
    plain.load_state_dict(model.state_dict())
    requests = requests_of(contexts=(18, 7), problems=(3, 9), samples=1)
    said = sample(padded(plain), requests, 4)
    engine = forest(model, max_batch=4, prefill_tokens=16)
    assert_same(sample(engine, requests, 4), said)
    assert isinstance(engine._forward, GpuForward)


def test_weights_side_by_side_are_read_where_they_are():
    flat = torch.arange(60.0)
    a, b = flat[10:30].view(5, 4), flat[30:42].view(3, 4)
    both = joined([a, b])
    assert both.data_ptr() == a.data_ptr()
    assert torch.equal(both, torch.cat([a, b]))
    flat.mul_(2)  # a step of the optimiser
    assert torch.equal(both, torch.cat([a, b]))


def test_weights_with_memory_of_their_own_move_side_by_side_and_parts_of_another_tensor_are_copied():
    own = [nn.Parameter(torch.full((n, 4), float(n)), requires_grad=False) for n in (2, 3)]
    both = joined(own)
    assert own[1].data_ptr() == both[2:].data_ptr()
    own[1].data.fill_(7)
    assert torch.equal(both[2:], own[1])
    flat = torch.zeros(40)
    parts = [nn.Parameter(flat[:8].view(2, 4)), nn.Parameter(flat[12:24].view(3, 4))]  # with a bias between
    copied = joined(parts)
    assert parts[0].data_ptr() == flat.data_ptr(), "an optimiser writes through its flat tensor"
    assert copied.shape == (5, 4)
    assert copied.data_ptr() != flat.data_ptr()


def test_weights_that_moved_while_sampling_can_be_trained():
    model, b = make_model(), batch()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.inference_mode():
        GpuForward(model)
    attention = model.model.layers[0].self_attn
    assert (
        attention.k_proj.weight.untyped_storage()._cdata == attention.q_proj.weight.untyped_storage()._cdata
    )
    model.requires_grad_()(**model_inputs(b)).logits.sum().backward()
    assert attention.k_proj.weight.grad.norm() > 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_on_a_cpu_the_reason_is_named():
    assert unsupported_reason(make_model()) == "the GPU forward is for a GPU, the weights are on cpu"
