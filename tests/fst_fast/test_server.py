"""rollout.backend=openai against a real HTTP server on this machine: ids and log-probs in both spellings, and every way to lack them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from fst_fast.config import Config
from fst_fast.contracts import Context
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
            status, answer = 200, {"object": "text_completion", "choices": [server.respond(body)]}
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


@contextmanager
def serving(respond: Respond) -> Iterator[tuple[ServerEngine, list[tuple[str, dict[str, Any]]]]]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.respond, server.asked = respond, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        args = ServerArgs(model="m", base_url=url, retries=0)
        yield ServerEngine(args, eos_ids=[EOS], stop=(), encode=lambda text: [len(text)]), server.asked
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
        "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    assert sorted(b["prompt"] for _, b in asked[:5]) == [r.prompt_ids.tolist() for r in REQUESTS]
    assert len({b["seed"] for _, b in asked[:5]}) == 5


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
        pytest.raises(UserError, match=r"sampled problem p\d.* from 4 prompt tokens that are not the 3"),
    ):
        generate(engine)

    def fail(_: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("no such model, sk-secret")

    with serving(fail) as (engine, _), pytest.raises(UserError, match="no such model") as caught:
        generate(engine)
    assert "sk-secret" not in str(caught.value)


def test_arguments_are_checked() -> None:
    with pytest.raises(UserError, match=r"backend_args\.model: .*allowed keys: model, base_url"):
        ServerEngine.from_args({"base_url": "http://h/v1"}, eos_ids=[EOS], stop=(), encode=list)
    with pytest.raises(UserError, match=r"backend_args\.url"):
        ServerEngine.from_args(
            {"model": "m", "base_url": "http://h/v1", "url": 1}, eos_ids=[EOS], stop=(), encode=list
        )
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

        def respond(body: dict[str, Any]) -> dict[str, Any]:
            ids = gold[json.dumps(body["prompt"])]
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
            served = sampler.server(model)
            assert served is not None
            got = sampler.local(
                served, [(seed, p, 0) for p in problems], stream=(0,), policy_version=0, temperature=1.0
            )
    assert [s.verdict.reward for s in got] == [1.0] * 3
