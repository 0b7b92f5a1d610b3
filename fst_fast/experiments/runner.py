"""Train the runs of a suite, several at a time, each in a process of its own; a finished run is not trained again.

A run is an ordinary run folder under OUT/runs. One that was interrupted goes on from its checkpoint; one that has another configuration
than asked for is refused by name. Where a run fails the others go on, and the error at the end names its log. A finished run can be
evaluated on another split of its task, into OUT/evaluations.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fst_fast.config import load as config_load
from fst_fast.errors import UserError
from fst_fast.experiments import worker
from fst_fast.experiments.runs import Budget, Changes, Run
from fst_fast.run.folder import MARKER, disk_errors

_COST = {"fst": 3.0, "rl": 1.0, "gepa": 1.0, "evaluation": 10.0, "export": 1.0}
"""Of a step of each method, of an evaluation and of an export, relative, for the estimate of the time left; measured roughly
(docs/experiments.md)."""


@dataclass(frozen=True, eq=False)
class _Job:
    """A call of a function of worker.py in a process of its own; its log has its name."""

    name: str
    cost: float
    work: Callable[..., None]
    arguments: tuple[Any, ...]


@dataclass
class Runner:
    """out: the suite's folder. workers: runs at a time. dry_run: only list the runs, in `planned`. say: prints a line."""

    out: Path
    budget: Budget
    families: Sequence[str]
    workers: int
    dry_run: bool = False
    say: Callable[[str], None] = print
    planned: list[Run] = field(default_factory=list)
    rl_settings: Mapping[str, Changes] | None = None  # of each family, instead of a sweep
    _seconds: float = 0.0  # of the jobs done
    _cost: float = 0.0  # of the same

    @property
    def seeds(self) -> range:
        return range(self.budget.seeds)

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name

    def weights(self, run: Run) -> Path | None:
        """The model folder that the run starts from; None: that of its configuration."""
        return self.out / "models" / run.after.name if run.after else None

    def train(self, runs: Sequence[Run]) -> None:
        """Train those that are not finished; the runs that they start from must be. Raises UserError where some failed, and where a
        folder has another configuration."""
        runs = list(dict.fromkeys(runs))
        self.planned += [run for run in runs if run not in self.planned]
        if self.dry_run:
            return
        exports, jobs = {}, []
        for run in runs:
            folder, weights = self.folder(run), self.weights(run)
            config = run.config(self.budget, weights)
            resume = (folder / MARKER).is_file()
            if resume and config_load.load(folder / "config.yaml") != config:
                wanted = "has another configuration than this suite asks for"
                raise UserError(f"{folder} {wanted}; give another --out, or remove the folder")
            if resume and (folder / "summary.json").is_file():
                continue
            if run.after and weights and not weights.is_dir():
                export = (self.folder(run.after), weights)
                exports[weights] = _Job(f"{run.after.name}-export", _COST["export"], worker.export, export)
            cost = _COST[run.method] * config.slow.steps
            jobs.append(_Job(run.name, cost, worker.train, (config, folder, resume)))
        self._work(list(exports.values()), "exports")
        self._work(jobs, "runs")

    def evaluate(self, runs: Sequence[Run], split: str) -> None:
        """Measure the four cells of finished runs on a split, unless that was done since they ended. Raises UserError where one failed."""
        if self.dry_run:
            return
        jobs = []
        for run in dict.fromkeys(runs):
            out, summary = self._evaluation_file(run, split), self.folder(run) / "summary.json"
            if not out.is_file() or out.stat().st_mtime_ns < summary.stat().st_mtime_ns:
                arguments = (self.folder(run), split, out)
                jobs.append(_Job(f"{run.name}-{split}", _COST["evaluation"], worker.evaluate, arguments))
        self._work(jobs, "evaluations")

    def evaluation(self, run: Run, split: str) -> dict[str, Any]:
        """The result of `evaluate`, as `fst eval --out` writes it."""
        found: dict[str, Any] = json.loads(self._evaluation_file(run, split).read_text())
        return found

    def _evaluation_file(self, run: Run, split: str) -> Path:
        return self.out / "evaluations" / f"{run.name}-{split}.json"

    def _work(self, jobs: Sequence[_Job], noun: str) -> None:
        """Do the jobs, the longest first so that the last ones end together. An interrupt ends those that run, then is raised."""
        for name in ("logs", "evaluations"):
            with disk_errors(f"{self.out} cannot be written"):
                (self.out / name).mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fst_fast.experiments.preload"])
        waiting, failed = sorted(jobs, key=lambda job: -job.cost), []
        running: dict[_Job, tuple[BaseProcess, float]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    job = waiting.pop(0)
                    arguments = (job.work, job.arguments, self._log(job))
                    process = context.Process(target=worker.run, args=arguments)
                    process.start()
                    running[job] = process, time.monotonic()
                wait([process.sentinel for process, _ in running.values()])
                for job in [job for job, (process, _) in running.items() if process.exitcode is not None]:
                    ended, began = running.pop(job)
                    if ended.exitcode:
                        failed.append(f"{job.name} ({_outcome(ended)}): {self._log(job)}")
                    seconds = time.monotonic() - began
                    self._seconds, self._cost = self._seconds + seconds, self._cost + job.cost
                    left = sum(job.cost for job in [*waiting, *running])
                    minutes = left * self._seconds / self._cost / self.workers / 60
                    count = f"{len(jobs) - len(waiting) - len(running)}/{len(jobs)}"
                    self.say(
                        f"[{count}] {job.name} {_outcome(ended)} in {seconds:.0f} s, about {minutes:.0f} min left"
                    )
        finally:
            _end([process for process, _ in running.values()])
        if failed:
            raise UserError(
                f"{len(failed)} of {len(jobs)} {noun} failed, each with a log: {'; '.join(failed)}"
            )

    def _log(self, job: _Job) -> Path:
        return self.out / "logs" / f"{job.name}.log"


def _outcome(process: BaseProcess) -> str:
    code = process.exitcode or 0
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"failed with exit code {code}" if code else "done"


def _end(processes: Sequence[BaseProcess]) -> None:
    """Tell runs to end after their step, with a checkpoint, and wait for that. A second interrupt ends them at once."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        raise
