"""An agent program that talks to an OpenAI-compatible server is an environment; whatever it does wrong is one sentence."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fst_fast.contracts import Problem
from fst_fast.errors import UserError
from fst_fast.tasks.registry import load_task
from fst_fast.verify.episodes import DROPPED, Episodes, Move, digest
from fst_fast.verify.worker import check

AGENT = """
import json, os, sys, urllib.error, urllib.request

problem = json.load(sys.stdin)
messages = [{"role": "system", "content": "You add."}, *problem["messages"]]
tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]

def ask(messages, url=os.environ["OPENAI_BASE_URL"], **more):
    body = json.dumps({"model": "any", "messages": messages, "temperature": 0.1, **more}).encode()
    key = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
    request = urllib.request.Request(url + "/chat/completions", body, key)
    try:
        return json.load(urllib.request.urlopen(request))["choices"][0]
    except urllib.error.HTTPError as error:
        return {"refused": json.load(error)["error"]["message"]}

"""
ADDS = (
    AGENT
    + """
while True:
    choice = ask(messages, tools=tools)
    messages.append(choice["message"])
    if choice["finish_reason"] == "stop":
        print(choice["message"]["content"])
        break
    for call in choice["message"]["tool_calls"]:
        numbers = json.loads(call["function"]["arguments"])
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": str(numbers["a"] + numbers["b"])})
"""
)
ROWS = [{"id": str(i), "prompt": f"{i} + 2 ?", "answer": str(i + 2), "split": "train"} for i in range(8)]


def environment(folder: Path, program: str, **args: Any) -> Any:
    (folder / "agent.py").write_text(program)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    inner = {"task": f"{folder}/rows.jsonl", "task_args": {"verify": "exact"}}
    return load_task("program", {**inner, "command": [sys.executable, f"{folder}/agent.py"], **args})


def call(a: int, b: int = 2) -> str:
    return f'<tool_call>{{"name": "add", "arguments": {{"a": {a}, "b": {b}}}}}</tool_call>'


def play(env: Any, responses: Sequence[Sequence[str]], end: str = "") -> list[list[dict[str, Any]]]:
    """What is said to the responses of each episode, side by side; end: of the last move."""
    problems: list[Problem] = list(env.problems("train"))[: len(responses)]
    episodes = Episodes(env, syntax="hermes", chars=2000, check=check)
    heard: list[list[dict[str, Any]]] = [[] for _ in problems]
    for turn in range(max(map(len, responses)) + 1):
        live = [
            i
            for i, said in enumerate(heard)
            if turn <= len(responses[i]) and (not said or "reward" not in said[-1])
        ]
        moves = []
        for i in live:
            seen = tuple(digest(s.get("observation", s)) for s in heard[i])
            last = end if turn and turn == len(responses[i]) else ""
            moves.append(Move(i, problems[i], 0, tuple(responses[i][:turn]), seen, last))
        for i, reply in zip(live, episodes.replies(moves), strict=True):
            heard[i].append(reply)
    list(episodes.replies([Move(i, p, 0, end=DROPPED) for i, p in enumerate(problems)]))
    return heard


def test_programs_side_by_side_are_told_apart_and_judged_by_what_they_print(tmp_path: Path) -> None:
    env = environment(tmp_path, ADDS)
    heard = play(env, [[call(i), str(i + 2 if i % 2 else 0)] for i in range(6)])
    for i, (opening, observation, end) in enumerate(heard):
        assert [m["content"] for m in opening["messages"]] == ["You add.", f"{i} + 2 ?"]
        assert opening["tools"][0]["function"]["name"] == "add"
        [said] = observation["observation"]
        assert (said["role"], said["content"], said["tool_call_id"]) == ("tool", str(i + 2), "call00000")
        assert end["reward"] == float(i % 2)


def test_a_malformed_call_comes_back_to_the_policy_and_the_program_does_not_see_it(tmp_path: Path) -> None:
    [[_, error, observation, end]] = play(environment(tmp_path, ADDS), [["<tool_call>{", call(0), "2"]])
    assert error["observation"][0]["content"].startswith("error: a <tool_call> is not closed")
    assert observation["observation"][0]["content"] == "2"
    assert end["reward"] == 1.0


def test_a_program_that_is_cut_is_ended(tmp_path: Path) -> None:
    env = environment(tmp_path, ADDS)
    [[_, end]] = play(env, [[call(0)]], end="max_turns")
    assert (end["reward"], end["ended"]) == (0.0, "max_turns")
    [[_, end]] = play(env, [["2"]], end="max_turns")  # its last response was its answer
    assert end["reward"] == 1.0


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise SystemExit('no model here')", "ended before its first request: exit code 1: no model here"),
        ("ask(messages); raise KeyError('x')", "the program failed: exit code 1.*KeyError: 'x'"),
        (
            "ask(messages); messages[0]['content'] = 'other'; ask(messages)",
            "rewrites its conversation or begins another",
        ),
        ("ask(messages); ask(messages)", "rewrites its conversation"),
        (
            "ask(messages); ask([*messages, {'role': 'assistant', 'content': ''}, messages[-1]], tools=tools)",
            "rewrites its",
        ),
        ("import time; ask(messages); time.sleep(60)", "neither asked nor ended within 2 s"),
        ("ask([{'role': 'user', 'content': [{'type': 'image_url'}]}])", "holds more than text"),
        ("import sys; ask(messages); sys.stdout.buffer.write(bytes(range(256)) * 10000)", "^the response"),
    ],
)
def test_a_program_that_fails_ends_its_episode_with_one_sentence(
    tmp_path: Path, program: str, reason: str
) -> None:
    env = environment(tmp_path, f"{AGENT}\n{program}", timeout_s=2)
    [said] = play(env, [["2", "3"]])
    if reason.startswith("^"):  # what it prints is judged, whatever it is
        assert said[-1]["reward"] == 0.0
    else:
        assert said[-1]["reward"] is None
        assert re.search(reason, said[-1]["failure"]), said[-1]


def test_requests_that_are_none_are_refused_and_the_episode_goes_on(tmp_path: Path) -> None:
    program = f"""{AGENT}
wrong = os.environ["OPENAI_BASE_URL"].rsplit("/", 2)[0] + "/wrong/v1"
os.environ["OPENAI_API_KEY"] = "wrong"
said = [
    ask([]), ask("hello"), ask([{{"role": "judge", "content": ""}}]), ask([{{"role": "assistant", "content": "x"}}]), ask(messages, n=2),
    ask(messages, tools="many"), ask(messages, url=wrong),
]
print(json.dumps([s["refused"] for s in said]), file=open({str(tmp_path / "said")!r}, "w"))
print(ask(messages)["message"]["content"])
"""
    [[_, end]] = play(environment(tmp_path, program), [["2"]])
    assert end["reward"] == 1.0
    refused = json.loads((tmp_path / "said").read_text())
    due = [
        "no messages",
        "no messages",
        "the role 'judge'",
        "the policy's own",
        "n=2",
        "not a list of functions",
        "neither the address",
    ]
    assert [part in text for part, text in zip(due, refused, strict=True)] == [True] * 7


def test_a_streamed_answer_is_read_by_the_openai_package(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    program = """
import json, sys, openai
problem = json.load(sys.stdin)
client = openai.OpenAI()
tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
calls, text = [], ""
for piece in client.chat.completions.create(model="any", messages=problem["messages"], tools=tools, stream=True):
    calls += piece.choices[0].delta.tool_calls or []
client.models.list()
messages = [*problem["messages"], {"role": "assistant", "content": None, "tool_calls": [c.model_dump(exclude={"index"}) for c in calls]}]
messages.append({"role": "tool", "tool_call_id": calls[0].id, "content": calls[0].function.arguments})
print(client.chat.completions.create(model="any", messages=messages, tools=tools).choices[0].message.content)
"""
    [[_, observation, end]] = play(environment(tmp_path, program, timeout_s=30), [[call(0), "2"]])
    assert json.loads(observation["observation"][0]["content"]) == {"a": 0, "b": 2}
    assert end["reward"] == 1.0


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({}, "task_args.task=None of task=program must name the task"),
        ({"task": "star_graph", "command": "python agent.py"}, "must be a list of texts"),
        ({"task": "star_graph", "command": []}, "must be a list of texts"),
        ({"task": "star_graph", "command": ["x"], "timeout_s": -1}, "must be a positive number"),
        (
            {"task": "openenv:http://host", "command": ["x"]},
            "is an environment; a task with a verifier is due",
        ),
        ({"task": "star_graph", "command": ["x"], "shell": True}, "do not fit"),
        ({"task": "nothing", "command": ["x"]}, "task='nothing' is not known"),
    ],
)
def test_arguments_that_cannot_be_are_refused(args: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load_task("program", args)


def test_a_program_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    [[said]] = play(environment(tmp_path, "", command=["/nowhere/agent"]), [[]])
    assert "FileNotFoundError" in said["failure"]


def test_what_the_policy_samples_for_a_program_is_recorded_token_by_token(tmp_path: Path) -> None:
    """Through the verifying processes, which end the program of every opening that is only looked at."""
    from fst_fast.contracts import Context, RolloutRequest
    from fst_fast.rollout.sampler import Sampler
    from tests.fst_fast.agents import Scripted, config_of, save_model

    folder = save_model(tmp_path / "model", "qwen")
    environment(tmp_path, ADDS)
    inner = {"task": f"{tmp_path}/rows.jsonl", "task_args": {"verify": "exact"}}
    args = {**inner, "command": [sys.executable, f"{tmp_path}/agent.py"]}
    config = config_of(folder, "program", task_args=args, verify={"timeout_s": 60})
    with Sampler.open(config) as sampler:
        problems = load_task("program", args).problems("train")[:2]
        engine: Any = Scripted(
            sampler.tokenizer,
            lambda problem, turn, sample: str(int(problem) + 2) if turn else call(int(problem)),
        )
        assert len(sampler.prompts.openable(problems)) == 2
        requests = [RolloutRequest(Context.of("Be exact."), p, s) for p in problems for s in range(2)]
        sampled = sampler.local(engine, requests, stream=("test",), policy_version=0, temperature=1.0)
        assert sampler.unverified() == {"verify_timeouts": 0, "verify_failures": 0}
    for request, scored in zip(requests, sampled, strict=True):
        rollout, number = scored.rollout, int(request.problem.id)
        assert (rollout.finish, scored.verdict.reward, len(rollout.turns)) == ("stop", 1.0, 2)
        spoken = sampler.tokenizer.decode(rollout.response_ids)
        assert spoken == f"{call(number)}<|im_end|>{number + 2}<|im_end|>"
        first, second = (turn.length for turn in rollout.turns)
        due = [-float(i + 1) for n in (first, second) for i in range(n)]
        assert rollout.logprobs.tolist() == due
        assert "Be exact.\n\nYou add." in sampler.tokenizer.decode(rollout.turns[0].added)
