"""Responses in pages: the same bits as in one piece, more sequences where memory is short, and no page that two hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.plan import times
from fst_fast.rollout import decode
from fst_fast.rollout.cascade import Suffixes
from fst_fast.rollout.decode import ForestDecoder, Room
from fst_fast.rollout.kv_pool import KVPool
from fst_fast.rollout.scheduler import Slots
from tests.compiler import needs_a_compiler
from tests.fst_fast.test_rollout import EOS, assert_same, forest, make_model, padded, requests_of, sample
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
    monkeypatch.setattr(decode, "PAGE", PAGE)
    return made


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_pages_change_no_bit(kind, backend, monkeypatch):
    needs_a_compiler(backend)
    monkeypatch.setenv("FST_KERNELS", backend)
    model, requests = make_model(kind), requests_of()

    def rollouts(room):
        monkeypatch.setattr(decode, "room_for", lambda *_, **__: room)
        return sample(forest(model), requests, TOKENS)

    slots = 5
    pieces = rollouts(Room(slots, TOKENS - 1, 1, slots))
    pages = rollouts(Room(slots, PAGE, 10, slots * 10))
    for a, b in zip(pieces, pages, strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()
        assert a.logprobs.tolist() == b.logprobs.tolist()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("eos", [EOS, ()], ids=["some end early", "none ends early"])
@pytest.mark.parametrize("tokens", [150, 190])
def test_where_memory_is_short_more_sequences_run_and_no_token_changes(
    model, decoders, backend, eos, tokens, monkeypatch
):
    needs_a_compiler(backend)
    monkeypatch.setenv("FST_KERNELS", backend)
    requests = requests_of(samples=4)
    notes: list[str] = []
    engine = forest(model, eos=eos, kv_bytes=tokens * TOKEN_BYTES, prefill_tokens=16, note=notes.append)
    assert_same(
        sample(engine, requests, TOKENS),
        sample(padded(make_model("llama", "sdpa"), eos=eos), requests, TOKENS),
    )
    [decoder] = decoders
    assert f"share {decoder.room.pages} pages of 4 tokens" in notes[0]
    whole = (tokens - 40) // (TOKENS - 1)
    assert decoder.room.slots > 1.5 * whole
    assert engine.most_kv_bytes <= tokens * TOKEN_BYTES
    assert (decoder.restarted > 0) == (eos == ())
    assert (decoder.fed == decoder.responses.length - 1).all()
    assert len(decoder.pool._spans) == len(engine._prefixes.calls) or not decoder.pool.tokens, (
        "no page is left behind"
    )


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
            tokens = np.array([len(w) for w in written])
            tokens[slot] += 1
            if suffixes.lacking(tokens).sum() > len(suffixes.free):
                continue
            suffixes.grow(tokens)
            number += 1
            written[slot].append(number)
            at = suffixes.rows(np.array([slot]), tokens[slot : slot + 1] - 1)
            pool.write(0, torch.from_numpy(at), *(torch.full((1, 1, 2), sign * number) for sign in (1, -1)))
        elif what == "drop":
            suffixes.drop(np.array([slot]))
            written[slot] = []
        elif what == "keep":
            order = data.draw(st.permutations(range(len(written))))[: data.draw(st.integers(1, len(written)))]
            suffixes.keep(np.array(order), torch.device("cpu"))
            written = [written[i] for i in order]
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
    slots.refill(lambda sequence: None if sequence == 3 else True)
    assert slots.sequence.tolist() == [4, 2, 0]
    slots.live[:] = False
    slots.refill(lambda _: True)
    assert slots.sequence.tolist() == [3, 1]


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
    assert times.PAGED == decode.EXPECTED
    assert times.PAGED_FROM == (2 * decode.EXPECTED - 1) * decode.PAGE
