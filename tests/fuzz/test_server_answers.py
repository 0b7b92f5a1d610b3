"""Any answer of a sampling server is a rollout that could be trained on, one that is not judged, or one sentence that names the server."""

import importlib
import importlib.util
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from fst_fast.errors import UserError
from fst_fast.rollout.engine import Request
from fst_fast.rollout.server import ServerArgs, ServerEngine

http = importlib.import_module(
    "httpx2" if importlib.util.find_spec("httpx2") else "httpx"
)  # openai's, from 3 on
FUZZ = settings.get_profile("fuzz")
EOS, VOCABULARY, ALLOWED = (5, 9), 20, 6
REQUEST = Request("p", "c", 0, np.array([7, 8]), seed=3)

odd = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 25), st.floats(), st.text(max_size=4), st.builds(list), st.builds(dict),
    st.sampled_from([2**63, -(2**70), 1e308, -1e308, -9999.0, "\ud83d", "token_id:4", "token_id:", "token_id:-1", "token_id:9999999999999999999999"]),
)  # fmt: skip
ids = st.one_of(
    st.lists(st.integers(0, 4), max_size=5).map(lambda made: [*made, 5]),
    st.lists(st.integers(0, 4), min_size=ALLOWED, max_size=ALLOWED),
    st.lists(st.integers(-1, 21), max_size=9),
    st.lists(odd, max_size=4),
    odd,
)
finishes = st.one_of(
    st.sampled_from(["stop", "stop", "length", "abort", "error", "content_filter", None]), odd
)


@st.composite
def choices(draw):
    """A choice that mostly hangs together, with some of its fields replaced or left out."""
    tokens = draw(ids)
    count = len(tokens) if isinstance(tokens, list) else 2
    number = st.one_of(st.floats(-20, 0), st.sampled_from([0.0, 1e-7, -1e-300]))
    values = draw(st.lists(number, min_size=count, max_size=count))
    spelt = (
        [f"token_id:{t}" for t in tokens]
        if isinstance(tokens, list) and draw(st.booleans())
        else ["x"] * count
    )
    choice = {
        "index": 0, "text": draw(st.text(max_size=5)), "finish_reason": draw(finishes), "token_ids": tokens,
        "prompt_token_ids": draw(st.sampled_from([[7, 8], [7, 8], None, [7], "7"])),
        "logprobs": {"tokens": spelt, "token_logprobs": values},
    }  # fmt: skip
    for name in draw(st.lists(st.sampled_from([*choice, "tokens", "token_logprobs"]), max_size=2)):
        place = choice.get("logprobs") if name.startswith("token") and name != "token_ids" else choice
        if not isinstance(place, dict):
            continue
        if draw(st.booleans()):
            place.pop(name, None)
        else:
            place[name] = draw(st.one_of(odd, st.lists(odd, max_size=3)))
    return choice


bodies = st.one_of(
    st.lists(choices(), min_size=1, max_size=1).map(
        lambda made: {"object": "text_completion", "choices": made}
    ),
    st.fixed_dictionaries({"choices": st.one_of(st.lists(st.one_of(choices(), odd), max_size=3), odd)}),
    odd,
)
raw = st.one_of(
    bodies.map(lambda body: json.dumps(body).encode()),
    bodies.map(lambda body: json.dumps(body).encode()[:-2]),
    st.binary(max_size=20),
    st.sampled_from([(b"", 0), (b"[", 100_000), (b"\xef\xbb\xbf{}", 1), (b'{"choices": ', 2000)]).map(
        lambda made: made[0] * made[1]
    ),
)


class Served:
    """An engine whose server answers with `replies`, one after another; making a client takes longer than asking it."""

    def __init__(self):
        self.engine = ServerEngine(
            ServerArgs(model="m", base_url="http://server/v1", retries=1),
            eos_ids=EOS, stop=(), vocab_size=VOCABULARY, encode=lambda text: [len(text)],
            decode=lambda made: "".join(chr(97 + int(i)) for i in made),
        )  # fmt: skip
        client = http.Client(transport=http.MockTransport(lambda request: self.reply()))
        self.engine.endpoint._client = OpenAI(
            api_key="not-needed", base_url="http://server/v1", max_retries=0, http_client=client
        )

    def reply(self):
        headers = {"content-type": self.kind} if self.kind else {}
        return http.Response(self.status, content=next(self.replies), headers=headers)


@pytest.fixture(scope="module")
def served():
    return Served()


@settings(FUZZ)
@given(
    answers=st.lists(raw, min_size=1, max_size=2),
    status=st.sampled_from([200] * 12 + [204, 301, 400, 404, 418]),
    kind=st.sampled_from(["application/json"] * 8 + ["text/html", "", "application/json; charset=utf-16"]),
    stop=st.sampled_from([(), ("cd",)]),
)
def test_an_answer_is_taken_whole_left_unjudged_or_refused_in_one_sentence(
    served, bounded, answers, status, kind, stop
):
    served.replies, served.status, served.kind = itertools.cycle(answers), status, kind
    engine = served.engine
    engine.stop = stop
    try:
        [rollout] = bounded(
            lambda: engine.generate([REQUEST], max_response_tokens=ALLOWED, temperature=1.0, policy_version=0)
        )
    except UserError as error:
        said = str(error)
        assert "http://server/v1" in said
        assert "\n" not in said
        assert len(said) < 600
        said.encode()
        return
    made, logprobs = rollout.response_ids, rollout.logprobs
    assert (made.dtype, logprobs.dtype, len(made)) == (np.int64, np.float32, len(logprobs))
    if rollout.finish == "abort":
        assert not len(made)
        return
    if np.isnan(logprobs).any():  # no ids, or no log-probs: good enough to evaluate
        assert np.isnan(logprobs).all()
    else:
        assert np.isfinite(logprobs).all()
        assert (logprobs <= 1e-5).all()
        assert 1 <= len(made) <= ALLOWED
        assert ((made >= 0) & (made < VOCABULARY)).all()
        assert not np.isin(made[:-1], EOS).any()
        ended = made[-1] in EOS or any(text in engine.decode(made[-3:]) for text in stop)
        assert ended if rollout.finish == "stop" else len(made) == ALLOWED
