"""The tree of contexts in the report, and the words that a child adds and drops."""

from __future__ import annotations

import json
from pathlib import Path

from fst_fast.report import lineage_figure
from fst_fast.report.lineage import lineage, word_diff
from fst_fast.report.load import load_runs
from tests.fst_fast.test_report import metrics_of, write_run


def test_the_lineage_is_the_recorded_tree(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    nodes = lineage(load_runs([folder])[0])
    recorded = json.loads((folder / "contexts.json").read_text())
    assert {node.id: (node.text, node.parent) for node in nodes} == {
        id: (kept["text"], kept["parent"]) for id, kept in recorded["contexts"].items()
    }
    at = {node.id: i for i, node in enumerate(nodes)}
    assert [node.id for node in nodes if node.parent is None] == ["seed00"]
    for node in nodes[1:]:
        assert node.parent
        assert at[node.parent] < at[node.id]
        assert nodes[at[node.parent]].depth == node.depth - 1
        assert "".join(text for what, text in node.changes if what != "del") == node.text
    assert {node.id for node in nodes if node.copies} == set(recorded["population"])
    born = {
        row["id"]: row for line in metrics_of(folder) if line["kind"] == "cycle" for row in line["contexts"]
    }
    assert all(
        born[node.id]["admitted"] == node.admitted and born[node.id]["mean"] == node.birth_mean
        for node in nodes[1:]
    )
    drawn = lineage_figure.draw(nodes)
    assert not isinstance(drawn, str)
    assert len(drawn.axes[0].get_lines()) == len(nodes) - 1  # one edge for each child


def test_parents_that_form_a_ring_are_still_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "rl", steps=2)
    ring = {"a": {"text": "x", "parent": "b", "born": 1}, "b": {"text": "y", "parent": "a", "born": 1}}
    (folder / "contexts.json").write_text(json.dumps({"population": ["a"], "contexts": ring}))
    assert sorted(node.id for node in lineage(load_runs([folder])[0])) == ["a", "b"]


def test_word_diff_names_what_was_added_and_removed() -> None:
    assert word_diff("solve the problem .", "solve the maze .") == [
        ("same", "solve the "),
        ("del", "problem "),
        ("ins", "maze "),
        ("same", "."),
    ]
    assert word_diff("a  b\nc", "a b c") == [("same", "a b c")]
    assert word_diff("a b", "a") == [("same", "a"), ("del", " b ")]
    assert word_diff("", "a") == [("ins", "a")]
    assert word_diff("", "") == []
