"""problems.json: what the last evaluation found for each problem, with one response of each cell, so that runs can be compared problem by problem.

It is replaced at every evaluation. A base model's sample that an earlier evaluation took is not sampled again; its response is taken over from the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fst_fast.contracts import Judged, Problem
from fst_fast.run.folder import write_json

FILE = "problems.json"
KEPT_CHARS = 2000  # of a question, a response, a feedback


def write_problems(
    run_dir: Path,
    problems: Sequence[Problem],
    seen: Mapping[str, Sequence[Judged]],
    *,
    step: int,
    final: bool,
) -> None:
    """Write the file. seen: cell -> its samples. Raises UserError where the disk refuses."""
    before = _read(run_dir / FILE)
    asked = {each.problem_id for judged in seen.values() for each in judged}
    tree: dict[str, Any] = {
        problem.id: {
            "question": _cut("\n\n".join(str(m["content"]) for m in problem.messages)),
            "cells": {},
        }
        for problem in problems
        if problem.id in asked
    }
    for cell, judged in seen.items():
        for each in judged:
            of_cell = tree[each.problem_id]["cells"]
            if cell not in of_cell:
                of_cell[cell] = {"rewards": [], **_shown(each, before.get(each.problem_id, {}), cell)}
            of_cell[cell]["rewards"].append(each.reward)
    write_json(run_dir / FILE, {"step": step, "final": final, "problems": tree})


def _shown(sample: Judged, before: Mapping[str, Any], cell: str) -> dict[str, Any]:
    """The first sample of a problem in a cell."""
    shown = {"reward": sample.reward, "context_id": sample.context_id}
    if sample.response is not None:
        return {**shown, "response": _cut(sample.response), "feedback": _cut(sample.feedback or "")}
    known = before.get("cells", {}).get(cell, {})
    same = all(known.get(key) == value for key, value in shown.items())
    return {**shown, **{key: known.get(key) if same else None for key in ("response", "feedback")}}


def _cut(text: str) -> str:
    """Valid UTF-8 without the middle of what is too long."""
    text = text.encode(errors="replace").decode()
    if len(text) <= KEPT_CHARS:
        return text
    half = KEPT_CHARS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"


def _read(path: Path) -> dict[str, Any]:
    """The problems of the file that is there; nothing where it cannot be read, which costs responses to show and no figure."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["problems"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
