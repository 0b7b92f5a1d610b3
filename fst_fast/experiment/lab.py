"""Make runs, several at a time, each in a process of its own; what is already made is not made again.

A run is an ordinary run folder under OUT/runs, made by `fst train` with one thread (worker.py). One that was interrupted goes on from its
checkpoint; one whose configuration is another than asked for is refused by name. Where runs fail the others go on, and the error at the
end names the log of each. A finished run can be evaluated on another split of its task, by `fst eval`, into OUT/evaluations.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fst_fast.config import load as config_load
from fst_fast.errors import UserError
from fst_fast.experiment.runs import Budget, Run
from fst_fast.experiment.worker import COMMAND, Worker
from fst_fast.run.folder import MARKER

_POLL_S = 0.2
_COST = {"fst": 3.0, "rl": 1.0, "gepa": 1.0}
"""Of a step, relative, for the estimate of the time left; measured roughly (docs/experiments.md)."""
_EVALUATION = 10.0
"""Of an evaluation, in the same units."""


@dataclass(frozen=True, eq=False)
class _Job:
    """Words of `fst`, one command after the other, whose output goes to `log`."""

    name: str
    commands: list[list[str]]
    log: Path
    cost: float


@dataclass
class Lab:
    """out: the suite's folder. workers: runs at a time. dry: say what would be run, run nothing."""

    out: Path
    budget: Budget
    families: Sequence[str]
    workers: int
    dry: bool = False
    say: Callable[[str], None] = print
    command: Sequence[str] = COMMAND  # of the processes that train and export
    planned: list[Run] = field(default_factory=list)
    _spent: float = 0.0  # seconds of finished runs
    _units: float = 0.0  # their cost

    @property
    def seeds(self) -> range:
        return range(self.budget.seeds)

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name

    def model(self, run: Run) -> Path | None:
        """The weights that the run begins with, None: those of its configuration."""
        return self.out / "models" / run.after.name if run.after else None

    def make(self, runs: Sequence[Run]) -> None:
        """Make all of them. Raises UserError where some failed, or where a folder holds another run."""
        wanted = list(
            dict.fromkeys(runs)
        )  # the runs that others start from must be made before, by an earlier call
        self.planned += [run for run in wanted if run not in self.planned]
        if self.dry:
            return
        self._work(
            [
                _Job(run.name, self._commands(run), self._log(run.name), self._cost(run))
                for run in wanted
                if not self._is_made(run)
            ],
            "runs",
        )

    def evaluate(self, runs: Sequence[Run], split: str) -> None:
        """Measure the four cells of finished runs on a split. Raises UserError where one failed."""
        if self.dry:
            return
        (self.out / "evaluations").mkdir(parents=True, exist_ok=True)
        jobs = []
        for run in dict.fromkeys(runs):
            out, ended = self._evaluation(run, split), self.folder(run) / "summary.json"
            if out.is_file() and out.stat().st_mtime_ns >= ended.stat().st_mtime_ns:
                continue
            words = ["eval", str(self.folder(run)), "--split", split, "--out", str(out)]
            name = f"{run.name}-{split}"
            jobs.append(_Job(name, [words], self._log(name), _EVALUATION))
        self._work(jobs, "evaluations")

    def evaluated(self, run: Run, split: str) -> dict[str, Any]:
        """What `evaluate` found: as `fst eval --out` writes it."""
        found: dict[str, Any] = json.loads(self._evaluation(run, split).read_text())
        return found

    def _evaluation(self, run: Run, split: str) -> Path:
        return self.out / "evaluations" / f"{run.name}-{split}.json"

    def _work(self, jobs: list[_Job], what: str) -> None:
        jobs = sorted(
            jobs, key=lambda job: -job.cost
        )  # the longest first, so that the last ones end together
        waiting, failed = list(jobs), []
        working: dict[_Job, tuple[Worker, float]] = {}
        workers: list[Worker] = []
        try:
            for i in range(min(self.workers, len(jobs))):
                workers.append(Worker(self.command, self.out / "logs" / f"worker-{i}.log"))
            idle = list(workers)
            while waiting or working:
                while waiting and idle:
                    job, worker = waiting.pop(0), idle.pop()
                    working[job] = (worker, time.monotonic())
                    worker.start(job.commands, job.log)
                time.sleep(_POLL_S)
                for job, (worker, began) in list(working.items()):
                    code = worker.poll()
                    if code is None:
                        continue
                    del working[job]
                    idle.append(worker)
                    seconds = time.monotonic() - began
                    self._spent += seconds
                    self._units += job.cost
                    if code:
                        failed.append(job)
                    cost = sum(job.cost for job in [*waiting, *working])
                    left = cost * self._spent / self._units / self.workers
                    done = len(jobs) - len(waiting) - len(working)
                    self.say(
                        f"[{done}/{len(jobs)}] {job.name} {'failed' if code else 'done'} in {seconds:.0f} s, "
                        f"about {left / 60:.0f} min left"
                    )
        finally:
            for worker in workers:
                worker.stop()
        if failed:
            logs = ", ".join(str(job.log) for job in failed)
            raise UserError(f"{len(failed)} of {len(jobs)} {what} failed; what they said is in {logs}")

    def _cost(self, run: Run) -> float:
        return _COST[run.method] * float(str(dict(run.changes).get("slow.steps", self.budget.steps)))

    def _is_made(self, run: Run) -> bool:
        folder = self.folder(run)
        if not (folder / MARKER).is_file():
            return False
        asked = config_load.dump(run.config(self.budget, self.model(run)))
        if (folder / "config.yaml").read_text() != asked:
            raise UserError(
                f"{folder} was made with another configuration than this suite asks for; give another --out, or remove the folder"
            )
        return (folder / "summary.json").is_file()

    def _commands(self, run: Run) -> list[list[str]]:
        """What makes the run, as words of `fst`."""
        folder, model = self.folder(run), self.model(run)
        commands = []
        if model and not model.is_dir():
            assert run.after
            commands.append(["export", str(self.folder(run.after)), str(model)])
        resume = ["--resume"] if (folder / MARKER).is_file() else []
        words = ["train", str(run.config_file()), "--run-dir", str(folder), *resume]
        return [*commands, [*words, *run.overrides(self.budget, model)]]

    def _log(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.log"
