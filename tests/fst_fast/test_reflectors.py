"""The reflectors by name, and the openai one against a real HTTP server on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fst_fast.errors import UserError
from fst_fast.fast.reflection import Failure, ReflectionPrompt, Refusal, Reply, extract
from fst_fast.fast.reflectors import make_reflector

KEY = "sk-very-secret-0123456789"
PROMPT = ReflectionPrompt("solve it", [Failure("2+2?", "five", "no", 0.0)])

Answer = tuple[int, bytes, dict[str, str]]


def completion(text: str | None, *, finish: str | None = "stop", choices: int = 1) -> Answer:
    message = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    body = {
        "id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [message] * choices,
        "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
    }  # fmt: skip
    return 200, json.dumps(body).encode(), {}


def failing(status: int, text: str = "busy") -> Answer:
    return status, json.dumps({"error": {"message": text}}).encode(), {"retry-after-ms": "1"}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    respond: Callable[[int, dict], Answer]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requests: list[dict] = []
        self.keys: list[str] = []
        self.released = threading.Event()

    def handle_error(self, request, client_address):
        pass  # the client hung up: that is what the time-out test is about


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(body)
            self.server.keys.append(self.headers["Authorization"])
        status, content, headers = self.server.respond(number, body)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextmanager
def serving(respond: Callable[[int, dict], Answer]) -> Iterator[Server]:
    server = Server()
    server.respond = respond
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def openai_at(server: Server, **args):
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return make_reflector("openai", {"base_url": url, "model": "m", "retries": 2, **args}, generate=None)


def test_a_right_answer_arrives_with_its_token_counts_and_the_request_says_what_was_asked():
    with serving(lambda n, body: completion("```\ntrace back\n```")) as server:
        reflect = openai_at(
            server,
            max_tokens=99,
            temperature=0.5,
            usd_per_million_prompt_tokens=2.0,
            usd_per_million_completion_tokens=4.0,
        )
        (reply,) = reflect([PROMPT], seeds=[5])
    assert reply == Reply("```\ntrace back\n```", "stop", None, 11, 7, pytest.approx(5e-5))
    (request,) = server.requests
    assert (request["model"], request["max_tokens"], request["temperature"], request["seed"]) == (
        "m",
        99,
        0.5,
        5,
    )
    assert request["messages"] == [{"role": "user", "content": PROMPT.render()}]
    assert server.keys == [f"Bearer {KEY}"]
    assert (reflect.requests, reflect.errors, reflect.prompt_tokens, reflect.completion_tokens) == (
        1,
        0,
        11,
        7,
    )
    assert reflect.cost_usd == pytest.approx((11 * 2 + 7 * 4) / 1e6)


def test_replies_come_in_the_order_of_the_prompts_whatever_the_concurrency():
    prompts = [ReflectionPrompt(f"context {i}", []) for i in range(12)]
    barrier = threading.Barrier(4)

    def respond(number, body):
        barrier.wait(timeout=10)  # four requests have to be under way at the same time
        return completion(
            next(w for w in body["messages"][0]["content"].splitlines() if w.startswith("context "))
        )

    with serving(respond) as server:
        replies = openai_at(server, concurrency=4)(prompts, seeds=range(12))
    assert [reply.text for reply in replies] == [f"context {i}" for i in range(12)]


def test_an_endpoint_that_hangs_is_an_error_after_the_time_out():
    def respond(number, body):
        server.released.wait(timeout=30)
        return completion("too late")

    with serving(respond) as server:
        (reply,) = openai_at(server, timeout_s=0.05, retries=0)([PROMPT], seeds=[0])
    assert reply.text is None
    assert "APITimeoutError" in (reply.error or "")


def test_a_429_is_tried_again():
    with serving(lambda n, body: failing(429) if n == 0 else completion("```\nok\n```")) as server:
        (reply,) = openai_at(server)([PROMPT], seeds=[0])
    assert reply.text == "```\nok\n```"
    assert len(server.requests) == 2


def test_a_500_that_stays_is_an_error_after_the_last_retry():
    with serving(lambda n, body: failing(500)) as server:
        reflect = openai_at(server, retries=2)
        (reply,) = reflect([PROMPT], seeds=[0])
    assert reply.text is None
    assert "500" in (reply.error or "")
    assert len(server.requests) == 3
    assert (reflect.requests, reflect.errors) == (1, 1)


@pytest.mark.parametrize(
    "body", [b"<html>not json", b'{"choices": 3}', b"[]", b"null", b'"text"', b"{}", b""]
)
def test_garbage_is_an_error_not_an_exception(body):
    with serving(lambda n, _: (200, body, {})) as server:
        (reply,) = openai_at(server, retries=0)([PROMPT], seeds=[0])
    assert reply.text is None
    assert reply.error


@pytest.mark.parametrize(
    "choice", [b"null", b"7", b"{}", b'{"message": null}', b'{"message": {"content": [1]}}']
)
def test_a_garbage_choice_is_an_error_not_an_exception(choice):
    with serving(lambda n, _: (200, b'{"choices": [' + choice + b"]}", {})) as server:
        (reply,) = openai_at(server, retries=0)([PROMPT], seeds=[0])
    assert reply.text is None
    assert reply.error


def test_an_answer_of_another_kind_is_named_in_the_error():
    with serving(lambda n, _: (200, b'{"choices": 3}', {})) as server:
        (reply,) = openai_at(server, retries=0)([PROMPT], seeds=[0])
    assert "not a chat completion" in (reply.error or "")


def test_no_choices_and_no_text_are_errors():
    with serving(
        lambda n, body: completion("x", choices=0) if n == 0 else completion(None, finish="tool_calls")
    ) as server:
        reflect = openai_at(server)
        (none,) = reflect([PROMPT], seeds=[0])
        (silent,) = reflect([PROMPT], seeds=[0])
    assert "no choices" in (none.error or "")
    assert "tool_calls" in (silent.error or "")


def test_an_endpoint_that_is_not_there_is_an_error():
    with serving(lambda n, body: completion("x")) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    (reply,) = make_reflector("openai", {"base_url": url, "model": "m", "retries": 0}, generate=None)(
        [PROMPT], seeds=[0]
    )
    assert "APIConnectionError" in (reply.error or "")


def test_a_cut_off_thinking_answer_is_refused_and_a_finished_one_read():
    def respond(number, body):
        return (completion("<think>hmm ```\nx", finish="length") if number == 0 else completion("<think>hm</think>```\ngood\n```"))  # fmt: skip

    with serving(respond) as server:
        reflect = openai_at(server)
        replies = [reflect([PROMPT], seeds=[0])[0] for _ in range(2)]
    read = [extract(r, known_texts=[], count_tokens=len, max_tokens=99) for r in replies]
    assert read == [Refusal("length"), "good"]


def test_the_key_never_appears_in_an_error():
    with serving(lambda n, body: failing(401, f"Incorrect API key provided: {KEY}")) as server:
        reflect = openai_at(server)
        (reply,) = reflect([PROMPT], seeds=[0])
    assert "401" in (reply.error or "")
    assert KEY not in repr(reply)
    assert KEY not in repr(vars(reflect.args))


def test_optional_fields_are_left_out_when_not_wanted():
    with serving(lambda n, body: completion("x")) as server:
        openai_at(server, send_seed=False)([PROMPT], seeds=[3])
    assert {"seed", "temperature"}.isdisjoint(server.requests[0])


def test_with_a_temperature_nothing_else_shapes_the_distribution():
    neutral = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1}
    neutral |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    with serving(lambda n, body: completion("x")) as server:
        openai_at(server, temperature=0.7)([PROMPT], seeds=[3])
        openai_at(server, temperature=0.7, send_sampling=False)([PROMPT], seeds=[3])
        openai_at(server)([PROMPT], seeds=[3])
    full, bare, default = server.requests
    assert full == {**bare, **neutral}
    assert default == {key: value for key, value in bare.items() if key != "temperature"}
    assert "top_p" not in bare


def test_a_reply_without_a_finish_reason_is_not_taken_for_a_whole_one():
    with serving(lambda n, body: completion("x", finish=None)) as server:
        (reply,) = openai_at(server)([PROMPT], seeds=[0])
    assert reply.finish not in ("stop", "length")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, "reflector_args.model is missing"),
        ({"model": "m", "api_key": KEY}, "OPENAI_API_KEY"),
        ({"model": "m", "speed": 1}, "has no speed; allowed: model, base_url"),
        ({"model": "m", "timeout_s": 0}, "timeout_s=0"),
        ({"model": "m", "retries": -1}, "retries=-1"),
        ({"model": "m", "concurrency": "many"}, "concurrency='many'"),
        ({"model": "m", "base_url": "ftp://x"}, "base_url must be http"),
        ({"model": "m", "base_url": f"https://user:{KEY}@host/v1"}, "without user name"),
    ],
)
def test_wrong_openai_arguments_are_one_sentence_without_secrets(args, said):
    with pytest.raises(UserError) as caught:
        make_reflector("openai", args, generate=None)
    assert said in str(caught.value)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_default_endpoint_needs_the_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY, which is not set"):
        make_reflector("openai", {"model": "m"}, generate=None)


def test_a_local_endpoint_needs_no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(lambda n, body: completion("ok")) as server:
        assert openai_at(server)([PROMPT], seeds=[0])[0].text == "ok"


def test_self_sends_the_rendered_prompts_and_seeds_to_the_model():
    seen = {}

    def generate(conversations, seeds):
        seen.update(conversations=list(conversations), seeds=list(seeds))
        return [Reply("```\nx\n```", "stop") for _ in conversations]

    assert (
        make_reflector("self", {}, generate=generate)([PROMPT, PROMPT], seeds=[1, 2])[1].text == "```\nx\n```"
    )
    assert seen == {"conversations": [[{"role": "user", "content": PROMPT.render()}]] * 2, "seeds": [1, 2]}


def test_self_without_a_model_is_refused():
    with pytest.raises(UserError, match="reflector=self needs a model"):
        make_reflector("self", {}, generate=None)


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def good(prompt):\n    return '```\\n' + prompt.context + ' better\\n```'\n"
        "def bad(prompt):\n    raise RuntimeError('no idea\\nmore')\n"
        "def odd(prompt):\n    return 7\n"
        "word = 'x'\n"
    )
    return path


def test_a_users_function_reflects_and_its_faults_are_errors(user_file):
    def ask(name):
        return make_reflector(f"{user_file}:{name}", {}, generate=None)([PROMPT], seeds=[0])[0]

    assert ask("good").text == "```\nsolve it better\n```"
    assert (ask("bad").error or "").endswith("bad raised RuntimeError: no idea")
    assert (ask("odd").error or "").endswith("odd returned int, not a string")


def test_one_fault_of_a_users_function_leaves_the_rest_of_the_batch(user_file):
    user_file.write_text(
        "def f(prompt):\n    assert prompt.context != 'b', 'no b'\n    return prompt.context\n"
    )
    replies = make_reflector(f"{user_file}:f", {}, generate=None)(
        [ReflectionPrompt(c, []) for c in "abc"], seeds=[0] * 3
    )
    assert [reply.text for reply in replies] == ["a", None, "c"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("{file}:missing", "has no function 'missing'; it offers bad, good, odd"),
        ("{file}:word", "has no function 'word'"),
        (
            "clever",
            "fast.reflector=clever is unknown; allowed: mini, self, openai, given, or file.py:function",
        ),
    ],
)
def test_a_reflector_that_cannot_be_is_one_sentence(user_file, spec, said):
    with pytest.raises(UserError) as caught:
        make_reflector(spec.format(file=user_file), {}, generate=None)
    assert said in str(caught.value)


def test_a_file_that_does_not_import_is_one_sentence(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError, match="failed with ModuleNotFoundError"):
        make_reflector(f"{path}:f", {}, generate=None)


def test_arguments_for_a_reflector_that_takes_none_are_refused(user_file):
    for name in ("self", "mini", f"{user_file}:good"):
        with pytest.raises(UserError, match="takes no arguments"):
            make_reflector(name, {"model": "m"}, generate=None)


def test_mini_repeats_itself_by_seed_and_edits_the_context():
    reflect = make_reflector("mini", {}, generate=None)
    prompts = [
        ReflectionPrompt("solve the problem .", [Failure("p", "r", "the path is not in a box", 0.0)])
    ] * 8
    replies = reflect(prompts, seeds=range(8))
    assert replies == reflect(prompts, seeds=range(8))
    texts = [
        extract(reply, known_texts=[], count_tokens=lambda t: len(t.split()), max_tokens=64)
        for reply in replies
    ]
    assert all(isinstance(text, str) for text in texts)
    assert len(set(texts)) > 3
