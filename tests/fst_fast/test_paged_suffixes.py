"""Responses in pages: the same bits as in one piece, more sequences where memory is short, and no page that two hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.plan import times
from fst_fast.rollout import decode, room
from fst_fast.rollout.cascade import Suffixes
from fst_fast.rollout.decode import ForestDecoder
from fst_fast.rollout.engine import Request
from fst_fast.rollout.graphs import EAGER_STEPS, StepGraph
from fst_fast.rollout.kv_pool import KVPool
from fst_fast.rollout.responses import Responses
from fst_fast.rollout.room import Room
from fst_fast.rollout.scheduler import Slots
from tests.compiler import needs_a_compiler
from tests.fst_fast.test_graphs import recording
from tests.fst_fast.test_rollout import EOS, assert_same, forest, ids, make_model, padded, requests_of, sample
from tests.fst_fast.test_rollout_memory import TOKEN_BYTES

TOKENS, PAGE = 41, 4  # ten pages


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


@pytest.fixture
def decoders(monkeypatch) -> list[ForestDecoder]:
    """Those that have run, with small pages."""
    made: list[ForestDecoder] = []
    run = ForestDecoder.run

    def noted(self: ForestDecoder) -> None:
        made.append(self)
        run(self)

    monkeypatch.setattr(ForestDecoder, "run", noted)
    monkeypatch.setattr(room, "PAGE", PAGE)
    return made


def exact_logprobs(requests, rollouts):
    """Of all sampled tokens, in float64: two results in float32 may each be half a tolerance away."""
    model, found = make_model("llama", "sdpa").double(), []
    for request, rollout in zip(requests, rollouts, strict=True):
        ids = torch.tensor(np.concatenate([request.prompt_ids, rollout.response_ids]))
        with torch.no_grad():
            rows = model(ids[None]).logits[0, len(request.prompt_ids) - 1 : -1].log_softmax(-1)
        found.append(rows.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0].numpy())
    return np.concatenate(found)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_pages_change_no_bit(kind, backend, monkeypatch):
    needs_a_compiler(backend)
    monkeypatch.setenv("FST_KERNELS", backend)
    model, requests = make_model(kind), requests_of()

    def rollouts(given):
        monkeypatch.setattr(decode, "room_for", lambda *_, **__: given)
        return sample(forest(model), requests, TOKENS)

    slots = 5
    pieces = rollouts(Room(slots, TOKENS - 1, 1, slots))
    pages = rollouts(Room(slots, PAGE, 10, slots * 10))
    for a, b in zip(pieces, pages, strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()
        assert a.logprobs.tolist() == b.logprobs.tolist()


@pytest.mark.parametrize("eos", [EOS, ()], ids=["some end early", "none ends early"])
@pytest.mark.parametrize(("backend", "tokens"), [("cpu", 150), ("cpu", 190), ("reference", 190)])
def test_where_memory_is_short_more_sequences_run_and_no_token_changes(
    model, decoders, backend, eos, tokens, monkeypatch
):
    needs_a_compiler(backend)
    monkeypatch.setenv("FST_KERNELS", backend)
    requests = requests_of(samples=4 if backend == "cpu" else 3)
    notes: list[str] = []
    engine = forest(model, eos=eos, kv_bytes=tokens * TOKEN_BYTES, prefill_tokens=16, note=notes.append)
    rollouts = sample(engine, requests, TOKENS)
    expected = sample(padded(make_model("llama", "sdpa"), eos=eos), requests, TOKENS)
    for one, other in zip(rollouts, expected, strict=True):
        assert (one.finish, one.response_ids.tolist()) == (other.finish, other.response_ids.tolist())
    logprobs = np.concatenate([r.logprobs for r in rollouts])
    np.testing.assert_allclose(logprobs, exact_logprobs(requests, rollouts), atol=2e-5)
    [decoder] = decoders
    assert f"share {decoder.room.pages} pages of 4 tokens" in notes[0]
    whole = (tokens - 40) // (TOKENS - 1)
    assert decoder.room.slots > 1.5 * whole
    assert engine.most_kv_bytes <= tokens * TOKEN_BYTES
    assert (decoder.restarted > 0) == (eos == ())
    assert (decoder.fed == decoder.responses.length - 1).all()
    assert decoder.pool.tokens == engine._prefixes.tokens, "no page is left behind"


def test_no_step_of_a_later_call_takes_more_memory_than_allowed(model, monkeypatch):
    """What an earlier call left is given up where pages take its room, though a part of it is found."""
    most, step = [], ForestDecoder._step

    def noted(self, *given):
        step(self, *given)
        most.append((self.room.most, self.pool.slots))

    monkeypatch.setattr(room, "PAGE", PAGE)
    monkeypatch.setattr(ForestDecoder, "_step", noted)
    prompts = [ids(np.random.default_rng(i), 12) for i in range(2)]
    first = [Request(f"p{i}", "", 0, prompt, i) for i, prompt in enumerate(prompts)]
    second = [Request("p1", "", s, prompts[1], 10 + s) for s in range(14)]
    engine = forest(model, kv_bytes=170 * TOKEN_BYTES)
    sample(engine, first, TOKENS)
    assert engine._prefixes.tokens == 24
    said, kept = sample(engine, second, TOKENS), most.copy()
    assert_same(said, sample(forest(model), second, TOKENS))
    assert {pages for pages, _ in kept} == {1, 10}
    assert max(slots for _, slots in kept) <= 170


def test_a_step_may_draw_nothing_while_a_response_is_fed_again(model, decoders, monkeypatch):
    """Two responses that do not fit together: one waits, and goes on when the other has ended."""
    requests, draws, steps = requests_of(samples=1)[:2], [], []
    draw, step = Responses.draw, ForestDecoder._step
    monkeypatch.setattr(Responses, "draw", lambda *given: (draws.append(1), draw(*given))[1])
    monkeypatch.setattr(ForestDecoder, "_step", lambda *given: (steps.append(1), step(*given))[1])
    how = {"eos": (), "stop": ["never"], "decode": lambda ids: "".join(f"<{i}>" for i in ids)}
    roomy = sample(forest(model, **how), requests, TOKENS)
    draws.clear(), steps.clear()
    tight = forest(model, kv_bytes=(18 + 3 + 9 + 40 + 4) * TOKEN_BYTES, **how)
    assert_same(sample(tight, requests, TOKENS), roomy)
    assert decoders[1].room.slots == 2
    assert decoders[1].restarted == 1
    assert len(steps) - (len(draws) - 2) > 10, "the first tokens are drawn after the prompts"


def test_a_recorded_step_stays_valid_while_responses_take_pages(model, decoders, monkeypatch):
    monkeypatch.setattr("fst_fast.rollout.graphs.look_at_values", lambda _: False)
    requests, graph = requests_of(samples=1), StepGraph(recording)
    monkeypatch.setattr(decode, "room_for", lambda *_, **__: Room(8, PAGE, 10, 80))
    said = sample(padded(make_model("llama", "sdpa"), eos=()), requests, TOKENS)
    assert_same(sample(forest(model, eos=(), graph=graph), requests, TOKENS), said)
    assert graph.recorded == 1
    assert graph.replayed == TOKENS - 1 - EAGER_STEPS


def test_where_there_is_room_a_response_is_one_piece(model, decoders):
    sample(forest(model), requests_of(), TOKENS)
    assert decoders[0].room == (14, TOKENS - 1, 1, 14)
    sample(forest(model, kv_bytes=60 * TOKEN_BYTES), requests_of(), 20)
    assert decoders[1].room.most == 1, "five pages are no long response"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_page_belongs_to_one_slot_and_keeps_what_is_written(data):
    """Against a list of what every slot has written."""
    pool, slots, most = KVPool(), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    pool.limit = 1000
    suffixes = Suffixes(pool, slots, page=3, most=most, pages=data.draw(st.integers(most, slots * most)))
    written: list[list[float]] = [[] for _ in range(slots)]
    other, number = pool.take(5), 0.0
    for _ in range(data.draw(st.integers(1, 25))):
        what = data.draw(st.sampled_from(["write", "drop", "keep", "move"]))
        slot = data.draw(st.integers(0, len(written) - 1))
        if what == "write" and len(written[slot]) < 3 * most:
            here, tokens, free = np.array([slot]), np.array([len(written[slot]) + 1]), len(suffixes.free)
            if not suffixes.grow(here, tokens):
                assert not free
                continue
            number += 1
            written[slot].append(number)
            at = suffixes.rows(here, tokens - 1)
            pool.write(0, torch.from_numpy(at), *(torch.full((1, 1, 2), sign * number) for sign in (1, -1)))
        elif what == "drop":
            suffixes.drop(np.array([slot]))
            written[slot] = []
        elif what == "keep":
            order = data.draw(st.permutations(range(len(written))))[: data.draw(st.integers(1, len(written)))]
            limit = data.draw(st.integers(len(order), slots))
            suffixes.keep(np.array(order), limit, torch.device("cpu"))
            written = [*(written[i] for i in order), *([] for _ in range(limit - len(order)))]
        else:
            del other  # what lies behind moves up
            other = pool.take(7)
            pool.resize(0)
        held = suffixes.table[suffixes.table >= 0]
        assert (
            len({*held.tolist(), *suffixes.free})
            == len(held) + len(suffixes.free)
            == suffixes.span.tokens // 3
        )
        assert suffixes.span.tokens // 3 >= most
        for i, mine in enumerate(written):
            rows = suffixes.rows(np.full(len(mine), i), np.arange(len(mine)))
            if mine:
                assert pool.k[0][rows, 0, 0].tolist() == mine
                assert pool.v[0][rows, 0, 1].tolist() == [-x for x in mine]


def test_sequences_that_are_put_back_are_the_next_ones_in_their_order():
    slots = Slots(np.array([4, 2, 0, 3, 1]), 3)
    slots.refill(lambda _: True)
    slots.put_back(np.array([2, 1]))
    assert slots.should_refill()
    assert slots.live.tolist() == [True, False, False]
    assert slots.width == 1
    slots.refill(lambda sequence: None if sequence == 3 else True)
    assert slots.sequence.tolist() == [4, 2, 0]
    assert slots.width == 2
    slots.live[:] = False
    slots.refill(lambda _: True)
    assert slots.sequence.tolist() == [3, 1]


@pytest.mark.parametrize("regrow", [True, False])
def test_a_slot_for_which_there_was_no_room_is_filled_later_where_slots_regrow(regrow):
    slots = Slots(np.arange(9), 4, regrow=regrow)
    slots.refill(lambda sequence: True if sequence < 2 else None)
    assert slots.sequence.tolist() == [0, 1]
    slots.live[0] = False
    stay, fresh = slots.refill(lambda _: True)
    assert slots.sequence.tolist() == ([2, 1, 3, 4] if regrow else [2, 1])
    assert stay.tolist() == list(range(len(stay)))
    assert fresh.tolist() == ([0, 2, 3] if regrow else [0])
    slots.live[1:] = False
    slots.refill(lambda _: True)
    assert len(slots.sequence) == (4 if regrow else 2)


def test_whole_responses_lie_side_by_side_whoever_leaves_and_enters(model, monkeypatch):
    """The reference reads them through one strided view then."""
    seen = []

    def noted(self, *given, **how):
        suffixes = given[2]
        seen.append(suffixes.table[:, 0].tolist())
        init(self, *given, **how)

    init = decode.DecodePlan.__init__
    monkeypatch.setattr(decode.DecodePlan, "__init__", noted)
    sample(forest(model, max_batch=6), requests_of(samples=5), 20)
    assert len({len(pages) for pages in seen}) > 2, "slots were refilled, and the batch has shrunk"
    assert all(pages == list(range(len(pages))) for pages in seen)


def test_the_plan_counts_pages_as_the_engine_does():
    assert (times.PAGE, times.EXPECTED) == (room.PAGE, room.EXPECTED)
