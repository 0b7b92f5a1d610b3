"""Logits of 16-bit models are sampled from in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fst_fast.rollout import logits
from fst_fast.rollout.logits import float32_logits, float32_product


class Model(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.lm_head = nn.Linear(64, 50, dtype=dtype)

    def get_output_embeddings(self):
        return self.lm_head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_head_gives_float32_while_it_is_open_and_its_own_type_afterwards(dtype):
    model, x = Model(dtype), (torch.randn(2, 3, 64) * 8).to(dtype)
    exact = x.double() @ model.lm_head.weight.double().t() + model.lm_head.bias.double()
    with float32_logits(model), torch.no_grad():
        out = model.lm_head(x)
    assert out.dtype == torch.float32
    assert (out - exact).abs().max() < 1e-4
    rounded = model.lm_head(x)
    assert rounded.dtype == dtype
    assert (rounded - exact).abs().max() > 1e-3


def test_a_forward_that_was_there_before_is_put_back():
    model = Model(torch.bfloat16)
    mine = model.lm_head.forward = lambda x: x
    with float32_logits(model):
        assert model.lm_head.forward is not mine
    assert model.lm_head.forward is mine


def test_float32_heads_and_other_layers_are_left_alone():
    model = Model(torch.float32)
    with float32_logits(model):
        assert "forward" not in vars(model.lm_head)


def test_on_a_gpu_the_product_is_asked_for_its_sums(monkeypatch):
    """The call that a GPU gets; there is no rounding to 16 bits in between."""
    seen = {}

    class Rows:
        is_cuda = True
        shape = (3, 64)

        def reshape(self, *_):
            return self

    def mm(a, b, out_dtype=None):
        seen["out_dtype"] = out_dtype
        return torch.zeros(3, 50)

    monkeypatch.setattr(logits.torch, "mm", mm)
    assert float32_product(Rows(), torch.zeros(50, 64, dtype=torch.bfloat16), None).shape == (3, 50)
    assert seen == {"out_dtype": torch.float32}
