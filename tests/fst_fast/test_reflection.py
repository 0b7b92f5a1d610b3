"""What the reflector is shown, and what is read out of its reply."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.fast.fences import without_thought
from fst_fast.fast.reflection import Failure, ReflectionPrompt, Refusal, Reply, ask, extract
from fst_fast.fast.request import PLACEHOLDER, SHOWN_CHARS


def read(text, *, finish="stop", known=(), limit=50, special="<|im_end|>"):
    return extract(
        Reply(text, finish),
        known_texts=list(known),
        count_tokens=lambda t: len(t.split()),
        max_tokens=limit,
        spells_special=lambda t: special in t,
    )


def test_the_prompt_shows_context_problem_response_feedback_and_reward():
    text = ReflectionPrompt("be brief", [Failure("2+2?", "five", "the answer is 4", 0.25)]).render()
    for part in ("be brief", "2+2?", "five", "the answer is 4", "0.25", "```"):
        assert part in text


def test_a_long_response_is_shown_without_its_middle():
    response = "A" * SHOWN_CHARS + "B" * SHOWN_CHARS
    text = ReflectionPrompt("c", [Failure("p", response, "f", 0.0)]).render()
    assert f"{SHOWN_CHARS} characters left out" in text
    assert len(text) < 2 * SHOWN_CHARS


@pytest.mark.parametrize(
    ("reply", "context"),
    [
        ("Sure:\n```\ntrace back first\n```", "trace back first"),
        ("```text\ntrace back\nthen box\n```\nDone.", "trace back\nthen box"),
        ("```trace back```", "trace back"),
        ("```\nold draft\n```\nbetter:\n```text\nnew one\n```", "new one"),
        ("```\nold draft\n```\nbetter:\n````\nnew one\n````", "new one"),
        ("<think>```\nno\n```</think>\n```\nyes\n```", "yes"),
        ("I think ```\nno\n``` hm</think>```\nyes\n```", "yes"),  # the chat template had opened the block
        ("<THINKING>x</THINKING>```\nyes\n```", "yes"),
        ("````\nuse ```python``` fences\n````", "use ```python``` fences"),
        ("````\nuse\n```\ncode\n```\nthen stop\n````", "use\n```\ncode\n```\nthen stop"),
        ("```\nform:\n```python\nx = 1\n```\nend\n```", "form:\n```python\nx = 1\n```\nend"),
        (
            "```md\n1.\n```json\n{}\n```\n2.\n```sh\nls\n```\n3.\n```",
            "1.\n```json\n{}\n```\n2.\n```sh\nls\n```\n3.",
        ),
        ("I looked at ```x``` first.\n```\nanswer in ```json``` form\n```", "answer in ```json``` form"),
        ("```Trace\nback from the goal```", "Trace\nback from the goal"),
        ("```rules\nbe brief\n```", "rules\nbe brief"),
        ("```plaintext\r\nbe brief\r\n```", "be brief"),
        ("```\nwrite <think></think> before the answer\n```", "write <think></think> before the answer"),
        ("<think>hm</think>\n```\nput <think>work</think> first\n```", "put <think>work</think> first"),
        ("```\nend your thought with </think> and answer\n```", "end your thought with </think> and answer"),
        ("<think>they want <think> tags</think>```\nuse tags\n```", "use tags"),
        ("<think>a</think>\n<thinking>b</thinking>\n```\nc\n```", "c"),
        ("```\n\n  padded  \n\n```", "padded"),
    ],
)
def test_the_last_fenced_block_outside_thinking_is_the_context(reply, context):
    assert read(reply) == context


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("trace back first", "unfenced"),
        ("", "unfenced"),
        ("<think>so I would say ```\nx\n```", "unfenced"),  # cut off while thinking: the known failure
        ("so maybe ```\nx\n``` no</think> I give up", "unfenced"),
        ("```\nfirst\n```\nand then ```\nnever closed", "unfenced"),
        ("```\nold draft\n```\nbetter:\n```\nnew one\n```", "ambiguous"),
        ("```\nform:\n```\nx = 1\n```\nend\n```", "ambiguous"),
        ("```text\ndraft\n```\nand\n```\nnew\n```", "ambiguous"),
        ("``` " * 66, "ambiguous"),
        (f"```\n{PLACEHOLDER}\n```", "placeholder"),
        ("```\n[The  revised instruction.]\n```", "placeholder"),
        ("```\nBe brief.<|im_end|>\n```", "special_token"),
        ("```\n\n```", "empty"),
        ("```\n   \n```", "empty"),
        ("```\nhalf \ud800 pair\n```", "not_text"),
        ("```\n" + "word " * 51 + "\n```", "too_long"),
    ],
)
def test_what_cannot_be_a_context_is_refused_with_a_reason(reply, reason):
    assert read(reply) == Refusal(reason)


def test_a_reply_stopped_by_length_is_refused_even_with_a_fence():
    assert read("```\nfine\n```", finish="length") == Refusal("length")


@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        ("LENGTH", "length"),
        ("max_tokens", "length"),
        ("MAX_TOKENS", "length"),
        ("error", "error"),
        ("none", "cut_off"),
        ("tool_calls", "cut_off"),
        ("Content_Filter", "cut_off"),
        ("", "cut_off"),
    ],
)
def test_only_a_reply_that_its_model_ended_is_whole(finish, reason):
    assert read("```\nfine\n```", finish=finish) == Refusal(reason)
    assert read("```\nfine\n```", finish="STOP") == read("```\nfine\n```", finish="eos") == "fine"


@pytest.mark.parametrize("finish", ["abort", "content_filter"])
def test_a_reply_cut_off_for_another_reason_is_refused(finish):
    assert read("```\nfine\n```", finish=finish) == Refusal("cut_off")


def test_an_error_is_a_refusal():
    assert extract(Reply.failed("down"), known_texts=[], count_tokens=len, max_tokens=9) == Refusal("error")
    assert extract(Reply(None, "stop"), known_texts=[], count_tokens=len, max_tokens=9) == Refusal("error")


def test_a_known_text_is_a_duplicate_whatever_its_white_space():
    assert read("```\nbe   brief\nplease\n```", known=["be brief please"]) == Refusal("duplicate")
    assert read("```\nbe briefer\n```", known=["be brief please"]) == "be briefer"


def test_exactly_the_longest_allowed_context_passes():
    assert read("```\n" + " ".join(["w"] * 50) + "\n```") == " ".join(["w"] * 50)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "```", "`", "\n", "a", " ", "text"]), max_size=20))
def test_no_reply_breaks_the_reading_and_no_thinking_gets_through(pieces):
    text = "".join(pieces)
    found = read(text)
    assert isinstance(found, (str, Refusal))
    assert not without_thought(text).lstrip().startswith("<think>")
    if isinstance(found, str):
        assert found == found.strip() != ""
        assert found in without_thought(text)


PROMPTS = [ReflectionPrompt("a", []), ReflectionPrompt("b", [])]


def raising(prompts, *, seeds):
    raise ConnectionError("nobody there\nsecond line")


@pytest.mark.parametrize(
    ("reflect", "said"),
    [
        (raising, "ConnectionError: nobody there"),
        (lambda prompts, *, seeds: None, "NoneType"),
        (lambda prompts, *, seeds: [Reply("x", "stop")], "1 items where 2 replies"),
        (lambda prompts, *, seeds: ["x", "y"], "2 items where 2 replies"),
    ],
)
def test_a_broken_reflector_becomes_replies_with_errors(reflect, said):
    lines: list[str] = []
    replies = ask(reflect, PROMPTS, [1, 2], lines.append)
    assert [reply.text for reply in replies] == [None, None]
    assert said in (replies[0].error or "")
    assert len(lines) == 1
    assert "2 of 2 reflections failed" in lines[0]


def test_one_failed_reply_is_logged_and_the_other_used():
    lines: list[str] = []
    replies = ask(
        lambda prompts, *, seeds: [Reply("x", "stop"), Reply.failed("late")], PROMPTS, [1, 2], lines.append
    )
    assert [reply.text for reply in replies] == ["x", None]
    assert lines == ["1 of 2 reflections failed: late"]
