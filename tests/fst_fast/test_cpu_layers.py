"""The CPU's own layers in training compute what transformers' layers do, forward and backward."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.policy import cpu_layers
from fst_fast.policy.cpu_forward import unsupported_reason
from fst_fast.policy.trained import TrainedPolicy, load
from tests.compiler import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"backend=cpu: {why_not()}")
SHAPE = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


def make(kind: type[PretrainedConfig], **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**SHAPE, **more}), dtype=torch.float32)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def pass_through(model):
    """Loss, logits and all gradients of a padded batch."""
    ids = torch.randint(50, (2, 19), generator=torch.Generator().manual_seed(1))
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return [out.loss, out.logits, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_transformers_layers(kind, checkpointing):
    theirs = make(kind)
    ours = copy.deepcopy(theirs)
    cpu_layers.install(ours)
    changed = {
        type(m).__name__
        for m, other in zip(ours.modules(), theirs.modules(), strict=True)
        if type(m) is not type(other)
    }
    name = kind.model_type.title()
    assert changed == {f"{name}RMSNorm", f"{name}MLP", f"{name}Attention"}
    assert unsupported_reason(ours) is None
    if checkpointing:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
        ours.train()
    for a, e in zip(pass_through(ours), pass_through(theirs), strict=True):
        torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-5 * float(e.detach().abs().max()))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


@pytest.mark.parametrize("kind", [GemmaConfig, LlamaConfig])
def test_other_models_keep_their_layers(kind):
    model = make(kind)
    model = model.bfloat16() if kind is LlamaConfig else model
    before = [type(module) for module in model.modules()]
    cpu_layers.install(model)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("lora", [None, {}])
def test_checkpointing_does_not_take_the_fast_forward_from_sampling(lora):
    distributed.init()
    config = Config.model_validate({"policy": {"activation_checkpointing": True, "lora": lora}})
    policy = TrainedPolicy(config, load(config) if lora is not None else None)
    assert unsupported_reason(policy.rollout_model) is None
