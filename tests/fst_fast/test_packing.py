"""Forest and padded batches of the same leaves, through real model architectures: same loss, same gradient of every
parameter.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fst_fast.errors import UserError
from fst_fast.forest import Leaf, Share, pack
from fst_fast.policy.attention import (
    NAME,
    PACKABLE,
    TreePlan,
    load_model,
    sliding_window,
    unpackable_reason,
)
from fst_fast.policy.packing import PackedBatch, forest_batch, model_inputs, padded_batch

VOCAB = 23
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
# Name -> config class and what is not common to all. Leaves of random_leaves are up to 27 tokens long, so that a window of 4 hides a lot.
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3": (Qwen3Config, {}),
    "qwen2": (Qwen2Config, {}),
    "llama": (LlamaConfig, {}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
    ),
    "mistral": (MistralConfig, {"sliding_window": 4}),
    "gemma3_text": (Gemma3TextConfig, {"query_pre_attn_scalar": 8, **SLIDING}),
    "qwen2, sliding": (Qwen2Config, {"use_sliding_window": True, **SLIDING}),
    "qwen3, sliding": (Qwen3Config, {"use_sliding_window": True, **SLIDING}),
}


def tiny_config(architecture: str, **more: Any) -> Any:
    kind, own = CONFIGS[architecture]
    heads = {} if kind is Qwen2Config else {"head_dim": 8}
    return kind(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        initializer_range=0.2,  # so that attention is far from uniform
        **heads,
        **own,
        **more,
    )


@cache
def models(architecture: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights twice: with tree attention and with transformers' own."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny_config(architecture), attn_implementation="sdpa")
    tree = AutoModelForCausalLM.from_config(tiny_config(architecture), attn_implementation=NAME)
    tree.load_state_dict(plain.state_dict())
    return tree, plain


def gradients(
    model: PreTrainedModel, batch: PackedBatch, weights: torch.Tensor
) -> tuple[float, dict[str, torch.Tensor]]:
    """A loss like a policy gradient: every label has its own weight, so that a label at a wrong row cannot cancel out."""
    model.zero_grad()
    rows = model(**model_inputs(batch)).logits.flatten(0, 1)[batch.rows]
    loss = (torch.nn.functional.cross_entropy(rows, batch.labels, reduction="none") * weights).sum() / len(
        weights
    )
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def random_leaves(seed: int) -> list[Leaf]:
    """Contexts with a common beginning, problems under each, samples of different lengths; some prompts without a
    response."""
    rng = np.random.default_rng(seed)
    header = rng.integers(1, VOCAB, rng.integers(0, 4))
    contexts = [
        np.concatenate([header, rng.integers(1, VOCAB, rng.integers(1, 9))])
        for _ in range(rng.integers(1, 4))
    ]
    problems = [rng.integers(1, VOCAB, rng.integers(1, 6)) for _ in range(rng.integers(1, 4))]
    leaves = [
        # two ids only: responses often agree
        Leaf(np.concatenate([c, p]), rng.integers(1, 3, rng.integers(0, 7)))
        for c in contexts
        for p in problems
        for _ in range(rng.integers(1, 4))
    ]
    return [*leaves, Leaf(contexts[0], rng.integers(1, VOCAB, 3))]


@pytest.mark.parametrize("architecture", CONFIGS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.sampled_from(["prompts", "all"]))
def test_forest_and_padded_batches_have_the_same_loss_and_gradient(
    architecture: str, seed: int, share: Share
) -> None:
    leaves = random_leaves(seed)
    tree, plain = models(architecture)
    forest, padded = (
        forest_batch(leaves, share=share, device="cpu"),
        padded_batch(leaves, pad_id=0, device="cpu"),
    )
    for field in ("labels", "leaf", "offset"):
        assert torch.equal(getattr(forest, field), getattr(padded, field))
    weights = torch.randn(len(forest.labels), generator=torch.Generator().manual_seed(seed))
    loss, grads = gradients(tree, forest, weights)
    expected, expected_grads = gradients(plain, padded, weights)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        # a bias of all keys moves no softmax
        assert name.endswith("k_proj.bias") or grad.abs().max() > 1e-5, name
        torch.testing.assert_close(
            grad, expected_grads[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_forest_tokens_are_fewer_and_both_counts_are_reported() -> None:
    leaves = [Leaf(np.arange(1, 11), np.array([n, n])) for n in range(1, 5)]
    forest, padded = (
        forest_batch(leaves, share="prompts", device="cpu"),
        padded_batch(leaves, pad_id=0, device="cpu"),
    )
    assert (forest.tokens, forest.unshared) == (10 + 4 * 2, 4 * 12)
    assert (padded.tokens, padded.unshared) == (48, 48)
    assert forest.input_ids.shape == forest.position_ids.shape == (1, 18)
    assert padded.input_ids.shape == padded.position_ids.shape == (4, 12)


def test_padding_ids_change_nothing() -> None:
    leaves = random_leaves(4)
    _, plain = models("qwen3")
    with torch.no_grad():
        one, other = (
            plain(**model_inputs(batch)).logits.flatten(0, 1)[batch.rows]
            for batch in (padded_batch(leaves, pad_id=pad, device="cpu") for pad in (0, 7))
        )
    assert torch.equal(one, other)


def test_a_leaf_in_a_forest_gives_the_same_output_as_alone() -> None:
    leaves = random_leaves(11)
    tree, plain = models("llama")
    forest = pack(leaves)
    with torch.no_grad():
        logits = tree(**model_inputs(forest_batch(leaves, share="prompts", device="cpu"))).logits[0]
        for i, leaf in enumerate(leaves):
            ids = torch.from_numpy(np.concatenate([leaf.prompt_ids, leaf.response_ids]))
            torch.testing.assert_close(
                logits[forest.path(i)], plain(input_ids=ids[None]).logits[0], rtol=0, atol=1e-5
            )


def test_gradient_checkpointing_passes_the_plan_on() -> None:
    leaves = random_leaves(2)
    torch.manual_seed(0)
    tree = AutoModelForCausalLM.from_config(tiny_config("qwen3"), attn_implementation=NAME)
    batch = forest_batch(leaves, share="prompts", device="cpu")
    weights = torch.ones(len(batch.labels))
    tree.train()
    _, expected = gradients(tree, batch, weights)
    tree.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, grads = gradients(tree, batch, weights)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name])


def test_a_model_loaded_for_trees_refuses_to_run_without_a_plan() -> None:
    tree, _ = models("qwen3")
    with pytest.raises(UserError, match="without a plan"):
        tree(input_ids=torch.ones(1, 3, dtype=torch.int64))


class ReadsNothingBack(TorchDispatchMode):
    """Raises where a number is fetched from a tensor, which on a GPU waits for all that was asked of it before."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


class Through:
    """A plan whose attention returns the queries."""

    windows = True

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        return q.transpose(1, 2)


# except qwen3_moe, whose routing reads counts back from the device
@pytest.mark.parametrize("architecture", [name for name in CONFIGS if name != "qwen3_moe"])
def test_a_forward_does_not_synchronise_with_the_device(architecture: str) -> None:
    tree, _ = models(architecture)
    for shape in ((1, 6), (6, 1)):  # a forest, a decode step
        ids = torch.zeros(shape, dtype=torch.int64)
        with ReadsNothingBack():
            tree(input_ids=ids, position_ids=ids.clone(), plan=Through(), use_cache=False)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), ReadsNothingBack():
        bool(ids.any())


def test_a_mask_together_with_a_plan_is_refused() -> None:
    tree, _ = models("qwen3")
    plan = TreePlan(torch.full((3,), 3, dtype=torch.int32))
    with pytest.raises(UserError, match=r"attention_mask.*policy.packing=padded"):
        tree(input_ids=torch.ones(1, 3, dtype=torch.int64), attention_mask=torch.ones(1, 1, 3, 3), plan=plan)


@pytest.mark.parametrize("attention", ["tree", "sdpa"])
def test_load_model_gives_the_saved_weights_in_the_type_asked_for(tmp_path: Path, attention: Any) -> None:
    _, plain = models("qwen3")
    plain.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, "bfloat16", attention=attention)
    assert loaded.dtype == torch.bfloat16
    batch = forest_batch if attention == "tree" else None
    inputs = model_inputs(
        batch(random_leaves(0), share="prompts", device="cpu")
        if batch
        else padded_batch(random_leaves(0), pad_id=0, device="cpu")
    )
    assert bool(torch.isfinite(loaded(**inputs).logits).all())
    again = load_model(str(tmp_path), torch.float32, attention=attention)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(), "caps attention scores .attn_logit_softcapping=50.0"),
        (GptOssConfig(), "attention sinks"),
        (AutoConfig.for_model("llama4_text"), "layers of type chunked_attention"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "is bidirectional"),
        (AutoConfig.for_model("olmo2"), "not been tested as a forest; tested are gemma3_text, llama"),
        (MambaConfig(), "linear_attention|recurrent state|swapped"),
        (AutoConfig.for_model("deepseek_v3"), "v_head_dim=128"),
        (AutoConfig.for_model("bloom"), "cannot be swapped"),
        (LlamaConfig(attention_dropout=0.1), "attention_dropout=0.1"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_architectures_that_cannot_be_packed_are_named_with_the_reason(
    tmp_path: Path, config: Any, reason: str
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=rf"{config.model_type} cannot be packed.*({reason}).*policy.packing=padded"
    ):
        load_model(tmp_path, "float32", attention="tree")


def test_every_packable_architecture_is_compared_with_the_padded_pass_here() -> None:
    assert [unpackable_reason(tiny_config(name)) for name in CONFIGS] == [None] * len(CONFIGS)
    assert {tiny_config(name).model_type for name in CONFIGS} == set(PACKABLE)


def test_the_window_of_a_model_is_known_from_its_config() -> None:
    windows = {name: sliding_window(tiny_config(name)) for name in CONFIGS}
    assert {name for name, window in windows.items() if window == 4} == {
        "mistral",
        "gemma3_text",
        "qwen2, sliding",
        "qwen3, sliding",
    }
    assert set(windows.values()) == {None, 4}
    assert sliding_window(MistralConfig(sliding_window=None)) is None


def test_a_plan_without_windows_is_refused_by_a_layer_that_has_one() -> None:
    class Plan:
        def attend(self, layer: int, q: Any, k: Any, v: Any, scale: float) -> Any:
            return q.transpose(1, 2)

    tree, _ = models("mistral")
    with pytest.raises(
        UserError, match=r"MistralAttention has a sliding window of 4 .* Plan .*policy.packing=padded"
    ):
        tree(input_ids=torch.ones(1, 3, dtype=torch.int64), plan=Plan())


def test_folders_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"model.path='.*nowhere' is neither a folder nor a .gguf file; .*'mini'"
    ):
        load_model(tmp_path / "nowhere", "float32", attention="tree")
    with pytest.raises(UserError, match=r"has no config.json; .*'mini'"):
        load_model(tmp_path, "float32", attention="tree")
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(UserError, match=r"config.json cannot be used"):
        load_model(tmp_path, "float32", attention="tree")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_thing"}))
    with pytest.raises(UserError, match=r"config.json cannot be used"):
        load_model(tmp_path, "float32", attention="tree")
    (tmp_path / "config.json").write_text(tiny_config("qwen3").to_json_string())
    with pytest.raises(UserError, match=r"cannot be loaded"):
        load_model(tmp_path, "float32", attention="tree")
