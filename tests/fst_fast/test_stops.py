"""Stop texts: the same answers as decoding the end of the response after every token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.rollout.stops import StopTexts

# Pieces of a byte-level vocabulary: characters of one to four bytes, cut anywhere, and whole words.
PIECES = [bytes([b]) for b in range(256)] + [
    w.encode() for w in ("ab", "Ende", "</s", "\u00e9t", " \u4f60", "\U0001f600!", "\n\n")
]


def decode(ids: np.ndarray) -> str:
    return b"".join(PIECES[i] for i in ids).decode("utf-8", errors="replace")


def naive(texts: tuple[str, ...], ids: np.ndarray) -> bool:
    tail = max(len(t.encode()) for t in texts) + 1
    return any(t in decode(ids[-tail:]) for t in texts)


def tokens_of(text: str, cut: int) -> list[int]:
    """Whole pieces where they match, else single bytes; `cut` varies which."""
    data, out = text.encode(), []
    while data:
        long = [i for i in range(256, len(PIECES)) if data.startswith(PIECES[i])]
        take = long[cut % len(long)] if long and cut % 3 else data[0]
        out.append(take)
        data = data[len(PIECES[take]) :]
    return out


TEXTS = ("Ende", "\u00e9t\u00e9", "\u4f60", "\U0001f600!", "</s>", "b\U0001f600")


@settings(max_examples=150, deadline=None)
@given(
    stops=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3, unique=True),
    parts=st.lists(st.sampled_from((*TEXTS, "x", "b", "E", "\u00e9", " \n")), max_size=8),
    cut=st.integers(0, 5),
)
def test_it_stops_at_the_token_at_which_decoding_everything_would(stops, parts, cut):
    ids = np.array(tokens_of("".join(parts), cut), dtype=np.int64)
    ends = StopTexts(stops, decode)
    for n in range(1, len(ids) + 1):
        there = naive(tuple(stops), ids[:n])
        assert ends(ids[:n]) == there, (stops, decode(ids[:n]))
        if there:
            break  # the response ends here


def test_a_character_of_four_bytes_completes_at_its_last_byte():
    ids = np.array([*b"ok", *"\U0001f600".encode()], dtype=np.int64)
    ends = StopTexts(["\U0001f600"], decode)
    assert [ends(ids[:n]) for n in range(1, len(ids) + 1)] == [False] * 5 + [True]


def test_tokens_that_cannot_complete_a_text_are_decoded_once():
    calls = []
    ends = StopTexts(["!"], lambda ids: (calls.append(len(ids)), decode(ids))[1])
    ids = np.array([*b"abcabcabcabc"], dtype=np.int64)
    assert not any(ends(ids[:n]) for n in range(1, len(ids) + 1))
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("text", ["a ", "\n\n"])
def test_a_text_that_ends_in_a_blank_is_always_looked_for(text):
    """Some decoders drop the blank in front of the first token."""
    ends = StopTexts([text], lambda ids: decode(ids).removeprefix(" "))
    assert ends(np.array([*b"xx", *text.encode()], dtype=np.int64))
