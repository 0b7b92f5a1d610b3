"""rollout.backend=openai against a real HTTP server on this machine: ids and log-probs in both spellings, and every way to lack them."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fst_fast.config import Config
from fst_fast.contracts import Context, RolloutRequest
from fst_fast.errors import UserError
from fst_fast.policy.attention import load_model
from fst_fast.rollout.engine import Request
from fst_fast.rollout.sampler import Sampler
from fst_fast.rollout.server import ServerArgs, ServerEngine
from fst_fast.tasks.registry import load_task

EOS = 5
REQUESTS = [Request(f"p{i}", "c", 0, np.array([7, 8, 9 + i]), seed=2**40 + i) for i in range(5)]
Respond = Callable[[dict[str, Any]], dict[str, Any]]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append((self.path, body))
        try:
            made = server.respond(body)
            status, answer = 200, made.pop("whole", {"object": "text_completion", "choices": [made]})
        except RuntimeError as error:
            status, answer = 400, {"error": {"message": str(error)}}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def decoded(ids: Any) -> str:
    """Every token is one letter, a for 0."""
    return "".join(chr(97 + int(i)) for i in ids)


PARTS: dict[str, Any] = {
    "eos_ids": [EOS], "stop": (), "vocab_size": 20, "decode": decoded, "encode": lambda text: [len(text)],
}  # fmt: skip


@contextmanager
def serving(
    respond: Respond, retries: int = 0, processed_logprobs: bool = False, **parts: Any
) -> Iterator[tuple[ServerEngine, list[tuple[str, dict[str, Any]]]]]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.respond, server.asked = respond, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        args = ServerArgs(model="m", base_url=url, retries=retries, processed_logprobs=processed_logprobs)
        yield ServerEngine(args, **{**PARTS, **parts}), server.asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def echo(body: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A sampler that repeats the last prompt token and ends, in the way of vLLM and SGLang."""
    ids = [body["prompt"][-1], EOS]
    choice = {
        "index": 0, "text": "word", "finish_reason": "stop", "token_ids": ids, "prompt_token_ids": body["prompt"],
        "logprobs": {"tokens": ["a", "b"], "token_logprobs": [-0.5, -0.25]},
    }  # fmt: skip
    if body["max_tokens"] == 1:
        choice |= {"token_ids": ids[:1], "logprobs": {"tokens": ["a"], "token_logprobs": [-0.5]}}
    return {**choice, **more}


def generate(engine: ServerEngine, **how: Any) -> list[Any]:
    return engine.generate(
        REQUESTS, **{"max_response_tokens": 8, "temperature": 0.7, "policy_version": 3} | how
    )


def test_ids_and_logprobs_come_back_in_request_order() -> None:
    with serving(echo) as (engine, asked):
        rollouts = generate(engine, top_p=0.9)
        engine.check_training(1.0)
    assert [r.response_ids.tolist() for r in rollouts] == [[9 + i, EOS] for i in range(5)]
    assert all(r.logprobs.dtype == np.float32 and r.logprobs.tolist() == [-0.5, -0.25] for r in rollouts)
    assert {(r.finish, r.policy_version, r.temperature) for r in rollouts} == {("stop", 3, 0.7)}
    assert engine.tokens_unshared == 5 * (3 + 2)
    path, body = asked[0]
    assert path == "/v1/completions"
    assert body | {"prompt": 0, "seed": 0} == {
        "model": "m", "prompt": 0, "max_tokens": 8, "temperature": 0.7, "top_p": 0.9, "logprobs": 1, "seed": 0,
        "n": 1, "echo": False, "stop": [], "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0,
        "stop_token_ids": [EOS], "ignore_eos": False, "include_stop_str_in_output": True, "no_stop_trim": True,
        "skip_special_tokens": False, "spaces_between_special_tokens": False, "add_special_tokens": False,
        "return_token_ids": True, "return_tokens_as_token_ids": True,
    }, "what a request leaves out is filled from the model's generation config"  # fmt: skip
    assert sorted(b["prompt"] for _, b in asked[:5]) == [r.prompt_ids.tolist() for r in REQUESTS]
    assert len({b["seed"] for _, b in asked[:5]}) == 5


def test_answers_in_the_shape_of_sglang_are_trained_on_at_any_temperature() -> None:
    def sglang(body: dict[str, Any]) -> dict[str, Any]:
        choice = {**echo(body), "matched_stop": EOS, "hidden_states": None}
        choice["logprobs"] = {
            **choice["logprobs"],
            "text_offset": [-1, -1],
            "top_logprobs": [{"a": -0.5}, {"b": -0.25}],
        }
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": None}
        return {"whole": {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice], "usage": usage, "metadata": {"weight_version": "default"}}}  # fmt: skip

    with serving(sglang, processed_logprobs=True) as (engine, _):
        engine.check_training(0.7)
        rollouts = generate(engine)
    assert [r.response_ids.tolist() for r in rollouts] == [[9 + i, EOS] for i in range(5)]
    assert [r.logprobs.tolist() for r in rollouts] == [[-0.5, -0.25]] * 5


def test_a_nucleus_of_one_and_stop_texts_are_said_too() -> None:
    with serving(echo, stop=("END", "."), eos_ids=[EOS, 3]) as (engine, asked):
        generate(engine)
    assert {body["top_p"] for _, body in asked} == {1.0}
    assert asked[0][1]["stop"] == ["END", "."]
    assert asked[0][1]["stop_token_ids"] == [EOS, 3]


def test_the_docs_name_every_parameter_of_a_request() -> None:
    engine = ServerEngine(ServerArgs(model="m", base_url="http://h/v1"), **PARTS)
    fields = engine.sampling(max_tokens=1, temperature=1.0, top_p=None)
    names = {*fields, *fields["extra_body"], "prompt", "seed"} - {"extra_body"}
    table = (Path(__file__).parents[2] / "docs/rollouts.md").read_text()
    assert not [name for name in names if f"`{name}`" not in table]


NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"finish_reason": None}, "says finish_reason=null; stop, length"),
    ({"finish_reason": "tool_calls"}, "says finish_reason='tool_calls'"),
    ({"finish_reason": ["stop"]}, r"says finish_reason=\['stop'\]"),
    ({"token_ids": []}, "has no token"),
    ({"token_ids": "9"}, "has token_ids='9'; it must be a list"),
    ({"token_ids": [9, 20]}, "has the token id 20 at 1; the model's are 0 to 19"),
    ({"token_ids": [-1, EOS]}, "has the token id -1 at 0"),
    ({"token_ids": [2**70, EOS]}, "has the token id 1180591620717411303424 at 0"),
    ({"token_ids": [9.0, EOS]}, "has the token id 9.0 at 0"),
    ({"token_ids": [True, EOS]}, "has the token id True at 0"),
    ({"token_ids": [None, EOS]}, "has the token id null at 0"),
    ({"token_ids": [9] * 20, "finish_reason": "length"}, "has 20 tokens; it was asked for 8 at most"),
    ({"token_ids": [9] * 3, "finish_reason": "length"}, "says finish_reason=length after 3 of 8 tokens"),
    ({"token_ids": [9, 9]}, r"says finish_reason=stop after the token 9, which is none of \[5\];"),
    ({"token_ids": [9, EOS, 9, EOS]}, "goes on after the token 5 at 1"),
    ({"logprobs": {"token_logprobs": [-0.5, float("nan")]}}, "has the log-prob nan at 1"),
    ({"logprobs": {"token_logprobs": [float("-inf"), -1.0]}}, "has the log-prob -inf at 0"),
    ({"logprobs": {"token_logprobs": [-0.5, 0.7]}}, "has the log-prob 0.7 at 1"),
    ({"logprobs": {"token_logprobs": [-9999.0, -1.0]}}, "has the log-prob -9999.0 at 0"),
    ({"logprobs": {"token_logprobs": ["x", -1.0]}}, "has the log-prob 'x' at 0"),
    ({"logprobs": {"token_logprobs": [-0.5]}}, "has 1 log-probs for 2 tokens"),
    ({"logprobs": {"token_logprobs": [-0.5] * 3}}, "has 3 log-probs for 2 tokens"),
    ({"logprobs": {"tokens": ["token_id:9", "token_id:7"], "token_logprobs": [-1.0] * 2}}, "not the ids of its log-probs"),
    ({"prompt_token_ids": 7}, "is sampled from a prompt"),
    ({"token_ids": None, "text": None}, "has neither token ids nor a text: text=null"),
    ({"token_ids": None, "text": "\ud83d"}, "has half a surrogate pair in its text"),
    ({"whole": {"choices": []}}, "has 0 choices where one is due"),
    ({"whole": {"choices": [{}, {}]}}, "has 2 choices"),
    ({"whole": {"error": {"message": "overloaded"}}}, "has no list of choices"),
    ({"whole": {"choices": [None]}}, "says finish_reason=null"),
    ({"whole": [1, 2]}, "has no list of choices"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), NONSENSE)
def test_an_answer_that_is_nonsense_is_one_sentence_that_names_the_server(
    change: dict[str, Any], said: str
) -> None:
    with serving(lambda body: {**echo(body, prompt_token_ids=None), "token_ids": [9, EOS], **change}) as (
        engine,
        _,
    ):
        with pytest.raises(UserError, match=said) as caught:
            generate(engine)
        assert engine.args.base_url in str(caught.value)
        assert "problem p" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("ids", "finish", "stop", "want"),
    [
        ([9] * 8, "length", (), "length"),
        ([9] * 7 + [EOS], "length", (), "stop"),  # as the native engine has it
        ([1, 2, 3], "stop", ("cd",), "stop"),
        ([1, 2, 3, 4], "stop", ("zz", "e"), "stop"),
        ([3], "stop", (), "stop"),
    ],
)
def test_every_end_that_the_native_engine_knows_is_taken(
    ids: list[int], finish: str, stop: tuple[str, ...], want: str
) -> None:
    change = {
        "token_ids": ids,
        "finish_reason": finish,
        "logprobs": {"token_logprobs": [-1.0, 1e-7, *[-2.0] * 9][: len(ids)]},
    }
    with serving(lambda body: echo(body, **change), stop=stop, eos_ids=[EOS, 3] if ids == [3] else [EOS]) as (
        engine,
        _,
    ):
        rollouts = generate(engine)
    assert {r.finish for r in rollouts} == {want}
    assert all(r.response_ids.tolist() == ids for r in rollouts)
    with serving(lambda body: echo(body, **change), stop=("yy",)) as (engine, _):
        if stop:
            with pytest.raises(UserError, match=r"none of \[5\] or a stop text"):
                generate(engine)


@pytest.mark.parametrize("reason", ["abort", "error", "content_filter"])
def test_a_response_that_is_given_up_is_asked_for_again_then_left_unjudged(reason: str) -> None:
    tries: Counter[int] = Counter()
    said: list[str] = []

    def respond(body: dict[str, Any]) -> dict[str, Any]:
        last = body["prompt"][-1]
        tries[last] += 1
        if last == 9 or tries[last] == 1:  # the first problem's every time, all others' once
            return echo(body, finish_reason=reason, token_ids=[7], logprobs=None)
        return echo(body)

    with serving(respond, retries=2, note=said.append) as (engine, asked):
        rollouts = generate(engine)
        assert len({body["seed"] for _, body in asked if body["prompt"][-1] == 10}) == 1
    assert tries == {9: 3, 10: 2, 11: 2, 12: 2, 13: 2}
    assert [r.finish for r in rollouts] == ["abort", "stop", "stop", "stop", "stop"]
    assert not len(rollouts[0].response_ids)
    assert not len(rollouts[0].logprobs)
    assert len(said) == 1
    assert f"gave up 1 of 5 responses ({reason} 1), each 3 times; they are not judged" in said[0]


def test_a_server_that_gives_up_the_first_token_is_not_trained_on() -> None:
    with (
        serving(lambda body: echo(body, finish_reason="abort")) as (engine, _),
        pytest.raises(UserError, match=r"gave up a response of one token \(finish_reason=abort\), 1 times"),
    ):
        engine.check_training(1.0)


def test_log_probs_that_stop_coming_are_said_once_they_are_trained_on() -> None:
    answers = [{}, {"logprobs": None}]
    with serving(lambda body: echo(body, **answers[body["max_tokens"] > 1])) as (engine, _):
        assert all(np.isnan(r.logprobs).all() for r in generate(engine)), "an evaluation needs none"
        engine.check_training(1.0)
        with pytest.raises(UserError, match="returns no log-probs for a sampled token"):
            generate(engine)


def test_after_a_fault_no_further_request_is_begun() -> None:
    with serving(lambda body: echo(body, token_ids=[])) as (engine, asked):
        engine.endpoint.args = engine.args.model_copy(update={"concurrency": 1})
        with pytest.raises(UserError, match="has no token"):
            engine.generate(REQUESTS * 200, max_response_tokens=8, temperature=1.0, policy_version=0)
        assert len(asked) < 20


def test_ids_spelt_as_tokens_are_read_too() -> None:
    def respond(body: dict[str, Any]) -> dict[str, Any]:
        choice = echo(body)
        ids = choice.pop("token_ids")
        choice["logprobs"]["tokens"] = [f"token_id:{i}" for i in ids]
        return choice

    with serving(respond) as (engine, _):
        assert [r.response_ids.tolist() for r in generate(engine)] == [[9 + i, EOS] for i in range(5)]
        engine.check_training(1.0)


@pytest.mark.parametrize(
    ("change", "missing"), [({"token_ids": None}, "token ids"), ({"logprobs": None}, "log-probs")]
)
def test_a_server_without_ids_or_logprobs_evaluates_and_is_not_trained_on(
    change: dict[str, Any], missing: str
) -> None:
    with serving(lambda body: echo(body, **change)) as (engine, _):
        rollouts = generate(engine)
        expected = [[4]] * 5 if missing == "token ids" else [[9 + i, EOS] for i in range(5)]
        assert [r.response_ids.tolist() for r in rollouts] == expected
        assert all(np.isnan(r.logprobs).all() for r in rollouts)
        with pytest.raises(
            UserError, match=rf"returns no {missing} for a sampled token.*cannot be trained on"
        ):
            engine.check_training(1.0)


def test_other_temperatures_train_only_on_processed_logprobs() -> None:
    with serving(echo) as (engine, _):
        with pytest.raises(UserError, match=r"rollout\.temperature=0\.7: a server's log-probs"):
            engine.check_training(0.7)
        engine.args = engine.args.model_copy(update={"processed_logprobs": True})
        engine.check_training(0.7)


def test_a_server_that_changes_the_prompt_or_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with (
        serving(lambda body: echo(body, prompt_token_ids=[1, *body["prompt"]])) as (engine, _),
        pytest.raises(
            UserError, match=r"to problem p\d.* is sampled from 4 prompt tokens that are not the 3"
        ),
    ):
        generate(engine)

    def fail(_: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("no such model, sk-secret")

    with serving(fail) as (engine, _), pytest.raises(UserError, match="no such model") as caught:
        generate(engine)
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize("before", ["", "x" * 30, "x" * 55])
def test_a_key_that_a_server_echoes_is_not_shown_not_even_in_part(
    monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    echoed = before + "sk-secret-0123456789"
    for change in (
        {"finish_reason": echoed},
        {"token_ids": [echoed]},
        {"token_ids": echoed},
        {"logprobs": {"token_logprobs": [echoed, -1.0]}},
    ):
        with (
            serving(lambda body, change=change: echo(body, **change)) as (engine, _),
            pytest.raises(UserError) as caught,
        ):  # type: ignore[misc]
            generate(engine)
        assert "sk-s" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"base_url": "http://h/v1"}, "backend_args.model is missing, but rollout.backend=openai needs it; allowed: model, base_url"),
        ({"model": "m", "base_url": "http://h/v1", "url": "sk-1"}, "backend_args has no url; allowed: model"),
        ({"model": "m", "base_url": "http://me:sk-1@h/v1"}, "backend_args.base_url must be http(s)://host/path without user name"),
        ({"model": "m", "base_url": "http://h/v1?key=sk-1"}, "backend_args.base_url must be"),
        ({"model": "m", "base_url": "http://h/v1", "api_key": "sk-1"}, "environment variable OPENAI_API_KEY"),
        ({"model": "m", "base_url": "http://h/v1", "retries": 11}, "backend_args.retries=11: "),
    ],
)  # fmt: skip
def test_arguments_are_checked(args: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        ServerEngine.from_args(args, **PARTS)
    assert said in str(caught.value)
    assert "sk-1" not in str(caught.value)


def test_the_native_backend_takes_no_arguments() -> None:
    with pytest.raises(ValueError, match="backend=native takes none"):
        Config.model_validate({"rollout": {"backend_args": {"model": "m"}}})


def test_a_wave_of_the_mini_task_is_sampled_by_the_server_and_judged_here() -> None:
    """The server answers every problem with its gold response, as ids of the mini tokenizer."""
    config = Config.model_validate({"task_args": {"form": "mini", "arms": 5, "path": 4, "ids": 40}})
    task: Any = load_task(config.task, config.task_args)
    problems = task.problems("validation")[:3]
    with Sampler.open(config) as sampler:
        gold: dict[str, list[int]] = {}
        seed = Context.of("solve the problem .")
        for problem in problems:
            text = task.gold(problem)
            ids = sampler.tokenizer(text, add_special_tokens=False)["input_ids"]
            gold[json.dumps(sampler.prompts.ids(seed, problem).tolist())] = [*ids, EOS]

        aborted = json.dumps(sampler.prompts.ids(seed, problems[1]).tolist())

        def respond(body: dict[str, Any]) -> dict[str, Any]:
            ids = gold[json.dumps(body["prompt"])]
            if json.dumps(body["prompt"]) == aborted:
                return echo(body, finish_reason="abort")
            return echo(
                body, token_ids=ids, logprobs={"tokens": [""] * len(ids), "token_logprobs": [-1.0] * len(ids)}
            )

        with serving(respond) as (engine, _):
            made = sampler.config.model_copy(
                update={
                    "rollout": config.rollout.model_copy(
                        update={"backend": "openai", "backend_args": engine.args.model_dump()}
                    )
                }
            )
            sampler.config = made
            model = load_model("mini", "float32", attention="tree")
            served = sampler.server(model, lambda _: None)
            assert served is not None
            got = sampler.local(
                served,
                [RolloutRequest(seed, p, 0) for p in problems],
                stream=(0,),
                policy_version=0,
                temperature=1.0,
            )
            assert sampler.unverified() == {"verify_timeouts": 0, "verify_failures": 0}
    assert [s.verdict.reward for s in got] == [1.0, None, 1.0]
    assert got[1].verdict.feedback == "the server gave the response up"
