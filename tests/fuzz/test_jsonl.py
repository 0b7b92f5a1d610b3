"""Any JSONL file is a task whose problems survive JSON and pickle unchanged, or one sentence with file and line."""

import json
import pickle
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.errors import UserError
from fst_fast.tasks.registry import load_task

FUZZ = settings.get_profile("fuzz")

text = st.one_of(
    st.sampled_from(["", " ", "?", "2 + 2 = ?", "a\x00b", "\ud83d", "\udc00x", "😀", "é", "{answer}", "\u2028", "\ufeff", "x" * 3000]),
    st.text(max_size=12),
)  # fmt: skip
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    text,
    st.sampled_from([10**50, -(10**50), 1e308, -0.0]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
messages = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": text}
        ),
        st.dictionaries(st.sampled_from(["role", "content", "name"]), values, max_size=3),
        values,
    ),
    max_size=3,
)
good = st.fixed_dictionaries(
    {"prompt": text, "answer": values}, optional={"id": text, "meta": st.dictionaries(text, values, max_size=2), "gold": text, "split": text}
)  # fmt: skip
keys = st.sampled_from(["id", "messages", "prompt", "answer", "split", "meta", "gold", "text", ""])
objects = st.one_of(
    good,
    st.fixed_dictionaries({"messages": messages, "answer": values}),
    st.dictionaries(keys, st.one_of(values, messages), max_size=6),
)
PIECES = [
    b'"prompt": "?"', b'"answer": 1', b'"answer": 1e999', b'"answer": NaN', b'"id": "a"', b'{', b'}', b"[", b"]", b",", b'"', b"\\ud83d", b"\\u0000", b"\x00",
    b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\n\n", b" ", b"9" * 5000, b"[" * 3000, b'{"a":' * 200, b"-", b"1E+400", b"null", b"true", b"//", b"\\",
]  # fmt: skip


@st.composite
def lines(draw):
    """One line: an object, spelt in one of JSON's ways, sometimes spliced with pieces that break it or bend it."""
    line = json.dumps(draw(objects), ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.integers(0, 2)) if draw(st.booleans()) else 0):
        at = draw(st.integers(0, len(line)))
        line = line[:at] + draw(st.sampled_from(PIECES)) + line[draw(st.sampled_from([at, at + 1])) :]
    return line


files = st.tuples(
    st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"]),
    st.lists(st.one_of(lines(), lines(), st.binary(max_size=12)), max_size=5),
    st.sampled_from([b"\n", b"\n", b"\r\n", b"\r", b"\n \n"]),
).map(lambda made: made[0] + made[2].join(made[1]))


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "g.py").write_text("def f(problem, response): return 1.0\n")
        yield Path(made)


@settings(FUZZ)
@given(data=files)
def test_a_file_is_read_or_refused_in_one_sentence(folder, bounded, data):
    path = folder / "d.jsonl"
    path.write_bytes(data)
    try:
        task = bounded(lambda: load_task(str(path), {"verify": f"{folder}/g.py:f"}))
    except UserError as error:
        said = str(error)
        assert "\n" not in said
        assert len(said) < 600 + len(str(path))
        said.encode()
        assert re.match(rf"{re.escape(str(path))}:\d+: |task={re.escape(str(path))} ", said), said
        return
    problems = [p for split in list(task._splits) for p in task.problems(split)]
    assert problems
    assert len({p.id for p in problems}) == len(problems)
    for problem in problems:
        given_ = [problem.id, [dict(m) for m in problem.messages], problem.answer, problem.meta]
        spelt = json.dumps(given_, allow_nan=False, ensure_ascii=False)
        assert json.dumps(json.loads(spelt), ensure_ascii=False) == spelt
        spelt.encode()
        assert pickle.loads(pickle.dumps(problem)) == problem
        gold = task.gold(problem)
        assert gold is None or gold.encode() is not None
