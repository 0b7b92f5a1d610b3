"""The examples run as they are."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.integration.launch import REPO, one_thread


def test_the_minimal_example_finds_a_better_context_and_learns() -> None:
    done = subprocess.run(
        [sys.executable, "examples/minimal_fst.py", "8"], capture_output=True, text=True, cwd=REPO, env=one_thread(), check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    best = [float(x) for x in re.findall(r"best context .*, reward ([\d.]+)", done.stdout)]
    rewards = [float(x) for x in re.findall(r"step \d+: reward ([\d.]+)", done.stdout)]
    assert (len(best), len(rewards)) == (2, 8)
    assert best[-1] > best[0]
