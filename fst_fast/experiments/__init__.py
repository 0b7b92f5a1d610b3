"""The paper's experiments on the mini world, with seeds and intervals: `fst experiment NAME --out DIR`, or `run(names, runner)`.

Rooms:
    runs.py         one training run as the experiments ask for it: its name, its configuration, what it starts from
    runner.py       makes the runs that are not made yet, side by side in child processes
    worker.py       a child process that runs `fst` commands one after another
    curves.py       a run folder as a curve on the four axes
    statistics.py   where a curve reaches a level, bootstrap intervals, the ceiling of a pooled fit
    methods.py      the runs that most experiments share, and where a run stands at RL's peak
    result.py       what an experiment returns
    experiments.py  each experiment: which runs, which numbers, which claims
    figures.py      the pictures
    page.py         results.json, the tables, report.html
"""

from __future__ import annotations

from fst_fast.experiments.experiments import EXPERIMENTS
from fst_fast.experiments.page import run
from fst_fast.experiments.runner import Runner

__all__ = ["EXPERIMENTS", "Runner", "run"]
