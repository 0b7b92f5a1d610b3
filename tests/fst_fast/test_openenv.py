"""A server that speaks the protocol of OpenEnv is an environment; whatever else it says ends the episode with one sentence."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fst_fast.contracts import Problem
from fst_fast.errors import UserError
from fst_fast.tasks.openenv import ANSWER_LIMIT, OpenEnv
from fst_fast.tasks.registry import load_task
from fst_fast.verify.episodes import DROPPED, Episodes, Move, digest
from fst_fast.verify.worker import check

websockets = pytest.importorskip("websockets.sync.server")

TEXT = {
    "properties": {"metadata": {"type": "object"}, "message": {"type": "string"}},
    "required": ["message"],
}


class Game:
    """Guess the seed from 0 to 9. says: what it answers to a step instead, a function of the action."""

    def __init__(self, says: Any = None, schema: Any = TEXT) -> None:
        self.says, self.schema = says, schema
        self.open, self.most, self.resets = 0, 0, []
        self.changed = threading.Condition()

    def count(self, sessions: int) -> None:
        with self.changed:
            self.open += sessions
            self.most = max(self.most, self.open)
            self.changed.notify_all()

    def reset(self, data: dict[str, Any]) -> dict[str, Any]:
        self.resets.append(data)
        return {
            "observation": {"prompt": "guess 0 to 9", "level": 1, "metadata": {}},
            "reward": None,
            "done": False,
        }

    def step(self, seed: int, action: dict[str, Any]) -> dict[str, Any]:
        guess = int(action["message"])
        done = guess == seed
        word = "right" if done else "higher" if guess < seed else "lower"
        return {"observation": {"prompt": word, "level": 1}, "reward": float(done), "done": done}


@contextmanager
def serving(game: Game) -> Iterator[str]:
    """The game behind a web socket, with a schema over HTTP at the same address."""

    def session(connection: Any) -> None:
        game.count(1)
        seed = 0
        try:
            for raw in connection:
                asked = json.loads(raw)
                if asked["type"] == "reset":
                    seed = asked["data"]["seed"]
                    connection.send(json.dumps({"type": "observation", "data": game.reset(asked["data"])}))
                elif game.says:
                    said = game.says(asked["data"])
                    if said is None:
                        return
                    if said != "silence":
                        connection.send(said if isinstance(said, str) else json.dumps(said))
                else:
                    connection.send(
                        json.dumps({"type": "observation", "data": game.step(seed, asked["data"])})
                    )
        finally:
            game.count(-1)

    def plain(connection: Any, request: Any) -> Any:
        if request.path == "/schema":
            return connection.respond(200, json.dumps({"action": game.schema}))
        return None

    with websockets.serve(session, "127.0.0.1", 0, process_request=plain) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()


def play(env: OpenEnv, problems: list[Problem], guesses: list[str]) -> list[list[dict[str, Any]]]:
    """What the environment says to every response of episodes that are played side by side, its opening first."""
    episodes = Episodes(env, syntax="", chars=2000, check=check)
    heard: list[list[dict[str, Any]]] = [[] for _ in problems]
    for turn in range(len(guesses) + 1):
        live = [i for i, said in enumerate(heard) if not said or "reward" not in said[-1]]
        moves = []
        for i in live:
            seen = [digest(s.get("observation", s)) for s in heard[i]]
            moves.append(Move(i, problems[i], 0, tuple(guesses[:turn]), tuple(seen)))
        for i, reply in zip(live, episodes.replies(moves), strict=True):
            heard[i].append(reply)
    list(episodes.replies([Move(i, p, 0, end=DROPPED) for i, p in enumerate(problems)]))
    assert episodes.live == 0
    return heard


def test_episodes_are_played_side_by_side_in_sessions_of_their_own() -> None:
    game = Game()
    with serving(game) as url:
        env = OpenEnv(url, train=6)
        heard = play(env, list(env.problems("train")), ["0", "3", "5"])
    assert [said[0]["messages"] for said in heard] == [[{"role": "user", "content": "guess 0 to 9"}]] * 6
    assert [len(said) for said in heard] == [2, 4, 4, 3, 4, 4]
    assert [said[-1].get("reward") for said in heard] == [1.0, None, None, 1.0, None, 1.0]
    assert heard[4][1] == {"observation": [{"role": "user", "content": "higher"}]}
    assert heard[3][-1]["feedback"] == "right"
    assert game.most == 6
    assert sorted(r["seed"] for r in game.resets) == list(range(6))
    with game.changed:  # those that were won and those that were dropped
        assert game.changed.wait_for(lambda: game.open == 0, timeout=30)


def test_train_and_validation_share_no_seed_and_need_no_server() -> None:
    env = load_task("openenv:http://127.0.0.1:1", {"train": 3, "validation": 2})
    seeds = [[p.meta["seed"] for p in env.problems(split)] for split in ("train", "validation", "other")]
    assert seeds == [[0, 1, 2], [3, 4], []]


def test_an_episode_that_is_cut_has_the_rewards_so_far() -> None:
    points = {"observation": {"prompt": "go on"}, "reward": 0.25, "done": False}
    with serving(Game(lambda action: {"type": "observation", "data": points})) as url:
        for reward, due in (("sum", 0.5), ("last", 0.25)):
            env = OpenEnv(url, reward=reward, train=1)
            [problem] = env.problems("train")
            episodes = Episodes(env, syntax="", chars=2000, check=check)
            [opening] = episodes.replies([Move(0, problem, 0)])
            [said] = episodes.replies([Move(0, problem, 0, ("1",), (digest(opening),))])
            seen = (digest(opening), digest(said["observation"]))
            [end] = episodes.replies([Move(0, problem, 0, ("1", "2"), seen, "max_turns")])
            assert (end["reward"], end["ended"], end["metrics"]) == (due, "max_turns", {"return": due})


def failure(says: Any, **args: Any) -> str:
    with serving(Game(says)) as url:
        env = OpenEnv(url, train=1, **args)
        [said] = play(env, list(env.problems("train")), ["1"])
    assert said[-1]["reward"] is None
    return str(said[-1]["failure"])


def observed(**data: Any) -> dict[str, Any]:
    return {"type": "observation", "data": data}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("not json", "the server's answer is not a JSON object: 'not json'"),
        ("[1]", "is not a JSON object"),
        ('{"a":' * 10**5, "is not a JSON object"),
        ({"type": "state", "data": {}}, "answers a step with 'state'; an observation is due"),
        (observed(reward=1), "not a step's result: observation: Field required"),
        (observed(observation="text"), "observation: Input should be a valid dictionary"),
        (observed(observation={}, reward="much"), "reward: Input should be a valid number"),
        ('{"type": "observation", "data": {"observation": {}, "reward": NaN}}', "reward: Input should be a finite number"),
        (observed(observation={"prompt": "x"}, reward=7.0, done=True), "reward 7 is not in \\[0, 1\\]; task_args.reward_range"),
        ({"type": "error", "data": {"message": "broken", "code": "EXECUTION_ERROR"}}, "refuses a step: broken"),
        ({"type": "error"}, "refuses a step: None"),
        ("x" * (ANSWER_LIMIT + 1), "1009"),
        (None, "ConnectionClosed"),
    ],
)  # fmt: skip
def test_an_answer_of_another_form_ends_its_episode_without_a_reward(answer: Any, reason: str) -> None:
    said = failure(lambda action: answer)
    assert re.search(reason, said), said


def test_a_server_that_is_silent_or_gone_is_given_up() -> None:
    assert "did not answer within 0.2 s" in failure(lambda action: "silence", timeout_s=0.2)
    env = OpenEnv("http://127.0.0.1:1", train=1)
    [[said]] = play(env, list(env.problems("train")), [])
    assert "the environment raised ConnectError" in said["failure"]


def test_an_action_that_the_server_does_not_take_is_told_to_the_policy() -> None:
    refusal = {"type": "error", "data": {"message": "no such move", "code": "VALIDATION_ERROR"}}
    with serving(Game(lambda action: refusal)) as url:
        env = OpenEnv(url, train=1)
        [said] = play(env, list(env.problems("train")), ["1"])
    assert said[-1] == {
        "observation": [{"role": "user", "content": "error: the server refuses a step: no such move"}]
    }


def test_a_response_is_sent_as_the_template_says_or_the_policy_is_told_what_is_wrong() -> None:
    actions: list[Any] = []

    def keep(action: Any) -> Any:
        actions.append(action)
        return observed(observation={"prompt": "ok"})

    template = {"id": "{response:int}", "why": ["because {response}"], "fixed": 1}
    with serving(Game(keep)) as url:
        env = OpenEnv(url, train=1, action=template)
        [said] = play(env, list(env.problems("train")), ["<think>3?</think> 4 ", "four"])
    assert actions == [{"id": 4, "why": ["because 4"], "fixed": 1}]
    assert (
        said[2]["observation"][0]["content"] == "error: the response must be a whole number and nothing else"
    )


@pytest.mark.parametrize(
    ("kind", "responses", "asked_for"),
    [
        ("float", ["nan", "-Infinity", "1e999"], "a number"),
        ("json", ["NaN", '{"x": [Infinity]}', "1e999"], "valid JSON"),
    ],
)
def test_a_number_that_json_does_not_have_is_told_to_the_policy_and_not_sent(
    kind: str, responses: list[str], asked_for: str
) -> None:
    game = Game(lambda action: observed(observation={"prompt": str(action)}))
    with serving(game) as url:
        env = OpenEnv(url, train=1, action={"x": f"{{response:{kind}}}"})
        [said] = play(env, list(env.problems("train")), [*responses, "1.5"])
    *refused, taken = [heard["observation"][0]["content"] for heard in said[1:]]
    assert refused == [f"error: the response must be {asked_for} and nothing else"] * 3
    assert taken == "{'x': 1.5}"


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (None, "its schema does not say what an action needs; task_args.action says it"),
        ({"required": ["a", "b"], "properties": {}}, "its actions need a, b; task_args.action says it"),
        (
            {"required": ["a"], "properties": {"a": {"type": "integer"}}},
            "its actions need a; task_args.action",
        ),
    ],
)
def test_an_action_that_the_schema_leaves_open_is_asked_for(schema: Any, reason: str) -> None:
    with serving(Game(schema=schema)) as url:
        env = OpenEnv(url, train=1)
        [[said]] = play(env, list(env.problems("train")), [])
    assert reason in said["failure"]


def test_the_fields_of_an_observation_that_are_shown_are_chosen() -> None:
    with serving(Game()) as url:
        for shown, text in ((["level", "prompt"], "1\n\nguess 0 to 9"), (None, "guess 0 to 9")):
            env = OpenEnv(url, train=1, observation=shown)
            [[said]] = play(env, list(env.problems("train")), [])
            assert said["messages"][0]["content"] == text
        env = OpenEnv(url, train=1, observation="board")
        [[said]] = play(env, list(env.problems("train")), [])
        assert (
            "the observation has no 'board' (task_args.observation); it has prompt, level" in said["failure"]
        )


def test_over_http_episodes_are_told_apart_by_their_id() -> None:
    game, seeds = Game(), dict[str, int]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status = 200
            if self.path == "/reset":
                seeds[body["episode_id"]] = body["seed"]
                answer: Any = game.reset(body)
            elif body["action"]["message"] == "bad":
                status, answer = 422, {"detail": "bad"}
            elif body["action"]["message"] == "worse":
                status, answer = 500, {}
            else:
                answer = game.step(seeds[body["episode_id"]], body["action"])
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = OpenEnv(
        f"http://127.0.0.1:{server.server_port}", transport="http", train=3, action={"message": "{response}"}
    )
    heard = play(env, list(env.problems("train")), ["1", "bad", "2", "worse"])
    server.shutdown()
    assert [len(said) for said in heard] == [5, 2, 4]
    assert [said[-1]["reward"] for said in heard] == [None, 1.0, 1.0]
    assert "answers 422" in heard[0][2]["observation"][0]["content"]
    assert "answers 500" in heard[0][-1]["failure"]


@pytest.mark.parametrize(
    ("url", "args", "reason"),
    [
        ("ws://host", {}, "must be openenv:http"),
        ("http://me:secret@host", {}, "must be openenv:http"),
        (
            "http://host",
            {"transport": "smoke"},
            "transport='smoke' is not known; allowed are websocket, http",
        ),
        ("http://host", {"reward": "mean"}, "reward='mean' is not known"),
        ("http://host", {"action": {"move": "x"}}, "does not hold {response}"),
        ("http://host", {"action": "x"}, "must be a mapping"),
        ("http://host", {"action": {"move": "{responses}"}}, "has the value '{responses}'"),
        (
            "http://host",
            {"action": {"a": "{response}", "b": ["{response:str}"]}},
            "has the value '{response:str}'",
        ),
        (
            "http://host",
            {"action": {"a": "n={response:int}"}},
            "has the value 'n={response:int}'; allowed are",
        ),
        ("http://host", {"action": {"{response}": 1}}, "does not hold {response}"),
        ("http://host", {"reward_range": [1, 0]}, "must be two finite numbers"),
        ("http://host", {"reward_range": 5}, "must be two finite numbers"),
        ("http://host", {"reward_range": [0, float("inf")]}, "must be two finite numbers"),
        ("http://host", {"timeout_s": 0}, "must be a positive number"),
        ("http://host", {"train": 0}, "whole number of at least 1"),
        ("http://host", {"observation": [1]}, "must be the names of fields"),
        ("http://host", {"speed": 1}, "do not fit"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_a_server_is_asked(
    url: str, args: Any, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        load_task(f"openenv:{url}", args)
