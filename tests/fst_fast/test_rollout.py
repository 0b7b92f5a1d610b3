"""The rollout engine against transformers: same tokens and log-probs however prompts are shared, batched, refilled or
cut.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fst_fast.contracts import Rollout
from fst_fast.errors import UserError
from fst_fast.policy.attention import NAME
from fst_fast.rollout.decode import ForestDecoder
from fst_fast.rollout.engine import Request, RolloutEngine
from fst_fast.rollout.prompt_tree import prompt_tree
from fst_fast.rollout.scheduler import Slots
from fst_kernels import sample_tokens
from fst_kernels.cascade_decode.partial import partial_attention, plain_partial_attention
from tests.compiler import needs_a_compiler

VOCABULARY, POSITIONS = 61, 256
EOS = (5, 9, 20, 33)  # enough of them that responses end at different lengths
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,  # logits spread over several nats: an argmax is no coin toss
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
CLASSES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    # Windows far shorter than the prompts, so that they end inside a context, a problem or the response itself.
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 5}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"query_pre_attn_scalar": 16, "head_dim": 16, **SLIDING}),
    "qwen2, sliding": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": True, **SLIDING}),
}
WINDOWED = ("mistral", "gemma3", "qwen2, sliding")


def make_model(kind: str = "qwen3", attention: str = NAME):
    torch.manual_seed(0)
    config, model, more = CLASSES[kind]
    made = model(config(**SHAPE, **more)).eval()
    made.set_attn_implementation(attention)
    return made


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    """The attention and sampling backend of this machine."""
    needs_a_compiler(request.param)
    monkeypatch.setenv("FST_KERNELS", request.param)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def plain_model():
    return make_model(attention="sdpa")


@pytest.fixture(scope="module")
def expected(plain_model):
    """The padded engine's rollouts for requests_of()."""
    rollouts = sample(padded(plain_model), requests_of())
    assert len({len(r.response_ids) for r in rollouts}) > 3, (
        "lengths must differ, or nothing ever leaves the batch"
    )
    return rollouts


def forest(model, *, max_batch: int = 64, eos: Sequence[int] = EOS, **more) -> RolloutEngine:
    return RolloutEngine(
        model, eos_ids=eos, pad_id=0, max_batch=max_batch, packing="forest", **{"join_tokens": 0, **more}
    )


def padded(model, *, max_batch: int = 64, eos: Sequence[int] = EOS) -> RolloutEngine:
    return RolloutEngine(model, eos_ids=eos, pad_id=0, max_batch=max_batch, packing="padded")


def ids(rng: np.random.Generator, n: int) -> NDArray[np.int64]:
    return rng.integers(6, VOCABULARY, n)


def requests_of(
    contexts: Sequence[int] = (18, 7), problems: Sequence[int] = (3, 9, 1), samples: int = 2
) -> list[Request]:
    """Prompts with shared contexts and problems, one that is a context alone, and one that ends inside a context."""
    rng = np.random.default_rng(0)
    context_ids = [ids(rng, n) for n in contexts]
    problem_ids = [ids(rng, n) for n in problems]
    made = [
        Request(f"p{p}", f"c{c}", s, np.concatenate([c_ids, p_ids]), seed=10_000 * c + 100 * p + s)
        for c, c_ids in enumerate(context_ids)
        for p, p_ids in enumerate(problem_ids)
        for s in range(samples)
    ]
    made.append(Request("empty", "c0", 0, context_ids[0], seed=77))
    made.append(Request("inside", "c0", 0, context_ids[0][:5], seed=78))
    return made


def sample(engine: RolloutEngine, requests: Sequence[Request], tokens: int = 12, **how) -> list[Rollout]:
    how = {"temperature": 1.0, **how}
    return engine.generate(requests, max_response_tokens=tokens, policy_version=3, **how)


def assert_same(a: Sequence[Rollout], b: Sequence[Rollout]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x.problem_id, x.context_id, x.sample, x.finish) == (
            y.problem_id,
            y.context_id,
            y.sample,
            y.finish,
        )
        assert x.response_ids.tolist() == y.response_ids.tolist()
        np.testing.assert_allclose(x.logprobs, y.logprobs, atol=2e-5)


@pytest.mark.parametrize("kind", CLASSES)
def test_greedy_rollouts_are_those_of_transformers_generate(kind):
    plain = make_model(kind, "sdpa")
    requests = requests_of(samples=1)
    width = max(len(r.prompt_ids) for r in requests)
    left = torch.zeros(len(requests), width, dtype=torch.long)
    mask = torch.zeros_like(left)
    for row, r in enumerate(requests):
        left[row, width - len(r.prompt_ids) :] = torch.as_tensor(r.prompt_ids)
        mask[row, width - len(r.prompt_ids) :] = 1
    out = plain.generate(
        left, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=list(EOS), pad_token_id=0
    )
    expected = [row.tolist() for row in out[:, width:]]
    ends = [next((i + 1 for i, t in enumerate(row) if t in EOS), len(row)) for row in expected]
    expected = [row[:end] for row, end in zip(expected, ends, strict=True)]
    assert len({tuple(row) for row in expected}) > len(requests) // 2, (
        "the model must not say the same to everything"
    )
    for engine in (forest(make_model(kind)), padded(plain)):
        rollouts = sample(engine, requests, 16, temperature=0.0)
        assert [r.response_ids.tolist() for r in rollouts] == expected


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", WINDOWED)
@pytest.mark.parametrize("prefill_tokens", [4, 16])
def test_sliding_windows_work_across_prompt_cuts(kind, prefill_tokens):
    expected = sample(padded(make_model(kind, "sdpa")), requests_of())
    engine = forest(make_model(kind), max_batch=5, prefill_tokens=prefill_tokens)
    assert_same(sample(engine, requests_of()), expected)
    assert_same(sample(engine, requests_of()), expected)  # and from the prefixes that the first call left


@pytest.mark.parametrize("kind", CLASSES)
def test_tokens_and_logprobs_are_those_of_a_plain_forward_over_prompt_and_response(kind):
    plain = make_model(kind, "sdpa")
    requests = requests_of()
    for r, rollout in zip(requests, sample(forest(make_model(kind)), requests, temperature=0.7), strict=True):
        whole = torch.as_tensor(np.concatenate([r.prompt_ids, rollout.response_ids]))[None]
        with torch.inference_mode():
            logits = plain(input_ids=whole).logits[0, len(r.prompt_ids) - 1 : -1]
        expected = torch.log_softmax(logits / 0.7, -1).gather(
            1, torch.as_tensor(rollout.response_ids)[:, None]
        )[:, 0]
        np.testing.assert_allclose(rollout.logprobs, expected.numpy(), atol=1e-5, rtol=1e-5)
        offsets = torch.arange(len(rollout.response_ids))
        drawn = sample_tokens(
            logits, temperature=0.7, seeds=torch.full_like(offsets, r.seed), positions=offsets
        )
        assert drawn.ids.tolist() == rollout.response_ids.tolist(), (
            "a token depends on its seed, its offset and its logits"
        )
        assert rollout.logprobs.dtype == np.float32
        assert rollout.response_ids.dtype == np.int64


def test_forest_and_padded_engine_give_the_same_rollouts(model, expected):
    assert_same(sample(forest(model), requests_of()), expected)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("max_batch", "prefill_tokens"), [(64, 8192), (1, 8192), (3, 17), (4, 8), (14, 3)])
@pytest.mark.parametrize("fused", [True, False])
def test_whatever_the_batch_and_the_windows_it_gives_the_same_rollouts(
    model, expected, max_batch, prefill_tokens, fused, monkeypatch
):
    if not fused:
        monkeypatch.setattr("fst_fast.rollout.engine.unsupported_reason", lambda _: "the test says so")
    engine = forest(model, max_batch=max_batch, prefill_tokens=prefill_tokens)
    assert_same(sample(engine, requests_of()), expected)
    held = engine._pool.tokens
    assert engine._pool.slots == held
    assert all(len(k) == held for k in engine._pool.k)
    assert_same(sample(engine, requests_of()), expected)
    assert engine.tokens_reused
    engine.forget()
    assert not engine._pool.slots


def test_truncated_sampling_is_the_same_too_and_gives_the_truncated_logprobs(model, plain_model):
    requests = requests_of()
    how = {"temperature": 0.6, "top_p": 0.8, "top_k": 20}
    ours = sample(forest(model), requests, **how)
    assert_same(ours, sample(padded(plain_model), requests, **how))
    untruncated = sample(forest(model), requests, temperature=0.6)
    assert sum(r.logprobs.sum() for r in ours) > sum(r.logprobs.sum() for r in untruncated)


@pytest.mark.parametrize(("max_batch", "prefill_tokens"), [(1, 8192), (3, 17), (4, 8), (14, 3)])
def test_batch_size_and_prefill_windows_change_nothing(model, expected, max_batch, prefill_tokens):
    assert_same(
        sample(forest(model, max_batch=max_batch, prefill_tokens=prefill_tokens), requests_of()), expected
    )


def test_alone_or_among_others_in_any_order_a_sequence_gets_the_same_tokens(model):
    requests = requests_of(samples=8)
    together = sample(forest(model), requests)
    for i in (0, len(requests) - 1):
        assert_same(sample(forest(model), [requests[i]]), [together[i]])
    order = np.random.default_rng(1).permutation(len(requests))
    assert_same(
        sample(forest(model, max_batch=11), [requests[i] for i in order]), [together[i] for i in order]
    )


def test_the_seed_determines_the_tokens(model):
    a, b = requests_of()[0], requests_of()[1]
    assert np.array_equal(a.prompt_ids, b.prompt_ids)
    one, other = sample(forest(model), [a, b])
    assert one.response_ids.tolist() != other.response_ids.tolist()


def test_a_node_with_many_sequences_beside_single_ones_changes_nothing(model, plain_model):
    rng = np.random.default_rng(2)
    root = ids(rng, 6)
    prompts = [np.concatenate([root, ids(rng, n)]) for n in rng.integers(2, 60, 16)]
    requests = [Request(f"p{i}", "c", 0, p, seed=i) for i, p in enumerate(prompts)]
    requests += [Request("p0", "c", s, prompts[0], seed=1000 + s) for s in range(1, 40)]
    assert_same(sample(forest(model), requests, 6), sample(padded(plain_model), requests, 6))


def test_a_trie_of_any_depth_works(model, plain_model):
    chain = ids(np.random.default_rng(3), 24)
    requests = [Request(f"p{n}", "c", 0, chain[:n], seed=n) for n in range(1, 25)]
    assert prompt_tree([r.prompt_ids for r in requests], max_node_tokens=100).level.max() == 23
    said = sample(padded(plain_model), requests, 4)
    assert_same(sample(forest(model), requests, 4), said)
    assert_same(sample(forest(model, max_batch=9, prefill_tokens=5), requests, 4), said)


def test_long_responses_outgrow_the_first_suffix_buffer(model, plain_model):
    requests = requests_of(contexts=(7,), problems=(3, 9), samples=1)
    said = sample(padded(plain_model, eos=()), requests, 70)
    assert_same(sample(forest(model, eos=(), max_batch=3), requests, 70), said)


def test_in_bfloat16_logprobs_stay_close_to_a_plain_forward():
    ours, plain = make_model().bfloat16(), make_model(attention="sdpa").bfloat16()
    requests = requests_of()
    for r, rollout in zip(requests, sample(forest(ours), requests), strict=True):
        whole = torch.as_tensor(np.concatenate([r.prompt_ids, rollout.response_ids]))[None]
        with torch.inference_mode():
            logits = plain(input_ids=whole).logits[0, len(r.prompt_ids) - 1 : -1].float()
        expected = torch.log_softmax(logits, -1).gather(1, torch.as_tensor(rollout.response_ids)[:, None])[
            :, 0
        ]
        assert np.abs(rollout.logprobs - expected.numpy()).mean() < 0.1


def test_eos_closes_a_response_and_is_part_of_it(model):
    requests = requests_of(samples=8)
    rollouts = sample(forest(model), requests, 16)
    finishes = {r.finish for r in rollouts}
    assert finishes == {"stop", "length"}
    for r in rollouts:
        assert not set(r.response_ids[:-1].tolist()) & set(EOS)
        assert (r.response_ids[-1] in EOS) == (r.finish == "stop")
        assert r.finish == "stop" or len(r.response_ids) == 16
        assert len(r.logprobs) == len(r.response_ids)
        assert (r.policy_version, r.temperature) == (3, 1.0)


@pytest.mark.parametrize("prefill_tokens", [8192, 5])
def test_prefill_computes_every_shared_token_once(model, prefill_tokens):
    requests = requests_of()
    engine = forest(model, prefill_tokens=prefill_tokens, max_batch=4)
    rollouts = sample(engine, requests, 1)
    distinct = {tuple(r.prompt_ids[: n + 1].tolist()) for r in requests for n in range(len(r.prompt_ids))}
    assert engine.tokens_computed == len(distinct)
    assert engine.tokens_unshared == sum(len(r.prompt_ids) + 1 for r in requests)
    assert all(len(r.response_ids) == 1 for r in rollouts)


def test_counters_add_up_over_calls(model, plain_model):
    requests = requests_of()
    n, prompt_tokens = len(requests), sum(len(r.prompt_ids) for r in requests)
    distinct = {tuple(r.prompt_ids[: n + 1].tolist()) for r in requests for n in range(len(r.prompt_ids))}
    ours, plain = forest(model, eos=()), padded(plain_model, eos=())
    for engine in (ours, ours, plain):
        sample(engine, requests, 10)
    # the last token is never fed; the second call has the prompts
    assert ours.tokens_computed == len(distinct) + 2 * 9 * n
    assert ours.tokens_reused == len(distinct)
    assert ours.tokens_unshared == 2 * (prompt_tokens + 10 * n)
    assert plain.tokens_unshared == prompt_tokens + 10 * n
    assert plain.tokens_computed == n * (max(len(r.prompt_ids) for r in requests) + 9)


def test_unneeded_nodes_are_freed(model, monkeypatch):
    held: list[int] = []
    forget = ForestDecoder._give_back

    def spy(self):
        forget(self)
        held.append(sum(len(b.lengths) for b in self.cache.blocks.values()))

    monkeypatch.setattr(ForestDecoder, "_give_back", spy)
    requests = requests_of(contexts=(9,) * 12, problems=(4, 5), samples=2)
    sample(forest(model, max_batch=4, prefill_tokens=30, kv_bytes=300 * 2 * 2 * 2 * 16 * 4), requests, 4)
    nodes = len(prompt_tree([r.prompt_ids for r in requests], max_node_tokens=30).start)
    assert max(held) < nodes // 2
    assert held[-1] < nodes // 3


def test_no_requests_no_rollouts(model):
    engine = forest(model)
    assert sample(engine, []) == []
    assert (engine.tokens_computed, engine.tokens_unshared) == (0, 0)


@pytest.mark.parametrize(
    ("length", "tokens", "message"),
    [
        (0, 4, r"problem p, context c, sample 2: the prompt is empty"),
        (
            250,
            10,
            r"problem p, context c, sample 2: 250 prompt tokens \+ 10 .* 256 positions; .* at most 246",
        ),
        (3, 0, r"max_response_tokens=0; at least 1"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_it_starts(model, length, tokens, message):
    requests = [*requests_of(), Request("p", "c", 2, np.full(length, 7), seed=0)]
    engine = forest(model)
    with pytest.raises(UserError, match=message):
        sample(engine, requests, tokens)
    assert engine.tokens_computed == 0


@pytest.mark.parametrize("packing", ["forest", "padded"])
def test_nan_logits_name_the_request_and_the_token(packing):
    broken = make_model(attention=NAME if packing == "forest" else "sdpa")
    make = forest if packing == "forest" else padded
    requests = requests_of(samples=1)
    rollouts = sample(make(broken, eos=()), requests, 8, temperature=0.0)
    # A token that one request says once, in the middle, and nobody else ever: its embedding makes the logits after it NaN.
    said = [r.response_ids.tolist() for r in rollouts]
    prompts = {t for r in requests for t in r.prompt_ids.tolist()}
    victim, token = next(
        (i, t)
        for i, row in enumerate(said)
        for t in row[1:6]
        if t not in prompts and sum(other.count(t) for other in said) == 1
    )
    with torch.no_grad():
        broken.get_input_embeddings().weight[token] = float("nan")
    with pytest.raises(
        FloatingPointError, match=rf"token {said[victim].index(token) + 1} of {requests[victim]} \(and 0 more"
    ):
        sample(make(broken, eos=()), requests, 8, temperature=0.0)


def test_the_model_keeps_its_modes_and_can_be_trained_afterwards():
    model = make_model().train()
    model.model.layers[0].mlp.eval()
    before = [m.training for m in model.modules()]
    engine = forest(model)
    first = sample(engine, requests_of())
    assert [m.training for m in model.modules()] == before
    from fst_fast.policy.attention import TreePlan

    plan = TreePlan(torch.full((6,), 6, dtype=torch.int32))
    model(
        input_ids=torch.arange(6)[None], position_ids=torch.arange(6)[None], plan=plan, use_cache=False
    ).logits.sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= 0.01 * parameter.grad
    second = sample(engine, requests_of())
    assert any(a.response_ids.tolist() != b.response_ids.tolist() for a, b in zip(first, second, strict=True))


def test_modes_come_back_after_a_failure():
    model = make_model().train()
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="token 0 of problem"):
        sample(forest(model), requests_of())
    assert all(m.training for m in model.modules())


def test_the_two_partial_attentions_agree():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 16, generator=generator) for n in (5, 9, 9))
    mask = torch.zeros(3, 1, 1, 9)
    mask[1, :, :, 4:] = float("-inf")
    for bias in (None, mask):
        for a, b in zip(
            partial_attention(q, k, v, 0.3, bias), plain_partial_attention(q, k, v, 0.3, bias), strict=True
        ):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_packing_and_attention_must_agree(model, plain_model):
    with pytest.raises(AssertionError, match="does not go with packing"):
        padded(model)
    with pytest.raises(AssertionError, match="does not go with packing"):
        forest(plain_model)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_sequence_gets_a_slot_once_in_order_and_idle_slots_stay_few(data):
    n = data.draw(st.integers(1, 40))
    order = np.array(data.draw(st.permutations(range(n))), dtype=np.int64)
    slots = Slots(order, data.draw(st.integers(1, 12)))
    unready = set(data.draw(st.lists(st.integers(0, n - 1))))
    asked: list[int] = []
    decoded: list[int] = []

    def ready(sequence: int) -> bool:
        asked.append(sequence)
        return sequence not in unready

    while True:
        if slots.should_refill():
            old = slots.sequence.copy()
            stay, fresh = slots.refill(ready)
            assert slots.live.all()
            kept = np.setdiff1d(np.arange(len(slots.sequence)), fresh)
            assert (slots.sequence[kept] == old[stay[kept]]).all()
            decoded.extend(slots.sequence[fresh].tolist())
            if not len(slots.sequence):
                break
        idle = int((~slots.live).sum())
        assert idle < len(slots.live) / (8 if len(slots.order) > slots.next else 4) or not idle
        ending = data.draw(
            st.lists(st.booleans(), min_size=len(slots.sequence), max_size=len(slots.sequence))
        )
        slots.live &= ~np.array(ending)
        if not any(ending):
            slots.live[np.flatnonzero(slots.live)[:1]] = False
    assert asked == order.tolist()
    assert decoded == [i for i in order.tolist() if i not in unready]


def test_a_model_copied_for_the_reference_samples_like_the_original(model):
    twin, requests = copy.deepcopy(model), requests_of(samples=1)
    assert_same(sample(forest(twin), requests, 4), sample(forest(model), requests, 4))
