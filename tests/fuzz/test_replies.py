"""Any reply of a reflector gives a context that it holds, or a reason to refuse it."""

from __future__ import annotations

from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.fast.fences import without_thought
from fst_fast.fast.reflection import WHOLE, RefusalReason, Reply, extract

FUZZ = settings.get_profile("fuzz")
SPECIAL = ("<|im_end|>", "[INST]", "<think>")
# fmt: off
pieces = st.one_of(
    st.sampled_from([
        "```", "````", "`````", "``", "`", "\n", "\r\n", " ", "text\n", "python\n", "Trace\n", "<think>", "</think>", "<THINKING>", "</thinking>",
        "(the revised instruction)", "be brief", "end", "<|im_end|>", "[INST]", "~~~", "\ud83d", "\x00", "\u2028", "  \n", "```text\n", "\n```\n",
        "```python\n", "\n````\n",
    ]),
    st.text(max_size=8),
)
# fmt: on
replies = st.lists(pieces, max_size=24).map("".join) | st.lists(pieces, max_size=400).map("".join)
finishes = st.sampled_from(
    [
        "stop",
        "eos",
        "STOP",
        "length",
        "max_tokens",
        "error",
        "content_filter",
        "abort",
        "none",
        "",
        "tool_calls",
    ]
) | st.text(max_size=8)


@settings(FUZZ)
@given(replies, finishes, st.lists(st.sampled_from(["be brief", "end", ""]), max_size=2))
def test_a_reply_is_read_or_refused_with_a_reason(bounded, reply, finish, known):
    found = bounded(
        lambda: extract(
            Reply(reply, finish),
            known_texts=known,
            count_tokens=lambda text: len(text.split()),
            max_tokens=20,
            spells_special=lambda text: any(word in text for word in SPECIAL),
        )
    )
    if not isinstance(found, str):
        assert found.reason in get_args(RefusalReason)
        return
    assert finish.lower() in WHOLE
    assert found == found.strip() != ""
    assert found in without_thought(reply)
    assert found in reply
    assert not any(word in found for word in SPECIAL)
    assert " ".join(found.split()) not in known
    assert len(found.split()) <= 20
    found.encode()


@settings(FUZZ)
@given(
    st.lists(st.sampled_from(["a", "use ```x``` here", "<think></think>", "</think>", "", "`", "``", "1.", "python"]), min_size=1, max_size=5),
    st.sampled_from(["", "<think>hm</think>", "<think>```\nno\n```</think>\n", "Here it is.\n"]),
    st.sampled_from(["", "text", "md"]),
    st.sampled_from(["", "\nDone."]),
)  # fmt: skip
def test_a_context_between_two_fences_comes_back_as_it_was(bounded, lines, before, language, after):
    context = "\n".join(["first", *lines, "last"])
    reply = f"{before}````{language}\n{context}\n````{after}"
    found = bounded(
        lambda: extract(
            Reply(reply, "stop"), known_texts=[], count_tokens=lambda text: len(text.split()), max_tokens=99
        )
    )
    assert found == context
