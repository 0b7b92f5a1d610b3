"""A run ends when its folder holds a file `stop`, and an evolution alone when its budget is used up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fst_fast

TINY = {
    "task": "star_graph",
    "task_args": {"form": "mini", "arms": 5, "path": 4, "ids": 40},
    "slow": {"steps": 3, "problems_per_step": 4, "lr": 3e-4},
    "fast": {
        "anchor_size": 4,
        "cycle_steps": 1,
        "rollout_budget": 40,
        "samples": 1,
        "children": 2,
        "first_generations": 1,
    },
    "rollout": {"max_response_tokens": 8},
    "eval": {"every": 0, "problems": 2, "final_problems": 2, "samples": 1, "kl_problems": 1},
}


class StopAfter(fst_fast.Callback):
    """Touches the stop file in a step, as a person may at any time."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step, self.steps = folder, step, 0

    def on_step(self, event: Any) -> None:
        self.steps += 1
        if event.step == self.step:
            (self.folder / "stop").touch()


def test_a_stop_file_ends_the_run_after_the_step_and_resuming_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stopping = StopAfter(folder, 1)
    assert fst_fast.train(dict(TINY), run_dir=folder, callbacks=[stopping]).summary is None
    assert stopping.steps == 1
    assert not (folder / "stop").exists()
    assert (folder / "checkpoints").is_dir()
    (folder / "stop").touch()  # of a stop that a kill came before
    rest = StopAfter(folder, 99)
    result = fst_fast.train(dict(TINY), run_dir=folder, resume=True, callbacks=[rest])
    assert result.summary is not None
    assert rest.steps == 2
    fst_fast.train(dict(TINY), run_dir=tmp_path / "whole")

    def steps(path: Path) -> list[str]:
        return [
            line for line in (path / "metrics.jsonl").read_text().splitlines() if '"kind": "step"' in line
        ]

    assert steps(folder) == steps(tmp_path / "whole")
    assert len(steps(folder)) == 3


def test_an_evolution_alone_ends_with_its_budget(tmp_path: Path) -> None:
    fast = {**TINY["fast"], "budget": {"idle_cycles": 1}, "admit_z": 1e6}  # type: ignore[dict-item]
    slow = {**TINY["slow"], "steps": 5}  # type: ignore[dict-item]
    result = fst_fast.train({**TINY, "method": "gepa", "slow": slow, "fast": fast}, run_dir=tmp_path / "run")
    assert result.summary is not None
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum('"kind": "cycle"' in line for line in lines) == 1
