"""CpuForward against the transformers forward, and when it is not used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fst_fast.forest import Leaf
from fst_fast.policy import cpu_forward, head
from fst_fast.policy.attention import NAME
from fst_fast.policy.cpu_forward import CpuForward, unsupported_reason
from fst_fast.policy.packing import forest_batch, model_inputs
from fst_fast.policy.scoring import Batching, MicroBatch, Scorer
from fst_fast.rollout.engine import fingerprint
from tests.compiler import needs_a_compiler
from tests.fst_fast.test_rollout import (
    CLASSES,
    SHAPE,
    WINDOWED,
    assert_same,
    forest,
    ids,
    make_model,
    requests_of,
    sample,
)


def batch():
    rng = np.random.default_rng(3)
    context = ids(rng, 12)
    return forest_batch(
        [Leaf(np.concatenate([context, ids(rng, n)]), ids(rng, 6)) for n in (3, 5, 9) for _ in range(2)],
        share="prompts",
        device="cpu",
    )


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind not in WINDOWED])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("rows", "wide"), [(1024, cpu_forward.WIDE), (7, cpu_forward.WIDE), (7, 1)])
def test_logits_are_those_of_the_transformers_forward(kind, rows, wide, backend, monkeypatch):
    needs_a_compiler(backend)
    monkeypatch.setenv("FST_KERNELS", f"cascade_decode_attention={backend}")
    monkeypatch.setattr(cpu_forward, "CHUNK_ROWS", rows)
    monkeypatch.setattr(cpu_forward, "WIDE", wide)
    model, b = make_model(kind), batch()
    for norm in (m for name, m in model.named_modules() if "norm" in name):  # trained norms are no ones
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    for projection in (
        m for name, m in model.named_modules() if name.endswith("proj") and m.bias is not None
    ):
        nn.init.normal_(projection.bias)
    read = torch.tensor([3, 11, 20])
    with torch.inference_mode():
        expected = model(**model_inputs(b)).logits[0]
        forward = CpuForward(model)
        whole = forward(b.input_ids[0], b.position_ids[0], b.plan)
        some = forward(b.input_ids[0], b.position_ids[0], b.plan, read)
    torch.testing.assert_close(whole, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(some, expected[read], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    ],
)
def test_logits_match_with_scaled_rotary_embeddings(rope):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope)).eval()
    model.set_attn_implementation(NAME)
    b = batch()
    with torch.inference_mode():
        expected = model(**model_inputs(b)).logits[0]
        got = CpuForward(model)(b.input_ids[0], b.position_ids[0], b.plan)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def test_modified_or_unsupported_models_take_the_transformers_forward(monkeypatch):
    assert unsupported_reason(make_model()) is None
    assert "bfloat16" in str(unsupported_reason(make_model().bfloat16()))
    assert unsupported_reason(make_model("qwen2, sliding")) == "it has a sliding window of 5 tokens"

    class Adapted(nn.Linear):
        pass

    adapted = make_model("llama")
    old = adapted.model.layers[1].self_attn.v_proj
    adapted.model.layers[1].self_attn.v_proj = Adapted(old.in_features, old.out_features, bias=False)
    assert unsupported_reason(adapted) == "layers.1.self_attn.v_proj is a Adapted"
    with pytest.raises(ValueError, match="is a Adapted"):
        CpuForward(adapted)
    hooked = make_model("llama")
    hooked.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert unsupported_reason(hooked) == "layers.0.mlp has hooks"
    gelu = Qwen2ForCausalLM(Qwen2Config(**SHAPE, hidden_act="gelu"))
    assert unsupported_reason(gelu) == "its activation is gelu, not silu"
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "dynamic" in str(
        unsupported_reason(LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=dynamic)))
    )

    used: list[int] = []
    hooked.model.layers[0].mlp.register_forward_hook(lambda *_: used.append(1))
    plain = make_model("llama")
    assert_same(sample(forest(hooked), requests_of()), sample(forest(plain), requests_of()))
    assert used


def test_the_engine_follows_weights_that_change():
    model = make_model()
    engine = forest(model)
    sample(engine, requests_of())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    assert_same(sample(engine, requests_of()), sample(forest(model), requests_of()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3,), (4, 5), (7, 2)])
def test_a_fingerprint_changes_with_any_bit_of_any_weight(dtype, shape):
    module = nn.Module()
    module.first = nn.Parameter(torch.randn(shape).to(dtype))
    module.second = nn.Parameter(torch.zeros(()).to(dtype))
    before = fingerprint(module)
    assert fingerprint(module) == before
    for weight in module.parameters():
        raw = weight.detach().reshape(-1).view(torch.uint8)
        for i in range(len(raw)):
            raw[i] ^= 1
            assert fingerprint(module) != before
            raw[i] ^= 1
        with torch.no_grad():
            weight.neg_()
        assert fingerprint(module) != before
        with torch.no_grad():
            weight.neg_()
    assert fingerprint(module) == before


def test_scoring_with_the_cpu_forward_gives_the_models_logprobs_and_hidden_states(monkeypatch):
    model, b = make_model(), batch()
    head.install(model)
    micro = MicroBatch([], b, head.Labels.of(b.rows, b.labels))
    batching = Batching("forest", tokens=999, head_rows=5, temperature=0.8, pad_id=0)
    ours = Scorer(model).logprobs(micro, batching), Scorer(model).hidden_rows(micro)
    monkeypatch.setattr("fst_fast.policy.scoring.unsupported_reason", lambda _: "no")
    theirs = Scorer(model).logprobs(micro, batching), Scorer(model).hidden_rows(micro)
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, atol=2e-5, rtol=1e-5)
        assert a.abs().sum() > 0


def test_weights_anywhere_inside_a_flat_tensor_have_a_fingerprint():
    """As under ZeRO, where a 16-bit weight can begin at any even byte."""
    flat, module = torch.randn(40).bfloat16(), nn.Module()
    module.weight = nn.Parameter(flat[3:23].view(4, 5))
    before = fingerprint(module)
    flat[22] += 1
    assert fingerprint(module) != before
