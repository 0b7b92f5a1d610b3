"""Experiments with real runs: trained, exported and evaluated in processes forked from one server, and ended by a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fst_fast.config import load as config_load
from fst_fast.experiments.curves import AXES, load_curve
from fst_fast.experiments.runner import Runner
from fst_fast.experiments.runs import FAMILIES, Budget, Run
from tests.integration.launch import REPO, one_thread, records

TINY = Budget(steps=2, eval_every=1, eval_problems=4, final_problems=4, seeds=1)


def test_a_tiny_suite_trains_starts_from_trained_weights_and_evaluates(tmp_path: Path) -> None:
    lines: list[str] = []
    runner = Runner(tmp_path, TINY, FAMILIES, 1, say=lines.append)
    first = Run("star_graph", "rl", 0, {"slow.lr": 1e-3})
    second = Run("linked_facts", "rl", 0, after=first)
    runner.train([first])
    runner.train([first, second])
    runner.evaluate([second], "ood")
    assert [line.split(" in ")[0] for line in lines] == [
        "[1/1] star_graph-rl-lr=1e-3-seed=0 done",
        "[1/1] star_graph-rl-lr=1e-3-seed=0-export done",
        f"[1/1] {second.name} done",
        f"[1/1] {second.name}-ood done",
    ]
    curve = load_curve(runner.folder(first))
    assert curve.cost["steps"].tolist() == [0, 1, 2]
    assert all((curve.cost[axis][1:] > 0).all() for axis in AXES)
    config = config_load.load(runner.folder(second) / "config.yaml")
    assert config.model.path == str(tmp_path / "models" / first.name)
    assert (tmp_path / "models" / first.name / "model.safetensors").is_file()
    assert set(runner.evaluation(second, "ood")["channels"]) == {"neither", "context", "weights", "both"}


HEARING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits an ignored one
from fst_fast.cli import run
run()
"""


def test_ctrl_c_ends_a_run_after_its_step_with_a_checkpoint(tmp_path: Path) -> None:
    """A terminal signals all processes of its foreground group: the suite, the fork server and what they started."""
    words = ["experiment", "efficiency", "--quick", "--families=star_graph", "--seeds=1", "--workers=1"]
    folder = tmp_path / "runs" / "star_graph-rl-lr=1e-4-seed=0"
    with subprocess.Popen(
        [sys.executable, "-c", HEARING, *words, "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPO,
        env=one_thread(),
        start_new_session=True,
    ) as suite:
        metrics = folder / "metrics.jsonl"
        while suite.poll() is None and not (metrics.is_file() and '"kind": "step"' in metrics.read_text()):
            time.sleep(0.05)
        os.killpg(suite.pid, signal.SIGINT)
        said = suite.communicate()[1]
    assert suite.returncode == 130
    assert "interrupted" in said
    last = records(folder, "step")[-1]["step"]
    assert 1 <= last < 60
    assert (folder / "checkpoints" / f"step-{last:06d}").is_dir()
    assert "fst: stopped by a signal" in (tmp_path / "logs" / f"{folder.name}.log").read_text()
