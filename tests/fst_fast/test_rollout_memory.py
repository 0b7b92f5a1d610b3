"""Memory of the engine: prefixes kept between calls, keys and values within a budget, and running out of memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fst_fast.errors import UserError
from fst_fast.rollout import engine as engine_module
from fst_fast.rollout.decode import ForestDecoder
from fst_fast.rollout.engine import Request
from fst_fast.rollout.prompt_tree import prompt_tree
from fst_fast.rollout.room import room_for
from tests.compiler import needs_a_compiler
from tests.fst_fast.test_rollout import assert_same, forest, ids, make_model, padded, requests_of, sample

TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # k and v, layers, kv heads, dim, float32


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


@pytest.fixture(scope="module")
def plain(model):
    return make_model("llama", "sdpa")


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def backend(request, monkeypatch):
    """The attention and sampling backend of this machine."""
    needs_a_compiler(request.param)
    monkeypatch.setenv("FST_KERNELS", request.param)


def other_samples(requests, shift):
    return [Request(r.problem_id, r.context_id, r.sample + 9, r.prompt_ids, r.seed + shift) for r in requests]


def test_a_second_call_computes_no_prompt_again_and_samples_what_a_fresh_engine_would(model):
    requests = requests_of()
    again = other_samples(requests, 5000)
    engine, fresh = forest(model, eos=()), forest(model, eos=())
    sample(engine, requests, 4)
    before = engine.tokens_computed
    assert_same(sample(engine, again, 4), sample(fresh, again, 4))
    distinct = {tuple(r.prompt_ids[: n + 1].tolist()) for r in requests for n in range(len(r.prompt_ids))}
    assert engine.tokens_reused == len(distinct)
    assert engine.tokens_computed - before == 3 * len(again)  # decoding alone
    assert fresh.tokens_reused == 0


def test_prompts_that_share_parts_of_earlier_ones_take_these_over(model, plain):
    """Branch points differ: a stored node is cut, joined, extended, and ends in its middle."""
    rng = np.random.default_rng(5)
    a, b, c = ids(rng, 20), ids(rng, 15), ids(rng, 9)
    first = [Request("a", "", 0, np.concatenate([a, b]), 1), Request("b", "", 0, np.concatenate([a, c]), 2)]
    second = [
        np.concatenate([a, b]),  # as before: with its logits
        np.concatenate([a, b[:7]]),  # ends inside
        np.concatenate([a[:11], c]),  # leaves inside
        np.concatenate([a, b, c]),  # goes on
        np.concatenate([a, b[:7], c]),
        c,  # shares nothing
    ]
    requests = [Request(str(i), "", 0, p, 10 + i) for i, p in enumerate(second)]
    engine = forest(model, prefill_tokens=6)
    sample(engine, first, 4)
    assert_same(sample(engine, requests, 6), sample(padded(plain), requests, 6))
    # a and b whole, less the last token of b[:7], computed for its logits
    assert engine.tokens_reused == 35 - 1 - 0


def test_changed_weights_and_forget_end_the_reuse():
    model, requests = make_model(), requests_of()
    engine = forest(model)
    sample(engine, requests, 3)
    engine.forget()
    sample(engine, other_samples(requests, 1), 3)
    assert engine.tokens_reused == 0
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 0.5
    again = other_samples(requests, 2)
    assert_same(sample(engine, again, 3), sample(forest(model), again, 3))
    assert engine.tokens_reused == 0


def test_a_stored_call_that_is_not_reused_is_dropped(model):
    rng = np.random.default_rng(7)
    engine = forest(model)
    for i in range(8):
        sample(engine, [Request("p", str(i), 0, ids(rng, 10), i)], 2)
    assert len(engine._prefixes.calls) == 4


@pytest.mark.parametrize("tokens", [60, 90, 200])
def test_a_small_memory_budget_changes_the_schedule_and_no_token(model, plain, tokens):
    requests = requests_of(samples=4)
    notes: list[str] = []
    engine = forest(model, kv_bytes=tokens * TOKEN_BYTES, prefill_tokens=16, note=notes.append)
    sample(engine, requests[:3], 12)
    again = other_samples(requests, 3)
    assert_same(sample(engine, again, 12), sample(padded(plain), again, 12))
    assert engine.most_kv_bytes <= tokens * TOKEN_BYTES
    assert any("instead of" in note and f"within {tokens * TOKEN_BYTES} bytes" in note for note in notes)


def test_the_number_of_slots_leaves_room_for_prompts_and_whole_responses():
    rng = np.random.default_rng(1)
    root = ids(rng, 10)
    tree = prompt_tree([np.concatenate([root, [i], ids(rng, 4)]) for i in range(6)], max_node_tokens=99)
    order = np.argsort(tree.leaf, kind="stable")
    for slots in range(1, 7):
        enough = 10 + slots * (5 + 7)
        room = room_for(tree, order, response_tokens=7, kv_tokens=enough, slots=6)
        assert room == (slots, 7, 1, slots)
        assert room_for(tree, order, response_tokens=7, kv_tokens=enough - 1, slots=6).slots == slots - 1


def test_what_cannot_fit_alone_is_refused_with_the_numbers(model):
    requests = requests_of()
    longest = max(len(r.prompt_ids) for r in requests)
    room = (longest + 11) * TOKEN_BYTES
    sample(forest(model, kv_bytes=room), requests, 12)
    engine = forest(model, kv_bytes=room - 1)
    with pytest.raises(
        UserError,
        match=rf"problem p1, context c0, sample 0: .* {longest} prompt and 12 response tokens take {room} bytes "
        rf"\({TOKEN_BYTES} per token\); rollout.kv_memory_bytes allows {room - 1}",
    ):
        sample(engine, requests, 12)
    assert engine.tokens_computed == 0


def test_nodes_are_freed_one_by_one_when_memory_is_short(model, monkeypatch):
    held: list[int] = []
    needed: list[int] = []
    make_room = ForestDecoder._make_room

    def spy(self):
        make_room(self)
        held.append(self.cache.tokens)
        nodes = self._needed()
        needed.append(int((self.tree.end - self.tree.start)[nodes].sum()))

    monkeypatch.setattr(ForestDecoder, "_make_room", spy)
    requests = requests_of(contexts=(9,) * 12, problems=(4, 5), samples=2)
    engine = forest(model, max_batch=4, prefill_tokens=30, kv_bytes=60 * TOKEN_BYTES)
    sample(engine, requests, 4)
    assert len(held) > 3
    # padding within a block at most doubles
    assert all(h <= 2 * n for h, n in zip(held, needed, strict=True))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("on the GPU"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_halves_the_batch_once_and_then_is_a_user_error(model, monkeypatch, error):
    requests, batches, notes = requests_of(), [], []
    run = ForestDecoder.run

    def short(self, limit=5):
        batches.append(self.max_batch)
        if self.max_batch > limit:
            raise error
        run(self)

    monkeypatch.setattr(ForestDecoder, "run", short)
    assert_same(
        sample(forest(model, max_batch=8, note=notes.append), requests),
        sample(forest(model, max_batch=4), requests),
    )
    assert batches == [8, 4, 4]
    assert notes == [f"rollouts: out of memory with 8 sequences at a time ({error}); once more with 4"]
    monkeypatch.setattr(ForestDecoder, "run", lambda self: short(self, 1))
    with pytest.raises(
        UserError, match=r"with 8 sequences at a time and again with 4: .*lower rollout\.max_batch=8"
    ):
        sample(forest(model, max_batch=8), requests)


def test_other_errors_are_not_mistaken_for_out_of_memory(model, monkeypatch):
    def fail(self):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(ForestDecoder, "run", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        sample(forest(model), requests_of())


@pytest.mark.parametrize("seed", [0, 17])
def test_a_window_of_short_nodes_counts_their_padding_and_their_logits(model, monkeypatch, seed):
    """One block holds nodes of 1 to 32 tokens, each as long as the longest, and a prompt's end has logits that are held."""
    rng = np.random.default_rng(seed)
    prompts = [ids(rng, 1 + 28 * (i % 12 == 0)) for i in range(36)]
    requests = [Request(f"p{i}", "", 0, np.append(p, i + 6), i) for i, p in enumerate(prompts)]
    expected, held = sample(forest(model), requests, 6), []
    prefill = ForestDecoder._prefill

    def watched(self):
        done = prefill(self)
        held.append(self._prompt_tokens() + self._suffix_tokens)
        return done

    monkeypatch.setattr(ForestDecoder, "_prefill", watched)
    engine = forest(model, max_batch=4, kv_bytes=150 * TOKEN_BYTES)
    assert_same(sample(engine, requests, 6), expected)
    assert max(held) <= 150
    assert engine.most_kv_bytes <= 150 * TOKEN_BYTES


def test_duplicate_requests_are_refused(model):
    requests = requests_of()
    with pytest.raises(
        UserError, match=r"problem p0, context c0, sample 0 is asked for twice with the same seed 0"
    ):
        sample(forest(model), [*requests, requests[0]])


def test_half_of_the_free_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = engine_module._half_of_free_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < engine_module._half_of_free_memory() < alone / 3


def test_what_the_allocator_holds_back_and_what_keys_and_values_take_is_room_too(monkeypatch):
    """The second step of a run has the memory of the first, though torch has kept all that the first one used."""
    gpu = torch.device("cuda", 0)

    def room(free, reserved, allocated, held, other=5):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 141))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated)
        return engine_module._room_on_device(gpu, held, other)

    first = room(free=100, reserved=40, allocated=40, held=0)
    assert first == 90
    assert room(free=20, reserved=120, allocated=40, held=0) == first
    assert room(free=20, reserved=120, allocated=70, held=30) == first
    assert room(free=100, reserved=40, allocated=40, held=0, other=30) == 70
    assert room(free=100, reserved=40, allocated=40, held=0, other=1000) == 50


def test_the_room_is_asked_for_once_a_call(model, monkeypatch):
    engine = forest(model)
    engine.kv_bytes = None
    asked = []
    half = engine_module._half_of_free_memory
    monkeypatch.setattr(engine_module, "_half_of_free_memory", lambda: (asked.append(1), half())[1])
    sample(engine, requests_of())
    assert len(asked) == 1


def test_a_stop_text_ends_a_response_wherever_its_tokens_begin(model):
    requests = requests_of(samples=4)
    free = sample(forest(model, eos=()), requests, 12)

    def decode(tokens):
        return "".join(f"<{t}>" for t in tokens)

    victim = free[0].response_ids.tolist()
    stop = decode(victim[3:5])[1:-1]  # begins and ends inside a token
    stopped = sample(forest(model, eos=(), stop=[stop, "never"], decode=decode), requests, 12)
    assert stopped[0].response_ids.tolist() == victim[:5]
    assert stopped[0].finish == "stop"
    for a, b in zip(free, stopped, strict=True):
        where = decode(a.response_ids).find(stop)
        assert (b.finish == "stop") == (where >= 0)
        assert b.response_ids.tolist() == a.response_ids.tolist()[: len(b.response_ids)]
        assert where < 0 or stop not in decode(b.response_ids[:-1])
