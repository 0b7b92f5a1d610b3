"""Tasks by name, from a user's file, from JSONL: what loads, and the error for what does not."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fst_fast.contracts import Problem, Task, Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.registry import load_task
from fst_fast.verify.gold import check_gold

ROOT = Path(__file__).parents[2]
GRADER = "def right(problem, response):\n    return response == problem.answer\n"


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def rows(path: Path, *objects: Any) -> str:
    return write(path, "".join((o if isinstance(o, str) else json.dumps(o)) + "\n" for o in objects))


def jsonl_task(tmp_path: Path, *objects: Any, **args: Any) -> Task:
    verify = write(tmp_path / "grader.py", GRADER) + ":right"
    return load_task(rows(tmp_path / "data.jsonl", *objects), {"verify": verify, **args})


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_built_in_task_loads_by_name_with_its_arguments() -> None:
    task = load_task(
        "star_graph", {"form": "mini", "arms": 2, "path": 3, "ids": 20, "train": 4, "validation": 2}
    )
    assert len(task.problems("train")) == 4
    assert isinstance(task, Task)


def test_problems_made_on_demand_index_like_a_list_and_a_mixture_keeps_each_parts_ids() -> None:
    sizes = {"train": 3, "validation": 2, "ood": 1}
    part = load_task("linked_facts", sizes)
    mixture = load_task("mixture", {"tasks": [{"task": "linked_facts", "task_args": sizes}] * 2})
    for problems, ids in (
        (part.problems("train"), [f"linked_facts/train/{i}" for i in range(3)]),
        (mixture.problems("train"), [f"{p}/linked_facts/train/{i}" for p in range(2) for i in range(3)]),
    ):
        n = len(ids)
        assert [p.id for p in problems] == [problems[i].id for i in range(n)] == ids
        assert [problems[i].id for i in range(-n, 0)] == ids
        assert [p.id for p in problems[::-2]] == ids[::-2]
        for index in (n, -n - 1):
            with pytest.raises(IndexError, match=f"problem {index} does not exist; there are {n}"):
                problems[index]
    assert mixture.verify(mixture.problems("train")[4], part.gold(part.problems("train")[1])).reward == 1  # type: ignore[attr-defined]


def test_an_unknown_name_is_refused_with_what_is_allowed() -> None:
    assert "did you mean star_graph" in refusal(lambda: load_task("star_grap", {}))
    assert "file.py:Class" in refusal(lambda: load_task("nothing", {}))


def test_the_example_task_loads_and_its_gold_is_right() -> None:
    task = load_task(f"{ROOT}/examples/my_task.py:AddTwo", {"train": 5})
    problems = task.problems("train")
    assert len({p.id for p in problems}) == 5
    assert [task.verify(p, task.gold(p)).reward for p in problems] == [1.0] * 5  # type: ignore[attr-defined]
    assert task.verify(problems[0], "no idea").reward == 0


@pytest.mark.parametrize(
    ("text", "name", "args", "said"),
    [
        ("class A: pass", "B", {}, "has no 'B'; it defines A"),
        ("class A: pass", "", {}, "the name after"),
        (
            "class A:\n    def problems(self, split): return []",
            "A",
            {},
            "has no method verify(problem, response)",
        ),
        ("class A:\n    def verify(self, p, r): return 0", "A", {}, "has no method problems(split)"),
        ("def A(): pass", "A", {}, "is a function; it must be a class"),
        (
            "import no_such_module_at_all",
            "A",
            {},
            "ModuleNotFoundError: No module named 'no_such_module_at_all' (task.py:1)",
        ),
        ("def f(:", "A", {}, "SyntaxError"),
        ("import sys\nsys.exit(3)", "A", {}, "SystemExit: 3"),
        ("TASK", "A", {"size": 3}, "'size'"),
        ("TASK", "A", {"n": "x"}, "ValueError: n is bad (task.py:3)"),
    ],
)
def test_a_task_file_that_is_no_task_gets_one_sentence(
    tmp_path: Path, text: str, name: str, args: dict[str, Any], said: str
) -> None:
    good = "class A:\n    def __init__(self, n=1):\n        if n == 'x': raise ValueError('n is bad')\n"
    good += "    def problems(self, split): return []\n    def verify(self, p, r): return 0\n"
    spec = write(tmp_path / "task.py", good if text == "TASK" else text) + (f":{name}" if name else "")
    message = refusal(lambda: load_task(spec, args))
    assert said in message
    assert str(tmp_path / "task.py") in message


def test_a_missing_task_file_is_refused_with_its_path(tmp_path: Path) -> None:
    assert f"there is no file {tmp_path}/gone.py" in refusal(lambda: load_task(f"{tmp_path}/gone.py:A", {}))


def test_a_task_file_may_import_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "neighbour_of_the_task.py", "SIZE = 3")
    body = "from neighbour_of_the_task import SIZE\nclass A:\n    def problems(self, s): return [0] * SIZE\n    def verify(self, p, r): ...\n"
    assert len(load_task(write(tmp_path / "task.py", body) + ":A", {}).problems("train")) == 3


def test_jsonl_lines_become_problems_of_their_split(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}]
    task = jsonl_task(
        tmp_path,
        {"id": "a", "messages": messages, "answer": "2", "split": "train", "meta": {"level": 1}},
        "",
        {"prompt": "2+2?", "answer": "4", "split": "validation"},
    )
    (train,), (validation,) = task.problems("train"), task.problems("validation")
    assert (train.id, list(train.messages), train.answer, train.meta) == ("a", messages, "2", {"level": 1})
    assert (validation.id, list(validation.messages)) == ("data/3", [{"role": "user", "content": "2+2?"}])
    assert task.verify(train, "2") == Verdict(1.0)
    assert task.verify(train, "3") == Verdict(0.0)


def test_jsonl_without_splits_holds_out_the_same_problems_whatever_the_order(tmp_path: Path) -> None:
    lines = [{"id": f"p{i}", "prompt": "?", "answer": str(i)} for i in range(400)]

    def held(*given: dict[str, Any]) -> set[str]:
        return {p.id for p in jsonl_task(tmp_path, *given, validation_fraction=0.25).problems("validation")}

    assert 75 < len(held(*lines)) < 125
    assert held(*lines[::-1]) == held(*lines)
    assert held(*lines[:200]) == {i for i in held(*lines) if int(i[1:]) < 200}, "growth moves no problem"
    assert len(jsonl_task(tmp_path, *lines[:2]).problems("validation")) == 1


GOOD = {"id": "a", "prompt": "?", "answer": "1"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "?", ', "is not JSON"),
        ("[1]", "is a JSON list"),
        ({"prompt": "?"}, "'answer' is missing"),
        ({"answer": 1}, "exactly one of"),
        ({**GOOD, "id": "b", "messages": []}, "exactly one of"),
        ({"messages": [], "answer": 1}, "must be a list that is not empty"),
        (
            {"messages": [{"role": "human", "content": "?"}], "answer": 1},
            "messages[0].role='human' is not known",
        ),
        ({"messages": [{"role": "user", "content": None}], "answer": 1}, "messages[0] must be an object"),
        ({"prompt": " ", "answer": 1}, "prompt=' '"),
        ({**GOOD, "anwser": 1}, "unknown key 'anwser'"),
        ({**GOOD, "id": 7}, "id=7"),
        (GOOD, "data.jsonl:1; ids must be unique"),
        ({**GOOD, "id": "b", "split": "train"}, "data.jsonl:1 has none; give it to all rows"),
        ({**GOOD, "id": "b", "meta": 3}, "meta=3"),
        ('{"prompt": "?", "answer": NaN}', "holds NaN"),
        ('{"prompt": "?", "answer": [1, -Infinity]}', "holds -Infinity"),
        ('{"prompt": "?", "answer": 1e999}', "holds the number 1e999, which is beyond the range"),
        ('{"prompt": "?", "answer": {"a": [-1.5E+400]}}', "holds the number -1.5E+400"),
        ('{"prompt": "?", "answer": ' + "7" * 5000 + "}", "holds a number of 5000 digits; at most 4000"),
        (r'{"prompt": "half \ud83d", "answer": 1}', r"holds half a surrogate pair in 'half \ud83d'"),
        (r'{"id": "\udc00", "prompt": "?", "answer": 1}', "half a surrogate pair"),
        (r'{"prompt": "?", "answer": [[{"k": "\ud800x"}]]}', "half a surrogate pair"),
        (r'{"prompt": "?", "answer": 1, "meta": {"\ude00": 1}}', "half a surrogate pair"),
        (r'{"prompt": "?", "answer": "a", "gold": "\ud83d"}', "half a surrogate pair"),
        ('{"prompt": "?", "answer": ' + "[" * 100_000 + "]" * 100_000 + "}", "is nested too deep"),
        (
            '{"prompt": "?", "answer": ' + '{"a":' * 150 + "1" + "}" * 150 + "}",
            "is nested too deep; at most 100",
        ),
        ('{"prompt": "?", "answer": 1, "answer": 2}', "the key 'answer' is given twice"),
        ('{"prompt": "?", "answer": {"x": 1, "y": 2, "x": 3}}', "the key 'x' is given twice"),
        ('{"prompt": "?", "answer": 1}\x00', "is not JSON"),
        ("\x00\x00\x00", "is not JSON"),
        ("\ufeff" + json.dumps(GOOD), "is not JSON: Unexpected UTF-8 BOM"),
        ('"text"', "is a JSON str"),
        ("null", "is a JSON NoneType"),
        ({**GOOD, "id": "x" * 5000, "split": []}, "split=[]"),
        ({"prompt": "?", "answer": 1, "k" * 10_000: 2}, "unknown key 'kkk"),
    ],
)
def test_a_bad_jsonl_line_is_named_with_file_and_line(tmp_path: Path, line: Any, said: str) -> None:
    message = refusal(lambda: jsonl_task(tmp_path, GOOD, line))
    assert f"{tmp_path}/data.jsonl:2: " in message
    assert len(message) < 400 + len(str(tmp_path))
    assert said in message


def test_jsonl_files_and_arguments_that_cannot_work_are_refused(tmp_path: Path) -> None:
    assert "set task_args.verify to grader.py:function" in refusal(
        lambda: load_task(rows(tmp_path / "d.jsonl", GOOD), {})
    )
    assert "cannot be read: No such file" in refusal(
        lambda: load_task(f"{tmp_path}/x.jsonl", {"verify": _grader(tmp_path)})
    )
    assert "task_args.fraction is not known" in refusal(lambda: jsonl_task(tmp_path, GOOD, fraction=1))
    assert "validation_fraction=1" in refusal(lambda: jsonl_task(tmp_path, GOOD, validation_fraction=1))
    assert "has one problem" in refusal(lambda: jsonl_task(tmp_path, GOOD))
    assert "has no problems: there are no rows" in refusal(lambda: jsonl_task(tmp_path))
    assert "has no 'wrong'" in refusal(
        lambda: jsonl_task(tmp_path, GOOD, verify=_grader(tmp_path)[:-5] + "wrong")
    )
    (tmp_path / "data.jsonl").write_bytes(b'{"prompt": "\xff", "answer": 1}')
    assert "data.jsonl:1: is not UTF-8" in refusal(
        lambda: load_task(f"{tmp_path}/data.jsonl", {"verify": _grader(tmp_path)})
    )


def _grader(tmp_path: Path) -> str:
    return write(tmp_path / "grader.py", GRADER) + ":right"


@pytest.mark.parametrize(
    ("returned", "reward", "feedback"),
    [
        ("True", 1.0, ""),
        ("0.25", 0.25, ""),
        ("__import__('numpy').float32(0.5)", 0.5, ""),
        ("{'reward': 0.5, 'feedback': 'half'}", 0.5, "half"),
        ("__import__('fst_fast.contracts').contracts.Verdict(None, 'unclear')", None, "unclear"),
        ("__import__('numpy').array(0.25)", 0.25, ""),
        ("__import__('numpy').array([[True]])", 1.0, ""),
        ("__import__('decimal').Decimal('0.125')", 0.125, ""),
        ("__import__('fractions').Fraction(3, 4)", 0.75, ""),
    ],
)
def test_a_grader_function_may_return_a_verdict_a_number_a_bool_or_a_dict(
    tmp_path: Path, returned: str, reward: float | None, feedback: str
) -> None:
    verify = write(tmp_path / "g.py", f"def f(problem, response): return {returned}") + ":f"
    task = load_task(rows(tmp_path / "d.jsonl", GOOD, {**GOOD, "id": "b"}), {"verify": verify})
    verdict = task.verify(task.problems("train")[0], "")
    assert (verdict.reward, verdict.feedback) == (reward, feedback)


def test_jsonl_as_other_systems_write_it_reads_the_same(tmp_path: Path) -> None:
    lines = [{**GOOD, "id": f"a{i}", "split": s} for i, s in enumerate(("train", "validation"))]
    text = "\ufeff" + "".join(f"{json.dumps(line)}\r\n\r\n  \t\r\n" for line in lines)
    (tmp_path / "dos.jsonl").write_bytes(text.encode())
    verify = write(tmp_path / "g.py", "def f(problem, response): return 1") + ":f"
    task = load_task(str(tmp_path / "dos.jsonl"), {"verify": verify})
    assert [p.id for p in task.problems("train")] == ["a0"]
    assert [p.id for p in task.problems("validation")] == ["a1"]


def test_an_answer_may_be_nested_and_large_where_it_can_be_held(tmp_path: Path) -> None:
    answer: Any = int("9" * 4000)
    for _ in range(90):
        answer = [answer]
    line = {**GOOD, "id": "deep", "answer": answer, "prompt": GOOD["prompt"] + " \U0001f600 \x00"}
    task = jsonl_task(tmp_path, {**line, "split": "train"}, {**GOOD, "split": "validation"})
    [problem] = task.problems("train")
    assert problem.answer == answer
    assert problem.messages[0]["content"].endswith("\U0001f600 \x00")
    assert pickle.loads(pickle.dumps(problem)) == problem


@pytest.mark.parametrize(
    "returned",
    [
        "None",
        "'1.0'",
        "[1.0]",
        "b'1'",
        "1j",
        "{'score': 1}",
        "{'reward': 1, 'text': ''}",
        "__import__('numpy').zeros(2)",
        "__import__('numpy').array('1')",
    ],
)
def test_a_grader_function_that_returns_something_else_raises(tmp_path: Path, returned: str) -> None:
    verify = write(tmp_path / "g.py", f"def f(problem, response): return {returned}") + ":f"
    task = load_task(rows(tmp_path / "d.jsonl", GOOD, {**GOOD, "id": "b"}), {"verify": verify})
    with pytest.raises(TypeError, match="the grader returned"):
        task.verify(task.problems("train")[0], "")


class InProcess:
    """Stands in for the pool: verifies here."""

    has_turns = False

    def __init__(self, task: Task) -> None:
        self.task = task
        self.asked: list[tuple[str, str]] = []

    def verify(self, items: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        self.asked += [(problem.id, response) for problem, response in items]
        return [self.task.verify(problem, response) for problem, response in items]


class Toy:
    def __init__(self, train: Any, validation: Any = (), reward: float | None = 1.0) -> None:
        self.splits, self.reward = {"train": train, "validation": validation}, reward

    def problems(self, split: str) -> Any:
        return self.splits[split]

    def verify(self, problem: Problem, response: str) -> Verdict:
        return Verdict(self.reward, "because")


class ToyWithGold(Toy):
    def gold(self, problem: Problem) -> str:
        return f"gold of {problem.id}"


def some(n: int, prefix: str = "p", **fields: Any) -> list[Problem]:
    return [Problem(f"{prefix}{i}", [{"role": "user", "content": "?"}], i, **fields) for i in range(n)]


def checked(task: Task, n: int = 8) -> list[tuple[str, str]]:
    pool = InProcess(task)
    check_gold(task, pool, n)  # type: ignore[arg-type]
    return pool.asked


def test_gold_is_tried_on_n_problems_of_each_split_evenly_spaced() -> None:
    asked = checked(ToyWithGold(some(9, "t"), some(2, "v")), n=3)
    assert asked == [(i, f"gold of {i}") for i in ("t0", "t3", "t6", "v0", "v1")]


def test_a_task_without_gold_is_asked_with_its_answers_only_where_the_problem_wants_it() -> None:
    task = Toy(some(2, "t"), some(1, "v", meta={"check_gold": True}))
    assert checked(task) == [("v0", "0")]


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (ToyWithGold(some(2), some(2, "v"), reward=0.0), "reward 0 instead of 1, saying: because"),
        (
            ToyWithGold(some(2), some(2, "v"), reward=None),
            "cannot judge the gold response 'gold of p0' of problem 'p0'",
        ),
        (Toy([], some(2)), "the split 'train' is empty"),
        (Toy(some(2), []), "the split 'validation' is empty"),
        (
            Toy(some(2), some(3)),
            "problem 0 of 'validation' has the id 'p0', which problem 0 of 'train' already has",
        ),
        (Toy([some(1)[0], some(1)[0]], some(1, "v")), "problem 1 of 'train' has the id 'p0'"),
        (Toy(["text"], some(1)), "problem 0 of 'train' is a str"),
        (Toy([Problem("a", [{"role": "user"}], 1)], some(1)), "(id 'a'): messages[0] must be"),
        (Toy(3, some(1)), "returned a int"),
        (
            Toy([Problem("\ud83d", [{"role": "user", "content": "?"}], 1)], some(1)),
            "which holds half a surrogate pair",
        ),
        (
            Toy([Problem("a", [{"role": "user", "content": "\udc00"}], 1)], some(1)),
            "messages[0] holds half a surrogate",
        ),
    ],
)
def test_a_task_that_cannot_be_trained_on_is_refused(task: Task, said: str) -> None:
    message = refusal(lambda: checked(task))
    assert said.replace("is empty", "of the task is empty") in message


def test_a_jsonl_grader_is_tried_with_the_answer_a_template_or_the_gold_of_the_line(tmp_path: Path) -> None:
    lines = [{**GOOD, "split": "train"}, {"prompt": "?", "answer": 5, "split": "validation"}]
    assert jsonl_task(tmp_path, *lines).gold(Problem("x", [], [1, 2])) == "[1, 2]"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="fails its own gold"):
        checked(jsonl_task(tmp_path, *lines, gold="the answer is {answer}"))
    with pytest.raises(UserError, match="fails its own gold"):
        checked(jsonl_task(tmp_path, {**lines[0], "gold": "2"}, {**lines[1], "answer": "5"}))
    assert checked(jsonl_task(tmp_path, *lines, gold="")) == []


def test_tasks_and_their_registry_do_not_import_torch() -> None:
    code = "import sys, fst_fast.tasks.registry as t, fst_fast.verify.pool; t.load_task('star_graph', {}); print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    path = {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=path)
    assert done.stdout.strip() == "[]"
