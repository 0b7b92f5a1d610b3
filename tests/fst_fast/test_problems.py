"""Runs compared problem by problem: what an evaluation writes down of each problem, and what the report makes of two runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fst_fast.cli import main
from fst_fast.contracts import Judged, Problem
from fst_fast.report import figures, write_report
from fst_fast.report.load import load_runs
from fst_fast.report.problems import Comparison, compare, present
from fst_fast.run.problems import FILE, KEPT_CHARS, write_problems

EVIL = "<script>alert(1)</script>"
PROBLEMS = [
    Problem("p1", [{"role": "user", "content": "1 + 1"}], "2"),
    Problem("p2", [{"role": "system", "content": "brief"}, {"role": "user", "content": "x" * 3000}], "4"),
    Problem("p3", [{"role": "user", "content": "not asked"}], "6"),
]


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "DPI", 30)


def judged(id: str, reward: float | None, response: str | None = "r", context: str = "c") -> Judged:
    return Judged(id, context, reward, response, None if response is None else "f")


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FILE).read_text())["problems"]  # type: ignore[no-any-return]


def test_an_evaluation_writes_the_rewards_and_the_first_response_of_each_problem(tmp_path: Path) -> None:
    seen = {
        "neither": [judged("p1", 0.0, "no"), judged("p1", 1.0, "yes"), judged("p2", None, "\ud800")],
        "both": [judged("p1", 1.0, "2")],
    }
    write_problems(tmp_path, PROBLEMS, seen, step=5, final=False)
    found = read(tmp_path)
    assert list(found) == ["p1", "p2"]
    assert found["p1"]["question"] == "1 + 1"
    assert found["p1"]["cells"]["neither"] == {
        "rewards": [0.0, 1.0], "reward": 0.0, "context_id": "c", "response": "no", "feedback": "f"
    }  # fmt: skip
    assert found["p2"]["cells"]["neither"]["rewards"] == [None]
    assert found["p2"]["cells"]["neither"]["response"] == "?"
    assert found["p2"]["question"].startswith("brief\n\nxxx")
    assert KEPT_CHARS < len(found["p2"]["question"]) < KEPT_CHARS + 100


def test_the_response_of_a_sample_that_is_not_taken_again_is_kept_while_it_is_the_same(
    tmp_path: Path,
) -> None:
    write_problems(tmp_path, PROBLEMS, {"neither": [judged("p1", 0.5, "half")], "context": [judged("p1", 1.0, "one")]}, step=1, final=False)  # fmt: skip
    again = {"neither": [judged("p1", 0.5, None)], "context": [judged("p1", 1.0, None, context="other")]}
    write_problems(tmp_path, PROBLEMS, again, step=2, final=True)
    cells = read(tmp_path)["p1"]["cells"]
    assert (cells["neither"]["response"], cells["neither"]["feedback"]) == ("half", "f")
    assert (cells["context"]["response"], cells["context"]["reward"]) == (None, 1.0), "another context's"
    (tmp_path / FILE).write_text("[]")
    write_problems(tmp_path, PROBLEMS, again, step=3, final=True)
    assert read(tmp_path)["p1"]["cells"]["neither"]["response"] is None


def run(folder: Path, rewards: dict[str, list[float | None]], question: str = "what", **more: Any) -> Path:
    """A run whose last evaluation gave these rewards."""
    folder.mkdir()
    lines = [{"kind": "start", "method": "fst", "seed": 0, "task": "t", "model": "m"}, *more.pop("lines", [])]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    problems = [Problem(id, [{"role": "user", "content": f"{question} {id} {EVIL}"}], None) for id in rewards]
    samples = [
        judged(id, reward, f"{folder.name} says {id} {EVIL}") for id, row in rewards.items() for reward in row
    ]
    write_problems(folder, problems, {"both": samples, "neither": []}, step=9, final=True)
    return folder


def test_who_solves_what(tmp_path: Path) -> None:
    a = run(
        tmp_path / "a",
        {"all": [1.0], "a": [1.0, 0.0], "b": [0.4, None], "none": [0.0], "only a": [1.0], "unjudged": [None]},
    )
    b = run(
        tmp_path / "b", {"all": [1.0], "a": [1.0, 0.0, 0.0], "b": [1.0], "none": [0.0], "unjudged": [1.0]}
    )
    found = compare(load_runs([a, b]))
    assert isinstance(found, Comparison)
    assert (found.problems, found.solved, found.alone) == (4, [2, 2], [1, 1])
    assert (found.by_all, found.by_none, found.left_out) == (1, 1, 2)
    assert [(row.id, round(row.spread, 3)) for row in found.rows] == [("b", 0.6), ("a", 0.167)]


def test_another_problem_under_the_same_id_is_not_compared(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", {"p": [1.0]}), run(tmp_path / "b", {"p": [0.0]}, question="another")
    found = compare(load_runs([a, b]))
    assert isinstance(found, Comparison)
    assert (found.problems, found.left_out, found.rows) == (0, 1, [])


def test_the_page_sets_responses_side_by_side_and_escapes_them(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", {"p": [1.0], "q": [1.0]}), run(tmp_path / "b", {"p": [0.0], "q": [1.0]})
    page = write_report([a, b], tmp_path / "out").read_text()
    assert EVIL not in page
    section = page[page.index('<section id="problems">') : page.index('<section id="lineage">')]
    assert re.search(r"a says p &lt;script.*b says p &lt;script", section, re.DOTALL)
    assert "says q" not in section
    assert "1 problem with different rewards" in section
    assert "Solved by all 1, by none 0." in section
    (b / FILE).unlink()
    page = write_report([a, b], tmp_path / "out").read_text()
    assert "No comparison: no problems.json in b" in page
    assert 'id="problems"' not in write_report([a], tmp_path / "one").read_text()


def test_a_damaged_file_is_refused_naming_the_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = run(tmp_path / "a", {"p": [1.0]})
    (a / FILE).write_text('{"step": 1, "problems": {"p": {"question": 3}}}')
    assert main(["report", str(a)]) == 2
    assert "problems.json:1: problems.p.question='3'" in capsys.readouterr().err


def test_the_report_lists_the_troubles_that_the_run_named(tmp_path: Path) -> None:
    trouble = {"kl_high": {"value": 2.0, "limit": 1.0, "count": 1}}
    steps = [{"kind": "step", "step": i, "troubles": trouble if i in (3, 4, 7) else {}} for i in range(1, 9)]
    a = run(tmp_path / "a", {}, lines=steps)
    [loaded] = load_runs([a])
    assert present(loaded) == [("kl_high", {"records": 3, "first": 3, "last": 7})]
    page = write_report([a], tmp_path / "out").read_text()
    assert "KL explodes" in page
    assert "docs/troubles.md#kl-explodes" in page
