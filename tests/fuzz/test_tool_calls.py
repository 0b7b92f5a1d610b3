"""Responses with tool calls: each is read, refused in one sentence, or calls nothing; what the model then reads can be encoded."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.contracts import EpisodeState, Problem
from fst_fast.tasks.tools.calls import MOST_CALLS, SYNTAXES, Call, CallError, read_calls
from fst_fast.verify.episodes import Episodes, Move

FUZZ = settings.get_profile("fuzz")

text = st.one_of(
    st.text(max_size=12),
    st.text('ab{}[]":,\\ \n<>/|', max_size=12),
    st.sampled_from(
        [
            "\ud800",
            "\\ud83d",
            "NaN",
            "1e999",
            "9" * 5000,
            "null",
            "</think>",
            "<|im_end|>",
            "[" * 3000,
            "a\rb",
            "\r",
        ]
    ),
)
leaves = st.one_of(text, st.none(), st.booleans(), st.integers(), st.floats())
values = st.recursive(
    leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(text, x, max_size=3), max_leaves=6
)
names = st.sampled_from(["double", "repeat", "fails"]) | text
trees = st.one_of(
    st.fixed_dictionaries({"name": names, "arguments": st.dictionaries(st.sampled_from(["x", "times", "word"]) | text, values, max_size=3)}),
    st.fixed_dictionaries({"name": values, "parameters": values}),
    values,
)  # fmt: skip
bodies = st.one_of(trees.map(json.dumps), text)
FRAMES = ("{}", "<tool_call>{}</tool_call>", "<tool_call>\n{}\n", "[TOOL_CALLS][{}]", "[TOOL_CALLS]{}", "<|python_tag|>{}", "</tool_call>{}", "<think>{}</think>")  # fmt: skip
pieces = st.tuples(st.sampled_from(FRAMES), bodies).map(lambda piece: piece[0].replace("{}", piece[1]))
responses = st.lists(pieces | text, max_size=20).map("".join)


def double(x: float) -> float:
    """Twice a number."""
    return 2 * x


def repeat(word: str, times: int = 1) -> str:
    """A word several times, and half a character."""
    return word * min(times, 99) + "\ud800"


def fails(word: str) -> str:
    """Raises its argument."""
    raise ValueError(word)


class Tools:
    """Asks for another response, whatever was said."""

    def start(self, problem):
        return problem.messages, (double, repeat, fails)

    def step(self, state: EpisodeState, response: str):
        return [{"role": "user", "content": response, "name": response}]


@settings(FUZZ)
@given(responses, st.sampled_from(list(SYNTAXES)))
def test_the_calls_of_a_response_are_read_or_refused_in_one_sentence(bounded, response, syntax):
    calls, refusal = [], ""
    try:
        calls = bounded(lambda: read_calls(response, syntax))
    except CallError as error:
        refusal = str(error)
    assert len(refusal.splitlines()) <= 1
    assert len(refusal) <= 500
    assert len(calls) <= MOST_CALLS
    for call in calls:
        assert isinstance(call, Call)
        assert isinstance(call.name, str)
        assert isinstance(call.arguments, dict)
        assert json.dumps(call.name)[1:-1] in response or call.name in response or "\\" in response


@settings(FUZZ)
@given(responses, st.sampled_from(list(SYNTAXES)))
def test_what_a_response_s_calls_give_can_be_encoded_and_is_bounded(bounded, response, syntax):
    problem = Problem("p", [{"role": "user", "content": "go"}], None)
    episodes = Episodes(Tools(), syntax=syntax, chars=300, check=lambda verdict: {})
    [opening] = episodes.replies([Move(1, problem, 0)])
    assert len(opening["tools"]) == 3
    seen = tuple(episodes._live[1].said)
    [reply] = bounded(lambda: list(episodes.replies([Move(1, problem, 0, (response,), seen)])))
    assert "failure" not in reply
    for message in reply["observation"]:
        assert set(message) <= {"role", "name", "tool_call_id", "content"}
        for said in message.values():
            said.encode()
            assert len(said) < 400
