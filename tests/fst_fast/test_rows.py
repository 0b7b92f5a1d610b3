"""Tasks from rows: CSV, Parquet, data sets in the layout of the Hub's cache; columns, filters, splits, and the sentence for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")
import pyarrow
from pyarrow import parquet

from fst_fast.data.fingerprint import of_problems
from fst_fast.errors import UserError
from fst_fast.tasks.registry import load_task
from tests.fst_fast.hub import cached_data_set

CHOICES = {
    "prompt": "{{ question }}\n{% for text in choices.text %}\n{{ choices.label[loop.index0] }}. {{ text }}\n{% endfor %}",
    "answer": "answerKey",
    "meta": {"level": "details.level", "first": "{{ choices.text[0] }}"},
}
QUESTIONS = [
    {"question": f"{i} + {i}?", "choices": {"text": [str(i), str(2 * i)], "label": ["A", "B"]}, "answerKey": "B",
     "details": {"level": "L1" if i % 2 else "L3"}, "domain": "Physics", "blob": b"\x00"} for i in range(3, 33)
]  # fmt: skip
ARGS = {"verify": "multiple_choice", "columns": CHOICES}


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    return str(caught.value)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def ids(task: Any, split: str) -> list[str]:
    return [p.id for p in task.problems(split)]


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set of 30 questions, cached as if it came from the Hub, where nothing can be reached."""
    return cached_data_set(
        tmp_path, monkeypatch, "ns/Questions", "v2", {"test": QUESTIONS[:20], "dev": QUESTIONS[20:]}
    )


def test_templates_and_columns_make_problems_of_any_rows(tmp_path: Path) -> None:
    task: Any = load_task(write_parquet(tmp_path / "q.parquet", QUESTIONS), ARGS)
    problem = next(p for p in [*task.problems("train"), *task.problems("validation")] if p.id == "q/1")
    assert problem.messages == ({"role": "user", "content": "4 + 4?\nA. 4\nB. 8\n"},)
    assert (problem.answer, problem.meta) == ("B", {"level": "L3", "first": "4"})
    assert task.verify(problem, "so \\boxed{B}").reward == 1
    assert task.verify(problem, task.gold(problem)).reward == 1


def test_the_same_rows_give_the_same_problems_in_every_format(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "prompt": f'é {i}, "{i}"?\n\u2028', "answer": str(i)} for i in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_parquet(tmp_path / "d.parquet", rows)
    quoted = {name: [[c.replace('"', '""') for c in row.values()] for row in rows] for name in ("csv", "tsv")}
    for name, sign in (("csv", ","), ("tsv", "\t")):
        lines = [["id", "prompt", "answer"], *quoted[name]]
        text = "\r\n".join(sign.join(f'"{cell}"' for cell in line) for line in lines)
        (tmp_path / f"d.{name}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    made = [
        load_task(f"{tmp_path}/d.{name}", {"verify": "exact"}) for name in ("jsonl", "parquet", "csv", "tsv")
    ]
    prints = {of_problems(task.problems(split))["sha256"] for task in made for split in ("train",)}
    assert len(prints) == 1
    assert 0 < len(made[0].problems("validation")) < 15


def test_rows_divide_by_their_content_so_that_growth_moves_none_and_doubles_stay_together(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"{i % 150}?", "answer": "1"} for i in range(300)]

    def held_out(name: str, count: int) -> set[str]:
        path = write_parquet(tmp_path / f"{name}.parquet", rows[:count])
        task = load_task(path, {"verify": "exact", "validation_fraction": 0.2})
        train, held = ({p.messages[0]["content"] for p in task.problems(s)} for s in ("train", "validation"))
        assert not train & held
        assert task.notes == []  # type: ignore[attr-defined]
        return held

    assert held_out("some", 100) == {q for q in held_out("all", 300) if int(q[:-1]) < 100}
    assert 15 < len(held_out("all", 300)) < 50


def test_a_second_file_is_the_validation_split_and_what_is_in_both_is_said(tmp_path: Path) -> None:
    train, held = QUESTIONS[:6], QUESTIONS[4:9]
    args = {**ARGS, "validation": write_parquet(tmp_path / "v.parquet", held)}
    task: Any = load_task(write_parquet(tmp_path / "t.parquet", train), args)
    assert ids(task, "train") == [f"t/{i}" for i in range(6)]
    assert ids(task, "validation") == [f"v/{i}" for i in range(5)]
    assert (
        "2 of 5 validation problems have the messages of a training problem, 'v/0' the first" in task.notes[0]
    )
    mixture: Any = load_task("mixture", {"tasks": [{"task": str(tmp_path / "t.parquet"), "task_args": args}]})
    assert (len(mixture.problems("train")), mixture.notes) == (6, task.notes)


def test_filter_shuffle_and_limit_choose_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "q.parquet", QUESTIONS)

    def chosen(**args: Any) -> list[str]:
        task = load_task(path, {**ARGS, "validation": path.replace("q.p", "v.p"), **args})
        return ids(task, "train")

    write_parquet(tmp_path / "v.parquet", QUESTIONS)
    assert chosen(filter="details.level == 'L3' and question|length > 6") == [
        f"q/{i}" for i in range(7, 30, 2)
    ]
    assert chosen(limit=3) == ["q/0", "q/1", "q/2"]
    some = chosen(limit=9, shuffle=1)
    assert sorted(chosen(shuffle=1)) == sorted(chosen())
    assert chosen(shuffle=1)[:9] == some != chosen(shuffle=2)[:9]
    assert some != sorted(some)


def test_one_expression_keeps_its_type_and_text_stays_text(tmp_path: Path) -> None:
    rows = [
        {"Question Type": "a", "tests": '["assert f(1) == 2"]', "n": 7, "t": "5"},
        {"Question Type": "b", "tests": "[]", "n": 8, "t": "[1]"},
    ]
    columns = {
        "id": "n", "prompt": "Solve {{ row['Question Type'] }}.", "answer": "{{ tests | fromjson }}", "meta": {"t": "{{ t }}", "more": "{{ n + 1 }}"},
    }  # fmt: skip
    task: Any = load_task(
        write_parquet(tmp_path / "d.parquet", rows), {"verify": "python_tests", "columns": columns}
    )
    problems = sorted([*task.problems("train"), *task.problems("validation")], key=lambda p: p.id)
    assert [(p.id, p.answer, p.meta) for p in problems] == [
        ("7", ["assert f(1) == 2"], {"t": "5", "more": 8}), ("8", [], {"t": "[1]", "more": 9}),
    ]  # fmt: skip


def test_a_data_set_of_the_hub_is_read_from_the_cache_without_a_network(questions: str) -> None:
    args = {**ARGS, "config": "v2", "train": "test", "validation": "dev", "revision": "refs/convert/parquet"}
    task: Any = load_task(questions, args)
    assert ids(task, "train") == [f"test/{i}" for i in range(20)]
    assert ids(task, "validation") == [f"dev/{i}" for i in range(10)]
    part: Any = load_task(questions, {**args, "train": "test[5:8]", "validation": None})
    assert len(part.problems("train")) + len(part.problems("validation")) == 3
    streamed: Any = load_task(questions, {**args, "streaming": 8})
    assert streamed.problems("train") == task.problems("train")[:8]
    assert streamed.problems("validation") == task.problems("validation")[:8]
    assert of_problems(streamed.problems("train"))["hashed"] == 8


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("ns/gone", {}, "task=hf:ns/gone: the data set is not in the cache of `datasets` and the Hub cannot be reached"),
        ("/nowhere/at/all", {}, "task=hf:/nowhere/at/all, split train: Couldn't find any data file"),
        ("", {"train": "tset"}, 'split tset: Unknown split "tset". Should be one of'),
        ("", {"config": "v9"}, "Couldn't find cache for ns/Questions for config 'v9' Available configs in the cache: ['v2']"),
        ("", {"train": "test", "revision": "b" * 40}, f"holds another revision than task_args.revision={'b' * 40}"),
        ("", {"splits": "test"}, "task_args.splits is not known; allowed are config, train, validation, revision, streaming, verify"),
        ("", {"streaming": True}, "task_args.streaming=True must be a whole number of at least 1"),
        ("", {"train": 3}, "task_args.train=3 must be a text"),
        ("", {"limit": 0}, "task_args.limit=0 must be a whole number of at least 1"),
        ("", {"verify": ""}, "needs a grader"),
        ("", {"train": "test", "filter": "details.level == 'L9'"}, "has no problems: task_args.filter keeps none of its 20 rows"),
        ("", {"train": "test", "filter": "levle == 1"}, "task_args.filter: 'levle' is undefined; the columns are question, choices"),
        ("", {"filter": "a b"}, "task_args.filter is not a valid template"),
        ("", {"columns": {"prompt": "question"}}, "task_args.columns needs answer, and one of prompt and messages"),
        ("", {"columns": {"text": "question"}}, "task_args.columns.text is not known; allowed: id, messages, prompt"),
        ("", {"columns": {"prompt": "{{ question", "answer": "answerKey"}}, "task_args.columns.prompt is not a valid template"),
        ("", {"train": "test", "columns": {"prompt": "Question", "answer": "answerKey"}},
         "hf:ns/Questions test[0]: task_args.columns.prompt=Question is not a column; the columns are question, choices, answerKey"),
        ("", {"train": "test", "columns": {"prompt": "{{ 1 // 0 }}", "answer": "answerKey"}}, "test[0]: task_args.columns.prompt: "),
        ("", {"train": "test", "columns": {"prompt": "{{ ''.__class__.mro() }}", "answer": "answerKey"}}, "is unsafe"),
        ("", {"train": "test", "columns": {"prompt": "question", "answer": "blob"}}, "test[0]: holds a value of type bytes"),
        ("", {"train": "test", "columns": {"prompt": "{{ 3 }}", "answer": "blob"}}, "test[0]: "),
        ("", {"train": "test", "columns": {"id": "answerKey", "prompt": "question", "answer": "domain"}},
         "test[1]: the id 'B' is already that of hf:ns/Questions test[0]; ids must be unique"),
        ("", {"train": "test", "columns": None}, "test[0]: unknown key 'question'; allowed are id, messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_sentence(
    questions: str, name: str, args: dict[str, Any], said: str
) -> None:
    spec = f"hf:{name}" if name else questions
    assert said in refusal(lambda: load_task(spec, {"config": "v2" if not name else None, **ARGS, **args}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "there are no rows"),
        (b"prompt,answer\n", "there are no rows"),
        (b"prompt,answer\na,1\nb\n", "d.csv:3: has 1 cells; the first line names 2 columns"),
        (b"prompt,answer\na,1,2\n", "d.csv:2: has 3 cells"),
        (b"prompt,prompt\na,1\n", "d.csv:1: the column name 'prompt' is empty or given twice"),
        (b"prompt,\na,1\n", "d.csv:1: the column name '' is empty"),
        (b'prompt,answer\n"a"b,1\n', "d.csv:2: is not CSV"),
        (b'prompt,answer\na,1\n"b,1\n', "is not CSV: unexpected end of data"),
        (b"prompt,answer\na,1\n\xff,1\n", "d.csv:3: is not UTF-8"),
        (b"prompt;answer\na;1\n", "d.csv:2: unknown key 'prompt;answer'"),
        (b"prompt,answer\n ,1\n", "d.csv:2: prompt=' ' must be a text that is not empty"),
    ],
)
def test_a_bad_csv_file_is_named_with_its_line(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "d.csv").write_bytes(text)
    assert said in refusal(lambda: load_task(f"{tmp_path}/d.csv", {"verify": "exact"}))


def test_bad_parquet_files_and_values_are_one_sentence(tmp_path: Path) -> None:
    args = {"verify": "exact"}
    (tmp_path / "text.parquet").write_text("prompt,answer")
    (tmp_path / "folder.parquet").mkdir()
    assert "is not a Parquet file that can be read" in refusal(
        lambda: load_task(f"{tmp_path}/text.parquet", args)
    )
    for name in ("folder", "gone"):
        assert "cannot be read" in refusal(lambda name=name: load_task(f"{tmp_path}/{name}.parquet", args))
    nan = write_parquet(
        tmp_path / "nan.parquet", [{"prompt": "?", "answer": 1.0}, {"prompt": "!", "answer": float("nan")}]
    )
    assert "nan.parquet[1]: holds nan, which is not a number" in refusal(lambda: load_task(nan, args))
    both = write_parquet(tmp_path / "both.parquet", [{"prompt": "?", "answer": "1", "split": "train"}])
    said = refusal(lambda: load_task(both, {**args, "validation": both}))
    assert "both.parquet[0]: has a split, but task_args.validation names the validation split" in said
    same = write_parquet(tmp_path / "same.parquet", [{"prompt": "?", "answer": "1", "id": "a"}])
    assert "same.parquet[0]: the id 'a' is already" in refusal(
        lambda: load_task(same, {**args, "validation": same})
    )


def test_fields_that_a_table_fills_with_null_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    rows = [
        {"chat": [{"role": "user", "content": f"{i}?", "name": None}], "answer": None, "id": None if i else "x", "kind": None} for i in range(4)
    ]  # fmt: skip
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema({
        "chat": pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string(), "name": pyarrow.string()})),
        "answer": pyarrow.string(), "id": pyarrow.string(), "kind": pyarrow.string(),
    }))  # fmt: skip
    parquet.write_table(table, tmp_path / "d.parquet")
    columns = {"messages": "chat", "answer": "answer", "id": "id", "meta": {"kind": "kind"}}
    verify = {"grader": "regex", "pattern": "a"}
    task = load_task(f"{tmp_path}/d.parquet", {"verify": verify, "columns": columns, "gold": ""})
    problems = sorted([*task.problems("train"), *task.problems("validation")], key=lambda p: p.id)
    assert [p.id for p in problems] == ["d/1", "d/2", "d/3", "x"]
    assert problems[0].messages == ({"role": "user", "content": "1?"},)
    assert (problems[0].answer, problems[0].meta) == (None, {"kind": None})


def test_a_verifying_child_reads_no_rows_and_no_package_of_data_sets(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom fst_fast.tasks.registry import load_task\nfrom fst_fast.contracts import Problem\n"
        "task = load_task('hf:ns/gone', {'verify': 'exact'}, problems=False)\n"
        "assert task.verify(Problem('a', [], '1'), '1').reward == 1\n"
        "print([name for name in ('torch', 'datasets', 'pyarrow', 'pandas', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_without_the_packages_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "d.parquet").write_bytes(b"")
    extra = "install it with: pip install 'fst-fast[tasks]'"
    assert f"task=hf:a/b needs the package datasets; {extra}" in refusal(lambda: load_task("hf:a/b", ARGS))
    assert f"needs the package pyarrow; {extra}" in refusal(lambda: load_task(f"{tmp_path}/d.parquet", ARGS))
