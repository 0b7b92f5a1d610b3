"""A run that names its troubles says and writes the same whether it was interrupted or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fst_fast

SETTINGS: dict[str, Any] = {
    "method": "rl", "slow": {"steps": 10, "problems_per_step": 2, "lr": 1e-12}, "checkpoint": {"every": 4},
    "eval": {"every": 0, "final_problems": 1, "samples": 1, "kl_problems": 1}, "rollout": {"max_response_tokens": 2},
}  # fmt: skip


class StopAfter(fst_fast.Callback):
    def on_step(self, event: Any) -> None:
        if event.step == 9:
            raise RuntimeError("enough")


def test_troubles_are_counted_on_after_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fst_fast.train(run_dir=tmp_path / "whole", **SETTINGS)
    said = capsys.readouterr().out
    with pytest.raises(fst_fast.UserError, match="enough"):
        fst_fast.train(run_dir=tmp_path / "broken", callbacks=[StopAfter()], **SETTINGS)
    assert "trouble: Responses are truncated" in capsys.readouterr().out
    fst_fast.train(run_dir=tmp_path / "broken", resume=True, **SETTINGS)
    again = capsys.readouterr().out
    whole, broken = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "broken"))
    assert whole == broken
    steps = [r for r in map(json.loads, whole.splitlines()) if r["kind"] == "step"]
    counts = [step.get("troubles", {}).get("responses_truncated", {}).get("count") for step in steps]
    assert counts == [None] * 7 + [1, 2, 3], "two tokens are never enough"
    assert said.count("trouble: Responses are truncated") == 1
    assert "trouble: Responses are truncated" not in again, "its checkpoint, of step 8, already knew"
