"""The built-in graders: what gets reward 1, what does not, and feedback that says why."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from fst_fast.contracts import Problem, Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.graders import BUILT_IN, gold_of, make_grader


def problem(answer: Any, **meta: Any) -> Problem:
    return Problem("p", [{"role": "user", "content": "Say it."}], answer, meta)


def grade(spec: Any, answer: Any, response: str, **meta: Any) -> Verdict:
    return make_grader(spec)(problem(answer, **meta), response)


JSON = {"grader": "json_equal"}
KEYS = {"grader": "json_equal", "keys": ["a", "b"]}
WORDS = [{"kind": "words", "max": 3}, {"kind": "case", "is": "lower"}]


@pytest.mark.parametrize(
    ("spec", "answer", "response", "reward", "said"),
    [
        ("exact", "Paris", " paris \n", 1, ""),
        ("exact", "Paris", "It is Paris", 0, 'the whole response must be exactly "Paris"'),
        ({"grader": "exact", "case": True}, "Paris", "paris", 0, 'is "paris"'),
        ({"grader": "exact", "read": "last_line"}, ["7", "seven"], "So:\n\nSeven\n", 1, ""),
        ({"grader": "exact", "read": "last_line"}, "7", "", 0, "the response is empty"),
        ({"grader": "exact", "read": "box"}, "7", "so \\boxed{7}", 1, ""),
        ({"grader": "exact", "read": "box"}, "7", "so 7", 0, "no \\boxed{}"),
        ("contains", ["red", "blue"], "Red and green", 0.5, 'does not contain "blue"'),
        ("contains", "art", "the start", 0, 'does not contain "art"'),
        ({"grader": "contains", "words": False}, "art", "the start", 1, ""),
        ({"grader": "contains", "any": True}, ["x", "y"], "only y here", 1, ""),
        ({"grader": "contains", "any": True}, ["x", "y"], "none", 0, '"x" or "y"'),
        ({"grader": "contains", "all_or_nothing": True}, ["red", "blue"], "Red and green", 0, 'the response does not contain "blue"'),
        ({"grader": "contains", "read": "box"}, ["red", "blue"], "blue, \\boxed{Red}", 0.5, 'the box does not contain "blue"'),
        ({"grader": "contains", "read": "box"}, ["red"], "red", 0, "no \\boxed"),
        ({"grader": "contains", "read": "box", "limit": 8}, ["red"], "a long way \\boxed{red, blue}", 0, "the box has 9 characters; at most 8"),
        ({"grader": "contains", "read": "box", "limit": 9}, ["red"], "a long way \\boxed{red, blue}", 1, ""),
        ("regex", r"\d{3}-\d{2}", "call 555-12 now", 1, ""),
        ({"grader": "regex", "full": True}, r"\d+", "12 or 13", 0, "does not match the pattern"),
        ({"grader": "regex", "pattern": r"= (-?\d+)$", "group": 1}, -4, "so x = -4", 1, ""),
        ({"grader": "regex", "pattern": r"= (-?\d+)$", "group": 1}, -4, "so x = 4", 0, 'must be "-4", but is "4"'),
        ("regex", "(", "x", None, "no regular expression"),
        ("multiple_choice", "C", "I choose \\boxed{C}.", 1, ""),
        ("multiple_choice", 2, "The answer is (c)", 1, ""),
        ("multiple_choice", "C", "Answer: **B**", 0, "the choice B is wrong; C is right"),
        ("multiple_choice", "(a)", "a", 1, ""),
        ("multiple_choice", "A", "A cat sat on the mat", 0, "no choice was found"),
        ({"grader": "multiple_choice", "choices": "AB"}, "A", "\\boxed{\\text{D}}", 0, "D is none of the choices A, B"),
        ({"grader": "multiple_choice", "choices": "AB"}, "E", "A", None, "is none of AB"),
        (JSON, {"a": [1, {"b": None}]}, '{"a": [1.0, {"b": null}]}', 1, ""),
        (JSON, {"a": 1}, '{"a": 1, "b": 2}', 0, "the value has b too many"),
        (JSON, {"a": 1, "c": 2}, '{"b": 1}', 0, "the value lacks a, c and has b too many"),
        (JSON, {"a": True}, '{"a": 1}', 0, 'a must be true, not "1"'),
        (JSON, [1, 2], "[1, 3]", 0, "[1] must be 2"),
        (JSON, 1, "Here: 1", 0, "nothing but a JSON value"),
        (JSON, 1, "NaN", 0, "NaN is not JSON"),
        (JSON, {"a": 1}, '{"a": 2, "a": 1}', 0, "the key 'a' occurs twice"),
        (JSON, 1, "[" * 100_000, 0, "nested too deeply"),
        ({**JSON, "alone": False}, {"a": 1}, 'Sure:\n```json\n{"a": 1}\n```', 1, ""),
        (KEYS, {"a": 1, "b": 2, "c": 3}, '{"a": 1, "b": 0}', 0.5, 'b must be 2, not "0"'),
        ({**JSON, "tolerance": 0.01}, 0.333, "0.3334", 1, ""),
        ({"grader": "format", "starts": "<a>", "ends": "</a>", "forbidden": ["!"]}, None, "<a>hi!</a>", 2 / 3, "! must not occur"),
        ({"grader": "format", "once": ["\\boxed"]}, None, "\\boxed{1} \\boxed{2}", 0, "exactly once, not 2 times"),
        ({"grader": "length", "limit": 4}, None, "12345", 0, "the response has 5 chars; at most 4"),
        ({"grader": "length", "limit": 4, "buffer": 4}, None, "123456", 0.5, "at most 4"),
        ({"grader": "length", "limit": 9, "least": 2, "unit": "words"}, None, "one", 0, "at least 2"),
        ({"grader": "instruction_following", "constraints": WORDS}, None, "all in lower case", 0.5, "at most 3 words, it has 4"),
        ({"grader": "instruction_following", "constraints": WORDS, "strict": True}, None, "NO", 0, "lower case"),
        ("instruction_following", [{"kind": "bullets", "exactly": 2}], "- a\n* b", 1, ""),
        ("instruction_following", [{"kind": "sections", "min": 2}], "# A\ntext", 0, "at least 2 headed sections, it has 1"),
        ("instruction_following", [{"kind": "sentences", "max": 2}], "One. Two! Three?", 0, "at most 2 sentences, it has 3"),
        ("instruction_following", [{"kind": "paragraphs", "exactly": 2}], "a\nb\n\nc", 1, ""),
        ("instruction_following", [{"kind": "keywords", "all": ["sun"], "none": ["moon"], "count": {"sea": 2}}], "Sun, sea, sea", 1, ""),
        ("instruction_following", [{"kind": "keywords", "any": ["sun", "moon"]}], "sunny", 0, "One of the words sun, moon"),
        ("instruction_following", [{"kind": "quoted"}, {"kind": "no_commas"}], '"a, b"', 0.5, "no comma, it has 1"),
        ("instruction_following", [{"kind": "json"}], "{", 0, "must be a JSON value"),
        ("instruction_following", [{"kind": "starts", "text": "Dear"}, {"kind": "ends", "text": "Yours"}], "Dear X Yours", 1, ""),
        ("instruction_following", [{"kind": "repeat_prompt"}], "Say it. Done", 1, ""),
        ("instruction_following", [{"kind": "wrods", "max": 3}], "x", None, "kind='wrods' is not known"),
        ("instruction_following", "three words", "x", None, "must be a list"),
    ],
)  # fmt: skip
def test_a_grader_gives_the_reward_and_says_what_was_wrong(
    spec: Any, answer: Any, response: str, reward: float | None, said: str
) -> None:
    verdict = grade(spec, answer, response)
    assert verdict.reward == (None if reward is None else pytest.approx(reward))
    assert said in verdict.feedback
    assert (verdict.feedback == "") == (reward == 1)


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("1/2", "\\boxed{0.5}", 1),
        ("\\frac{1}{2}", "so \\boxed{\\frac{2}{4}}", 1),
        ("x=5", "\\boxed{5}", 1),
        (12, "\\boxed{1{,}2}", 0),
        ("30", "\\boxed{31}", 0),
        ("30", "30", 0),
        ("{1,2}", "\\boxed{\\{2, 1\\}}", 1),
    ],
)
def test_mathematics_is_compared_as_mathematics(answer: Any, response: str, reward: float) -> None:
    pytest.importorskip("math_verify")
    verdict = grade("math", answer, response)
    assert verdict.reward == reward, verdict
    assert bool(verdict.feedback) == (reward == 0)


def test_a_schema_is_of_the_problem_or_of_all_and_the_feedback_names_the_place() -> None:
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 1}}}
    assert grade("json_schema", schema, '{"n": 3}').reward == 1
    verdict = grade({"grader": "json_schema", "schema": schema}, None, '{"n": 0}')
    assert verdict.reward == 0
    assert "n: 0 is less than the minimum of 1" in verdict.feedback
    assert grade("json_schema", {"type": 3}, "{}").reward is None
    with pytest.raises(UserError, match="schema is not a JSON schema"):
        make_grader({"grader": "json_schema", "schema": {"type": 3}})


def test_a_language_is_recognised() -> None:
    pytest.importorskip("langdetect")
    german = [{"kind": "language", "is": "de"}]
    assert grade("instruction_following", german, "Das ist ein ganz gewöhnlicher deutscher Satz.").reward == 1
    verdict = grade("instruction_following", german, "This is a perfectly ordinary English sentence.")
    assert (verdict.reward, verdict.feedback) == (0, "The response must be in the language de, it is in en.")


ADD = "def add(a, b):\n    return a + b\n"


def test_programs_are_run_against_asserts_and_against_input_and_output() -> None:
    asserts = ["assert add(1, 2) == 3", "assert add(2, 2) == 5"]
    verdict = grade("python_tests", asserts, f"Here:\n```python\n{ADD}```", solution=ADD)
    assert verdict.reward == 0.5
    assert verdict.feedback.startswith(
        '1 of 2 tests pass. The test "assert add(2, 2) == 5" fails: AssertionError'
    )
    assert grade({"grader": "python_tests", "all_or_nothing": True}, asserts, ADD).reward == 0
    io = [{"input": "3 4\n", "output": "7\n"}]
    assert grade("python_tests", io, "print(sum(map(int, input().split())))").reward == 1
    assert (
        'it prints "12", not "7"'
        in grade("python_tests", io, "a, b = input().split()\nprint(int(a) * int(b))").feedback
    )
    slow = grade({"grader": "python_tests", "timeout_s": 0.5}, io, "while True: pass")
    assert (slow.reward, slow.feedback) == (
        0,
        '0 of 1 tests pass. With the input "3 4\n" does not end within 0.5 s.',
    )
    assert grade("python_tests", [], ADD).reward is None
    assert (
        gold_of(make_grader("python_tests"), problem(asserts[:1], solution=ADD)) == f"```python\n{ADD}\n```"
    )


@pytest.mark.parametrize(
    "name",
    sorted(set(BUILT_IN) - {"regex", "json_schema", "instruction_following", "format", "length", "http"}),
)
def test_a_grader_gives_its_own_gold_reward_1(name: str) -> None:
    pytest.importorskip("math_verify")
    answers: dict[str, Any] = {
        "json_equal": {"a": [1]},
        "multiple_choice": 1,
        "python_tests": "assert add(1, 1) == 2",
    }
    asked = problem(answers.get(name, "7"), solution=ADD)
    grader = make_grader(name)
    gold = gold_of(grader, asked)
    assert gold is not None
    assert grader(asked, gold).reward == 1


def test_several_graders_are_weighted_and_each_is_logged() -> None:
    spec = [{"grader": "exact", "weight": 3}, {"grader": "length", "limit": 3, "name": "brevity"}]
    verdict = grade(spec, "Paris", "Paris")
    assert verdict.reward == pytest.approx(0.75)
    assert verdict.metrics == {"reward/exact": 1.0, "reward/brevity": 0.0, "length_chars": 5.0}
    assert verdict.feedback == "the response has 5 chars; at most 3 are wanted."
    assert grade(["exact", "regex"], "(", "x").reward is None
    assert gold_of(make_grader(["exact", {"grader": "length", "limit": 9}]), problem("Rome")) == "Rome"
    assert gold_of(make_grader(spec), problem("Rome")) is None


def test_a_function_may_be_async(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(
        "async def grade(problem, response):\n    return float(response == problem.answer)\n"
    )
    assert make_grader(f"{tmp_path / 'judge.py'}:grade")(problem("a"), "a") == 1.0


def test_a_service_may_judge_and_its_faults_leave_the_rollout_unjudged() -> None:
    class Judge(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            good = asked["response"] == asked["answer"]
            body = (
                {"reward": float(good), "feedback": "wrong", "metrics": {"n": 1}}
                if asked["response"] != "break"
                else [1]
            )
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    spec = {"grader": "http", "url": f"http://127.0.0.1:{server.server_port}/grade"}
    try:
        assert grade(spec, "a", "a").reward == 1
        assert grade(spec, "a", "b") == Verdict(0.0, "wrong", {"n": 1})
        assert grade(spec, "a", "break").reward is None
    finally:
        server.shutdown()
        server.server_close()
    assert "does not answer" in grade(spec, "a", "a").feedback


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"grader": "contains", "read": "end"}, "read='end'; allowed: all, last_line, box"),
        ({"grader": "contains", "any": True, "all_or_nothing": True}, "any and all_or_nothing exclude each other"),
        ({"grader": "contains", "limit": -1}, "limit=-1; allowed: a whole number >= 0"),
        ("exactt", "task_args.verify=exactt is not known; allowed: exact, contains"),
        (3, "task_args.verify=3 is no grader"),
        ([], "is no grader"),
        ({"gradr": "exact"}, "the key `grader` is missing"),
        ({"grader": "exact", "cas": True}, "task_args.verify.cas is not known for the grader exact; allowed: case, read"),
        ({"grader": "exact", "read": "middle"}, "read='middle'; allowed: all, last_line, box"),
        ({"grader": "length"}, "the grader length needs more"),
        ({"grader": "length", "limit": 3, "least": 4}, "least=4, limit=3"),
        ({"grader": "format"}, "no demand is given"),
        ({"grader": "regex", "pattern": "("}, "is no regular expression"),
        ({"grader": "http", "url": "ftp://x"}, "allowed: http:// or https://"),
        ({"grader": "instruction_following", "constraints": [{"kind": "words"}]}, "allowed besides kind: min, max, exactly"),
        ([{"grader": "exact", "weight": 0}], "task_args.verify[0].weight=0 is refused"),
        (["exact", "exact"], "two graders are named 'exact'"),
        ("nowhere.py:grade", "nowhere.py"),
    ],
)  # fmt: skip
def test_a_wrong_grader_is_one_sentence(spec: Any, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        make_grader(spec)
    assert sentence in str(refused.value)


def test_a_jsonl_task_takes_a_built_in_grader_and_its_gold(tmp_path: Path) -> None:
    from fst_fast.tasks.registry import load_task

    rows = [{"id": str(i), "prompt": f"{i} + 1 = ?", "answer": str(i + 1)} for i in range(4)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    boxed: Any = load_task(str(data), {"verify": {"grader": "exact", "read": "box"}})
    first = boxed.problems("train")[0]
    assert boxed.gold(first) == f"\\boxed{{{first.answer}}}"
    assert boxed.verify(first, boxed.gold(first)).reward == 1
    short: Any = load_task(str(data), {"verify": [{"grader": "length", "limit": 3}]})
    assert short.gold(first) is None
    templated: Any = load_task(str(data), {"verify": "exact", "gold": "{answer}"})
    assert templated.gold(first) == first.answer
    with pytest.raises(UserError, match=r"task_args\.verify=exatc is not known"):
        load_task(str(data), {"verify": "exatc"})
